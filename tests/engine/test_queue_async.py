"""The pool's queue with tasks: cancelled anywhere, at any step, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.util.concurrency import greenlet_spawn

import resilientdb as rdb
from resilientdb.errors import CircuitOpen, DeadlineExceeded, PoolSaturated, PoolTimeout
from tests.engine.conftest import assert_whole_async, by_another_task, until_async

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from tests.engine.conftest import AsyncPool, FakeDatabase


@pytest.fixture
def make_pool(make_async_pool: Callable[..., AsyncPool]) -> Callable[..., AsyncPool]:
    return make_async_pool


async def give(connection: Any) -> None:
    await greenlet_spawn(connection.close)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


# -- order and limits -----------------------------------------------------------------------------------------------


def test_first_come_first_served(make_pool: Callable[..., AsyncPool]) -> None:
    async def main() -> None:
        pool, order = make_pool(1), []

        async def work(number: int) -> None:
            connection = await pool.take()
            order.append(number)
            await asyncio.sleep(0)
            await give(connection)

        held = await by_another_task(pool.take())
        tasks = [asyncio.create_task(work(number)) for number in range(6)]
        await until_async(lambda: pool.stats().waiting == 6)
        await give(held)
        await work(6)
        await asyncio.gather(*tasks)
        assert order == list(range(7))
        await assert_whole_async(pool, 1)

    run(main())


def test_timeout_and_full_line(make_pool: Callable[..., AsyncPool]) -> None:
    async def main() -> None:
        policy = rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=1))
        pool = make_pool(1, resilience=policy, timeout=0.05)
        held = await by_another_task(pool.take())
        first = asyncio.create_task(pool.take())
        await until_async(lambda: pool.stats().waiting == 1)
        with pytest.raises(PoolSaturated):
            await pool.take()
        with pytest.raises(PoolTimeout):
            await first
        await give(held)
        await assert_whole_async(pool, 1)

    run(main())


def test_a_failed_connect_is_told_to_all_who_wait_for_the_same(
    make_pool: Callable[..., AsyncPool], database: FakeDatabase
) -> None:
    async def main() -> None:
        pool = make_pool(1, resilience=rdb.Resilience(retry=rdb.RetryPolicy(attempts=1)), timeout=60.0)
        pool.gate = asyncio.Event()
        database.failures.append(ConnectionRefusedError("connection refused"))
        first, second = (asyncio.create_task(pool.take()) for _ in range(2))
        await until_async(lambda: pool.stats().waiting == 1)
        pool.gate.set()
        for task in (first, second):
            with pytest.raises(ConnectionRefusedError):
                await task
        assert pool.stats().connect_failures == 1
        await assert_whole_async(pool, 1)

    run(main())


def test_who_waits_is_told_when_the_circuit_opens_in_another_thread(
    make_pool: Callable[..., AsyncPool],
) -> None:
    async def main() -> None:
        pool = make_pool(1, timeout=None)
        held = await by_another_task(pool.take())
        tasks = [asyncio.create_task(pool.take()) for _ in range(3)]
        await until_async(lambda: pool.stats().waiting == 3)
        await asyncio.to_thread(pool.node.breaker.open)
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert [type(answer) for answer in answers] == [CircuitOpen] * 3
        pool.node.breaker.close()
        await give(held)
        await assert_whole_async(pool, 1)

    run(main())


# -- cancellation at every step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounded", [False, True], ids=["no deadline", "deadline"])
@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
def test_cancelled_after_any_number_of_steps(
    make_pool: Callable[..., AsyncPool], contended: bool, bounded: bool
) -> None:
    """Step by step through the whole of a checkout, a use and a checkin, each time one step further."""

    async def once(steps: int) -> bool:
        pool = make_pool(1)
        pool.steps = 3

        async def work() -> None:
            with rdb.deadline(10.0 if bounded else None):
                connection = await pool.take()
            try:
                await asyncio.sleep(0)
            finally:
                await give(connection)

        held = await pool.take() if contended else None
        task, other = asyncio.create_task(work()), asyncio.create_task(work())
        for step in range(steps):
            if held is not None and step == 5:
                await give(held)
                held = None
            await asyncio.sleep(0)
        task.cancel()
        if held is not None:
            await give(held)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.wait_for(other, 10)
        await assert_whole_async(pool, 1)
        pool.dispose()
        return task.cancelled()

    async def main() -> None:
        steps = 0
        while await once(steps):
            steps += 1
            assert steps < 100
        assert steps >= 5, "it really was cancelled at several places"

    run(main())


@pytest.mark.parametrize("order", ["returned, cancelled", "cancelled, returned"])
def test_cancelled_in_the_same_step_in_which_it_is_served(
    make_pool: Callable[..., AsyncPool], order: str
) -> None:
    async def main() -> None:
        pool = make_pool(1)
        held = await by_another_task(pool.take())
        tasks = [asyncio.create_task(pool.take()) for _ in range(4)]
        await until_async(lambda: pool.stats().waiting == 4)
        if order == "cancelled, returned":
            for task in tasks[:3]:
                task.cancel()
        # Without a step of the loop in between: the slot is handed to a task that is being cancelled.
        held._connection_record.checkin()
        held._connection_record = None
        held.dbapi_connection = None
        if order == "returned, cancelled":
            for task in tasks[:3]:
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers[:3]] == [asyncio.CancelledError] * 3
        await give(answers[3])
        await assert_whole_async(pool, 1)

    run(main())


def test_wait_for_task_group_and_cancel_scope(make_pool: Callable[..., AsyncPool]) -> None:
    async def main() -> None:
        pool = make_pool(1, timeout=60.0)
        held = await by_another_task(pool.take())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.take(), 0.02)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await pool.take()
        with anyio.move_on_after(0.02) as scope:
            await pool.take()
        assert scope.cancelled_caught
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(pool.take())
                await until_async(lambda: pool.stats().waiting == 3)
                raise KeyError
        assert caught.group_contains(KeyError)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(pool.take)
            await until_async(lambda: pool.stats().waiting == 3)
            tasks.cancel_scope.cancel()
        await give(held)
        await assert_whole_async(pool, 1)

    run(main())


def test_many_tasks_cancelled_at_random(make_pool: Callable[..., AsyncPool], database: FakeDatabase) -> None:
    async def main() -> None:
        pool = make_pool(3)

        async def work(number: int) -> None:
            for turn in range(20):
                with contextlib.suppress(TimeoutError, DeadlineExceeded):
                    async with asyncio.timeout(0.0007 * ((number + turn) % 4) or None):
                        with rdb.deadline(5 if number % 2 else None):
                            connection = await pool.take()
                        try:
                            await asyncio.sleep(0.0003 * (turn % 3))
                        finally:
                            if (number + turn) % 7 == 0:
                                connection.invalidate()
                            await give(connection)

        await asyncio.gather(*(work(number) for number in range(20)))
        await assert_whole_async(pool, 3)
        pool.dispose()

    run(main())
    assert database.open_now == 0


# -- deadlines ------------------------------------------------------------------------------------------------------


def test_a_deadline_bounds_the_wait(make_pool: Callable[..., AsyncPool]) -> None:
    async def main() -> None:
        pool = make_pool(1)
        held = await by_another_task(pool.take())
        with rdb.deadline(0.03), pytest.raises(DeadlineExceeded):
            await pool.take()
        await give(held)
        await assert_whole_async(pool, 1)

    run(main())


@pytest.mark.parametrize("end", ["deadline", "cancelled"])
@pytest.mark.parametrize("fails", [False, True], ids=["connects", "fails"])
def test_a_connect_that_outlives_its_caller_joins_the_pool(
    make_pool: Callable[..., AsyncPool], database: FakeDatabase, end: str, fails: bool
) -> None:
    async def main() -> None:
        pool = make_pool(2)
        pool.gate = asyncio.Event()
        if fails:
            database.failures.append(ConnectionRefusedError("connection refused"))

        async def take() -> None:
            with rdb.deadline(0.05 if end == "deadline" else 10):
                await pool.take()

        task = asyncio.create_task(take())
        for _ in range(8):
            await asyncio.sleep(0)
        if end == "cancelled":
            task.cancel()
        with pytest.raises(DeadlineExceeded if end == "deadline" else asyncio.CancelledError):
            await task
        assert (pool.stats().total, pool.stats().active) == (1, 1), "its slot is in use until it ends"
        pool.gate.set()
        await until_async(lambda: pool.stats().active == 0)
        assert (pool.stats().total, pool.stats().idle) == ((0, 0) if fails else (1, 1))
        assert pool.node.breaker.current_state == "closed"
        await assert_whole_async(pool, 2)
        assert database.opened == 2

    run(main())


# -- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("returned_by", ["another thread", "another loop"])
def test_a_waiter_whose_loop_was_closed_is_passed_over(
    make_pool: Callable[..., AsyncPool], returned_by: str
) -> None:
    pool = make_pool(1, timeout=None)
    loop = asyncio.new_event_loop()
    kept: list[Any] = []

    async def leave_a_waiter() -> None:
        kept.append(await pool.take())
        kept.append(asyncio.create_task(pool.take()))
        await until_async(lambda: pool.stats().waiting == 1)

    loop.run_until_complete(leave_a_waiter())
    loop.close()

    def give_back() -> None:
        async def main() -> None:
            await give(kept[0])
            assert (pool.stats().active, pool.stats().idle, pool.stats().waiting) == (0, 1, 0)
            with pytest.raises(rdb.ConfigurationError, match="another event loop, which has been closed"):
                await pool.take()
            assert (pool.stats().active, pool.stats().idle) == (0, 1)

        asyncio.run(main())

    if returned_by == "another thread":
        errors: list[BaseException] = []

        def work() -> None:
            try:
                give_back()
            except BaseException as error:  # noqa: BLE001 - raised by the test
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(20)
        assert errors == []
    else:
        give_back()
    kept[1]._log_destroy_pending = False


def test_a_real_engine(tmp_path: Path) -> None:
    async def main() -> None:
        engine = rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db", pool_size=2, max_overflow=0)
        running = 0

        async def work() -> int:
            nonlocal running
            async with engine.connect() as connection:
                running += 1
                assert running <= 2
                answer = await connection.scalar(sa.text("SELECT 1"))
                running -= 1
                return answer or 0

        tasks = [asyncio.create_task(work()) for _ in range(30)]
        await asyncio.sleep(0.001)
        for task in tasks[::3]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers.count(1) >= 20
        pool: Any = engine.pool
        assert (pool.stats().active, pool.stats().waiting) == (0, 0)
        await engine.dispose()

    run(main())
