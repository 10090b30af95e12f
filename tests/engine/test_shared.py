"""One limiter for two engines: one limit, one line, and neither ever waits for the other's thread or loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.util.concurrency import greenlet_spawn

import resilientdb as rdb
from resilientdb.engine.compat import record_of
from resilientdb.errors import (
    CircuitOpen,
    DeadlineExceeded,
    PoolDraining,
    PoolSaturated,
    PoolTimeout,
)
from tests.engine import sharing
from tests.engine.conftest import by_another
from tests.engine.sharing import (
    Cycle,
    Gauge,
    LoopThread,
    Makers,
    TaskPool,
    assert_whole,
    give,
    give_back_one,
    in_thread,
    policy,
    until,
    until_waiting,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.runtime.context import Criticality
    from resilientdb.testing import Postgres
    from tests.engine.conftest import FakeDatabase

REFUSALS = (PoolTimeout, PoolSaturated, DeadlineExceeded, CircuitOpen, ConnectionRefusedError)


own_limiters, make, loop = sharing.own_limiters, sharing.make, sharing.loop


# -- one limit --------------------------------------------------------------------------------------------------


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
    one.opening.physical = lambda _record: unreliable()

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
    one.opening.physical = lambda _record: plain()
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


@pytest.mark.filterwarnings("ignore:The garbage collector is trying:sqlalchemy.exc.SAWarning")
def test_a_forgotten_connection_collected_in_another_thread(make: Makers, loop: LoopThread) -> None:
    """SQLAlchemy looks at its record again after giving it back: in use once more, it would be taken away again."""
    one, other = make.threads(1), make.tasks(1)
    again: list[Any] = []
    sa.event.listen(other, "detach", lambda *_: again.append(loop.run(other.take())))

    async def forget() -> None:
        Cycle(await other.take())

    gc.disable()
    try:
        loop.run(forget())
        in_thread(gc.collect).result(20)
    finally:
        gc.enable()
    assert (other.stats().active, one._admission.total) == (1, 1)
    loop.run(give(again.pop()))
    assert_whole(one, other, loop, 1)


def test_a_collection_while_all_the_pools_are_looked_at(make: Makers) -> None:
    """At each allocation in turn: a pool that is gone leaves the list of those that are being looked through."""
    pools: Any = [make.threads(1) for _ in range(25)]  # more than CPython keeps ready-made tuples for
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    try:
        for allocations in range(12):
            gc.disable()
            make.threads(1)
            gc.set_threshold(gc.get_count()[0] + allocations, *before[1:])
            gc.enable()
            assert len(pools[0]._slots._limiter.pools()) >= 25
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
        gc.enable()


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
        assert record_of(theirs)._pool is other, "a connection of its own engine"
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
        with pytest.raises(PoolTimeout, match=r"holds a connection of db already.*task") as caught:
            await other.take()
        assert caught.value.reason == "pool-nested"
        held.close()

    loop.run(main())
    assert_whole(one, other, loop, 1)


def test_a_task_that_holds_of_both_engines_holds_both(make: Makers, loop: LoopThread) -> None:
    one, other = make.threads(2), make.tasks(2)

    async def main() -> None:
        held = await other.take(), one.connect()
        for ask in (other.take, lambda: asyncio.sleep(0, one.connect())):
            with pytest.raises(PoolTimeout, match=r"already \(.*task Task.*, .*task Task") as caught:
                await ask()
            assert caught.value.reason == "pool-nested"
        await give(held[0])
        held[1].close()

    loop.run(main())
    assert_whole(one, other, loop, 2)


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

    attempts: list[object] = []

    def refuse(record: Any) -> Any:
        attempts.append(record)
        assert gate.wait(20)
        raise ConnectionRefusedError("connection refused")

    one.opening.physical = refuse
    opening = in_thread(one.connect)
    until(lambda: one.stats().active == 1)
    thread, task = in_thread(one.connect), loop.start(other.take())
    until(lambda: one.stats().waiting == 2)
    gate.set()
    for future in (opening, thread):
        with pytest.raises(ConnectionRefusedError):
            future.result(10)
    assert len(attempts) == 1
    loop.run(give(task.result(10)))
    loop.run(give(first))
    one.opening.physical = lambda _record: make.database.connect()
    assert_whole(one, other, loop, 2)
