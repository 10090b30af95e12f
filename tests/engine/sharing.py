"""Pools and engines of one limiter, and threads and loops to use them from."""

from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

import resilientdb as rdb
from resilientdb.engine import shared
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.pool import AsyncQueueDoor, QueueDoor
from resilientdb.errors import ConfigurationError, PoolTimeout
from tests.engine.conftest import until, until_waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from tests.engine.conftest import FakeDatabase

__all__ = [
    "Cycle",
    "Gauge",
    "LoopThread",
    "Makers",
    "TaskPool",
    "assert_whole",
    "give",
    "give_back_one",
    "in_thread",
    "loop",
    "make",
    "own_limiters",
    "policy",
    "until",
    "until_waiting",
]

T = TypeVar("T")


class TaskPool(AsyncQueueDoor):
    """For tasks; connecting takes a turn of the event loop."""

    def __init__(self, database: FakeDatabase, size: int, **options: Any) -> None:
        def connect() -> Any:
            await_only(asyncio.sleep(0))
            return database.connect()

        super().__init__(connect, pool_size=size, **options)

    async def take(self) -> Any:
        return await greenlet_spawn(self.connect)


async def give(connection: Any) -> None:
    await greenlet_spawn(connection.close)


def policy(limiter: str | None = "app", *, life: rdb.Lifecycle | None = None, **queue: Any) -> rdb.Resilience:
    return rdb.Resilience(
        retry=rdb.RetryPolicy(attempts=1),
        lifecycle=life or rdb.Lifecycle(),
        queue=rdb.SaturationQueue(limiter=limiter, **queue),
    )


class Makers:
    """Pools over one database, all of one limiter."""

    def __init__(self, database: FakeDatabase) -> None:
        self.database = database

    def threads(self, size: int, *, resilience: rdb.Resilience | None = None, **options: Any) -> QueueDoor:
        options = self._options(sqlite.dialect(), resilience, options)
        return QueueDoor(self.database.connect, pool_size=size, **options)

    def tasks(self, size: int, *, resilience: rdb.Resilience | None = None, **options: Any) -> TaskPool:
        return TaskPool(self.database, size, **self._options(aiosqlite.dialect(), resilience, options))

    def _options(
        self, dialect: Any, resilience: rdb.Resilience | None, given: dict[str, Any]
    ) -> dict[str, Any]:
        cluster = Cluster(resilience or policy(), dialect, [(given.pop("node", "db"), "unknown", None)])
        return {
            "max_overflow": 0,
            "timeout": 10.0,
            "dialect": dialect,
            "resilientdb_cluster": cluster,
            **given,
        }


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        result: T = self.start(work).result(30)
        return result

    def start(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture(autouse=True)
def own_limiters(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left over from a test that failed."""
    monkeypatch.setattr(shared, "_limiters", weakref.WeakValueDictionary())


@pytest.fixture
def make(database: FakeDatabase) -> Makers:
    return Makers(database)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def in_thread(work: Callable[[], T]) -> Any:
    """``work()`` in a thread of its own; what comes of it is awaited with ``result()``."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def assert_whole(one: QueueDoor, other: TaskPool, loop: LoopThread, limit: int) -> None:
    """Nothing is lost and nothing is there twice: each can have the whole limit, and then the other nothing."""
    until(lambda: one.stats().active == other.stats().active == 0, "everything back")
    assert one.stats().waiting == 0
    assert one._admission.total == 0
    one._timeout = other._timeout = 0.0
    held = [one.connect() for _ in range(limit)]
    assert one.stats().active == limit
    for pool_is_full in (lambda: loop.run(other.take()), one.connect):
        with pytest.raises(PoolTimeout):
            pool_is_full()
    for connection in held:
        connection.close()

    async def theirs() -> None:
        held = [await other.take() for _ in range(limit)]
        for pool_is_full in (lambda: in_thread(one.connect).result(10), lambda: asyncio.run(other.take())):
            with pytest.raises((PoolTimeout, ConfigurationError)):
                await asyncio.to_thread(pool_is_full)
        for connection in held:
            await give(connection)

    loop.run(theirs())
    assert one._admission.total == 0


class Gauge:
    """How many are at work at once, counted by themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, connection: object) -> None:
        self.connection = connection
        self.myself = self


async def give_back_one(pool: TaskPool) -> None:
    await give(await pool.take())
