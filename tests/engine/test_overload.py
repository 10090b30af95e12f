"""Overload on a real pool, with threads and with tasks: who is refused, why, how soon, and that no slot is lost.

The pool's clock is a fake one, so that a line can have stood for seconds without anybody waiting for them.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.util.concurrency import greenlet_spawn

import resilientdb as rdb
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.pool import AsyncQueueDoor
from resilientdb.errors import DeadlineExceeded, PoolSaturated, PoolTimeout
from resilientdb.testing import FakeClock
from tests.engine.conftest import assert_whole, by_another, by_another_task

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.runtime.context import Criticality
    from tests.engine.conftest import FakeDatabase

    MakePool = Callable[..., QueueDoor]
    MakeAsyncPool = Callable[..., AsyncQueueDoor]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    for user in (
        "engine.holders",
        "engine.pool",
        "engine.refusals",
        "engine.slots",
        "runtime.context",
        "runtime.waiters",
    ):
        monkeypatch.setattr(f"resilientdb.{user}.monotonic", clock)
    return clock


def policy(**queue: Any) -> rdb.Resilience:
    return rdb.Resilience(retry=rdb.RetryPolicy(attempts=1), queue=rdb.SaturationQueue(**queue))


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


class Callers:
    """Threads that ask one pool for connections."""

    def __init__(self, pool: QueueDoor, threads: ThreadPoolExecutor) -> None:
        self.pool = pool
        self._threads = threads

    def held(self) -> Any:
        """A connection that is out, by somebody who asks for no more."""
        return by_another(self.pool.connect)

    def connect(self, level: Criticality = "critical", seconds: float | None = None) -> Any:
        with rdb.criticality(level), rdb.deadline(seconds):
            return self.pool.connect()

    def refused(self, level: Criticality = "critical", seconds: float | None = None) -> PoolSaturated:
        with pytest.raises(PoolSaturated) as caught:
            self.connect(level, seconds)
        return caught.value

    def waiting(self, level: Criticality = "critical", seconds: float | None = None) -> Future[Any]:
        """One more in line."""
        joined = self.pool.stats().waited + 1
        future = self._threads.submit(by_another, lambda: self.connect(level, seconds))
        give_up = time.monotonic() + 10
        while self.pool.stats().waited < joined:
            assert time.monotonic() < give_up, "did not join the line"
            time.sleep(0.0001)  # a state that can be seen but not waited for
        return future


def sent_away(future: Future[Any]) -> PoolSaturated:
    error = future.exception(10)
    assert isinstance(error, PoolSaturated)
    return error


@pytest.fixture
def make_callers(make_pool: MakePool, threads: ThreadPoolExecutor) -> Callable[..., Callers]:
    def make(size: int = 1, **queue: Any) -> Callers:
        return Callers(make_pool(size, resilience=policy(**queue), timeout=60.0), threads)

    return make


def test_the_sheddable_are_refused_before_the_critical(
    make_callers: Callable[..., Callers], database: FakeDatabase
) -> None:
    callers = make_callers(max_waiting=4)
    held = callers.held()
    waiting = [callers.waiting("critical")]
    error = callers.refused("sheddable")
    assert error.reason == "pool-saturated"
    assert "all places to wait are taken" in str(error)
    assert "1 active, 0 idle, 1 waiting; limit of size 1 overflow 0, at most 4 waiting" in str(error)
    waiting.append(callers.waiting("critical"))
    assert callers.refused("sheddable_plus").reason == "pool-saturated"
    waiting += [callers.waiting("critical"), callers.waiting("critical")]
    assert callers.pool.stats().rejected == 2
    held.close()
    for future in waiting:
        future.result(10).close()
    assert_whole(callers.pool, database, 1)


def test_the_more_critical_take_the_places_of_the_less_critical(
    make_callers: Callable[..., Callers], database: FakeDatabase, clock: FakeClock
) -> None:
    callers = make_callers(max_waiting=2)
    held = callers.held()
    displaced = callers.waiting("sheddable_plus")
    first = callers.waiting("critical")
    clock.advance(0.1)
    second = callers.waiting("critical_plus")
    error = sent_away(displaced)  # while the only connection is still held
    assert error.reason == "pool-displaced"
    assert "after 0.10 s in line" in str(error)
    assert "1 active, 0 idle, 2 waiting" in str(error)
    assert callers.refused("critical").reason == "pool-saturated"
    held.close()
    second.result(10).close()
    first.result(10).close()
    assert_whole(callers.pool, database, 1)


def test_who_would_be_late_is_refused_on_arrival(
    make_callers: Callable[..., Callers], database: FakeDatabase, clock: FakeClock
) -> None:
    callers = make_callers(interval=1000.0)
    held = callers.held()
    waiting = [callers.waiting() for _ in range(4)]
    for future in waiting[:2]:
        clock.advance(1.0)
        held.close()
        held = future.result(10)
    error = callers.refused(seconds=2.5)  # one place a second, and two wait already
    assert error.reason == "pool-would-be-late"
    assert error.retry_after == pytest.approx(3.0)
    assert error.snapshot is not None
    assert error.snapshot.pool is not None
    assert error.snapshot.pool.waiting == 2
    assert "the wait would be longer than this caller may wait" in str(error)
    waiting.append(callers.waiting("critical_plus", seconds=2.5))  # ahead of the two
    held.close()
    for future in (waiting[4], *waiting[2:4]):
        future.result(10).close()
    assert_whole(callers.pool, database, 1)


def test_the_first_in_line_is_let_in_whatever_the_last_ones_waited(
    make_callers: Callable[..., Callers], database: FakeDatabase, clock: FakeClock
) -> None:
    callers = make_callers()
    held = callers.held()
    waiting = callers.waiting()
    clock.advance(60.0)
    held.close()
    held = waiting.result(10)
    waiting = callers.waiting(seconds=20.0)
    assert callers.refused(seconds=20.0).reason == "pool-would-be-late"
    held.close()
    waiting.result(10).close()
    assert_whole(callers.pool, database, 1)


def test_a_time_in_which_nobody_waited_is_no_reason_for_a_long_retry_after(
    make_callers: Callable[..., Callers], clock: FakeClock
) -> None:
    callers = make_callers()
    held = callers.held()
    waiting = callers.waiting()
    clock.advance(0.01)
    held.close()
    held = waiting.result(10)
    clock.advance(7200.0)
    with pytest.raises(DeadlineExceeded) as caught:
        callers.connect(seconds=0)
    assert caught.value.retry_after == pytest.approx(0.01)
    held.close()


def test_under_overload_the_newest_is_served_and_the_late_are_told_at_once(
    make_callers: Callable[..., Callers], database: FakeDatabase, clock: FakeClock
) -> None:
    callers = make_callers()
    held = callers.held()
    first, *late, newest = (callers.waiting() for _ in range(5))
    clock.advance(0.5)
    held.close()
    held = first.result(10)  # first come, first served: it may be a burst
    clock.advance(1.0)
    held.close()
    held = newest.result(10)  # a second later the line still stands
    fresh = callers.waiting()
    held.close()
    held = fresh.result(10)
    errors = [sent_away(future) for future in late]  # while the only connection is still held
    assert len({id(error) for error in errors}) == 3, "an exception belongs to one thread"
    for error in errors:
        assert error.reason == "pool-shed"
        assert "overloaded" in str(error)
        assert "after 1.50 s in line" in str(error)
        assert error.retry_after is not None
    assert callers.pool.stats().rejected == 3
    held.close()
    assert_whole(callers.pool, database, 1)


def test_who_has_no_time_left_to_use_a_connection_makes_way(
    make_callers: Callable[..., Callers], database: FakeDatabase, clock: FakeClock
) -> None:
    callers = make_callers()
    held = callers.held()
    late, patient = callers.waiting(seconds=30.0), callers.waiting()
    clock.advance(31.0)
    held.close()
    patient.result(10).close()
    assert sent_away(late).reason == "pool-shed"
    assert_whole(callers.pool, database, 1)


def test_a_lost_connection_sheds_and_hands_its_slot_on(
    make_callers: Callable[..., Callers], database: FakeDatabase, clock: FakeClock
) -> None:
    callers = make_callers()
    held = callers.held()
    late, patient = callers.waiting(seconds=30.0), callers.waiting()
    clock.advance(31.0)
    held.invalidate()
    held.close()
    patient.result(10).close()
    assert sent_away(late).reason == "pool-shed"
    assert database.opened == 2
    assert_whole(callers.pool, database, 1)


def test_always_overloaded_threads_lose_no_slot(make_pool: MakePool, database: FakeDatabase) -> None:
    """Every line is overloaded as soon as it stands, so that hand-off, shedding, displacement and time-outs race."""
    queue = rdb.SaturationQueue(max_waiting=6, target=1e-6, interval=1e-6)
    pool = make_pool(
        2, resilience=rdb.Resilience(retry=rdb.RetryPolicy(attempts=1), queue=queue), timeout=0.05
    )
    levels: tuple[Criticality, ...] = ("critical_plus", "critical", "sheddable_plus", "sheddable")
    start = threading.Barrier(12)
    reasons: set[str] = set()

    def work(seed: int) -> int:
        chance, served = random.Random(seed), 0
        start.wait(10)
        for _ in range(150):
            with rdb.criticality(chance.choice(levels)), rdb.deadline(chance.choice([None, 0.001, 1.0])):
                try:
                    connection = pool.connect()
                except (PoolSaturated, PoolTimeout, DeadlineExceeded) as refusal:
                    reasons.add(refusal.reason)
                    continue
            served += 1
            if chance.random() < 0.1:
                connection.invalidate()
            connection.close()
        return served

    with ThreadPoolExecutor(12) as threads:
        served = sum(threads.map(work, range(12)))
    assert served > 0
    assert "pool-shed" in reasons
    assert_whole(pool, database, 2)


# -- tasks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_async_pool(database: FakeDatabase) -> MakeAsyncPool:
    def make(size: int = 1, **queue: Any) -> AsyncQueueDoor:
        dialect = aiosqlite.dialect()
        cluster = Cluster(policy(**queue), dialect, [("db", "unknown", None)])
        return AsyncQueueDoor(
            database.connect,
            pool_size=size,
            max_overflow=0,
            timeout=60.0,
            dialect=dialect,
            resilientdb_cluster=cluster,
        )

    return make


async def take(pool: AsyncQueueDoor, level: Criticality = "critical", seconds: float | None = None) -> Any:
    with rdb.criticality(level), rdb.deadline(seconds):
        return await greenlet_spawn(pool.connect)


async def queue_up(
    pool: AsyncQueueDoor, level: Criticality = "critical", seconds: float | None = None
) -> asyncio.Task[Any]:
    joined = pool.stats().waited + 1
    task = asyncio.create_task(take(pool, level, seconds))
    async with asyncio.timeout(10):
        while pool.stats().waited < joined:  # noqa: ASYNC110 - a state that can be seen but not waited for
            await asyncio.sleep(0)
    return task


async def give(connection: Any) -> None:
    await greenlet_spawn(connection.close)


async def reason(task: asyncio.Task[Any]) -> str:
    with pytest.raises(PoolSaturated) as caught:
        async with asyncio.timeout(10):
            await task
    return caught.value.reason


async def assert_whole_async(pool: AsyncQueueDoor, size: int) -> None:
    assert (pool.stats().active, pool.stats().waiting) == (0, 0)
    pool._timeout = 0.0
    held = [await by_another_task(take(pool)) for _ in range(size)]
    with pytest.raises(PoolTimeout, match="timed out"):
        await take(pool)
    for connection in held:
        await give(connection)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


@pytest.mark.usefixtures("clock")
def test_tasks_have_shares_and_make_room(make_async_pool: MakeAsyncPool) -> None:
    async def main() -> None:
        pool = make_async_pool(max_waiting=4)
        held = await by_another_task(take(pool))
        sheddable = await queue_up(pool, "sheddable")
        with pytest.raises(PoolSaturated, match="1 active, 0 idle, 1 waiting") as caught:
            await take(pool, "sheddable")
        assert caught.value.reason == "pool-saturated"
        critical = [await queue_up(pool) for _ in range(4)]
        assert await reason(sheddable) == "pool-displaced"
        await give(held)
        for task in critical:
            await give(await task)
        await assert_whole_async(pool, 1)

    run(main())


def test_tasks_are_shed_at_once_and_refused_if_they_would_be_late(
    make_async_pool: MakeAsyncPool, clock: FakeClock
) -> None:
    async def main() -> None:
        pool = make_async_pool()
        held = await by_another_task(take(pool))
        first, *late, newest = [await queue_up(pool) for _ in range(5)]
        for task, seconds in ((first, 0.5), (newest, 1.0)):
            clock.advance(seconds)
            await give(held)
            held = await task
        with pytest.raises(PoolSaturated) as caught:
            await take(pool, "sheddable", seconds=1.0)  # three wait before it, one is served each half second
        assert caught.value.reason == "pool-would-be-late"
        fresh = await queue_up(pool)
        await give(held)
        held = await fresh
        assert [await reason(task) for task in late] == ["pool-shed"] * 3
        await give(held)
        await assert_whole_async(pool, 1)

    run(main())


def test_a_task_cancelled_as_it_is_sent_away_changes_nothing(
    make_async_pool: MakeAsyncPool, clock: FakeClock
) -> None:
    async def main() -> None:
        pool = make_async_pool()
        held = await by_another_task(take(pool))
        late, patient = await queue_up(pool, seconds=30.0), await queue_up(pool)
        clock.advance(31.0)
        await give(held)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        await give(await patient)
        await assert_whole_async(pool, 1)

    run(main())
