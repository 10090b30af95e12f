"""One decision at a time, whatever interrupts it; what follows from it is done afterwards, outside."""

from __future__ import annotations

import ctypes
import gc
import random
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from resilientdb.runtime.section import Reentered, Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Interrupt(BaseException):
    """What a signal handler, or a debugger, throws into a thread at any moment."""


@pytest.fixture
def _hurried() -> Iterator[None]:
    """Threads are switched as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def nothing() -> None:
    pass


def in_another_thread(work: Callable[[], object]) -> bool:
    """Whether ``work()`` comes to its end there, and well."""
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(work() is None), daemon=True)
    thread.start()
    thread.join(10)
    return ended == [True]


def is_free(section: Section) -> bool:
    return in_another_thread(lambda: section.run(nothing))


# -- decisions ------------------------------------------------------------------------------------------------------


def test_the_decision_is_given_its_arguments_and_its_answer_returned() -> None:
    def decide(*args: object, **kwargs: object) -> object:
        return args, kwargs

    assert Section(lambda: None).run(decide, 1, two=2) == ((1,), {"two": 2})


@pytest.mark.usefixtures("_hurried")
def test_one_at_a_time() -> None:
    section, count, inside, overlaps = Section(lambda: None), 0, 0, 0

    def decide() -> None:
        nonlocal count, inside, overlaps
        inside += 1
        before = count
        overlaps += inside != 1
        for _ in range(3):
            nothing()  # a place to be interrupted at
        count = before + 1
        inside -= 1

    threads = [threading.Thread(target=lambda: [section.run(decide) for _ in range(2_000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (count, overlaps) == (8_000, 0)


def test_an_error_is_raised_and_the_section_left() -> None:
    section = Section(lambda: None)

    def decide() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        section.run(decide)
    assert not section.is_inside()
    assert is_free(section)


# -- consequences ---------------------------------------------------------------------------------------------------


def test_consequences_are_done_in_order() -> None:
    section, done = Section(lambda: None), []

    def decide() -> str:
        section.afterwards(lambda: done.append("first"))
        section.afterwards(lambda: done.append("second"))
        assert done == []
        return "decided"

    assert section.run(decide) == "decided"
    assert done == ["first", "second"]


def test_consequences_are_done_outside() -> None:
    section, done = Section(lambda: None), []

    def act() -> None:
        assert not section.is_inside()
        assert is_free(section), "another thread may decide meanwhile"
        done.append("done")

    section.run(section.afterwards, act)
    assert done == ["done"]


def test_consequences_are_done_even_if_the_decision_raises() -> None:
    section, done = Section(lambda: None), []

    def decide() -> None:
        section.afterwards(lambda: done.append("done"))
        raise LookupError

    with pytest.raises(LookupError):
        section.run(decide)
    assert done == ["done"]


def test_a_consequence_may_decide_again_and_have_consequences() -> None:
    section, done = Section(lambda: None), []

    def again() -> None:
        section.run(section.afterwards, lambda: done.append("last"))
        done.append("again")

    section.run(section.afterwards, again)
    assert done == ["last", "again"]


def test_what_a_failing_consequence_leaves_behind_is_done_by_the_next() -> None:
    section, done = Section(lambda: None), []

    def fail() -> None:
        raise LookupError("a consequence")

    def decide() -> None:
        section.afterwards(fail)
        section.afterwards(lambda: done.append("done"))

    with pytest.raises(LookupError, match="a consequence"):
        section.run(decide)
    section.run(nothing)
    assert done == ["done"]


def test_who_comes_next_does_what_was_left_while_nobody_was_inside() -> None:
    section, done = Section(lambda: None), []
    section.afterwards(lambda: done.append("done"))
    assert done == []
    assert is_free(section)
    assert done == ["done"]


# -- a garbage collection in the middle ----------------------------------------------------------------------------


class Garbage:
    """Found by the collector alone; ``finalize`` then runs in whatever thread that happens in."""

    def __init__(self, finalize: Callable[[], object]) -> None:
        self.finalize = finalize
        self.myself = self

    def __del__(self) -> None:
        self.finalize()


@pytest.fixture
def _collected_on_demand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_collected_on_demand")
def test_a_finalizer_in_the_middle_does_not_touch_what_is_half_done() -> None:
    section = Section(lambda: None)
    seen: list[object] = []

    def finalize() -> None:
        seen.append(section.is_inside())
        try:
            section.run(seen.append, "decided in the middle of a decision")
        except Reentered:
            seen.append("reentered")
        section.afterwards(lambda: seen.append("later"))

    def decide() -> str:
        Garbage(finalize)
        gc.collect()
        seen.append("decided")
        return "answer"

    assert section.run(decide) == "answer"
    assert seen == [True, "reentered", "decided", "later"]
    assert not section.is_inside()
    assert is_free(section)


@pytest.mark.usefixtures("_collected_on_demand")
def test_what_a_finalizer_leaves_is_not_done_in_the_middle() -> None:
    """Being turned away, it does not do what others left to be done either: that might decide in its turn."""
    section, seen = Section(lambda: None), []

    def finalize() -> None:
        with pytest.raises(Reentered):
            section.run(nothing)

    def decide() -> None:
        section.afterwards(lambda: seen.append("consequence"))
        Garbage(finalize)
        gc.collect()
        seen.append("decided")

    section.run(decide)
    assert seen == ["decided", "consequence"]


@pytest.mark.usefixtures("_collected_on_demand")
def test_a_finalizer_in_another_thread_is_not_inside() -> None:
    section = Section(lambda: None)
    answers: list[bool] = []

    def ask() -> None:
        answers.append(section.is_inside())

    asking = threading.Thread(target=ask)

    def decide() -> None:
        asking.start()
        asking.join(0.05)
        assert answers == [], "it waits until the decision is made"

    section.run(decide)
    asking.join(10)
    assert answers == [False]


# -- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("seed", [1, 2])
def test_an_exception_from_outside_never_leaves_it_locked(seed: int) -> None:
    """``PyThreadState_SetAsyncExc`` between any two instructions, thousands of times."""
    section, dice, done = Section(lambda: None), random.Random(seed), threading.Event()
    ready: list[bool] = []
    wrong: list[BaseException] = []

    def decide(steps: int) -> None:
        section.afterwards(nothing)
        for _ in range(steps):
            nothing()

    def keep_deciding() -> None:
        while not done.is_set():
            section.run(decide, dice.randrange(4))
            section.is_inside()

    def work() -> None:
        while True:
            try:
                ready.append(True)  # to be interrupted, once
                keep_deciding()
            except Interrupt:
                continue
            except BaseException as error:  # noqa: BLE001 - raised by the test
                wrong.append(error)
            return

    def until_ready(number: int) -> None:
        give_up = time.monotonic() + 20
        while len(ready) <= number:
            assert not wrong
            assert time.monotonic() < give_up, "the thread hangs"
            time.sleep(0)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
    tries = 5_000
    for number in range(tries):
        until_ready(number)
        set_exception(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupt))
        if number % 250 == 0:
            assert is_free(section)
    until_ready(tries)
    done.set()
    thread.join(10)
    assert is_free(section)
    assert not section.is_inside()


CTRL_C = """
import signal, sys, threading, time
from resilientdb.runtime.section import Section

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
section, main, ready, pressed = Section(lambda: None), threading.main_thread(), [], 0

def press():
    global pressed
    while pressed < 2000:
        if len(ready) > pressed:
            pressed += 1
            signal.pthread_kill(main.ident, signal.SIGINT)
        time.sleep(0)

def decide(steps):
    section.afterwards(int)
    for _ in range(steps):
        int()

sys.setswitchinterval(1e-6)
threading.Thread(target=press, daemon=True).start()
while len(ready) < 2000:
    try:
        ready.append(True)  # to be interrupted, once
        while True:
            section.run(decide, pressed % 4)
            section.is_inside()
    except KeyboardInterrupt:
        pass
other = threading.Thread(target=section.run, args=(print, pressed), daemon=True)
other.start()
other.join(10)
assert not other.is_alive() and not section.is_inside()
"""


def test_ctrl_c_never_leaves_it_locked() -> None:
    """The real signal, into the main thread of a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.returncode) == ("2000\n", 0), ended.stderr
