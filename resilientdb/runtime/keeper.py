"""Looks after every pool of the process when something may be due there: one thread for all of them.

A pool says when it wants to be tended; the keeper calls it then, and each time that it has said in its answer. An
idle service's pools want nothing, and then the thread sleeps without end: it is kept, since it costs nothing
asleep, and ending it would leave a moment in which a nudge reaches nobody.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import logging
import os
import threading
import weakref
from collections import deque
from typing import Protocol

from resilientdb.runtime.clock import Clock, monotonic

__all__ = ["Keeper", "Tended", "keeper"]

logger = logging.getLogger("resilientdb")

_AFTER_ERROR = 1.0
"""Seconds until a subject whose ``tend`` raised is tended again."""

_SHORTEST = 0.01
"""Least seconds between two calls that a subject itself has asked for: one that always says "at once" would
otherwise keep a processor busy."""


class Tended(Protocol):
    """What can be looked after. It is held weakly, and known by identity."""

    def tend(self, now: float) -> float | None:
        """Do what is due; seconds until it should be called again, None: not before the next nudge.

        Called from the keeper's thread, outside every lock, never twice at once. While it runs, all others wait: what
        may block is to be handed to another thread.
        """


class Keeper:
    """One daemon thread, started with the first nudge.

    No lock guards it, since a nudge may come from a finalizer in the middle of anything, another nudge included.
    Everybody else only adds to ``_inbox``; the appointments (``_arranged`` and ``_heap``) are changed by the thread
    alone, and ``nudge`` looks at them to save itself the trouble. Each access is one operation on a deque or dict.
    """

    def __init__(self, *, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._inbox: deque[tuple[weakref.ref[Tended], int, float | None]] = deque()
        """A subject, its ``id``, and when to tend it; None = forget it."""
        self._arranged: dict[int, tuple[float, weakref.ref[Tended]]] = {}
        """The one appointment of each subject, by ``id``."""
        self._heap: list[tuple[float, int]] = []
        """Times and ids, soonest first; one that ``_arranged`` does not say as well has been called off."""
        self._wake = threading.Lock()
        """Held while there is nothing new: the thread sleeps by trying to take it."""
        self._wake.acquire()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def nudge(self, subject: Tended, after: float = 0.0) -> None:
        """Have ``subject`` tended in ``after`` seconds, or earlier if that was arranged already.

        From any thread, at any time, also from a finalizer; never blocks but to start the thread. What was changed
        before is seen by the ``tend`` that follows.
        """
        at = self._clock() + after
        # In this order: what is in the inbox may forget an appointment that still stands.
        if not self._inbox:
            arranged = self._arranged.get(id(subject))
            # It is taken out before its subject is tended, so where there is one, the call is still to come.
            if arranged is not None and arranged[0] <= at and arranged[1]() is subject:
                return
        self._post(subject, at)

    def forget(self, subject: Tended) -> None:
        """Call off what was arranged so far. A ``tend`` may be running, or about to begin."""
        if self._thread is not None:
            self._post(subject, None)

    def close(self) -> None:
        """Tend nobody any more, and say nothing of errors: the interpreter is about to exit."""
        self._closed = True
        self._rouse()

    def after_fork(self) -> None:
        """In the child: the thread did not come along, and what was arranged is about the parent's connections."""
        self.__init__(clock=self._clock)  # type: ignore[misc]

    def _post(self, subject: Tended, at: float | None) -> None:
        if self._closed:
            return
        self._inbox.append((weakref.ref(subject), id(subject), at))
        if self._thread is None or not self._thread.is_alive():
            self._start()
        self._rouse()

    def _rouse(self) -> None:
        with contextlib.suppress(RuntimeError):  # somebody has done so already
            self._wake.release()

    def _start(self) -> None:
        # Not waiting for it: whoever has it starts the thread, and may be this very one, below a finalizer.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="resilientdb-keeper", daemon=True)
                self._thread.start()
        except RuntimeError:
            # Out of threads. Whoever nudged wants a connection, not this; the next nudge tries again.
            logger.warning("the thread that looks after the pools could not be started", exc_info=True)
        finally:
            self._starting.release()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        me = threading.current_thread()
        while self._thread is me and not self._closed:
            self._read()
            seconds = self._until_next()
            if seconds is None or seconds > 0:
                self._wake.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))
            else:
                self._tend_next()

    def _read(self) -> None:
        while self._inbox:
            reference, key, at = self._inbox[0]
            if at is None:
                self._arranged.pop(key, None)
            else:
                self._arrange(reference, key, at)
            # Only now: while it is there, nobody trusts what is arranged.
            self._inbox.popleft()

    def _arrange(self, reference: weakref.ref[Tended], key: int, at: float) -> None:
        arranged = self._arranged.get(key)
        # The appointment of one that is gone is another's, who had the same id.
        if arranged is not None and arranged[0] <= at and arranged[1]() is not None:
            return
        self._arranged[key] = (at, reference)
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 64 + 2 * len(self._arranged):
            self._tidy()

    def _tidy(self) -> None:
        """Drop what was called off, so that the heap is never much longer than there are subjects."""
        for key in [key for key, (_, reference) in self._arranged.items() if reference() is None]:
            del self._arranged[key]
        self._heap = [(at, key) for key, (at, _) in self._arranged.items()]
        heapq.heapify(self._heap)

    def _until_next(self) -> float | None:
        """Seconds until the next appointment; None: there is none."""
        while self._heap:
            at, key = self._heap[0]
            arranged = self._arranged.get(key)
            if arranged is not None and arranged[0] == at:
                return at - self._clock()
            heapq.heappop(self._heap)
        return None

    def _tend_next(self) -> None:
        _, key = heapq.heappop(self._heap)
        _, reference = self._arranged.pop(key)
        subject = reference()
        if subject is None:
            return
        try:
            again = subject.tend(self._clock())
        except BaseException:
            again = _AFTER_ERROR
            if not self._closed:
                logger.exception("tending a %s failed", type(subject).__qualname__)
        if again is not None:
            # Before the inbox is read, so that who is forgotten meanwhile stays so.
            self._arrange(reference, key, self._clock() + max(again, _SHORTEST))


keeper = Keeper()
"""The process's keeper."""

atexit.register(keeper.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=keeper.after_fork)
