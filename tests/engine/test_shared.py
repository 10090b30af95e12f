"""One limiter for two engines: one limit, one line, and neither ever waits for the other's thread or loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import os
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

import resilientdb as rdb
from resilientdb.engine import shared
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.pool import AsyncQueueDoor, QueueDoor
from resilientdb.errors import (
    CircuitOpen,
    ConfigurationError,
    DeadlineExceeded,
    PoolDraining,
    PoolSaturated,
    PoolTimeout,
)
from tests.engine.conftest import by_another

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from resilientdb.testing import Postgres
    from tests.engine.conftest import FakeDatabase

T = TypeVar("T")

REFUSALS = (PoolTimeout, PoolSaturated, DeadlineExceeded, CircuitOpen, ConnectionRefusedError)


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

    def _options(self, dialect: Any, resilience: rdb.Resilience | None, given: dict[str, Any]) -> dict[str, Any]:
        cluster = Cluster(resilience or policy(), dialect, [(given.pop("node", "db"), "unknown", None)])
        return {
            "max_overflow": 0,
            "timeout": 10.0,
            "dialect": dialect,
            "resilientdb_cluster": cluster,
            **given,
        }


@pytest.fixture
def make(database: FakeDatabase) -> Makers:
    return Makers(database)


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.start(work).result(30)

    def start(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def until(condition: Callable[[], bool], what: str = "") -> None:
    """Others reach a state that can be seen but not waited for."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up, f"never: {what}"
        time.sleep(0.001)


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


# -- one limit --------------------------------------------------------------------------------------------------


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


@pytest.fixture
def _hurried() -> Iterator[None]:
    """Threads are switched as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_storm(make: Makers, database: FakeDatabase, loop: LoopThread, seed: int) -> None:
    """Threads and tasks at once: timeouts, deadlines, cancelled tasks, failing connects, connections invalidated,
    detached and forgotten, circuits opening. Never more at work than the limit; nothing lost."""
    limit = 4
    one, other = make.threads(2, max_overflow=2), make.tasks(2, max_overflow=2)
    chance = random.Random(seed)
    plain, gauge = database.connect, Gauge()
    wrong: list[object] = []

    def unreliable() -> Any:
        if chance.random() < 0.1:
            raise ConnectionRefusedError("connection refused")
        return plain()

    database.connect = unreliable  # type: ignore[method-assign]
    one._open_physical = lambda _record: unreliable()

    def spoil(dice: random.Random, connection: Any) -> Any:
        fate = dice.random()
        if fate < 0.1:
            connection.invalidate()
        elif fate < 0.15:
            # No longer the pool's, and no longer counted.
            raw = connection.dbapi_connection
            connection.detach()
            raw.close()
        elif fate < 0.2:
            Cycle(connection)
            return None
        return connection

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(100):
            one._timeout = dice.choice([0.0, 0.001, 5.0])
            connection = None
            with contextlib.suppress(*REFUSALS), rdb.deadline(dice.choice([None, 0.002, 5.0])):
                connection = one.connect()
            if connection is None:
                continue
            with gauge:
                time.sleep(dice.choice([0, 0, 0.0005]))
            connection = spoil(dice, connection)
            if connection is not None:
                connection.close()
            if dice.random() < 0.01:
                one.node.breaker.open()
                one.node.breaker.close()

    async def turn(dice: random.Random) -> None:
        other._timeout = dice.choice([0.0, 0.001, 5.0])
        with rdb.deadline(dice.choice([None, 0.002, 5.0])):
            connection = await other.take()
        try:
            with gauge:
                await asyncio.sleep(dice.choice([0, 0, 0.0005]))
        finally:
            connection = await greenlet_spawn(spoil, dice, connection)
            if connection is not None:
                await give(connection)

    async def tasks(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(100):
            task = asyncio.create_task(turn(dice), context=contextvars.Context())
            if dice.random() < 0.2:
                await asyncio.sleep(dice.choice([0, 0, 0.001]))
                task.cancel()
            with contextlib.suppress(*REFUSALS, asyncio.CancelledError):
                await task
            if dice.random() < 0.01:
                other.node.breaker.open()
                other.node.breaker.close()

    def watch() -> None:
        for seen in (one.stats(), other.stats()):
            if seen.total != seen.active + seen.idle or min(seen.active, seen.idle, seen.waiting) < 0:
                wrong.append(seen)

    running = [in_thread(lambda number=number: work(seed * 100 + number)) for number in range(6)]
    running += [loop.start(tasks(seed * 100 + number)) for number in range(50, 56)]
    while not all(future.done() for future in running):
        watch()
        time.sleep(0.002)
    for future in running:
        future.result(1)
    assert wrong == []
    assert gauge.most <= limit, "more at work than the limit"
    assert gauge.most > 1
    database.connect = plain  # type: ignore[method-assign]
    one._open_physical = lambda _record: plain()
    gc.collect()
    assert_whole(one, other, loop, limit)


def test_engines_on_a_file(tmp_path: Path, loop: LoopThread) -> None:
    """An Engine and an AsyncEngine at work, the one disposed again and again meanwhile."""
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 1, "pool_timeout": 30, "resilience": policy()}
    one = rdb.create_engine(f"sqlite:///{tmp_path}/shared.db", **options)
    other = rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shared.db", **options)
    gauge, finished = Gauge(), threading.Event()

    def work() -> None:
        for _ in range(40):
            with one.connect() as connection, gauge:
                assert connection.scalar(sa.text("SELECT 1")) == 1

    async def task() -> None:
        for _ in range(40):
            async with other.connect() as connection:
                with gauge:
                    assert await connection.scalar(sa.text("SELECT 1")) == 1

    def dispose() -> None:
        while not finished.wait(0.005):
            one.dispose()

    running = [in_thread(work) for _ in range(6)] + [loop.start(task()) for _ in range(6)]
    disposing = in_thread(dispose)
    for future in running:
        future.result(60)
    finished.set()
    disposing.result(10)
    assert 1 < gauge.most <= 3
    pools: Any = (one.pool, other.sync_engine.pool)
    assert [pool._admission is pools[0]._admission for pool in pools] == [True, True]
    assert pools[0]._admission.total == 0

    async def all_of_it() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(other.connect())
            assert rdb.control(other).snapshot().nodes[0].pool.active == 3  # type: ignore[union-attr]

    loop.run(all_of_it())
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(one.connect())
        assert rdb.control(one).snapshot().nodes[0].pool.active == 3  # type: ignore[union-attr]
    one.dispose()
    loop.run(other.dispose())


def test_the_server_never_sees_more_at_work(resilientdb_postgres: Postgres, loop: LoopThread) -> None:
    """psycopg in threads and asyncpg in tasks; the sessions with something to do are the server's own count."""
    options: dict[str, Any] = {
        "pool_size": 3,
        "max_overflow": 0,
        "pool_timeout": 30,
        "resilience": policy(max_waiting=100),
    }
    one = rdb.create_engine(
        resilientdb_postgres.url("psycopg"), connect_args={"application_name": "shared"}, **options
    )
    other = rdb.create_async_engine(
        resilientdb_postgres.url("asyncpg"),
        connect_args={"server_settings": {"application_name": "shared"}},
        **options,
    )
    slowly = sa.text("SELECT pg_sleep(0.01)")

    def work() -> None:
        for turn in range(15):
            with one.connect() as connection:
                connection.execute(slowly)
                if turn % 7 == 3:
                    connection.invalidate()

    async def task() -> None:
        for turn in range(15):
            cut = None if turn % 5 else 0.004
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(cut), other.connect() as connection:
                    await connection.execute(slowly)

    running = [in_thread(work) for _ in range(6)] + [loop.start(task()) for _ in range(6)]
    counts = []
    watcher = sa.create_engine(resilientdb_postgres.url("psycopg"), isolation_level="AUTOCOMMIT")
    with watcher.connect() as connection:
        while not all(future.done() for future in running):
            counts.append(
                connection.scalar(
                    sa.text(
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shared' AND "
                        "state <> 'idle' AND query LIKE '%pg_sleep%'"
                    )
                )
            )
            time.sleep(0.001)
    for future in running:
        future.result(1)
    # A statement whose caller gave up may be at work at the server for as long as it takes, connection or not.
    within = [count for count in counts if count is not None and count <= 3]
    assert max(within) == 3, "they were at work together"
    assert len(within) >= 0.9 * len(counts)
    pools: Any = (one.pool, other.sync_engine.pool)
    until(lambda: pools[0]._admission.total == 0, "everything back")
    watcher.dispose()
    one.dispose()
    loop.run(other.dispose())
