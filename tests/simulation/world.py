"""Virtual time: things happen in the order of their times, and nothing waits."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["World"]


class World:
    """``now`` is the time of what is happening. Of two things at one time, the one planned first is first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._plans: list[tuple[float, int, Callable[[Any], object], Any]] = []
        self._serial = 0

    def at(self, when: float, what: Callable[[Any], object], whom: Any = None) -> None:
        self._serial += 1
        heapq.heappush(self._plans, (when, self._serial, what, whom))

    def after(self, seconds: float, what: Callable[[Any], object], whom: Any = None) -> None:
        self.at(self.now + seconds, what, whom)

    def run(self, until: float) -> None:
        plans = self._plans
        while plans and plans[0][0] <= until:
            self.now, _, what, whom = heapq.heappop(plans)
            what(whom)
        self.now = until
