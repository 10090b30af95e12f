"""A database in memory that counts its connections and fails, or waits, on demand; and real pools over it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from resilientdb import Resilience
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.pool import AsyncQueueDoor, QueueDoor
from resilientdb.errors import PoolSaturated, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def by_another(work: Callable[[], T]) -> T:
    """``work()`` in another flow of work, as another request would do it: what it takes is not held by the caller,
    who may then wait for it without waiting for itself."""
    return contextvars.Context().run(work)


async def by_another_task(work: Coroutine[Any, Any, T]) -> T:
    """As ``by_another``, for tasks."""
    return await asyncio.create_task(work, context=contextvars.Context())


def until(condition: Callable[[], bool], what: str = "") -> None:
    """Other threads reach a state that can be seen but not waited for."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up, f"never: {what}"
        time.sleep(0.001)


def until_waiting(pool: QueueDoor, number: int) -> None:
    until(lambda: pool.stats().waiting == number, f"{number} waiting")


class FakeConnection:
    """As much of a DBAPI connection as a pool touches."""

    def __init__(self, database: FakeDatabase, number: int) -> None:
        self.database = database
        self.number = number
        self.is_open = True

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.database.close_one()

    terminate = close


class FakeDatabase:
    """``connect`` is a pool's creator. ``_lock`` guards the counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.opened = 0
        self.open_now = 0
        self.most_open = 0
        self.failures: deque[BaseException] = deque()
        """What the next attempts to connect raise, one each."""
        self.gate: threading.Event | None = None
        """What an attempt to connect waits for before anything else."""
        self.connecting = threading.Semaphore(0)
        """Released by each attempt as it begins to wait for ``gate``."""

    def connect(self) -> FakeConnection:
        gate = self.gate
        if gate is not None:
            self.connecting.release()
            assert gate.wait(20), "nobody opened the gate"
        with self._lock:
            if self.failures:
                raise self.failures.popleft()
            self.opened += 1
            self.open_now += 1
            self.most_open = max(self.most_open, self.open_now)
            return FakeConnection(self, self.opened)

    def close_one(self) -> None:
        with self._lock:
            self.open_now -= 1


def assert_whole(pool: QueueDoor, database: FakeDatabase, size: int) -> None:
    """Every slot is there: the pool can hand out all of them at once, and no more."""
    assert pool.stats().active == 0
    assert pool.stats().waiting == 0
    pool._timeout = 0.0
    held = [by_another(pool.connect) for _ in range(size)]
    with pytest.raises((PoolTimeout, PoolSaturated)):
        pool.connect()
    assert pool.stats().total == pool.stats().active == size
    for connection in held:
        connection.close()
    assert database.most_open <= size


@pytest.fixture
def database() -> FakeDatabase:
    return FakeDatabase()


@pytest.fixture
def make_pool(database: FakeDatabase) -> Callable[..., QueueDoor]:
    """A pool of real threads over ``database``: no overflow, no patience to speak of, and all else as given."""

    def make(size: int, *, resilience: Resilience | None = None, **options: Any) -> QueueDoor:
        dialect = sqlite.dialect()
        cluster = Cluster(resilience or Resilience(), dialect, [("db", "unknown", None)])
        options = {"max_overflow": 0, "timeout": 10.0, **options}
        return QueueDoor(
            database.connect, pool_size=size, dialect=dialect, resilientdb_cluster=cluster, **options
        )

    return make


# -- tasks ----------------------------------------------------------------------------------------------------------


class AsyncPool(AsyncQueueDoor):
    """Connecting takes ``steps`` turns of the event loop, and until ``gate`` is set."""

    def __init__(self, database: FakeDatabase, size: int, **options: Any) -> None:
        self.database = database
        self.steps = 1
        self.gate: asyncio.Event | None = None

        def connect() -> Any:
            for _ in range(self.steps):
                await_only(asyncio.sleep(0))
            if self.gate is not None:
                await_only(self.gate.wait())
            return database.connect()

        options = {"max_overflow": 0, "timeout": 10.0, **options}
        super().__init__(connect, pool_size=size, **options)

    async def take(self) -> Any:
        return await greenlet_spawn(self.connect)

    async def give(self, connection: Any) -> None:
        await greenlet_spawn(connection.close)


@pytest.fixture
def make_async_pool(database: FakeDatabase) -> Callable[..., AsyncPool]:
    def make(size: int, *, resilience: Resilience | None = None, **options: Any) -> AsyncPool:
        dialect = aiosqlite.dialect()
        cluster = Cluster(resilience or Resilience(), dialect, [("db", "unknown", None)])
        return AsyncPool(database, size, dialect=dialect, resilientdb_cluster=cluster, **options)

    return make


async def until_async(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a state that can be seen but not waited for
            await asyncio.sleep(0)


async def assert_whole_async(pool: AsyncPool, size: int) -> None:
    await until_async(lambda: pool.stats().active == 0)
    assert pool.stats().waiting == 0
    pool._timeout = 0.0
    held = [await by_another_task(pool.take()) for _ in range(size)]
    with pytest.raises(PoolTimeout, match="timed out"):
        await pool.take()
    assert pool.stats().total == pool.stats().active == size
    for connection in held:
        await pool.give(connection)
    assert pool.database.most_open <= size
