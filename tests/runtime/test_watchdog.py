"""Cutting a connection at its time: exactly then, only that one, and never one that is somebody else's by now."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.watchdog import GRACE, Watch, Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def dog() -> Watchdog:
    return Watchdog()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.settimeout(10)
    far.settimeout(10)
    with near, far:
        yield near, far


Pair = tuple[socket.socket, socket.socket]


def assert_alive(pair: Pair) -> None:
    pair[0].sendall(b"?")
    assert pair[1].recv(1) == b"?"


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_blocked_read_ends_at_the_appointed_time(dog: Watchdog, pair: Pair) -> None:
    watch = Watch(pair[0].fileno())
    began = monotonic()
    dog.appoint(watch, began + 0.1)
    assert pair[0].recv(1) == b"", "the end of the stream"
    assert 0.1 <= monotonic() - began < 2
    assert watch.fired
    assert watch.end() is True
    assert pair[1].recv(1) == b"", "the peer hears of it"


def test_called_off_in_time_nothing_is_touched(dog: Watchdog, pair: Pair) -> None:
    watch, other = Watch(pair[0].fileno()), Watch(pair[0].fileno())
    at = monotonic() + 0.05
    dog.appoint(watch, at)
    assert watch.end() is False
    dog.appoint(other, at + 0.05)
    while not other.fired:
        assert_alive(pair) if monotonic() < at else time.sleep(0.001)
    assert not watch.fired


def test_a_moved_appointment_is_kept_at_its_new_time(dog: Watchdog, pair: Pair) -> None:
    watch = Watch(pair[0].fileno())
    began = monotonic()
    dog.appoint(watch, began + 0.03)
    dog.appoint(watch, began + 0.15)
    assert pair[0].recv(1) == b""
    assert monotonic() - began >= 0.15
    watch.end()


def test_an_appointment_may_be_moved_forward(dog: Watchdog, pair: Pair) -> None:
    watch = Watch(pair[0].fileno())
    began = monotonic()
    dog.appoint(watch, began + 60)
    dog.appoint(watch, began + 0.05)
    assert pair[0].recv(1) == b""
    assert monotonic() - began < 10
    watch.end()


def test_nobody_wants_it_any_more(dog: Watchdog, pair: Pair) -> None:
    asked = threading.Event()

    def still_wanted() -> bool:
        asked.set()
        return False

    watch = Watch(pair[0].fileno(), still_wanted)
    dog.appoint(watch, monotonic())
    assert asked.wait(10)
    assert watch.end() is False
    assert_alive(pair)


def test_firing_for_a_time_that_was_moved_does_nothing(pair: Pair) -> None:
    watch = Watch(pair[0].fileno())
    watch.at = 2.0
    watch.fire(1.0)
    assert not watch.fired
    watch.end()
    watch.fire(0.0)
    assert not watch.fired
    assert_alive(pair)


def test_the_earliest_is_first_whatever_the_order(dog: Watchdog) -> None:
    pairs = [socket.socketpair() for _ in range(20)]
    watches = [Watch(near.fileno()) for near, _ in pairs]
    began = monotonic()
    for number in (7, 3, 19, 0, 12, 5, 1, 18, 9, 2, 15, 4, 6, 8, 10, 11, 13, 14, 16, 17):
        dog.appoint(watches[number], began + 0.1 + 0.01 * number)
    for number, (near, far) in enumerate(pairs):
        near.settimeout(10)
        assert near.recv(1) == b""
        assert monotonic() - began >= 0.1 + 0.01 * number
        near.close()
        far.close()
    assert all(watch.end() for watch in watches)


def test_a_descriptor_used_again_by_another_connection_is_not_hit(dog: Watchdog) -> None:
    near, far = socket.socketpair()
    number = near.fileno()
    watch = Watch(number)
    at = monotonic() + 0.05
    dog.appoint(watch, at)
    near.close()
    # Closed behind our back, its number given to somebody else at once.
    others = [socket.socketpair() for _ in range(3)]
    assert number in {one.fileno() for pair in others for one in pair}
    while not watch.fired:
        time.sleep(0.001)
    for pair in others:
        assert_alive(pair)
        pair[0].close()
        pair[1].close()
    far.close()
    watch.end()


def test_descriptors_are_not_leaked(dog: Watchdog, pair: Pair) -> None:
    dog.appoint(Watch(pair[0].fileno()), monotonic() + 60)  # starts the thread
    gc.collect()
    before = open_descriptors()
    for _ in range(20):
        Watch(pair[0].fileno()).end()
        Watch(pair[0].fileno())  # forgotten
    fired = Watch(pair[0].fileno())
    fired.at = 1.0
    fired.fire(1.0)
    fired.end()
    fired.end()
    gc.collect()
    assert open_descriptors() == before


def test_what_is_not_a_socket_does_not_end_the_watchdog(dog: Watchdog, pair: Pair) -> None:
    reader, writer = os.pipe()
    watch, next_one = Watch(reader), Watch(pair[0].fileno())
    os.close(reader)
    os.close(writer)
    dog.appoint(watch, monotonic())
    dog.appoint(next_one, monotonic() + 0.02)
    assert pair[0].recv(1) == b""
    watch.end()
    next_one.end()


def test_ten_thousand_appointments_called_off_are_forgotten(dog: Watchdog, pair: Pair) -> None:
    at = monotonic() + 600
    kept = Watch(pair[0].fileno())
    dog.appoint(kept, at)
    most = 0
    for number in range(10_000):
        watch = Watch(pair[0].fileno())
        dog.appoint(watch, at + number)
        watch.end()
        most = max(most, len(dog._heap))
    assert most <= 1025
    assert any(reference() is kept for _, _, reference in dog._heap)
    dog.appoint(kept, monotonic() + 0.02)
    assert pair[0].recv(1) == b""
    kept.end()


def test_one_watch_moved_ten_thousand_times(dog: Watchdog, pair: Pair) -> None:
    watch = Watch(pair[0].fileno())
    for number in range(10_000):
        dog.appoint(watch, monotonic() + 600 + number)
    assert len(dog._heap) <= 1025
    dog.appoint(watch, monotonic() + 0.02)
    assert pair[0].recv(1) == b""
    watch.end()


def test_ending_and_firing_exclude_each_other(dog: Watchdog) -> None:
    """After ``end`` has said "not cut", the socket is whole; after "cut", it is cut."""
    for number in range(200):
        near, far = socket.socketpair()
        watch = Watch(near.fileno())
        dog.appoint(watch, monotonic() + 0.0001 * (number % 5))
        if number % 3:
            time.sleep(0.0002)
        if watch.end():
            near.settimeout(10)
            assert near.recv(1) == b""
        else:
            assert_alive((near, far))
        near.close()
        far.close()


def test_a_finalizer_that_makes_an_appointment_inside_the_lock(dog: Watchdog, pair: Pair) -> None:
    """A collection in the middle of it rolls a forgotten connection back, under the caller's deadline."""
    done = threading.Event()
    watch = Watch(pair[0].fileno())

    def work() -> None:
        with dog._lock:
            dog.appoint(watch, monotonic() + 0.02)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(10)
    assert pair[0].recv(1) == b""
    watch.end()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_child_it_has_no_appointments_and_a_thread_of_its_own(dog: Watchdog, pair: Pair) -> None:
    watch = Watch(pair[0].fileno())
    dog.appoint(watch, monotonic() + 600)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            dog.after_fork()
            near, far = socket.socketpair()
            near.settimeout(10)
            own = Watch(near.fileno())
            dog.appoint(own, monotonic() + 0.02)
            status = 1 if len(dog._heap) > 1 or near.recv(1) else 0
            far.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_alive(pair)
    watch.end()


# -- a statement that can be cancelled ------------------------------------------------------------------------------


class Server:
    """Is asked to cancel; hears of it when it is let to, if at all."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.hears = threading.Event()
        self.until = 0.0
        self.error: BaseException | None = None

    def ask(self) -> Callable[[float], None]:
        return self.cancel

    def cancel(self, until: float) -> None:
        self.until = until
        self.asked.set()
        assert self.hears.wait(10)
        if self.error is not None:
            raise self.error


def test_a_statement_is_cancelled_before_it_is_cut(dog: Watchdog, pair: Pair) -> None:
    watch, server = Watch(pair[0].fileno()), Server()
    server.hears.set()
    at = monotonic() + 0.05
    dog.appoint(watch, at)
    watch.begin(server.ask)
    assert server.asked.wait(10)
    assert monotonic() >= at
    assert server.until <= monotonic() + GRACE
    asking = watch.finished()
    assert asking is not None
    asking.result(10)
    time.sleep(2 * GRACE)
    assert_alive(pair)
    assert watch.end() is False


def test_cut_when_the_cancel_has_no_effect(dog: Watchdog, pair: Pair) -> None:
    watch, server = Watch(pair[0].fileno()), Server()
    server.hears.set()
    began = monotonic()
    watch.begin(server.ask)
    dog.appoint(watch, began + 0.05)
    assert pair[0].recv(1) == b"", "the end of the stream"
    assert monotonic() >= began + 0.05 + GRACE / 2
    assert server.asked.is_set()
    assert watch.end() is True


def test_cut_at_once_when_the_cancel_fails(pair: Pair) -> None:
    watch, server = Watch(pair[0].fileno()), Server()
    server.error = ConnectionRefusedError()
    watch.begin(server.ask)
    watch.at = 1.0
    watch.fire(1.0)
    server.hears.set()
    assert pair[0].recv(1) == b""
    asking = watch.finished()
    assert asking is not None
    asking.result(10)
    assert watch.end() is True


@pytest.mark.parametrize("answer", ["nothing", "an error"])
def test_cut_at_once_when_there_is_nobody_to_ask(pair: Pair, answer: str) -> None:
    def ask() -> None:
        if answer == "an error":
            raise OSError

    watch = Watch(pair[0].fileno())
    watch.begin(ask)
    watch.at = 1.0
    assert watch.fire(1.0) is None
    assert watch.end() is True


def test_given_back_while_a_cancel_is_under_way_it_is_cut(pair: Pair) -> None:
    """Nobody knows whom it would hit."""
    watch, server = Watch(pair[0].fileno()), Server()
    watch.begin(server.ask)
    watch.at = 1.0
    assert watch.fire(1.0) == watch.until
    assert server.asked.wait(10)
    assert watch.end() is True
    server.hears.set()
    assert pair[0].recv(1) == b""


def test_a_statement_that_ended_before_is_not_cancelled(dog: Watchdog, pair: Pair) -> None:
    watch, server = Watch(pair[0].fileno(), is_busy=lambda: False), Server()
    watch.begin(server.ask)
    dog.appoint(watch, monotonic() + 0.02)
    assert watch.finished() is None
    time.sleep(0.06)
    assert not server.asked.is_set()
    assert watch.end() is False
    assert_alive(pair)


def test_between_two_statements_it_looks_again(pair: Pair) -> None:
    busy = False
    watch = Watch(pair[0].fileno(), is_busy=lambda: busy)
    watch.at = at = 1.0
    again = watch.fire(at)
    assert again is not None
    assert again == watch.at
    busy = True
    assert watch.fire(again) is None
    assert watch.end() is True


def test_no_more_threads_than_so_many(dog: Watchdog) -> None:
    """The others wait for theirs, and are asked for all the same; appointments are on time meanwhile."""
    asked, hears = threading.Semaphore(0), threading.Event()

    def cancel(_: float) -> None:
        asked.release()
        assert hears.wait(10)

    pairs = [socket.socketpair() for _ in range(20)]
    watches = [Watch(near.fileno()) for near, _ in pairs]
    for watch in watches:
        watch.begin(lambda: cancel)
        watch.at = 1.0
        assert watch.fire(1.0) is not None
    for _ in range(16):
        assert asked.acquire(timeout=10)
    assert not asked.acquire(timeout=0.05)
    near, far = socket.socketpair()
    near.settimeout(10)
    other = Watch(near.fileno())
    dog.appoint(other, monotonic() + 0.02)
    assert near.recv(1) == b""
    other.end()
    hears.set()
    for watch in watches:
        asking = watch.finished()
        assert asking is not None
        asking.result(10)
        assert watch.end() is False
    for _ in range(4):
        assert asked.acquire(timeout=10)
    for one in (*pairs, (near, far)):
        one[0].close()
        one[1].close()
