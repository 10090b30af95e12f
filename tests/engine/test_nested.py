"""Who holds a connection already and asks for another: served first, and told at once when it waits for itself."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncSession

import resilientdb as rdb
from resilientdb.errors import DeadlineExceeded, PoolTimeout
from resilientdb.runtime.context import recording
from resilientdb.testing import FakeClock
from tests.engine.conftest import assert_whole, by_another, by_another_task, until, until_async, until_waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.runtime.context import Criticality
    from tests.engine.conftest import FakeDatabase

    MakePool = Callable[..., QueueDoor]
    MakeThread = Callable[[str], ThreadPoolExecutor]
    MakeAsyncEngine = Callable[..., contextlib.AbstractAsyncContextManager[AsyncEngine]]


@pytest.fixture
def make_thread() -> Iterator[MakeThread]:
    """Each is one thread, and one flow of work: it does what it is given, one thing after the other."""
    with contextlib.ExitStack() as threads:
        yield lambda name: threads.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))


def in_lane(pool: QueueDoor, lane: str) -> int:
    return pool.stats().waiting_by_criticality.get(lane, 0)


def until_in_lane(pool: QueueDoor, lane: str, number: int) -> None:
    until(lambda: in_lane(pool, lane) == number, f"{number} waiting in the lane {lane}")


def refused(future: Future[Any]) -> PoolTimeout:
    error = future.exception(10)
    assert isinstance(error, PoolTimeout)
    assert error.reason == "pool-nested"
    return error


# -- threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [0, 2])
def test_who_holds_all_there_is_is_told_at_once(
    make_pool: MakePool, database: FakeDatabase, overflow: int
) -> None:
    """SQLAlchemy lets it wait for its whole ``pool_timeout``, or for ever."""
    pool = make_pool(1, max_overflow=overflow, timeout=None)
    held = [pool.connect() for _ in range(1 + overflow)]
    with pytest.raises(PoolTimeout, match="the caller would wait for itself") as caught:
        pool.connect()
    assert isinstance(caught.value, exc.TimeoutError)
    assert caught.value.reason == "pool-nested"
    assert pool.stats().refused["pool-nested"] == 1
    assert (pool.stats().waited, pool.stats().timeouts) == (0, 0)
    for connection in held:
        connection.close()
    assert_whole(pool, database, 1 + overflow)


def test_it_stays_nested_after_the_inner_one_was_given_back(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase
) -> None:
    pool, me, other = make_pool(2), make_thread("me"), make_thread("other")
    outer = me.submit(pool.connect).result(10)
    me.submit(lambda: pool.connect().close()).result(10)
    taken = other.submit(pool.connect).result(10)
    inner = me.submit(pool.connect)
    until_in_lane(pool, "holding", 1)
    taken.close()
    inner.result(10).close()
    outer.close()
    assert_whole(pool, database, 2)


def test_who_has_given_everything_back_holds_nothing(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase
) -> None:
    pool, me, other = make_pool(1), make_thread("me"), make_thread("other")
    me.submit(lambda: pool.connect().close()).result(10)
    taken = other.submit(pool.connect).result(10)
    waiting = me.submit(pool.connect)
    until_in_lane(pool, "critical", 1)
    taken.close()
    waiting.result(10).close()
    assert_whole(pool, database, 1)


@pytest.mark.parametrize("how", ["invalidate", "detach"])
def test_what_is_lost_or_detached_is_held_by_nobody(make_pool: MakePool, how: str) -> None:
    pool = make_pool(1, timeout=None)
    connection = pool.connect()
    getattr(connection, how)()
    pool.connect().close()
    connection.close()
    assert (pool.stats().active, pool.stats().rejected) == (0, 0)


@pytest.mark.parametrize("level", ["critical_plus", "sheddable"])
def test_a_holder_is_served_before_ten_who_wait(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase, level: Criticality
) -> None:
    """Whatever it says of itself and they of themselves: they wait for what it keeps."""
    pool, me = make_pool(2), make_thread("me")
    outer = me.submit(pool.connect).result(10)
    taken = by_another(pool.connect)
    order: list[str] = []

    def use(name: str, level: Criticality) -> None:
        with rdb.criticality(level):
            connection = pool.connect()
        order.append(name)
        connection.close()

    with ThreadPoolExecutor(10) as threads:
        others = [threads.submit(by_another, lambda: use("other", "critical_plus")) for _ in range(10)]
        until_waiting(pool, 10)
        inner = me.submit(use, "holder", level)
        until_in_lane(pool, "holding", 1)
        taken.close()
        for future in (inner, *others):
            future.result(10)
    assert order == ["holder"] + ["other"] * 10
    outer.close()
    assert_whole(pool, database, 2)


def test_a_holder_may_wait_when_all_places_are_taken(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase
) -> None:
    policy = rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=1))
    pool, me, other = make_pool(2, resilience=policy), make_thread("me"), make_thread("other")
    outer = me.submit(pool.connect).result(10)
    taken = by_another(pool.connect)
    waiting = other.submit(pool.connect)
    until_waiting(pool, 1)
    inner = me.submit(pool.connect)
    until_waiting(pool, 2)
    taken.close()
    inner.result(10).close()
    waiting.result(10).close()
    outer.close()
    assert_whole(pool, database, 2)


def test_of_two_who_wait_for_each_other_one_is_told_at_once(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase
) -> None:
    pool, first, second = make_pool(2, timeout=None), make_thread("first"), make_thread("second")
    outer = [first.submit(pool.connect).result(10), second.submit(pool.connect).result(10)]
    inner = first.submit(pool.connect)
    until_in_lane(pool, "holding", 1)
    refused(second.submit(pool.connect))
    refused(second.submit(pool.connect))  # and every time it asks
    assert not inner.done()
    outer[1].close()  # what the second does now, and what else it could not have done
    inner.result(10).close()
    second.submit(lambda: pool.connect().close()).result(10)
    outer[0].close()
    assert_whole(pool, database, 2)


def test_a_holder_that_gave_up_waiting_stands_in_nobodys_way(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase
) -> None:
    pool, first, second = make_pool(2), make_thread("first"), make_thread("second")
    outer = [first.submit(pool.connect).result(10), second.submit(pool.connect).result(10)]

    def briefly() -> None:
        with rdb.deadline(0.05):
            pool.connect()

    assert isinstance(first.submit(briefly).exception(10), DeadlineExceeded)
    inner = second.submit(pool.connect)
    until_in_lane(pool, "holding", 1)
    outer[0].close()
    inner.result(10).close()
    outer[1].close()
    assert_whole(pool, database, 2)


def test_whose_connection_came_back_by_another_hand_waits_for_nobody(
    make_pool: MakePool, make_thread: MakeThread, database: FakeDatabase
) -> None:
    pool, me, other = make_pool(2), make_thread("me"), make_thread("other")
    mine = me.submit(pool.connect).result(10)
    theirs = other.submit(pool.connect).result(10)
    waiting = me.submit(pool.connect)
    until_in_lane(pool, "holding", 1)
    mine.close()  # by this thread: the one that took it is waiting
    again = waiting.result(10)
    inner = other.submit(pool.connect)
    until_in_lane(pool, "holding", 1)
    again.close()
    inner.result(10).close()
    theirs.close()
    assert_whole(pool, database, 2)


# -- what is not nested -------------------------------------------------------------------------------------------


def test_pools_are_not_confused(make_pool: MakePool, make_thread: MakeThread) -> None:
    one, other, me = make_pool(1), make_pool(1), make_thread("me")
    outer = me.submit(one.connect).result(10)
    me.submit(lambda: other.connect().close()).result(10)
    taken = by_another(other.connect)
    waiting = me.submit(other.connect)
    until_in_lane(other, "critical", 1)
    taken.close()
    waiting.result(10).close()
    outer.close()


@pytest.mark.parametrize(
    "asked_before",
    [
        False,
        True,
    ],
)
def test_a_framework_s_thread_that_serves_somebody_else_by_now(
    make_pool: MakePool, make_thread: MakeThread, *, asked_before: bool
) -> None:
    """One thread of a pool, one context a request: what it took for the first is not the second's.

    ``asked_before``: in the context that theirs are copies of, somebody has used a pool (a program that makes its
    tables before it starts to serve).
    """
    pool, thread, program = make_pool(1), make_thread("worker"), contextvars.Context()
    if asked_before:
        program.run(lambda: pool.connect().close())
    requests = [program.copy(), program.copy()]
    held = thread.submit(requests[0].run, pool.connect).result(10)
    waiting = thread.submit(requests[1].run, pool.connect)
    until(lambda: in_lane(pool, "critical") == 1 or waiting.done(), "it has asked")
    held.close()
    waiting.result(10).close()


def test_two_threads_of_one_request_are_free_to_go_on_without_each_other(
    make_pool: MakePool, make_thread: MakeThread
) -> None:
    """A context that was copied into another thread (``asyncio.to_thread``): whose connection it is, is known, but
    not that its holder waits."""
    pool, first, second = make_pool(1), make_thread("first"), make_thread("second")
    request = contextvars.Context()
    held = first.submit(request.run, pool.connect).result(10)
    waiting = second.submit(request.copy().run, pool.connect)
    until_in_lane(pool, "critical", 1)
    held.close()
    waiting.result(10).close()


# -- the request's record as identity ----------------------------------------------------------------------------


def test_a_request_is_known_by_its_record(make_pool: MakePool, database: FakeDatabase) -> None:
    """Frameworks run each part of a request in a fresh copy of its context, so that nothing else is left behind."""
    pool = make_pool(1, timeout=None)
    with recording("GET /orders"):
        held = contextvars.copy_context().run(pool.connect)
        with pytest.raises(
            PoolTimeout, match=r"holds a connection of db already \(\d\.\d\d s by GET /orders \(thread"
        ):
            contextvars.copy_context().run(pool.connect)
    held.close()
    assert_whole(pool, database, 1)


def test_two_requests_of_one_thread_have_their_own_records(
    make_pool: MakePool, make_thread: MakeThread
) -> None:
    pool, thread = make_pool(1), make_thread("worker")

    def serve(route: str) -> Any:
        with recording(route):
            return pool.connect()

    held = thread.submit(by_another, lambda: serve("GET /orders")).result(10)
    waiting = thread.submit(by_another, lambda: serve("GET /carts"))
    until_in_lane(pool, "critical", 1)
    held.close()
    waiting.result(10).close()


def test_a_record_inside_a_record_is_the_same_work(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=None)
    with recording("GET /orders"):
        held = pool.connect()
        with recording("the audit of it"), pytest.raises(PoolTimeout, match="wait for itself"):
            pool.connect()
    held.close()


# -- what it is told -----------------------------------------------------------------------------------------------


def test_the_message_names_what_the_caller_holds_and_who_holds_longest(
    make_pool: MakePool, make_thread: MakeThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    for user in ("engine.door", "engine.holders", "engine.pool", "engine.slots", "runtime.waiters"):
        monkeypatch.setattr(f"resilientdb.{user}.monotonic", clock)
    pool, me, other = make_pool(3, timeout=None), make_thread("me"), make_thread("other")

    def pay() -> Any:
        with recording("POST /pay"):
            return pool.connect()

    theirs = other.submit(pay).result(10)
    clock.advance(2.0)
    mine = [me.submit(pool.connect).result(10)]
    clock.advance(0.5)
    mine.append(me.submit(pool.connect).result(10))
    clock.advance(0.25)
    waiting = other.submit(pool.connect)
    until_in_lane(pool, "holding", 1)
    message = str(refused(me.submit(pool.connect)))
    assert "it holds a connection of db already (0.75 s by thread me_0, 0.25 s by thread me_0)" in message
    assert "3 active, 0 idle, 1 waiting; limit of size 3 overflow 0" in message
    assert (
        "longest held 2.75 s by POST /pay (thread other_0), 0.75 s by thread me_0, 0.25 s by thread me_0"
        in message
    )
    mine[0].close()
    waiting.result(10).close()
    mine[1].close()
    theirs.close()


# -- tasks ---------------------------------------------------------------------------------------------------------


def patient() -> rdb.Resilience:
    """Callers wait for ever, and yet may be told that it would be for themselves."""
    return rdb.Resilience(queue=rdb.SaturationQueue(timeout=None))


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeAsyncEngine:
    @contextlib.asynccontextmanager
    async def make(size: int, **options: Any) -> AsyncIterator[AsyncEngine]:
        url = f"sqlite+aiosqlite:///{tmp_path}/nested.db"
        engine = rdb.create_async_engine(url, pool_size=size, max_overflow=0, **options)
        try:
            yield engine
            pool: Any = engine.pool
            assert (pool.stats().active, pool.stats().waiting) == (0, 0)
            assert pool.stats().total <= size
        finally:
            await engine.dispose()

    return make


def pool_of(engine: AsyncEngine) -> Any:
    return engine.pool


async def query(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(sa.text("SELECT 1")) or 0


def test_a_task_that_holds_all_there_is_is_told_at_once(make_engine: MakeAsyncEngine) -> None:
    async def main() -> None:
        async with make_engine(1, resilience=patient()) as engine:
            async with engine.connect() as connection:
                with pytest.raises(PoolTimeout, match=r"already \(\d\.\d\d s by task the task\)") as caught:
                    await query(engine)
                assert caught.value.reason == "pool-nested"
                assert await connection.scalar(sa.text("SELECT 1")) == 1
            assert await query(engine) == 1

    async def named() -> None:
        task = asyncio.create_task(main(), name="the task")
        await asyncio.wait_for(task, 30)

    asyncio.run(named())


def test_a_session_inside_a_session(make_engine: MakeAsyncEngine) -> None:
    async def main() -> None:
        async with make_engine(1, resilience=patient()) as engine, AsyncSession(engine) as outer:
            assert await outer.scalar(sa.text("SELECT 1")) == 1
            async with AsyncSession(engine) as inner:
                with pytest.raises(PoolTimeout, match="wait for itself"):
                    await inner.scalar(sa.text("SELECT 1"))
                await outer.commit()  # gives its connection back
                assert await inner.scalar(sa.text("SELECT 1")) == 1

    asyncio.run(asyncio.wait_for(main(), 30))


def test_children_of_a_holder_are_not_the_holder(make_engine: MakeAsyncEngine) -> None:
    """It may be free to go on: that it waits for them nobody can know."""

    async def main() -> None:
        async with make_engine(1) as engine:
            async with engine.connect():
                children = asyncio.gather(*(query(engine) for _ in range(3)))
                await until_async(lambda: in_lane(pool_of(engine), "critical") == 3)
            assert await children == [1, 1, 1]

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("introduced", [False, True])
def test_of_two_children_that_wait_for_each_other_one_is_told_at_once(
    make_engine: MakeAsyncEngine, *, introduced: bool
) -> None:
    """``introduced``: their flow of work is their parent's; it is the task that tells them apart."""

    async def child(engine: AsyncEngine, everybody: asyncio.Barrier) -> int:
        async with engine.connect():
            await everybody.wait()
            return await query(engine)

    async def main() -> None:
        async with make_engine(2, resilience=patient()) as engine:
            if introduced:
                await query(engine)
            everybody = asyncio.Barrier(2)
            answers = await asyncio.gather(
                *(child(engine, everybody) for _ in range(2)), return_exceptions=True
            )
            assert answers.count(1) == 1
            [error] = [answer for answer in answers if answer != 1]
            assert isinstance(error, PoolTimeout)
            assert error.reason == "pool-nested"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_holding_task_is_served_before_ten_who_wait(make_engine: MakeAsyncEngine) -> None:
    async def main() -> None:
        async with make_engine(2) as engine:
            order: list[str] = []
            taken = await by_another_task(engine.connect().start())

            async def use(name: str) -> None:
                async with engine.connect():
                    order.append(name)

            async def hold() -> None:
                async with engine.connect():
                    await until_async(lambda: pool_of(engine).stats().waiting == 10)
                    await use("holder")

            holder = asyncio.create_task(hold())
            await until_async(lambda: pool_of(engine).stats().active == 2)
            others = [asyncio.create_task(use("other")) for _ in range(10)]
            await until_async(lambda: in_lane(pool_of(engine), "holding") == 1)
            await taken.close()
            await asyncio.gather(holder, *others)
            assert order == ["holder"] + ["other"] * 10

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_task_that_has_ended_is_not_taken_for_the_next_one(make_engine: MakeAsyncEngine) -> None:
    """It left its connection to its parent (``asyncio.wait_for`` did so until 3.12); the next task that is made is
    as a rule found at the same address."""

    async def main() -> None:
        async with make_engine(1) as engine:
            await query(engine)
            for _ in range(20):
                connection = await asyncio.create_task(engine.connect().start())
                other = asyncio.create_task(query(engine))
                await until_async(lambda: in_lane(pool_of(engine), "critical") == 1)
                await connection.close()
                assert await other == 1

    asyncio.run(asyncio.wait_for(main(), 30))


def test_engines_of_one_task_are_not_confused(make_engine: MakeAsyncEngine) -> None:
    async def main() -> None:
        async with make_engine(1) as one, make_engine(1) as other, one.connect(), other.connect():
            with pytest.raises(PoolTimeout, match="wait for itself"):
                await query(one)
            with pytest.raises(PoolTimeout, match="wait for itself"):
                await query(other)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_sync_engine_used_in_to_thread(make_pool: MakePool, database: FakeDatabase) -> None:
    """Each call gets a thread of the loop's and a copy of the task's context."""

    def nested(pool: QueueDoor) -> None:
        with contextlib.closing(pool.connect()), pytest.raises(PoolTimeout, match="wait for itself"):
            pool.connect()

    async def main() -> None:
        pool = make_pool(1, timeout=60.0)
        await asyncio.to_thread(nested, pool)
        held = await asyncio.to_thread(pool.connect)
        waiting = asyncio.create_task(asyncio.to_thread(lambda: pool.connect().close()))
        await until_async(lambda: in_lane(pool, "critical") == 1)
        held.close()
        await waiting
        assert_whole(pool, database, 1)

    by_another(lambda: asyncio.run(asyncio.wait_for(main(), 30)))


def test_an_explicit_pool_timeout_is_waited_for(tmp_path: Path) -> None:
    """Another thread may give back what this one holds; SQLAlchemy's own option keeps its meaning."""
    engine = rdb.create_engine(
        f"sqlite:///{tmp_path}/a.db?check_same_thread=false",
        poolclass=sa.QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=60,
    )
    pool: Any = engine.pool
    held = engine.connect()

    def give_back() -> None:
        until_waiting(pool, 1)
        held.close()

    other = threading.Thread(target=give_back)
    other.start()
    engine.connect().close()
    other.join(10)
    engine.dispose()
