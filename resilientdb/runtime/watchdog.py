"""Ends a database call at its deadline, whatever the driver is doing.

A silent server is the hard case: no driver timeout covers it everywhere, a task's cancellation waits for the
driver's own graceful close (3 s in asyncpg, 11 s in psycopg), and a thread blocked in C cannot be interrupted at
all. What works on every driver is ``shutdown()`` on the connection's socket, from outside: the driver then
finds its connection lost and says so at once. The socket is shut down through a duplicate of its descriptor,
made while the connection is certainly ours, so that a number reused by another connection in the meantime is
never hit. A connection ended this way is broken on purpose and must be discarded.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING

from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Watch", "Watchdog", "watchdog"]


class Watch:
    """One connection's appointment with the watchdog. ``end`` it when the connection is given back.

    ``_guard`` makes firing and ending exclude each other: after ``end`` returned False the socket has not been
    and will not be touched.
    """

    __slots__ = ("__weakref__", "_fd", "_guard", "at", "fired", "still_wanted")

    def __init__(self, fd: int, still_wanted: Callable[[], bool] | None = None) -> None:
        # Re-entrant: a garbage collection while firing may find the very connection, forgotten, and end its watch.
        self._guard = threading.RLock()
        self._fd: int | None = os.dup(fd)
        self.at = 0.0
        """When to fire, monotonic seconds; 0 = not now."""
        self.fired = False
        self.still_wanted = still_wanted
        """Asked just before firing: False = the deadline's block has ended meanwhile."""

    def end(self) -> bool:
        """Call the appointment off and close the duplicate. True = it was too late, the call was cut."""
        with self._guard:
            self.at = 0.0
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
            return self.fired

    def fire(self, at: float) -> None:
        """Shut the socket down, unless the appointment was moved or called off."""
        with self._guard:
            if self._fd is None or self.at != at:
                return
            self.at = 0.0
            if self.still_wanted is not None and not self.still_wanted():
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

    def after_fork(self) -> None:
        """In the child: the thread did not come along, and the sockets are the parent's."""
        self.__init__()  # type: ignore[misc]

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
                watch.fire(at)
                del watch


def _is_due(entry: tuple[float, int, weakref.ref[Watch]]) -> bool:
    watch = entry[2]()
    return watch is not None and watch.at == entry[0]


watchdog = Watchdog()
"""The process's watchdog."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watchdog.after_fork)
