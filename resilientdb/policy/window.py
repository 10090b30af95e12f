"""Counts of successes, failures and slow calls over the last few seconds, in constant space and time."""

from __future__ import annotations

__all__ = ["Window"]


class Window:
    """A sliding window of ``length`` seconds, kept in ``slices`` slices.

    A slice leaves as a whole, so the window really covers between ``length * (slices - 1) / slices`` and
    ``length`` seconds. Not thread-safe: guarded by its owner's lock.
    """

    __slots__ = ("_bad", "_current", "_good", "_per_second", "_slices", "_slow")

    def __init__(self, length: float, slices: int = 10) -> None:
        self._slices = slices
        self._per_second = slices / length
        self._good = [0] * slices
        self._bad = [0] * slices
        self._slow = [0] * slices
        self._current = 0

    def success(self, now: float, count: int = 1) -> None:
        current = int(now * self._per_second)
        if current != self._current:
            self._advance(current)
        self._good[self._current % self._slices] += count

    def failure(self, now: float) -> None:
        current = int(now * self._per_second)
        if current != self._current:
            self._advance(current)
        self._bad[self._current % self._slices] += 1

    def slow_success(self, now: float) -> None:
        """A success, counted among the slow ones too."""
        self.success(now)
        self._slow[self._current % self._slices] += 1

    def totals(self, now: float) -> tuple[int, int]:
        """(successes, failures) within the window that ends at ``now``."""
        current = int(now * self._per_second)
        if current != self._current:
            self._advance(current)
        return sum(self._good), sum(self._bad)

    def slow(self, now: float) -> int:
        """How many of the successes were slow ones, within the window that ends at ``now``."""
        current = int(now * self._per_second)
        if current != self._current:
            self._advance(current)
        return sum(self._slow)

    def clear(self) -> None:
        self._good = [0] * self._slices
        self._bad = [0] * self._slices
        self._slow = [0] * self._slices

    def _advance(self, current: int) -> None:
        if current < self._current:
            # An outcome timed just before another thread's: it belongs to the slice that is open.
            # (Its own slice may already have been handed to newer seconds.)
            return
        for passed in range(self._current + 1, min(current, self._current + self._slices) + 1):
            self._good[passed % self._slices] = 0
            self._bad[passed % self._slices] = 0
            self._slow[passed % self._slices] = 0
        self._current = current
