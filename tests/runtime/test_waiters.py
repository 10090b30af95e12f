"""Parking places: woken once, by anybody, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from resilientdb.runtime.waiters import TaskWaiter, ThreadWaiter, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable


def park_task(waiter: TaskWaiter, seconds: float | None) -> asyncio.Task[bool]:
    async def park() -> bool:
        return bool(await greenlet_spawn(waiter.park, seconds))

    return asyncio.ensure_future(park())


def task_waiter() -> TaskWaiter:
    return TaskWaiter(asyncio.get_running_loop(), await_only)


def test_a_thread_is_woken_by_another() -> None:
    waiter = ThreadWaiter()
    waker = threading.Timer(0.02, waiter.wake)
    waker.start()
    assert waiter.park(10) is True
    waker.join()


def test_a_thread_woken_before_it_parks_does_not_park() -> None:
    waiter = ThreadWaiter()
    assert waiter.wake()
    assert waiter.park(0) is True


@pytest.mark.parametrize("seconds", [0, 0.02, -1.0])
def test_a_thread_whose_time_is_over(seconds: float) -> None:
    waiter = ThreadWaiter()
    began = time.monotonic()
    assert waiter.park(seconds) is False
    assert time.monotonic() - began >= seconds
    assert waiter.since <= began


@pytest.mark.parametrize("seconds", [None, 1e300])
def test_a_thread_without_a_limit(seconds: float | None) -> None:
    waiter = ThreadWaiter()
    threading.Timer(0.02, waiter.wake).start()
    assert waiter.park(seconds) is True


def test_a_task_is_woken_from_its_own_loop_and_from_another_thread() -> None:
    async def main() -> list[bool]:
        loop = asyncio.get_running_loop()
        mine, foreign = task_waiter(), task_waiter()
        parked = [park_task(mine, None), park_task(foreign, 10.0)]
        await asyncio.sleep(0)
        assert mine.wake()
        assert await loop.run_in_executor(None, foreign.wake)
        return await asyncio.gather(*parked)

    assert asyncio.run(main()) == [True, True]


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_task_whose_time_is_over(seconds: float) -> None:
    async def main() -> bool:
        return await park_task(task_waiter(), seconds)

    assert asyncio.run(main()) is False


def test_a_timer_does_not_outlive_its_task() -> None:
    async def main() -> int:
        loop: Any = asyncio.get_running_loop()
        waiter = task_waiter()
        parked = park_task(waiter, 1_000.0)
        await asyncio.sleep(0)
        waiter.wake()
        await parked
        return sum(not timer.cancelled() for timer in loop._scheduled)

    assert asyncio.run(main()) == 0


def test_waking_a_cancelled_task_is_no_error() -> None:
    """It holds what it was granted when it finds out, and gives it back itself."""

    async def main() -> bool:
        waiter = task_waiter()
        parked = park_task(waiter, None)
        await asyncio.sleep(0)
        parked.cancel()
        answer = waiter.wake()
        with pytest.raises(asyncio.CancelledError):
            await parked
        return answer

    assert asyncio.run(main()) is True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["this thread", "another"])
def test_a_task_whose_loop_was_closed_cannot_be_woken(where: str) -> None:
    loop = asyncio.new_event_loop()
    made: list[tuple[TaskWaiter, asyncio.Task[bool]]] = []

    async def main() -> None:
        waiter = task_waiter()
        made.append((waiter, park_task(waiter, None)))
        await asyncio.sleep(0)

    loop.run_until_complete(main())
    loop.close()
    waiter, task = made.pop()
    answers: list[bool] = []
    wake: Callable[[], None] = lambda: answers.append(waiter.wake())  # noqa: E731
    if where == "another":
        thread = threading.Thread(target=wake)
        thread.start()
        thread.join(10)
    else:
        wake()
    assert answers == [False]
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_the_base_only_promises() -> None:
    waiter = Waiter()
    assert (waiter.granted, waiter.refusal) == (None, None)
    with pytest.raises(NotImplementedError):
        waiter.wake()
    with pytest.raises(NotImplementedError):
        waiter.park(0)
