"""How a caller waits for its turn: one parking place for threads, one for tasks of an event loop.

Both keep the same promise. ``wake`` is called at most once, from any thread, after the lock is released, and
answers False if nobody can be woken any more (what was granted is then to be given to somebody else); ``park``
returns True once woken, False when the time is over first. Neither decides anything: whether a waiter that
ran out of time was served after all is decided under the pool's lock (``Admission.leave``).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from resilientdb.policy.saturation import Lane
from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["TaskWaiter", "ThreadWaiter", "Waiter"]

_FOREVER = threading.TIMEOUT_MAX


class Waiter:
    """Base: one caller in line. ``granted`` and ``refusal`` are written under the pool's lock, before ``wake``."""

    __slots__ = ("at", "granted", "holds", "lane", "refusal", "remaining", "since")

    def __init__(self) -> None:
        self.since = monotonic()
        self.holds = 0
        """Slots of this pool that the caller has already."""
        self.lane = Lane.CRITICAL
        self.remaining: float | None = None
        self.at: Any = None
        """The slots that it waits for: of its own pool, where several share a line."""
        self.granted: Any = None
        """What came with the slot: a connection record."""
        self.refusal: Callable[[], BaseException] | None = None
        """Makes the error of a waiter that is sent away without a slot."""

    def wake(self) -> bool:
        raise NotImplementedError

    def park(self, seconds: float | None) -> bool:
        raise NotImplementedError


class ThreadWaiter(Waiter):
    """Parks a thread on a lock of its own: woken exactly once, by exactly one hand-off."""

    __slots__ = ("_gate",)

    def __init__(self) -> None:
        super().__init__()
        self._gate = threading.Lock()
        self._gate.acquire()

    def wake(self) -> bool:
        self._gate.release()
        return True

    def park(self, seconds: float | None) -> bool:
        return self._gate.acquire(timeout=_FOREVER if seconds is None else min(max(0.0, seconds), _FOREVER))


class TaskWaiter(Waiter):
    """Parks the current task, from inside SQLAlchemy's greenlet: ``suspend`` awaits a future from there."""

    __slots__ = ("_future", "_loop", "_suspend", "_thread")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, suspend: Callable[[asyncio.Future[bool]], bool]
    ) -> None:
        super().__init__()
        self._loop = loop
        self._suspend = suspend
        self._thread = threading.get_ident()
        self._future = loop.create_future()

    def wake(self) -> bool:
        try:
            if threading.get_ident() == self._thread:
                self._settle(True)
            else:
                # The slot may come from a garbage collection or a breaker that opened there.
                self._loop.call_soon_threadsafe(self._settle, True)
        except RuntimeError:
            return False  # the loop was closed with this task still waiting
        return True

    def _settle(self, woken: bool) -> None:
        if not self._future.done():
            self._future.set_result(woken)

    def park(self, seconds: float | None) -> bool:
        timer = None if seconds is None else self._loop.call_later(max(0.0, seconds), self._settle, False)
        try:
            return self._suspend(self._future)
        finally:
            if timer is not None:
                timer.cancel()
