"""A clock that a test moves by hand, for every option of the library that takes ``clock``."""

from __future__ import annotations

import math
import threading

__all__ = ["FakeClock"]


class FakeClock:
    """Monotonic seconds that stand still until :meth:`advance` is called.

    It starts at an arbitrary value, as ``time.monotonic`` does, so that code which takes zero to
    mean "never" fails in its unit test. Safe to call from several threads.
    """

    def __init__(self, start: float = 1_000.0) -> None:
        self._lock = threading.Lock()
        self._now = float(start)  # guarded by _lock

    def __call__(self) -> float:
        with self._lock:
            return self._now

    def advance(self, seconds: float) -> float:
        """Move forward and return the new time; ``ValueError`` for what a monotonic clock cannot do."""
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"a monotonic clock cannot advance by {seconds!r} seconds")
        with self._lock:
            self._now += seconds
            return self._now

    def __repr__(self) -> str:
        return f"FakeClock({self()!r})"
