"""Work that may outlive its caller: its result is taken by exactly one of the two who could."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import threading
from typing import Any, NoReturn

import pytest
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from resilientdb.runtime.bounded import LeftBehind, run_in_task, run_in_thread

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Adoption:
    """Where work without a caller ends up."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, BaseException | None]] = []
        self.happened = threading.Event()

    def __call__(self, value: Any, error: BaseException | None) -> None:
        self.calls.append((value, error))
        self.happened.set()


@pytest.fixture
def adopt() -> Adoption:
    return Adoption()


def fail() -> NoReturn:
    raise KeyError("work")


# -- threads ------------------------------------------------------------------------------------------------------


def test_a_result_in_time_is_the_callers(adopt: Adoption) -> None:
    assert run_in_thread(lambda: 7, 10.0, adopt) == 7
    with pytest.raises(KeyError):
        run_in_thread(fail, 10.0, adopt)
    assert adopt.calls == []


def test_the_work_sees_the_callers_context(adopt: Adoption) -> None:
    token = VARIABLE.set("caller's")
    try:
        assert run_in_thread(VARIABLE.get, 10.0, adopt) == "caller's"
    finally:
        VARIABLE.reset(token)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("seconds", [0.02, 0.0, -1.0])
def test_work_left_behind_is_adopted_once(adopt: Adoption, fails: bool, seconds: float) -> None:
    go_on = threading.Event()

    def work() -> int:
        assert go_on.wait(10)
        return fail() if fails else 7

    with pytest.raises(LeftBehind) as caught:
        run_in_thread(work, seconds, adopt)
    assert caught.value.__cause__ is None
    assert adopt.calls == []
    go_on.set()
    assert adopt.happened.wait(10)
    ((value, error),) = adopt.calls
    assert (value, type(error)) == ((None, KeyError) if fails else (7, type(None)))


class Interrupt(BaseException):
    pass


def test_an_interrupted_caller_leaves_its_work_to_be_adopted(adopt: Adoption) -> None:
    started, go_on = threading.Event(), threading.Event()
    causes: list[BaseException | None] = []

    def work() -> int:
        started.set()
        assert go_on.wait(10)
        return 7

    def call() -> None:
        try:
            run_in_thread(work, 0.3, adopt)
        except LeftBehind as left:
            causes.append(left.__cause__)

    caller = threading.Thread(target=call)
    caller.start()
    assert started.wait(10)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller.ident or 0), ctypes.py_object(Interrupt))
    caller.join(10)
    assert [type(cause) for cause in causes] == [Interrupt]
    assert adopt.calls == []
    go_on.set()
    assert adopt.happened.wait(10)
    assert adopt.calls == [(7, None)]


def test_without_a_thread_to_be_had_nothing_is_left_behind(
    adopt: Adoption, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(_thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_in_thread(lambda: 7, 10.0, adopt)
    assert adopt.calls == []


# -- tasks --------------------------------------------------------------------------------------------------------


async def bounded(work: Any, seconds: float, adopt: Adoption) -> Any:
    return await greenlet_spawn(
        lambda: run_in_task(work, seconds, adopt, spawn=greenlet_spawn, suspend=await_only)
    )


def test_a_tasks_result_in_time_is_the_callers(adopt: Adoption) -> None:
    async def main() -> None:
        assert await bounded(lambda: await_only(asyncio.sleep(0, 7)), 10.0, adopt) == 7
        with pytest.raises(KeyError):
            await bounded(fail, 10.0, adopt)

    asyncio.run(main())
    assert adopt.calls == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_left_behind_is_adopted_once(adopt: Adoption, fails: bool) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        def work() -> int:
            await_only(go_on.wait())
            return fail() if fails else 7

        with pytest.raises(LeftBehind):
            await bounded(work, 0.02, adopt)
        go_on.set()
        while not adopt.calls:  # noqa: ASYNC110 - a state that can be seen but not waited for
            await asyncio.sleep(0)

    asyncio.run(main())
    ((value, error),) = adopt.calls
    assert (value, type(error)) == ((None, KeyError) if fails else (7, type(None)))


@pytest.mark.parametrize("finished_first", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_caller_leaves_its_task_to_be_adopted(
    adopt: Adoption, finished_first: bool, fails: bool
) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        def work() -> int:
            await_only(go_on.wait())
            return fail() if fails else 7

        caller = asyncio.ensure_future(bounded(work, 10.0, adopt))
        for _ in range(5):
            await asyncio.sleep(0)
        if finished_first:
            # The result is there, the caller has not run since.
            go_on.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(LeftBehind) as caught:
            await caller
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        go_on.set()
        while not adopt.calls:  # noqa: ASYNC110 - a state that can be seen but not waited for
            await asyncio.sleep(0)

    asyncio.run(main())
    ((value, error),) = adopt.calls
    assert (value, type(error)) == ((None, KeyError) if fails else (7, type(None)))
