"""How many retries a database can be asked to bear.

Retries multiply the load on a database exactly when it can bear the least. The budget allows, over a sliding
window, a share of the calls that succeed, plus a small floor so that a quiet service may still retry (Finagle's
``RetryBudget``; by a window of time rather than by calls in flight, because few are in flight at low traffic).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.policy.window import Window

if TYPE_CHECKING:
    from resilientdb.config import RetryBudget

__all__ = ["Budget"]


class Budget:
    """The account of one database. ``rate`` is always the successful calls a second, at present.

    Not thread-safe: guarded by its owner's lock.
    """

    __slots__ = ("_settings", "_spent", "exhausted")

    def __init__(self, settings: RetryBudget) -> None:
        self._settings = settings
        self._spent = Window(settings.window)
        self.exhausted = False
        """Whether the last retry asked for was refused."""

    def try_spend(self, now: float, rate: float) -> bool:
        """Ask for one retry; True = granted and counted."""
        spent, _ = self._spent.totals(now)
        self.exhausted = spent >= self._allowed(rate)
        if self.exhausted:
            return False
        self._spent.success(now)
        return True

    def left(self, now: float, rate: float) -> float:
        """Share of the budget not yet spent, 0.0 to 1.0."""
        allowed = self._allowed(rate)
        spent, _ = self._spent.totals(now)
        return max(0.0, 1.0 - spent / allowed) if allowed else 0.0

    def _allowed(self, rate: float) -> float:
        return self._settings.floor + self._settings.ratio * rate * self._settings.window
