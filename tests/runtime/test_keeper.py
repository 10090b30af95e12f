"""The thread that looks after all pools: when it calls, whom it lets go, and what cannot stop it."""

from __future__ import annotations

import gc
import logging
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest

from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.keeper import Keeper
from resilientdb.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 20
"""Seconds after which a test gives up waiting."""


class Subject:
    """Answers what it was told to answer, and then None."""

    def __init__(self, *answers: float | None) -> None:
        self.answers = list(answers)
        self.calls: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def tend(self, now: float) -> float | None:
        self.thread = threading.current_thread()
        self.calls.put(now)
        return self.answers.pop(0) if self.answers else None

    def called(self) -> float:
        return self.calls.get(timeout=LONG)

    def so_far(self) -> int:
        """How many calls nobody has asked after."""
        return self.calls.qsize()


class Failing(Subject):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def tend(self, now: float) -> float | None:
        super().tend(now)
        raise self.error


class Held(Subject):
    """Stays in ``tend`` until it may go on."""

    def __init__(self, *answers: float | None) -> None:
        super().__init__(*answers)
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def tend(self, now: float) -> float | None:
        self.inside.set()
        assert self.go_on.wait(LONG)
        return super().tend(now)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def keeper(clock: FakeClock) -> Iterator[Keeper]:
    keeper = Keeper(clock=clock)
    yield keeper
    keeper.close()


@pytest.fixture
def wait(keeper: Keeper, clock: FakeClock) -> Callable[[float], float]:
    """Let seconds pass, and all that is due by then be done."""

    def wait(seconds: float) -> float:
        clock.advance(seconds)
        last = Subject()
        clock.advance(1 / 1024)  # after all that is due
        keeper.nudge(last)
        return last.called()

    return wait


# -- when -----------------------------------------------------------------------------------------------------------


def test_at_once_and_by_a_thread_of_its_own(keeper: Keeper, clock: FakeClock) -> None:
    subject = Subject()
    keeper.nudge(subject)
    assert subject.called() == clock()
    assert subject.thread is not None
    assert subject.thread.daemon
    assert subject.thread is not threading.current_thread()


def test_in_a_while_by_the_real_clock() -> None:
    keeper, subject = Keeper(), Subject()
    began = monotonic()
    keeper.nudge(subject, 0.05)
    assert subject.called() >= began + 0.05
    assert monotonic() - began < LONG
    keeper.close()


def test_not_before_its_time_and_once(keeper: Keeper, wait: Callable[[float], float]) -> None:
    subject = Subject()
    keeper.nudge(subject, 10)
    wait(9)
    assert subject.so_far() == 0
    wait(1)
    assert subject.so_far() == 1
    wait(100)
    assert subject.so_far() == 1


@pytest.mark.parametrize("seconds", [(10, 2), (2, 10), (7, 2, 10)])
def test_the_earliest_of_several_counts(
    keeper: Keeper, wait: Callable[[float], float], seconds: tuple[float, ...]
) -> None:
    subject = Subject()
    for one in seconds:
        keeper.nudge(subject, one)
    wait(1)
    assert subject.so_far() == 0
    wait(1)
    assert subject.so_far() == 1
    wait(100)
    assert subject.so_far() == 1, "the others were met by that"


def test_again_when_it_has_said(keeper: Keeper, clock: FakeClock, wait: Callable[[float], float]) -> None:
    subject = Subject(5, 0.5, None)
    keeper.nudge(subject)
    began = subject.called()
    wait(4)
    assert subject.so_far() == 0
    wait(1)
    assert 5 <= subject.called() - began < 5.1
    wait(0.5)
    assert subject.so_far() == 1
    wait(1000)
    assert subject.so_far() == 1


def test_a_nudge_comes_before_what_it_has_said(keeper: Keeper, wait: Callable[[float], float]) -> None:
    subject = Subject(50, None)
    keeper.nudge(subject)
    wait(0)
    keeper.nudge(subject, 3)
    wait(3)
    assert subject.so_far() == 2
    wait(50)
    assert subject.so_far() == 2, "what it said last counts"


@pytest.mark.parametrize("answer", [None, 30])
def test_what_changes_while_it_is_tended_is_seen(
    keeper: Keeper, wait: Callable[[float], float], answer: float | None
) -> None:
    subject = Held(answer)
    keeper.nudge(subject)
    assert subject.inside.wait(LONG)
    keeper.nudge(subject)
    subject.go_on.set()
    subject.called()
    subject.called()
    wait(10)
    assert subject.so_far() == 0


def test_all_in_the_order_of_their_times(keeper: Keeper, wait: Callable[[float], float]) -> None:
    order: list[int] = []

    class Numbered(Subject):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def tend(self, now: float) -> float | None:
            order.append(self.number)
            return super().tend(now)

    subjects = [Numbered(number) for number in range(20)]
    for number in (7, 3, 19, 0, 12, 5, 1, 18, 9, 2, 15, 4, 6, 8, 10, 11, 13, 14, 16, 17):
        keeper.nudge(subjects[number], 1 + number)
    wait(30)
    assert order == list(range(20))


def test_who_always_says_at_once_does_not_keep_a_processor_busy(
    keeper: Keeper, wait: Callable[[float], float]
) -> None:
    subject = Subject(*[0.0] * 1000)
    keeper.nudge(subject)
    for _ in range(10):
        wait(0.01)
    assert subject.so_far() <= 12


def test_equal_subjects_are_two(keeper: Keeper) -> None:
    class Alike(Subject):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

    one, other = Alike(), Alike()
    keeper.nudge(one)
    keeper.nudge(other)
    one.called()
    other.called()


# -- letting go -----------------------------------------------------------------------------------------------------


def test_nobody_is_kept_alive(keeper: Keeper, wait: Callable[[float], float]) -> None:
    waiting, tended, again = Subject(), Subject(), Subject(1000)
    keeper.nudge(waiting, 10)
    keeper.nudge(tended)
    keeper.nudge(again)
    wait(0)
    references = [weakref.ref(one) for one in (waiting, tended, again)]
    del waiting, tended, again
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    wait(2000)
    assert keeper._arranged == {}


def test_forgotten_is_forgotten_until_the_next_nudge(keeper: Keeper, wait: Callable[[float], float]) -> None:
    subject = Subject()
    keeper.forget(subject)  # never heard of
    keeper.nudge(subject, 5)
    keeper.forget(subject)
    wait(10)
    assert subject.so_far() == 0
    keeper.nudge(subject, 5)
    keeper.forget(subject)
    keeper.nudge(subject, 7)
    wait(6)
    assert subject.so_far() == 0
    wait(1)
    assert subject.so_far() == 1


def test_forgotten_and_nudged_while_the_thread_is_busy(
    keeper: Keeper, wait: Callable[[float], float]
) -> None:
    held, subject = Held(), Subject()
    keeper.nudge(subject, 5)
    wait(0)
    keeper.nudge(held)
    assert held.inside.wait(LONG)
    keeper.forget(subject)
    keeper.nudge(subject, 7)
    held.go_on.set()
    wait(6)
    assert subject.so_far() == 0
    wait(1)
    assert subject.so_far() == 1


def test_who_has_the_place_in_memory_of_one_that_is_gone(
    keeper: Keeper, wait: Callable[[float], float]
) -> None:
    first = Subject()
    keeper.nudge(first, 5)
    wait(0)
    place = id(first)
    del first
    others = [Subject() for _ in range(10_000)]
    second = next((one for one in others if id(one) == place), None)
    if second is None:
        pytest.skip("memory is not used again here")
    keeper.nudge(second, 7)
    wait(6)
    assert second.so_far() == 0
    wait(1)
    assert second.so_far() == 1


def test_forgotten_while_it_is_tended(keeper: Keeper, wait: Callable[[float], float]) -> None:
    subject = Held(3, 3, 3)
    keeper.nudge(subject)
    assert subject.inside.wait(LONG)
    keeper.forget(subject)
    subject.go_on.set()
    wait(10)
    assert subject.so_far() == 1


def test_forgotten_and_nudged_at_once_many_times() -> None:
    """Whatever the thread is doing at that moment, the nudge is the last word."""
    keeper, subject = Keeper(), Subject(*[0.02] * 10_000)
    for number in range(400):
        keeper.forget(subject)
        keeper.nudge(subject, 0.0003 * (number % 3))
        subject.called()
    keeper.close()


def test_moved_ten_thousand_times_it_takes_no_room(keeper: Keeper, wait: Callable[[float], float]) -> None:
    subjects = [Subject() for _ in range(10)]
    most = 0
    for number in range(1000):
        for subject in subjects:
            keeper.nudge(subject, 2000 - number)
        wait(0)
        most = max(most, len(keeper._heap))
    assert most < 100
    wait(1001)
    assert [subject.so_far() for subject in subjects] == [1] * 10


# -- what cannot stop it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3)])
def test_an_error_is_logged_and_it_is_tended_again_in_a_second(
    keeper: Keeper, wait: Callable[[float], float], caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    failing, other = Failing(error), Subject(0.5)
    with caplog.at_level(logging.ERROR, "resilientdb"):
        keeper.nudge(failing)
        keeper.nudge(other)
        wait(0)
        assert (failing.so_far(), other.so_far()) == (1, 1)
        (record,) = caplog.records
        assert (record.name, record.getMessage()) == ("resilientdb", "tending a Failing failed")
        assert record.exc_info is not None
        assert record.exc_info[1] is error
        wait(0.9)
        assert (failing.so_far(), other.so_far()) == (1, 2)
        wait(0.1)
        assert failing.so_far() == 2


def test_no_thread_to_be_had(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    one, other = Subject(), Subject()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "resilientdb"):
        patch.setattr(threading.Thread, "start", fail)
        keeper.nudge(one)
    assert "could not be started" in caplog.text
    keeper.nudge(other)
    one.called()
    other.called()


def test_a_finalizer_that_nudges_while_the_thread_is_being_started(keeper: Keeper) -> None:
    one, other = Subject(), Subject()
    done = threading.Event()

    def work() -> None:
        with keeper._starting:
            keeper.nudge(one)
        keeper.nudge(other)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(LONG)
    one.called()
    other.called()


def test_finalizers_that_nudge_in_the_middle_of_nudges() -> None:
    keeper, subject, finalized = Keeper(), Subject(*[0.01] * 100_000), 0

    class Forgotten:
        def __init__(self) -> None:
            self.myself = self

        def __del__(self) -> None:
            nonlocal finalized
            finalized += 1
            keeper.nudge(subject)
            keeper.forget(subject)
            keeper.nudge(subject, 0.001)

    def work() -> None:
        for _ in range(3000):
            Forgotten()
            keeper.nudge(subject)

    before = gc.get_threshold()
    gc.set_threshold(5)  # a collection at nearly every other allocation, wherever that is
    try:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
    finally:
        gc.set_threshold(*before)
    assert finalized > 1000
    last = Subject()
    keeper.nudge(last)
    last.called()
    keeper.close()


@pytest.mark.parametrize("count", [1, 3])
def test_no_nudge_is_lost(count: int) -> None:
    keeper = Keeper()
    written = [0] * count

    class Reader:
        read = tuple(written)

        def tend(self, now: float) -> float | None:
            self.read = tuple(written)
            return 60

    reader = Reader()
    lost = []

    def work(mine: int) -> None:
        for number in range(1, 1000):
            written[mine] = number
            keeper.nudge(reader)
            end = monotonic() + LONG
            while reader.read[mine] < number:
                time.sleep(0)
                if monotonic() > end:
                    lost.append(number)
                    return

    threads = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LONG)
    keeper.close()
    assert lost == []


def test_once_closed_it_starts_nothing(keeper: Keeper) -> None:
    subject = Subject()
    keeper.close()
    keeper.nudge(subject)
    keeper.forget(subject)
    assert keeper._thread is None
    assert subject.so_far() == 0


def test_the_thread_is_kept_for_the_next(keeper: Keeper) -> None:
    first, second = Subject(), Subject()
    keeper.nudge(first)
    first.called()
    keeper.nudge(second)
    second.called()
    assert first.thread is second.thread


# -- the process ----------------------------------------------------------------------------------------------------

PROGRAM = """
import atexit, logging, os, queue, sys, threading, time
ending = threading.Event()
def end():
    ending.set()
    time.sleep(0.2)
    keeper.nudge(Subject())
    time.sleep(0.1)
    print(*(thread.name for thread in threading.enumerate()))
atexit.register(end)  # called after those that are registered below
from resilientdb.runtime.keeper import keeper

class Subject:
    def __init__(self, answer=None, patience=0):
        self.answer, self.patience, self.calls = answer, patience, queue.SimpleQueue()
    def tend(self, now):
        self.calls.put(now)
        if ending.wait(self.patience):
            raise RuntimeError("too late")
        return self.answer
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_child_it_has_a_thread_of_its_own_and_nothing_arranged() -> None:
    done = run(
        """
parents, shared = Subject(), Subject()
keeper.nudge(shared)
shared.calls.get(timeout=20)
keeper.nudge(parents, 1.0)
child = os.fork()
if child == 0:
    status = 1
    try:
        mine = Subject()
        keeper.nudge(mine)
        keeper.nudge(shared)
        mine.calls.get(timeout=20)
        shared.calls.get(timeout=20)
        time.sleep(1.2)
        status = parents.calls.qsize()
    finally:
        os._exit(status)
parents.calls.get(timeout=20)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0\nMainThread\n", "", 0)


@pytest.mark.parametrize("subject", ["Subject(answer=0)", "Subject(patience=20)"])
def test_it_is_quiet_when_the_interpreter_exits(subject: str) -> None:
    done = run(
        f"""
busy = {subject}
keeper.nudge(busy)
busy.calls.get(timeout=20)
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("MainThread\n", "", 0)
