"""What a caller says about its work: for this block, this task, this thread, and nobody else."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.util.concurrency import greenlet_spawn

import resilientdb as rdb
from resilientdb.runtime.context import (
    Deadline,
    current_criticality,
    current_deadline,
    current_record,
    deadline,
    is_read_only,
    read_only,
    recording,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def left() -> float:
    now = current_deadline()
    assert now is not None
    return now.remaining()


# -- deadlines ----------------------------------------------------------------------------------------------------


def test_nested_deadlines_only_shrink() -> None:
    assert current_deadline() is None
    with deadline(10) as outer:
        assert 9 < left() <= 10
        with deadline(60) as longer:
            assert longer is outer
        with deadline(1) as shorter:
            assert shorter is not outer
            assert left() <= 1
            with deadline(None) as same:
                assert same is shorter
        assert current_deadline() is outer
    assert current_deadline() is None


def test_a_deadline_ends_with_its_own_block_and_no_other() -> None:
    with deadline(10) as outer:
        assert outer is not None
        with deadline(60):
            pass
        assert outer.is_in_force(), "the inner block had no deadline of its own"
        with deadline(1) as inner:
            assert inner is not None
        assert not inner.is_in_force()
        assert outer.is_in_force()
    assert not outer.is_in_force()


def test_what_outlives_a_block_has_the_deadline_of_the_block_around_it() -> None:
    """A task or thread that was started inside, with a copy of its context."""
    with deadline(10) as outer:
        with deadline(5) as inner:
            task = contextvars.copy_context()
            assert task.run(current_deadline) is inner
        assert task.run(current_deadline) is outer

        def work() -> None:
            with deadline(60) as own:
                assert own is outer, "bound by what is in force, and by nothing else"
            assert outer is not None
            assert outer.is_in_force()
            with deadline(1) as own:
                assert own is current_deadline()

        task.run(work)
    assert task.run(current_deadline) is None

    def later() -> None:
        with deadline(60) as own:
            assert own is not None
            assert own.seconds == 60
            assert current_deadline() is own

    task.run(later)


def test_it_ends_when_the_block_fails() -> None:
    with pytest.raises(KeyError), deadline(1) as one:
        raise KeyError
    assert one is not None
    assert not one.is_in_force()
    assert current_deadline() is None


def test_no_deadline_at_all() -> None:
    with deadline(None) as nothing:
        assert nothing is None
        assert current_deadline() is None


def test_remaining_is_negative_afterwards() -> None:
    one = Deadline(expires_at=time.monotonic() - 1, seconds=5)
    assert one.remaining() <= -1
    assert one.remaining(now=one.expires_at - 2) == 2


@pytest.mark.parametrize("seconds", [-1, -0.001, "1", True, math.nan, [1]])
def test_what_is_no_deadline(seconds: Any) -> None:
    with pytest.raises(rdb.ConfigurationError, match="deadline must be a number of seconds") as caught:
        deadline(seconds)
    assert caught.value.key == "deadline"


# -- as decorators -------------------------------------------------------------------------------------------------


def test_a_decorated_function_keeps_its_name_and_its_answers() -> None:
    @read_only()
    def add(a: int, b: int = 1) -> tuple[int, bool]:
        """Adds."""
        return a + b, is_read_only()

    assert add(1, b=2) == (3, True)
    assert (add.__name__, add.__doc__) == ("add", "Adds.")
    assert not is_read_only()


def test_a_deadline_begins_with_each_call() -> None:
    @deadline(0.05)
    def remaining() -> float:
        return left()

    remaining()
    time.sleep(0.06)
    assert remaining() > 0.01


def test_methods_and_async_functions() -> None:
    class Service:
        @read_only()
        def get(self) -> bool:
            return is_read_only()

        @classmethod
        @deadline(5)
        def remaining(cls) -> float:
            return left()

        @rdb.criticality("sheddable")
        async def work(self) -> str:
            await asyncio.sleep(0)
            return current_criticality()

    assert Service().get()
    assert Service.remaining() <= 5
    assert inspect.iscoroutinefunction(Service.work)
    assert asyncio.run(Service().work()) == "sheddable"
    assert current_criticality() == "critical"


def test_a_decorated_function_may_call_itself() -> None:
    @read_only()
    def count(down: int) -> bool:
        return is_read_only() if down == 0 else count(down - 1)

    assert count(5)
    assert not is_read_only()


def test_one_decorated_coroutine_function_in_many_tasks_at_once() -> None:
    @deadline(5)
    async def work(pause: float) -> Deadline | None:
        mine = current_deadline()
        await asyncio.sleep(pause)
        assert current_deadline() is mine
        return mine

    async def main() -> list[Deadline | None]:
        return await asyncio.gather(*(work(0.001 * (7 - number)) for number in range(7)))

    assert len({id(one) for one in asyncio.run(main())}) == 7


def test_generators_are_refused() -> None:
    """What they yield to would run inside the scope, and what follows the yield perhaps outside it."""

    def rows() -> Iterator[int]:
        yield 1

    async def async_rows() -> AsyncIterator[int]:
        yield 1

    for function in (rows, async_rows):
        with pytest.raises(TypeError, match=f"{function.__name__} is a generator"):
            read_only()(function)


# -- re-entrance and isolation --------------------------------------------------------------------------------------


def test_one_object_may_be_entered_again() -> None:
    scope = rdb.criticality("sheddable")
    with scope:
        with rdb.criticality("critical_plus"), scope:
            assert current_criticality() == "sheddable"
        assert current_criticality() == "sheddable"
    assert current_criticality() == "critical"
    with scope:
        assert current_criticality() == "sheddable"


def test_one_object_in_several_threads_at_once() -> None:
    scope = read_only()
    both_in, first_out = threading.Barrier(2), threading.Event()

    def work(first: bool) -> bool:
        with scope:
            both_in.wait(10)
            if not first:
                assert first_out.wait(10)
        first_out.set()
        return is_read_only()

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(work, first) for first in (True, False)]
        assert [future.result(10) for future in futures] == [False, False]


def test_one_object_in_several_tasks_at_once() -> None:
    scope = deadline(5)

    async def work(pause: float) -> Deadline | None:
        with scope as mine:
            await asyncio.sleep(pause)
            assert current_deadline() is mine
        assert current_deadline() is None
        assert mine is not None
        assert not mine.is_in_force()
        return mine

    async def main() -> list[Deadline | None]:
        return list(await asyncio.gather(work(0.0), work(0.02), work(0.01)))

    assert len({id(one) for one in asyncio.run(main())}) == 3


def test_threads_do_not_see_each_other() -> None:
    with read_only(), ThreadPoolExecutor(1) as threads:
        assert threads.submit(is_read_only).result(10) is False
        context = contextvars.copy_context()
        assert threads.submit(context.run, is_read_only).result(10) is True, "unless they are told"


def test_a_task_inherits_and_keeps_to_itself() -> None:
    async def child() -> bool:
        inherited = is_read_only()
        with rdb.criticality("sheddable"):
            await asyncio.sleep(0)
        return inherited

    async def main() -> None:
        with read_only():
            task = asyncio.create_task(child())
        assert await task
        assert not is_read_only()
        assert current_criticality() == "critical"

    asyncio.run(main())


def test_it_crosses_into_sqlalchemys_greenlets_and_threads() -> None:
    async def main() -> None:
        with read_only():
            assert await greenlet_spawn(is_read_only)
            assert await asyncio.to_thread(is_read_only)
        assert not await greenlet_spawn(is_read_only)

    asyncio.run(main())


# -- the others -----------------------------------------------------------------------------------------------------


def test_criticality_is_one_of_four() -> None:
    with pytest.raises(rdb.ConfigurationError, match="criticality must be one of critical_plus") as caught:
        rdb.criticality("urgent")  # type: ignore[arg-type]
    assert caught.value.key == "criticality"


def test_a_record_a_request() -> None:
    assert current_record() is None
    with recording() as outer:
        assert outer is not None
        assert current_record() is outer
        with recording() as inner:
            assert inner is not outer
        assert (outer.waits, outer.wait_time) == (0, 0.0)
    assert current_record() is None


def test_a_record_says_what_it_is_of() -> None:
    routes: list[str | None] = []

    @recording("nightly clean-up")
    def job() -> None:
        record = current_record()
        assert record is not None
        routes.append(record.route)
        record.route = "said later"

    job()
    job()
    assert routes == ["nightly clean-up"] * 2
    with recording() as record:
        assert record is not None
        assert record.route is None
