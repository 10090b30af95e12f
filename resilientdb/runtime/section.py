"""A critical section that a garbage collection may find its way into, and that leaves its consequences for later."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Reentered", "Section"]

P = ParamSpec("P")
R = TypeVar("R")


class Reentered(RuntimeError):
    """A finalizer, run by a garbage collection in the middle of the section, asked for the section again."""


class Section:
    """Runs one decision at a time, of all threads; what follows from it is done after the section is left.

    A decision neither waits nor sends, nor runs anything of the user's. But any allocation in it may start a
    garbage collection, whose finalizers run in this very thread: the lock is re-entrant, so that they do not wait
    for themselves, and a busy flag tells them that they must not touch what is half done. They say what is to be
    done with ``afterwards``.

    The lock is taken by a bare ``with`` on the lock itself: there, and nowhere else, can no asynchronous exception
    (KeyboardInterrupt, a thread's timeout) come between taking it and being sure to give it back.
    """

    __slots__ = ("_busy", "_consequences", "_lock", "_mend")

    def __init__(self, mend: Callable[[], object]) -> None:
        """``mend`` is called, inside, after a decision has raised: an asynchronous exception may have ended it
        half-way, and left counts that do not agree with what they count."""
        self._mend = mend
        self._lock = threading.RLock()
        self._busy = False
        self._consequences: deque[Callable[[], object]] = deque()

    def run(self, decide: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``decide(*args)``, alone; then, outside, what it and others have left to do.

        Raises ``Reentered`` when called from a finalizer in the middle of another decision.
        """
        inside = True
        try:
            with self._lock:
                if self._busy:
                    raise Reentered
                self._busy = True
                inside = False
                try:
                    return decide(*args, **kwargs)
                except BaseException:
                    self._mend()
                    raise
                finally:
                    self._busy = False
        finally:
            if self._consequences and not inside:
                self._act()

    def afterwards(self, act: Callable[[], object]) -> None:
        """Have ``act()`` called once the section has been left, by whoever leaves it."""
        self._consequences.append(act)

    def is_inside(self) -> bool:
        """Whether this very thread is inside: this is then a finalizer, in the middle of a decision."""
        with self._lock:
            return self._busy

    def _act(self) -> None:
        while self._consequences:
            try:
                act = self._consequences.popleft()
            except IndexError:
                return  # another thread was quicker
            act()
