"""Counting how long things take, in buckets: what a ``stats.Histogram`` is made of."""

from __future__ import annotations

from bisect import bisect_left

from resilientdb.stats import BOUNDS, Histogram

__all__ = ["Recorder"]


class Recorder:
    """A histogram in the making; constant space, a fraction of a microsecond an observation.

    Not locked. Two threads that add at the very same moment may cost one of the two observations, or its share
    of the sum. A snapshot agrees with itself, in that its count is the sum of its buckets; its sum may be ahead or
    behind by what is just being added.
    """

    __slots__ = ("_counts", "_sum")

    def __init__(self, before: Histogram | None = None) -> None:
        """``before``: goes on from there, as a pool does that takes another one's place."""
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0
        if before is not None:
            if before.bounds != BOUNDS:
                raise ValueError(f"a histogram of other buckets cannot be continued: {before.bounds}")
            self._counts = list(before.counts)
            self._sum = before.sum

    def add(self, seconds: float) -> None:
        """One more took this long. A bound belongs to the bucket that it ends."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> Histogram:
        """All that was added so far."""
        return Histogram(counts=tuple(self._counts), sum=self._sum)
