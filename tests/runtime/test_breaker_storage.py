"""A storage is told the newest state, by a thread of its own: whatever it does, no caller notices."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pybreaker
import pytest

from resilientdb import BreakerPolicy
from resilientdb.runtime.breaker import CircuitBreaker
from resilientdb.runtime.storage import StorageWriter

if TYPE_CHECKING:
    from collections.abc import Callable


class Shelf(pybreaker.CircuitMemoryStorage):
    """A storage of the user's own. ``gate``, if there is one, is what each write waits for; ``broken`` what it
    raises."""

    gate: threading.Event | None = None
    broken: Exception | None = None

    def __init__(self, name: str) -> None:
        super().__init__(pybreaker.STATE_CLOSED)
        self.node = name
        self.written: list[str] = []
        self.tried = 0

    @property
    def state(self) -> str:
        return self.written[-1] if self.written else "closed"

    @state.setter
    def state(self, state: str) -> None:
        self.tried += 1
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.broken is not None:
            raise self.broken
        self.written.append(state)


def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up, f"never: {what}"
        time.sleep(0.001)


def idle(name: str) -> bool:
    """Whether the writer of that name has no thread any more."""
    return all(thread.name != f"resilientdb-storage {name}" for thread in threading.enumerate())


@pytest.fixture
def shelf() -> Shelf:
    return Shelf("db:5432")


@pytest.fixture
def writer(shelf: Shelf) -> StorageWriter:
    return StorageWriter("db:5432", lambda _name: shelf, pause=0.01)


def make(storage: Callable[[str], Any], name: str = "db:5432") -> CircuitBreaker:
    return CircuitBreaker(BreakerPolicy(minimum_calls=1, storage=storage), name=name)


def test_it_is_told_from_the_start_and_of_each_move() -> None:
    shelves: list[Shelf] = []

    def storage(name: str) -> Shelf:
        shelves.append(Shelf(name))
        return shelves[-1]

    breaker = make(storage)
    until(lambda: bool(shelves and shelves[0].written == ["closed"]), "told that it is closed")
    breaker.open()
    until(lambda: shelves[0].written == ["closed", "open"], "told that it is open")
    assert shelves[0].opened_at is not None
    breaker.close()
    until(lambda: shelves[0].written == ["closed", "open", "closed"], "told that it is closed again")
    until(lambda: idle("db:5432"), "the thread has ended: there is nothing more to do")
    (shelf,) = shelves
    assert shelf.node == "db:5432"


def test_it_does_not_dictate_the_state() -> None:
    class OpenShelf(Shelf):
        @property
        def state(self) -> str:
            return "open"

        @state.setter
        def state(self, state: str) -> None:
            pass

    breaker = make(OpenShelf)
    assert (breaker.current_state, breaker.state.name) == ("closed", "closed")
    assert breaker.call(int) == 0


def test_one_that_hangs_delays_nobody_and_is_told_only_the_newest(shelf: Shelf) -> None:
    shelf.gate = threading.Event()
    moves: list[str] = []
    breaker = make(lambda _name: shelf)
    breaker.subscribe(lambda move: moves.append(move.new))
    until(lambda: shelf.tried == 1, "it hangs")
    threads = threading.active_count()
    for _ in range(50):
        breaker.open()
        breaker.close()
    breaker.open()
    assert len(moves) == 101
    assert threading.active_count() == threads, "one thread, and no more"
    shelf.gate.set()
    until(lambda: shelf.written == ["closed", "open"], "what it hung with, and the newest")


def test_one_that_cannot_even_be_made_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tried = threading.Event()

    def storage(_name: str) -> Shelf:
        tried.set()
        raise ConnectionError("the other server is away")

    breaker = make(storage)
    assert tried.wait(10)
    breaker.open()
    assert breaker.state.name == "open"
    until(lambda: "the circuit of db:5432 cannot be stored (ConnectionError)" in caplog.text, "said")
    breaker._writer.stop()  # type: ignore[union-attr]


def test_a_failure_is_said_once_until_it_works_again(
    shelf: Shelf, writer: StorageWriter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="resilientdb")
    for round_ in (1, 2):
        shelf.broken = ConnectionError("away")
        tried = shelf.tried
        writer.tell("open")
        until(lambda tried=tried: shelf.tried > tried + 3, "tried again and again")  # type: ignore[misc]
        assert (
            caplog.messages.count(
                "the circuit of db:5432 cannot be stored (ConnectionError); it goes on without, and tries again"
            )
            == round_
        )
        writer.tell("half-open")
        shelf.broken = None
        until(lambda: shelf.state == "half-open", "the newest is told when it is back")
        until(lambda: idle("db:5432"), "the thread has ended")
        assert len(caplog.messages) == 2 * round_
        assert caplog.messages[-1] == "the circuit of db:5432 is stored again"


def test_a_forgotten_breaker_leaves_no_thread_behind() -> None:
    class Lost(Shelf):
        broken = ConnectionError("away")

    breaker = make(Lost, name="forgotten")
    until(lambda: not idle("forgotten"), "it tries")
    del breaker
    gc.collect()
    until(lambda: idle("forgotten"), "the thread has ended")


def test_a_silent_redis_storage_is_made_to_speak() -> None:
    """pybreaker's own catches what its client raises, and logs it: each time, and to nobody's use."""
    redis: Any = pytest.importorskip("redis")

    class Client:
        def __init__(self) -> None:
            self.kept: dict[str, str] = {}
            self.away = False
            self.tried = 0

        def setnx(self, key: str, value: str) -> None:
            self.kept.setdefault(key, value)

        def set(self, key: str, value: str) -> None:
            self.tried += 1
            if self.away:
                raise redis.RedisError("away")
            self.kept[key] = value

        def transaction(self, _change: Any, key: str) -> None:
            self.set(key, "now")

    client: Any = Client()
    storage = pybreaker.CircuitRedisStorage("closed", client)
    log = storage.logger
    writer = StorageWriter("db", lambda _name: storage, pause=0.01)
    client.away = True
    writer.tell("open")
    until(lambda: client.tried > 2, "its failure was seen")
    client.away = False
    until(lambda: client.kept.get("pybreaker:state") == "open", "told")
    assert client.kept["pybreaker:opened_at"] == "now"
    assert storage.logger is log, "the user's own object is as it was"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_has_a_thread_and_a_storage_of_its_own(shelf: Shelf) -> None:
    shelf.gate = threading.Event()
    breaker = make(lambda _name: shelf)
    until(lambda: shelf.tried == 1, "the parent's thread is at work")
    reader, writing = os.pipe()
    child = os.fork()
    if child == 0:
        breaker.after_fork()
        shelf.gate = None
        breaker.open()
        give_up = time.monotonic() + 10
        while shelf.state != "open" and time.monotonic() < give_up:
            time.sleep(0.001)
        os.write(writing, shelf.state.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reader) as answer:
        assert answer.read() == "open"
    shelf.gate.set()
    until(lambda: shelf.written == ["closed"], "the parent's goes on")
