"""Telling listeners: in order, one at a time, outside every lock, and none of them able to do harm."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from resilientdb.runtime.emitter import Emitter

if TYPE_CHECKING:
    from collections.abc import Callable


def test_nothing_is_told_before_it_is_delivered() -> None:
    emitter, told = Emitter(), []
    emitter.post(lambda: told.append(1))
    emitter.post(lambda: told.append(2))
    assert told == []
    emitter.deliver()
    assert told == [1, 2]
    emitter.deliver()
    assert told == [1, 2], "once"


def test_what_a_listener_causes_is_told_after_it_returns() -> None:
    emitter, told = Emitter(), []

    def first() -> None:
        emitter.post(lambda: told.append("caused"))
        emitter.deliver()
        told.append("first")

    emitter.post(first)
    emitter.post(lambda: told.append("second"))
    emitter.deliver()
    assert told == ["first", "second", "caused"]


def test_a_listener_that_raises_is_logged_and_the_next_is_told(caplog: pytest.LogCaptureFixture) -> None:
    emitter, told = Emitter(), []
    emitter.post(lambda: 1 / 0)
    emitter.post(lambda: told.append(1))
    emitter.deliver()
    assert told == [1]
    assert [record.name for record in caplog.records] == ["resilientdb"]
    assert "ZeroDivisionError" in caplog.text


def test_an_interruption_passes_and_loses_nothing() -> None:
    emitter, told = Emitter(), []

    def interrupted() -> None:
        raise KeyboardInterrupt

    emitter.post(interrupted)
    emitter.post(lambda: told.append(1))
    with pytest.raises(KeyboardInterrupt):
        emitter.deliver()
    emitter.deliver()
    assert told == [1]


def test_who_finds_another_delivering_does_not_wait() -> None:
    emitter, told = Emitter(), []
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert leave.wait(10)
        told.append("slow")

    emitter.post(slow)
    thread = threading.Thread(target=emitter.deliver)
    thread.start()
    assert entered.wait(10)
    emitter.post(lambda: told.append("quick"))
    emitter.deliver()
    assert told == []
    leave.set()
    thread.join(10)
    assert told == ["slow", "quick"]


def test_many_threads_lose_nothing_and_never_overlap() -> None:
    emitter = Emitter()
    told: list[tuple[int, int]] = []
    inside: list[int] = []
    overlaps: list[int] = []

    def tell(who: int, what: int) -> Callable[[], None]:
        def call() -> None:
            inside.append(who)
            if len(inside) > 1:
                overlaps.append(who)
            told.append((who, what))
            inside.pop()

        return call

    def work(who: int) -> None:
        for what in range(500):
            emitter.post(tell(who, what))
            emitter.deliver()

    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert overlaps == []
    assert len(told) == 8 * 500
    for who in range(8):
        assert [what for one, what in told if one == who] == list(range(500))
