"""One limiter for two engines: one limit, one line, and neither ever waits for the other's thread or loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
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
from resilientdb.engine.control import cluster_of
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

    from resilientdb.runtime.context import Criticality
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


@pytest.fixture(autouse=True)
def _own_limiters(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left over from a test that failed."""
    monkeypatch.setattr(shared, "_limiters", weakref.WeakValueDictionary())


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
        result: T = self.start(work).result(30)
        return result

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


def until_waiting(pool: QueueDoor, number: int) -> None:
    until(lambda: pool.stats().waiting == number, f"{number} waiting")


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


@pytest.mark.filterwarnings("ignore:The garbage collector is trying:sqlalchemy.exc.SAWarning")
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
        wrong.extend(
            seen
            for seen in (one.stats(), other.stats())
            if seen.total != seen.active + seen.idle or min(seen.active, seen.idle, seen.waiting) < 0
        )

    running = [in_thread(functools.partial(work, seed * 100 + number)) for number in range(6)]
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
    try:
        for future in running:
            future.result(60)
    finally:
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


# -- neither waits for the other's thread or loop ---------------------------------------------------------------


def test_a_blocked_loop_holds_up_no_thread(make: Makers, loop: LoopThread) -> None:
    """The loop sleeps, as it should not, while threads hand a slot on among themselves."""
    one, other = make.threads(1), make.tasks(1)
    loop.run(give_back_one(other))
    held = one.connect()
    waiter = in_thread(one.connect)
    until(lambda: one.stats().waiting == 1)
    asleep, wake = threading.Event(), threading.Event()

    def block() -> None:
        asleep.set()
        wake.wait(20)

    loop.loop.call_soon_threadsafe(block)
    assert asleep.wait(10)
    held.close()
    waiter.result(10).close()
    wake.set()
    assert_whole(one, other, loop, 1)


async def give_back_one(pool: TaskPool) -> None:
    await give(await pool.take())


def test_a_waiting_thread_holds_up_no_loop(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(2), make.tasks(2)
    held = [one.connect(), loop.run(other.take())]
    waiter = in_thread(one.connect)
    until(lambda: one.stats().waiting == 1)

    async def tick() -> int:
        for _ in range(100):
            await asyncio.sleep(0)
        return 100

    assert loop.run(tick()) == 100
    loop.run(give(held.pop()))
    waiter.result(10).close()
    held.pop().close()
    assert_whole(one, other, loop, 2)


def test_each_wakes_the_other(make: Makers, loop: LoopThread) -> None:
    """Promptly: by being handed the slot, not by looking again some time."""
    one, other = make.threads(1), make.tasks(1)
    held = one.connect()
    for _ in range(50):
        task = loop.start(other.take())
        until(lambda: other.stats().waiting == 1)
        held.close()
        theirs = task.result(5)
        thread = in_thread(one.connect)
        until(lambda: one.stats().waiting == 1)
        loop.run(give(theirs))
        held = thread.result(5)
    held.close()
    assert (one.stats().timeouts, other.stats().timeouts) == (0, 0)
    assert_whole(one, other, loop, 1)


def test_a_loop_that_is_closed_with_a_task_in_line(make: Makers, loop: LoopThread) -> None:
    """What its task would have been given goes to the next, by the thread that gave it back."""
    one, other = make.threads(1), make.tasks(1)
    held = one.connect()
    gone = make.tasks(1)
    dead = asyncio.new_event_loop()
    task = dead.create_task(gone.take())
    dead.call_later(0.05, dead.stop)
    dead.run_forever()
    assert gone.stats().waiting == 1
    dead.close()
    waiter = in_thread(one.connect)
    until(lambda: one.stats().waiting == 2)
    held.close()
    waiter.result(10).close()
    with contextlib.suppress(asyncio.CancelledError, RuntimeError):
        task.get_coro().close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert_whole(one, other, loop, 1)


def test_a_slot_given_to_a_task_that_is_cancelled_at_that_moment(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(1), make.tasks(1)

    async def main() -> None:
        for _ in range(20):
            held = await asyncio.to_thread(one.connect)
            task = asyncio.create_task(other.take())
            while not other.stats().waiting:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.to_thread(held.close)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await give(await task)

    loop.run(main())
    assert_whole(one, other, loop, 1)


# -- one line ---------------------------------------------------------------------------------------------------


def queue_up(
    one: QueueDoor, other: TaskPool, loop: LoopThread, classes: list[Criticality]
) -> tuple[list[int], list[Any]]:
    """Threads and tasks by turns, one after the other; the order in which they were served, and they themselves."""
    order: list[int] = []

    def thread(number: int, criticality: Criticality) -> None:
        with rdb.criticality(criticality):
            connection = one.connect()
        order.append(number)
        connection.close()

    async def task(number: int, criticality: Criticality) -> None:
        with rdb.criticality(criticality):
            connection = await other.take()
        order.append(number)
        await give(connection)

    running: list[Any] = []
    for number, criticality in enumerate(classes):
        if number % 2:
            running.append(loop.start(task(number, criticality)))
        else:
            running.append(in_thread(functools.partial(thread, number, criticality)))
        until_waiting(one, number + 1)
    return order, running


def test_first_come_first_served(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(1), make.tasks(1)
    held = one.connect()
    order, running = queue_up(one, other, loop, ["critical"] * 8)
    assert one.stats().waiting == other.stats().waiting == 8
    held.close()
    for future in running:
        future.result(10)
    assert order == list(range(8))
    assert_whole(one, other, loop, 1)


def test_the_more_critical_goes_first_in_whichever_engine(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(1), make.tasks(1)
    held = one.connect()
    classes: list[Criticality] = [
        "sheddable", "sheddable", "critical", "critical", "critical_plus", "critical_plus",
    ]  # fmt: skip
    order, running = queue_up(one, other, loop, classes)
    held.close()
    for future in running:
        future.result(10)
    assert order == [4, 5, 2, 3, 0, 1]


def test_max_waiting_is_of_both(make: Makers, loop: LoopThread) -> None:
    options = {"resilience": policy(max_waiting=2)}
    one, other = make.threads(1, **options), make.tasks(1, **options)
    held = one.connect()
    _, running = queue_up(one, other, loop, ["critical"] * 2)
    with pytest.raises(PoolSaturated, match="1 in use by all who share the limiter 'app'"):
        loop.run(other.take())
    with pytest.raises(PoolSaturated, match="all places to wait are taken"):
        by_another(one.connect)
    held.close()
    for future in running:
        future.result(10)


def test_who_makes_room_is_counted_where_it_waited(make: Makers, loop: LoopThread) -> None:
    options = {"resilience": policy(max_waiting=2)}
    one, other = make.threads(1, **options), make.tasks(1, **options)
    held = one.connect()

    async def dispensable() -> None:
        with rdb.criticality("sheddable_plus"):
            await give(await other.take())

    sheddable = loop.start(dispensable())
    until(lambda: one.stats().waiting == 1)
    running = []
    for _ in range(2):
        running.append(in_thread(lambda: one.connect().close()))
        until(lambda: one.stats().waited == len(running))
    with pytest.raises(PoolSaturated) as caught:
        sheddable.result(10)
    assert caught.value.reason == "pool-displaced"
    assert (one.stats().rejected, other.stats().rejected) == (0, 1)
    assert other.stats().refused["pool-displaced"] == 1
    held.close()
    for future in running:
        future.result(10)
    assert_whole(one, other, loop, 1)


# -- who waits for itself ---------------------------------------------------------------------------------------


def test_a_thread_that_holds_one_of_another_engine(make: Makers, loop: LoopThread) -> None:
    """Two engines of one limiter: together they are one pool to whoever takes of both."""
    one, other, tasks = make.threads(1), make.threads(1), make.tasks(1)
    held = one.connect()
    with pytest.raises(PoolTimeout, match=r"holds a connection of db already.*MainThread") as caught:
        other.connect()
    assert caught.value.reason == "pool-nested"
    held.close()
    assert_whole(other, tasks, loop, 1)


def test_a_task_that_holds_one_and_asks_the_engine_of_threads(make: Makers, loop: LoopThread) -> None:
    """It stops its loop while it waits, and with it itself, who holds what it waits for."""
    one, other = make.threads(1), make.tasks(1)

    async def main() -> None:
        held = await other.take()
        with pytest.raises(PoolTimeout, match=r"holds a connection of db already.*task") as caught:
            one.connect()
        assert caught.value.reason == "pool-nested"
        await give(held)

    loop.run(main())
    assert_whole(one, other, loop, 1)


def test_a_task_that_holds_one_of_the_engine_of_threads(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(1), make.tasks(1)

    async def main() -> None:
        held = one.connect()
        with pytest.raises(PoolTimeout, match=r"holds a connection of db already.*thread") as caught:
            await other.take()
        assert caught.value.reason == "pool-nested"
        held.close()

    loop.run(main())
    assert_whole(one, other, loop, 1)


def test_who_was_started_by_one_that_holds_does_not_hold(make: Makers, loop: LoopThread) -> None:
    """A thread, or a task, of the same flow of work may wait: who started it is free to go on."""
    one, other = make.threads(2), make.tasks(2)

    async def main() -> None:
        held = [await other.take(), one.connect()]
        thread = asyncio.create_task(asyncio.to_thread(one.connect))
        task = asyncio.create_task(other.take())
        while one.stats().waiting < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert one.stats().waiting_by_criticality["holding"] == 0
        await give(held.pop(0))
        held.pop().close()
        await give(await task)
        await asyncio.to_thread((await thread).close)

    loop.run(main())
    assert_whole(one, other, loop, 2)


def test_who_holds_one_goes_first(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(2), make.threads(2)
    tasks = make.tasks(2)
    held, theirs = one.connect(), by_another(one.connect)
    task = loop.start(tasks.take())
    until(lambda: one.stats().waiting == 1)
    threading.Timer(0.05, theirs.close).start()
    other.connect().close()
    loop.run(give(task.result(10)))
    held.close()
    assert_whole(one, tasks, loop, 2)


# -- what can be seen -------------------------------------------------------------------------------------------


def test_counts(make: Makers, loop: LoopThread) -> None:
    """Connections are each pool's own; the line and the limit are common."""
    one, other = make.threads(3), make.tasks(3)
    mine = [one.connect() for _ in range(2)]
    theirs = loop.run(other.take())
    waiting = loop.start(other.take())
    until(lambda: other.stats().waiting == 1)

    def seen(pool: QueueDoor) -> tuple[int | None, ...]:
        stats = pool.stats()
        return stats.total, stats.active, stats.idle, stats.waiting, stats.limit

    assert seen(one) == (2, 2, 0, 1, 3)
    assert seen(other) == (1, 1, 0, 1, 3)
    assert (one.checkedout(), one.checkedin(), one.overflow()) == (2, 0, -1)
    assert (one.load, other.load) == (2, 2), "who waits is a load where it waits"
    mine.pop().close()
    loop.run(give(waiting.result(10)))
    assert seen(one) == (2, 1, 1, 0, 3)
    assert seen(other) == (2, 1, 1, 0, 3)
    assert one.node.stats().pool == one.stats()
    loop.run(give(theirs))
    mine.pop().close()
    assert (one.stats().waited, other.stats().waited) == (0, 1)
    assert_whole(one, other, loop, 3)


def test_draining_one_does_not_wait_for_the_line_of_the_other(tmp_path: Path, loop: LoopThread) -> None:
    url, options = f"{tmp_path}/drain.db", {"pool_size": 1, "max_overflow": 0, "resilience": policy()}
    one = rdb.create_engine(f"sqlite:///{url}", **options)  # type: ignore[arg-type]
    other = rdb.create_async_engine(f"sqlite+aiosqlite:///{url}", **options)  # type: ignore[arg-type]

    async def main() -> None:
        async with other.connect():
            waiting = asyncio.create_task(other.connect().start(), context=contextvars.Context())
            while not rdb.control(other).snapshot().nodes[0].pool.waiting:  # type: ignore[union-attr]  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert await asyncio.to_thread(rdb.control(one).drain, 20.0) is True
            assert not waiting.done(), "the other engine's callers are none of its business"
        await (await waiting).close()
        with pytest.raises(PoolDraining):
            one.connect()
        await other.dispose()

    began = time.monotonic()
    loop.run(main())
    assert time.monotonic() - began < 10


# -- circuits, failing connects ---------------------------------------------------------------------------------


def test_a_circuit_that_opens_sends_its_own_away(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(1), make.tasks(1)
    held = one.connect()
    thread, task = in_thread(one.connect), loop.start(other.take())
    until(lambda: one.stats().waiting == 2)
    one.node.breaker.open()
    with pytest.raises(CircuitOpen):
        thread.result(10)
    assert other.stats().waiting == 1
    held.close()
    loop.run(give(task.result(10)))
    one.node.breaker.close()
    assert_whole(one, other, loop, 1)


def test_a_failing_connect_is_told_to_its_own(make: Makers, loop: LoopThread) -> None:
    """Nobody holds a connection that those could wait for; the other engine's have nothing to do with it."""
    one, other = make.threads(2), make.tasks(2)
    first = loop.run(other.take())
    gate = threading.Event()

    def refuse(_record: Any) -> Any:
        assert gate.wait(20)
        raise ConnectionRefusedError("connection refused")

    one._open_physical = refuse
    opening = in_thread(one.connect)
    until(lambda: one.stats().active == 1)
    thread, task = in_thread(one.connect), loop.start(other.take())
    until(lambda: one.stats().waiting == 2)
    gate.set()
    for future in (opening, thread):
        with pytest.raises(ConnectionRefusedError):
            future.result(10)
    loop.run(give(task.result(10)))
    loop.run(give(first))
    one._open_physical = lambda _record: make.database.connect()
    assert_whole(one, other, loop, 2)


# -- contradictions, names, lifetimes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "queue", "message"),
    [
        (3, {}, {}, r"pool_size \+ max_overflow is 2 in one and 3 in the other$"),
        (2, {"max_overflow": -1}, {}, r"pool_size \+ max_overflow is 2 in one and unlimited in the other$"),
        (2, {}, {"max_waiting": 7}, r"queue\.max_waiting is 50 in one and 7 in the other$"),
        (2, {}, {"target": 0.1}, r"queue\.target is 0\.05 in one and 0\.1 in the other$"),
        (2, {}, {"interval": 2.0}, r"queue\.interval is 1\.0 in one and 2\.0 in the other$"),
        (2, {}, {"sheddable_share": 0.1}, r"queue\.sheddable_share is 0\.25 in one and 0\.1 in the other$"),
    ],
)
def test_engines_that_disagree(
    make: Makers, size: int, options: dict[str, Any], queue: dict[str, Any], message: str
) -> None:
    one = make.threads(2)
    with pytest.raises(
        ConfigurationError, match=rf"the limiter 'app' \(queue\.limiter\).* at db.*{message}"
    ) as caught:
        make.threads(size, resilience=policy(**queue), **options)
    assert (caught.value.key, caught.value.value) == ("queue.limiter", "app")
    assert one.stats().limit == 2


def test_patience_is_of_the_line(tmp_path: Path) -> None:
    """An explicit pool_timeout says that nobody is sent away under overload: that cannot be half true."""
    options: dict[str, Any] = {"resilience": policy()}
    one = rdb.create_engine(f"sqlite:///{tmp_path}/a.db", **options)
    with pytest.raises(
        ConfigurationError, match="an explicit pool_timeout is not given in one and given in the"
    ):
        rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db", pool_timeout=30, **options)
    one.dispose()


def test_names_and_nodes_are_apart(make: Makers, loop: LoopThread) -> None:
    one, tasks = make.threads(1), make.tasks(1)
    apart = [make.threads(2, resilience=policy("reports")), make.threads(2, node="replica"),
             make.threads(2, resilience=policy(None))]  # fmt: skip
    held = one.connect()
    for pool in apart:
        taken = [by_another(pool.connect) for _ in range(2)]
        assert pool.stats().active == 2
        for connection in taken:
            connection.close()
    held.close()
    assert_whole(one, tasks, loop, 1)


def test_replicas_share_node_by_node() -> None:
    """An engine with replicas and one of the first replica alone have that node in common, and no other."""
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 1, "resilience": policy()}
    cluster = rdb.create_engine("postgresql+psycopg://app@a/db", replicas=["b", "c"], **options)
    single = rdb.create_engine("postgresql+psycopg://app@b/db", **options)
    nodes: Any = cluster_of(cluster).nodes
    lines = {node.name: node.pool._admission for node in nodes}
    assert len({id(line) for line in lines.values()}) == 3
    pool: Any = single.pool
    assert pool._admission is lines["b:5432"]
    cluster.dispose()
    single.dispose()


def test_a_limiter_ends_with_its_last_engine(make: Makers) -> None:
    one, other = make.threads(1), make.threads(1)
    alive = weakref.ref(one._slots._limiter)  # type: ignore[attr-defined]
    gc.disable()
    try:
        del one
        with pytest.raises(ConfigurationError):
            make.threads(2)
        del other
        assert make.threads(2).stats().limit == 2, "engines that are gone, collected or not, have no say"
    finally:
        gc.enable()
    assert alive() is None


def test_an_engine_that_is_dropped_leaves_the_limit_as_it_was(make: Makers, loop: LoopThread) -> None:
    """What lay idle in it was in nobody's use."""
    one, other, tasks = make.threads(2), make.threads(2), make.tasks(2)
    held = [other.connect(), other.connect()]
    for connection in held:
        connection.close()
    assert other.stats().idle == 2
    del held, connection, other
    gc.collect()
    assert one._admission.total == 0
    assert_whole(one, tasks, loop, 2)


def test_a_pool_that_is_replaced_keeps_its_part_until_it_comes_back(make: Makers, loop: LoopThread) -> None:
    old, tasks = make.threads(2), make.tasks(2)
    out = old.connect()
    old.connect().close()
    old.dispose()
    new = old.recreate()
    assert new._admission is old._admission
    assert new._admission.total == 1
    tasks._timeout = new._timeout = 0.0
    loop.run(give_back_one(tasks))
    one_more = by_another(new.connect)
    with pytest.raises(PoolTimeout):
        loop.run(tasks.take())
    out.close()
    assert old.stats().total == 0
    loop.run(give_back_one(tasks))
    one_more.close()
    assert_whole(new, tasks, loop, 2)


def test_switched_off(tmp_path: Path) -> None:
    """Plain SQLAlchemy, whatever the name and whatever the sizes."""
    off = rdb.Resilience(enabled=False, queue=rdb.SaturationQueue(limiter="app"))
    engines = [
        rdb.create_engine(f"sqlite:///{tmp_path}/off.db", pool_size=size, max_overflow=0, resilience=off)
        for size in (1, 2)
    ]
    with engines[0].connect(), engines[1].connect(), engines[1].connect():
        assert rdb.control(engines[0]).snapshot().nodes[0].pool is None
    for engine in engines:
        engine.dispose()


def test_a_second_loop_is_told_of_the_first(make: Makers) -> None:
    """Idle connections are enough to belong to a loop; what the other engine has in use is not."""
    one, other = make.threads(2), make.tasks(2)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def lose() -> None:
        connection = await other.take()
        connection.invalidate()
        await give(connection)

    held = one.connect()
    first.run_until_complete(lose())
    second.run_until_complete(give_back_one(other))
    held.close()
    assert (other.stats().idle, other._admission.total) == (1, 0)
    with pytest.raises(ConfigurationError, match="belong to another event loop"):
        first.run_until_complete(give_back_one(other))
    first.close()
    second.close()


# -- after a fork -----------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> str:
    """What ``work()`` returns in a child process, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "?"
        try:
            said = repr(work())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = repr(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        said = answers.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_begins_with_an_empty_limiter(make: Makers, loop: LoopThread, database: FakeDatabase) -> None:
    """Whatever the parent's threads and tasks hold, also in a pool that has been replaced, or wait for."""
    replaced, tasks = make.threads(3), make.tasks(3)
    out = [replaced.connect()]
    replaced.dispose()
    one = replaced.recreate()
    out.append(by_another(one.connect))
    theirs = loop.run(tasks.take())
    waiting = in_thread(one.connect)
    until(lambda: one.stats().waiting == 1)

    def work() -> object:
        seen = [one._admission.total, one.stats().waiting, one.stats().total, tasks.stats().total]
        one._timeout = tasks._timeout = 0.0
        opened = database.open_now
        own = [by_another(one.connect) for _ in range(3)]
        with pytest.raises(PoolTimeout):
            asyncio.run(tasks.take())
        for connection in (*out, *own):
            connection.close()
        return seen, one._admission.total, database.open_now - opened

    assert in_child(work) == "([0, 0, 0, 0], 0, 3)"
    loop.run(give(theirs))
    waiting.result(10).close()
    for connection in out:
        connection.close()
    assert_whole(one, tasks, loop, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_of_a_parent_that_was_making_an_engine(make: Makers) -> None:
    """The lock of the list is not the child's to wait for."""
    one = make.threads(2)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with shared._lock:
            held.set()
            release.wait(20)

    holder = in_thread(hold)
    assert held.wait(10)

    def work() -> object:
        with shared._lock if not shared._lock.locked() else contextlib.nullcontext():
            pass
        return shared._lock.locked(), one.stats().limit

    assert in_child(work) == "(False, 2)"
    release.set()
    holder.result(10)


# -- looking after the connections ------------------------------------------------------------------------------


def test_upkeep_loses_no_slot(resilientdb_postgres: Postgres, loop: LoopThread) -> None:
    """Warm-up, validation, pruning, retirement by age and by uses, a report on leaks: all at once, at work."""
    life = rdb.Lifecycle(
        min_size=2,
        idle_timeout=0.1,
        validate_idle=0.02,
        keepalive=0.05,
        max_age=0.3,
        max_uses=5,
        leak_threshold=0.2,
    )
    options: dict[str, Any] = {
        "pool_size": 3,
        "max_overflow": 1,
        "pool_timeout": 30,
        "resilience": policy(life=life),
    }
    one = rdb.create_engine(resilientdb_postgres.url("psycopg"), **options)
    other = rdb.create_async_engine(resilientdb_postgres.url("asyncpg"), **options)
    gauge = Gauge()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(40):
            with one.connect() as connection, gauge:
                assert connection.scalar(sa.text("SELECT 1")) == 1
            time.sleep(dice.choice([0, 0, 0.03]))

    async def task(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(40):
            async with other.connect() as connection:
                with gauge:
                    assert await connection.scalar(sa.text("SELECT 1")) == 1
            await asyncio.sleep(dice.choice([0, 0, 0.03]))

    running: list[Any] = [in_thread(functools.partial(work, seed)) for seed in range(5)]
    running += [loop.start(task(seed)) for seed in range(5)]
    for future in running:
        future.result(60)
    assert 1 < gauge.most <= 4
    pools: Any = (one.pool, other.sync_engine.pool)
    retired = {why for pool in pools for why in pool.stats().retired}
    assert "max_uses" in retired or "uses" in retired, retired
    until(lambda: all(pool.stats().total >= 2 for pool in pools), "warm again")
    until(lambda: pools[0]._admission.total == 0, "nothing in use")
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(one.connect())
        pools[1]._timeout = 0.0
        with pytest.raises(PoolTimeout):
            loop.run(other.connect().start())
    one.dispose()
    loop.run(other.dispose())
    assert pools[0]._admission.total == 0


def test_a_warm_up_takes_what_there_is(resilientdb_postgres: Postgres, loop: LoopThread) -> None:
    """A limit that the other engine uses up is not gone round; and nobody is kept busy by asking."""
    life = rdb.Lifecycle(min_size=2)
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "resilience": policy(life=life)}
    one = rdb.create_engine(resilientdb_postgres.url("psycopg"), **options)
    other = rdb.create_async_engine(resilientdb_postgres.url("asyncpg"), **options)
    pools: Any = (one.pool, other.sync_engine.pool)

    async def main() -> None:
        held = [await other.connect() for _ in range(2)]
        rdb.control(one).warm()
        assert pools[0].stats().total == 0
        began = time.thread_time()
        busy = time.process_time()
        pools[0]._upkeep.used()
        await asyncio.sleep(0.3)
        assert time.process_time() - busy < 0.2 + (time.thread_time() - began)
        for connection in held:
            await connection.close()

    loop.run(main())
    rdb.control(one).warm()
    assert pools[0].stats().idle == 2
    assert pools[0]._admission.total == 0
    one.dispose()
    loop.run(other.dispose())
