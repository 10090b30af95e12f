"""When to stop asking a node, and when to ask again: the circuit breaker's state machine, without the locks.

States are pybreaker's: ``closed`` (ask freely), ``open`` (ask nothing), ``half-open`` (let a few probes
through). The rules:

* closed → open when, over the window, at least ``minimum_calls`` outcomes are known and the share of
  failures reaches ``failure_rate_threshold``; or when the background prober finds the node dead.
* open → half-open when ``reset_timeout`` has passed since the last sign of failure, or when the prober gets an
  answer from a node that it had itself seen working all along (then real calls fail for a reason a probe does
  not see, and real calls must show that it is over).
* open → closed when the prober gets an answer from a node that it had seen dead.
* half-open → closed on one probe's success, → open on one probe's failure.

A **permit** says in which state a call was let through. An outcome is counted only while that state lasts, so
a late result from before the trip neither closes nor opens anything (``failsafe-go`` counts such results as
probes). An outcome is *success* (the node answered, even with an error of the application's own), *failure*,
or *inconclusive* (the caller was cancelled, waited locally, or never asked).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from resilientdb.policy.window import Window

if TYPE_CHECKING:
    from resilientdb.config import BreakerPolicy

__all__ = ["CLOSED", "HALF_OPEN", "OPEN", "BreakerCore", "Permit", "Transition"]

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"


class Permit:
    """Leave to make one call (a probe), or any number of calls while the circuit stays closed.

    Compared by identity. The same closed permit is handed to every caller of one closed period.
    """

    __slots__ = ("issued_at", "probe")

    def __init__(self, *, probe: bool, issued_at: float) -> None:
        self.probe = probe
        self.issued_at = issued_at


@dataclass(frozen=True, slots=True)
class Transition:
    """The circuit moved; whoever caused it announces it, once the lock is released."""

    old: str
    new: str
    cause: str


class BreakerCore:
    """One node's circuit. Not thread-safe: every method requires the owner's lock.

    Each method that may move the circuit returns the ``Transition`` or None.
    """

    __slots__ = (
        "_absorbed_at",
        "_by_hand",
        "_opened_at",
        "_policy",
        "_probed",
        "_probes",
        "_seen_dead",
        "_window",
        "closed_permit",
        "failing_since",
        "state",
    )

    def __init__(self, policy: BreakerPolicy, now: float, *, probed: bool = False) -> None:
        """``probed``: a background prober looks after the node, and closes the circuit as soon as it can."""
        self._policy = policy
        self._probed = probed
        self._by_hand = False
        self._opened_at = now
        self._window = Window(policy.window)
        self._absorbed_at = now
        self._probes: dict[Permit, None] = {}
        self._seen_dead = False
        self.state: str = CLOSED
        self.closed_permit: Permit | None = Permit(probe=False, issued_at=now)
        """The permit of the present closed period; None in any other state."""
        self.failing_since = now
        """When the node last showed that it fails, while open."""

    def try_acquire(self, now: float) -> tuple[Permit | None, Transition | None]:
        """Leave to call the node, or None."""
        if self.closed_permit is not None:
            return self.closed_permit, None
        moved = None
        if self.state == OPEN:
            if now < self.failing_since + self._policy.reset_timeout:
                return None, None
            moved = self._move(HALF_OPEN, now, "reset timeout passed")
        self._forget_lost_probes(now)
        if len(self._probes) >= self._policy.half_open_max_calls:
            return None, moved
        permit = Permit(probe=True, issued_at=now)
        self._probes[permit] = None
        return permit, moved

    def record_success(self, permit: Permit, now: float) -> Transition | None:
        """The node answered the call made under ``permit``."""
        if permit is self.closed_permit:
            self._window.success(now)
        elif permit in self._probes:
            return self._move(CLOSED, now, "a probe succeeded")
        return None

    def record_failure(self, permit: Permit, now: float, cause: str) -> Transition | None:
        """The node failed the call made under ``permit``."""
        if permit is self.closed_permit and self._policy.enabled:
            self._window.failure(now)
            good, bad = self._window.totals(now)
            if good + bad >= self._policy.minimum_calls and bad >= (
                self._policy.failure_rate_threshold * (good + bad)
            ):
                return self._move(OPEN, now, f"{bad} of {good + bad} calls failed, last: {cause}")
        elif permit in self._probes:
            return self._move(OPEN, now, f"a probe failed: {cause}")
        return None

    def release(self, permit: Permit) -> None:
        """The call made under ``permit`` showed nothing about the node."""
        self._probes.pop(permit, None)

    def prober_succeeded(self, now: float) -> Transition | None:
        """The background prober got an answer."""
        if self.state == CLOSED or self._by_hand:
            return None
        if self._seen_dead:
            return self._move(CLOSED, now, "the prober got an answer")
        if self.state == OPEN:
            return self._move(HALF_OPEN, now, "the prober gets answers; calls must show that they do too")
        return None

    def absorb(self, successes: int, now: float) -> None:
        """Count successes of the present closed period that were tallied elsewhere since the last time.

        When they happened in between is not known: they are taken to be spread evenly, so of a longer time only
        the share that falls into the window counts.
        """
        span = now - self._absorbed_at
        self._absorbed_at = now
        if self.state == CLOSED and successes:
            recent = successes if span <= self._policy.window else successes * self._policy.window / span
            self._window.success(now, round(recent))

    def prober_failed(self, now: float, cause: str) -> Transition | None:
        """The background prober found the node dead."""
        self._seen_dead = True
        self.failing_since = now
        if self.state == OPEN:
            return None
        return self._move(OPEN, now, f"the prober failed: {cause}")

    def force(self, state: str, now: float, cause: str) -> Transition | None:
        """Move by hand. A circuit opened so counts its reset timeout from now, and no prober closes it before."""
        moved = self._move(state, now, cause) if state != self.state else None
        self._by_hand = state == OPEN
        self.failing_since = now
        return moved

    def retry_after(self, now: float) -> float | None:
        """Seconds after which another call makes sense; None when closed.

        Without a prober, the time until the circuit lets a call through. With one, it may close at any moment:
        an outage is then expected to last about as long as it has lasted (as good a guess as any, and it spreads
        those who come back), up to the reset timeout.
        """
        if self.state == CLOSED:
            return None
        if self.state == HALF_OPEN:
            return 0.0
        remaining = max(0.0, self.failing_since + self._policy.reset_timeout - now)
        if not self._probed or self._by_hand:
            return remaining
        return min(now - self._opened_at, self._policy.reset_timeout)

    def rate(self, now: float) -> float:
        """Successes a second over the window: how fast callers are being served."""
        return self._window.totals(now)[0] / self._policy.window

    def _move(self, state: str, now: float, cause: str) -> Transition:
        transition = Transition(self.state, state, cause)
        self.state = state
        self._probes.clear()
        self.closed_permit = Permit(probe=False, issued_at=now) if state == CLOSED else None
        self._by_hand = False
        if state == OPEN:
            self.failing_since = now
            if transition.old == CLOSED:
                self._opened_at = now
        if state == CLOSED:
            self._window.clear()
            self._absorbed_at = now
            self._seen_dead = False
        return transition

    def _forget_lost_probes(self, now: float) -> None:
        """A probe whose caller neither finishes nor gives up must not hold the circuit for ever."""
        for permit in [p for p in self._probes if now >= p.issued_at + self._policy.reset_timeout]:
            del self._probes[permit]
