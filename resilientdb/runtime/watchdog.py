"""Ends a database call at its deadline, whatever the driver is doing.

Where the server still answers, it is asked to cancel the statement: by another connection, so that the call ends as
any that fails and its own connection stays. Asking takes a while, and a silent server does not hear it. So at most
``GRACE`` later the socket is shut down, from outside: no driver timeout covers silence everywhere, a task's
cancellation waits for the driver's own graceful close (2 s in asyncpg, 10 s in psycopg), and a thread blocked in C
cannot be interrupted at all. The driver then finds its connection lost and says so at once.

The socket is shut down through a duplicate of its descriptor, made while the connection is certainly ours, so that a
number reused by another connection in the meantime is never hit. A connection ended this way is broken on purpose and
must be discarded.
"""

from __future__ import annotations

import _thread
import concurrent.futures
import contextlib
import heapq
import itertools
import os
import socket
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GRACE", "Asking", "Watch", "Watchdog", "aside", "watchdog"]

GRACE: Final = 0.06
"""Seconds from the deadline in which the server may still end the statement itself, and save its connection. What a
call may be late by is 0.1; the rest is for threads to wake up in."""

_MOST_ASKED: Final = 16
"""Cancels that may be under way at once, in the process: each is a thread. One that has to wait for its turn may be
too late to save a connection, but not for the server, which goes on with the statement until it hears."""
_MOST_WAITING: Final = 1000

Asking = concurrent.futures.Future
"""A cancel under way. It is done when it can no longer reach the server."""


class Watch:
    """One connection's appointment with the watchdog. ``end`` it when the connection is given back.

    ``_guard`` makes firing and ending exclude each other: after ``end`` returned False the socket has not been
    and will not be touched, and no cancel is under way.
    """

    __slots__ = (
        "__weakref__",
        "_asking",
        "_fd",
        "_guard",
        "ask",
        "at",
        "fired",
        "is_busy",
        "still_wanted",
        "until",
    )

    def __init__(
        self,
        fd: int,
        still_wanted: Callable[[], bool] | None = None,
        is_busy: Callable[[], bool] | None = None,
    ) -> None:
        # Re-entrant: a garbage collection while firing may find the very connection, forgotten, and end its watch.
        self._guard = threading.RLock()
        self._fd: int | None = os.dup(fd)
        self._asking: Asking[None] | None = None
        self.at = 0.0
        """When to fire, monotonic seconds; 0 = not now."""
        self.fired = False
        """Whether the socket was shut down."""
        self.still_wanted = still_wanted
        """Asked just before firing: False = the deadline's block has ended meanwhile."""
        self.is_busy = is_busy
        """Whether the driver waits for the server, where no statement is known to be under way. None: it may."""
        self.until = 0.0
        """When the last cancel must have come to its end."""
        self.ask: Callable[[], Callable[[float], None] | None] | None = None
        """While a statement is under way: asked at its time, without waiting, for what cancels it at the server.

        That is called in a thread of its own with the time by which it must be over; it returns when the server has
        heard, and will not cancel anything later on account of this, and raises otherwise. None: this is not to be
        cancelled."""

    def begin(self, ask: Callable[[], Callable[[float], None] | None]) -> None:
        """A statement is about to be sent."""
        self._asking = None
        self.ask = ask

    def finished(self) -> Asking[None] | None:
        """The statement has ended. If a cancel was sent meanwhile, returns it: nothing more may be sent on the
        connection before that is done, or the next statement would be hit. ``cut`` it if it is not done in time."""
        with self._guard:
            self.ask = None
            if self._asking is not None:
                self.at = 0.0
            return self._asking

    def end(self) -> bool:
        """Call the appointment off and close the duplicate. True = it was too late, the call was cut."""
        with self._guard:
            self.at = 0.0
            self.ask = None
            if self._asking is not None and not self._asking.done():
                self._cut()
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
            return self.fired

    def fire(self, at: float) -> float | None:
        """Cancel the call or cut it, unless the appointment was moved or called off. Returns when to come again."""
        with self._guard:
            if self._fd is None or self.at != at:
                return None
            self.at = 0.0
            if self.still_wanted is not None and not self.still_wanted():
                return None
            again = None
            if self.ask is None and (self._asking is None or self._asking.done()):
                again = self._look()
            elif self._asking is None:
                again = self._ask(at)
            if again is None:
                self._cut()
            else:
                self.at = again
            return again

    def cut(self) -> None:
        """Shut the socket down now; whoever waits for it finds it lost."""
        with self._guard:
            self.at = 0.0
            self._cut()

    def _ask(self, at: float) -> float | None:
        """Have the server cancel the statement. Returns when that must have worked; None: it is not to be had."""
        assert self.ask is not None
        self.until = until = max(at + GRACE, monotonic() + GRACE / 2)
        with contextlib.suppress(Exception):  # a driver's object that just loses its connection
            cancel = self.ask()
            if cancel is not None:
                self._asking = aside(cancel, until, self.cut)
        return None if self._asking is None else until

    def _look(self) -> float | None:
        """Between two statements: a connection that waits for nothing need not be lost."""
        return None if self.is_busy is None or self.is_busy() else monotonic() + GRACE / 2

    def _cut(self) -> None:
        if self._fd is None:
            return
        self.fired = True
        fd, self._fd = self._fd, None
        # ENOTCONN: the peer was faster.
        with contextlib.suppress(OSError), socket.socket(fileno=fd) as handle:
            handle.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


class Watchdog:
    """One daemon thread, started with the first appointment, that keeps them all in order of time.

    ``_lock`` guards the heap; a watch is fired outside it. Appointments called off stay in the heap until
    their time or until they outnumber the rest, so making one costs O(log n) and ending one nothing.
    """

    def __init__(self) -> None:
        # Re-entrant: a garbage collection inside may roll a forgotten connection back, under the same deadline.
        self._lock = threading.Condition(threading.RLock())
        self._heap: list[tuple[float, int, weakref.ref[Watch]]] = []
        self._serial = itertools.count()
        self._thread: threading.Thread | None = None
        self._compact_at = 1024

    def appoint(self, watch: Watch, at: float) -> None:
        """Fire ``watch`` at ``at``, instead of at any time said before."""
        watch.at = at
        self._enter(watch, at)

    def after_fork(self) -> None:
        """In the child: the thread did not come along, and the sockets are the parent's."""
        self.__init__()  # type: ignore[misc]
        _aside.__init__()  # type: ignore[misc]

    def _enter(self, watch: Watch, at: float) -> None:
        entry = (at, next(self._serial), weakref.ref(watch))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="resilientdb-watchdog", daemon=True)
                self._thread.start()
            first = not self._heap or at < self._heap[0][0]
            heapq.heappush(self._heap, entry)
            if len(self._heap) > self._compact_at:
                self._compact()
            if first:
                self._lock.notify()

    def _compact(self) -> None:
        entries, self._heap = self._heap, []
        # Added to what came in meanwhile, see _lock.
        self._heap += [entry for entry in entries if _is_due(entry)]
        heapq.heapify(self._heap)
        self._compact_at = max(1024, 2 * len(self._heap))

    def _run(self) -> None:
        while True:
            with self._lock:
                while self._heap and not _is_due(self._heap[0]):
                    heapq.heappop(self._heap)  # called off: not worth waking up for
                while not self._heap:
                    self._lock.wait()
                at, _, reference = self._heap[0]
                delay = at - monotonic()
                if delay > 0:
                    self._lock.wait(delay)
                    continue
                heapq.heappop(self._heap)
            watch = reference()
            if watch is not None:
                again = watch.fire(at)
                if again is not None:
                    self._enter(watch, again)
                del watch


def _is_due(entry: tuple[float, int, weakref.ref[Watch]]) -> bool:
    watch = entry[2]()
    return watch is not None and watch.at == entry[0]


class _Aside:
    """Threads that come and go, a few at a time, and what waits for one. ``_lock`` guards both."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def run(self, work: Callable[[], None]) -> bool:
        """Have ``work``, which does not raise, done soon; False if there is too much already."""
        with self._lock:
            if self._running >= _MOST_ASKED:
                if len(self._waiting) >= _MOST_WAITING:
                    return False
                self._waiting.append(work)
                return True
            self._running += 1
        try:
            # Not a Thread, whose start() waits for it to run: the watchdog has other appointments.
            _thread.start_new_thread(self._work, (work,))
        except RuntimeError:
            with self._lock:
                self._running -= 1
            return False
        return True

    def _work(self, work: Callable[[], None] | None) -> None:
        while work is not None:
            work()
            with self._lock:
                work = self._waiting.popleft() if self._waiting else None
                if work is None:
                    self._running -= 1


_aside = _Aside()


def aside(cancel: Callable[[float], None], until: float, failed: Callable[[], None]) -> Asking[None] | None:
    """Call ``cancel(until)`` in another thread; None if too many are to be called already. If it raises, ``failed``
    is called before it is done."""
    asking: Asking[None] = concurrent.futures.Future()
    asking.set_running_or_notify_cancel()

    def run() -> None:
        try:
            cancel(until)
        except BaseException:  # noqa: BLE001 - nobody but the caller's statement is to hear of it
            failed()
        finally:
            asking.set_result(None)

    return asking if _aside.run(run) else None


watchdog = Watchdog()
"""The process's watchdog."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watchdog.after_fork)
