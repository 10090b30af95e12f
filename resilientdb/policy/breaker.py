"""When to stop asking a node, and when to ask again: the circuit breaker's state machine, without the locks.

States are pybreaker's: ``closed`` (ask freely), ``open`` (ask nothing), ``half-open`` (let a few probes
through). The rules:

* closed → open when, over the window, at least ``minimum_calls`` outcomes are known and the share of
  failures reaches ``failure_rate_threshold``, or that of slow calls ``slow_call_rate_threshold``; or when the
  background prober finds the node dead.
* open → half-open when the open time has passed since the last sign of failure, or when the prober gets an
  answer from a node that it had itself seen working all along (then real calls fail for a reason a probe does
  not see, and real calls must show that it is over); where a call has tried just now and got no answer in time,
  a quarter of the open time has to pass first.
* open → closed when the prober gets an answer from a node that it had seen dead.
* half-open → closed on one probe's success, → open on one probe's failure, or on a slow answer where slow calls
  count.

The **open time** is ``reset_timeout`` the first time, twice as long each time the circuit opens again without
having been closed for a whole window in between, and never more than ``max_reset_timeout``. Of that a random part
between a half and all is waited, so that processes which opened together do not try together. It holds callers
back, not the prober.

A circuit that closes because the node answered begins with a **slow start**: ``half_open_max_calls`` at once (a
call without an answer for a second does not count), one more for each success, until ``slow_start_calls`` have
succeeded. So the load doubles with each response time: a fast node has all of it back at once, a slow one is
asked as much as it answers, and an idle circuit waits for its first callers. A call that fails meanwhile
without an answer halves what is let through, and puts off the end; and the circuit opens again as soon as such
failures reach ``failure_rate_threshold``, be they ever so few: so the first call's does. (If any failure opened
it, a node that fails one call in ten, which is no reason to open, would hardly ever get through.) One that
fails after its first answer counts as at any other time.

A **permit** says in which state a call was let through. An outcome is counted only while that state lasts, so a
late result from before the trip neither closes nor opens anything (``failsafe-go`` counts such results as
probes). The permit of a probe, or of a call of the slow start, is for the node's *first answer*: who has it
goes on under the permit of the closed period (``following``), and does not keep others out while it holds its
connection. An outcome is *success* (the node answered, even with an error of the application's own), *slow
success*, *failure*, or *inconclusive* (the caller was cancelled, waited locally, or never asked). A permit for
one call (a probe, or a call of the slow start) that has no outcome after ``reset_timeout`` gives its place to
another, and what is reported under it later counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from resilientdb.policy.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.config import BreakerPolicy

__all__ = ["CLOSED", "HALF_OPEN", "OPEN", "BreakerCore", "Permit", "Transition"]

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"

_GROWTH: Final = 2.0
"""How many times longer the circuit stays open each time."""

_PATIENCE: Final = 0.25
"""Part of the open time after which the prober's answer counts again."""

_SETBACK: Final = 3
"""Answers by which a failure puts off the end of the slow start: it ends for a node that fails less than a call in
four, and not for one that breaks under more than it is let have."""

_OVERDUE: Final = 1.0
"""Seconds after which a call of the slow start that has had no answer makes room for another. It may be a long
report, or wait for a lock, which says nothing of the node; and one more a second hardly adds to the work of a node
that is too slow."""

_SOON: Final = 0.05
"""Least seconds after which somebody whom the slow start sends away is told to come back: a few responses."""


class Permit:
    """Leave to make one call (``probe``), or any number of calls while the circuit stays closed.

    Compared by identity. The same closed permit is handed to every caller of one closed period; that of the slow
    start before it is for one call, as a probe's.
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
    would_be: bool = False
    """It did not move: it would have, if its mode were not ``metrics_only``."""


class BreakerCore:
    """One node's circuit. Not thread-safe: every method requires the owner's lock.

    Each method that may move the circuit returns the ``Transition`` or None.
    """

    __slots__ = (
        "_absorbed_at",
        "_allowance",
        "_by_hand",
        "_closed_at",
        "_longest",
        "_no_answer",
        "_opened_at",
        "_period",
        "_policy",
        "_probed",
        "_probes",
        "_rng",
        "_seen_dead",
        "_starting",
        "_starting_since",
        "_wait",
        "_window",
        "closed_permit",
        "failing_since",
        "state",
    )

    def __init__(
        self, policy: BreakerPolicy, now: float, *, rng: Callable[[], float], probed: bool = False
    ) -> None:
        """``rng`` gives a number from 0 to below 1. ``probed``: a background prober looks after the node, and closes
        the circuit as soon as it can."""
        self._policy = policy
        self._probed = probed
        self._rng = rng
        self._by_hand = False
        self._opened_at = self._closed_at = now
        self._window = Window(policy.window)
        self._absorbed_at = now
        self._longest = policy.reset_timeout
        """How long it stays open at most when it opens next."""
        self._wait = policy.reset_timeout
        """How long it stays open this time."""
        self._probes: dict[Permit, None] = {}
        """Permits for one call whose outcome is awaited; in the order in which they were given."""
        self._allowance = 0
        """How many of these there may be at once."""
        self._starting = 0
        """Successes until the slow start is over."""
        self._starting_since: float | None = None
        """When its first call was let through."""
        self._seen_dead = False
        self._no_answer = False
        """Whether it opened because a call got no answer in time that was let through to see whether there is one."""
        self.state: str = CLOSED
        self._period: Permit | None = Permit(probe=False, issued_at=now)
        """The permit of the present closed period; None in any other state."""
        self.closed_permit: Permit | None = self._period
        """The same, for everybody to take without asking: None also during the slow start."""
        self.failing_since = now
        """When the node last showed that it fails, while open."""

    # -- calls ---------------------------------------------------------------------------------------------

    def try_acquire(self, now: float) -> tuple[Permit | None, Transition | None]:
        """Leave to call the node, or None."""
        if self.closed_permit is not None:
            return self.closed_permit, None
        moved = None
        if self.state == OPEN:
            if now < self.failing_since + self._wait:
                return None, None
            moved = self._move(HALF_OPEN, now, "the open time has passed")
        self._forget_lost_probes(now)
        if self._awaited(now) >= self._allowance:
            return None, moved
        permit = Permit(probe=True, issued_at=now)
        self._probes[permit] = None
        if self._starting_since is None and self.state == CLOSED:
            self._starting_since = now
        return permit, moved

    def is_current(self, permit: Permit) -> bool:
        """Whether an outcome under ``permit`` still counts."""
        return permit is self._period or permit in self._probes

    @property
    def following(self) -> Permit | None:
        """Under which permit a call goes on that has had an answer; None: what becomes of it counts for nothing."""
        return self._period

    def record_success(self, permit: Permit, now: float) -> Transition | None:
        """The node answered the call made under ``permit``."""
        if permit is self.closed_permit:
            self._window.success(now)
        elif permit in self._probes:
            if self.state == HALF_OPEN:
                return self._move(CLOSED, now, "a probe succeeded", slow_start=True)
            del self._probes[permit]
            self._window.success(now)
            if self.closed_permit is None:
                self._allowance += 1
                self._come_nearer(now)
        return None

    def record_slow(self, permit: Permit, now: float) -> Transition | None:
        """The node answered, but took longer than ``slow_call_duration``."""
        if permit is not self._period:
            if permit not in self._probes:
                return None
            if self.state == HALF_OPEN:
                return self._move(OPEN, now, "a probe was answered too slowly", no_answer=True)
            # The slow start goes on, but asks no more at once of a node that is slow already.
            del self._probes[permit]
            if self.closed_permit is None:
                self._come_nearer(now)
        self._window.slow_success(now)
        good, bad = self._window.totals(now)
        slow = self._window.slow(now)
        if self._is_too_much(slow, good + bad, self._policy.slow_call_rate_threshold):
            return self._move(OPEN, now, f"{slow} of {good + bad} calls were slow")
        return None

    def record_failure(
        self, permit: Permit, now: float, cause: str, *, no_answer: bool = False
    ) -> Transition | None:
        """The node failed the call made under ``permit``. ``no_answer``: not by an error, but by being too slow or
        too full."""
        is_first_answer = permit is not self._period
        if is_first_answer:
            if permit not in self._probes:
                return None
            if self.state == HALF_OPEN:
                return self._move(OPEN, now, f"a probe failed: {cause}", no_answer=no_answer)
            del self._probes[permit]
        self._window.failure(now)
        good, bad = self._window.totals(now)
        if is_first_answer and self.closed_permit is None:
            if bad >= self._policy.failure_rate_threshold * (good + bad):
                cause = f"{bad} of {good + bad} calls of the slow start failed, last: {cause}"
                return self._move(OPEN, now, cause, no_answer=no_answer)
            self._allowance = max(self._policy.half_open_max_calls, self._allowance // 2)
            self._starting = min(self._starting + _SETBACK, self._policy.slow_start_calls)
        elif self._is_too_much(bad, good + bad, self._policy.failure_rate_threshold):
            return self._move(OPEN, now, f"{bad} of {good + bad} calls failed, last: {cause}")
        return None

    def release(self, permit: Permit) -> None:
        """The call made under ``permit`` showed nothing about the node."""
        self._probes.pop(permit, None)

    def absorb(self, successes: int, now: float) -> None:
        """Count successes of the present closed period that were tallied elsewhere since the last time.

        When they happened in between is not known: they are taken to be spread evenly, so of a longer time only
        the share that falls into the window counts.
        """
        span = now - self._absorbed_at
        self._absorbed_at = now
        if self.closed_permit is not None and successes:
            recent = successes if span <= self._policy.window else successes * self._policy.window / span
            self._window.success(now, round(recent))

    # -- the prober, and by hand ---------------------------------------------------------------------------

    def prober_succeeded(self, now: float) -> Transition | None:
        """The background prober got an answer."""
        if self.state == CLOSED or self._by_hand:
            return None
        if self._seen_dead:
            return self._move(CLOSED, now, "the prober got an answer", slow_start=True)
        if self.state == OPEN:
            # A node that is weak yet answers a probe at any time. If each answer let the next call through, all
            # processes would try again at once, and it would never get well.
            if self._no_answer and now < self.failing_since + self._wait * _PATIENCE:
                return None
            return self._move(HALF_OPEN, now, "the prober gets answers; calls must show that they do too")
        return None

    def prober_failed(self, now: float, cause: str) -> Transition | None:
        """The background prober found the node dead."""
        self._seen_dead = True
        self.failing_since = now
        if self.state == OPEN:
            return None
        return self._move(OPEN, now, f"the prober failed: {cause}")

    def force(self, state: str, now: float, cause: str) -> Transition | None:
        """Move by hand. A circuit opened so stays open for ``reset_timeout`` from now, and no prober closes it
        before; one closed so is well: no slow start, and nothing held against it."""
        moved = None
        if state != self.state:
            moved = self._move(state, now, cause, by_hand=True)
        elif state == OPEN:
            self._by_hand = True
            self._wait = self._policy.reset_timeout
        elif state == CLOSED and self.closed_permit is None:
            self._end_slow_start(now)
        if state == CLOSED:
            self._longest = self._policy.reset_timeout
        self.failing_since = now
        return moved

    def start_slowly(self) -> None:
        """A closed circuit whose node has had no calls for a while: begin with few."""
        if self._policy.slow_start_calls:
            self.closed_permit = None
            self._starting = self._policy.slow_start_calls
            self._allowance = self._policy.half_open_max_calls

    # -- what can be seen ----------------------------------------------------------------------------------

    @property
    def slow_start(self) -> tuple[int, int] | None:
        """(calls let through at once, successes still missing) of a circuit that has closed and is careful yet."""
        if self.state != CLOSED or self.closed_permit is not None:
            return None
        return self._allowance, self._starting

    def has_room(self, now: float) -> bool:
        """Whether a call would be let through."""
        if self.closed_permit is not None:
            return True
        if self.state == OPEN:
            return now >= self.failing_since + self._wait
        return self._awaited(now) < self._allowance

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
        remaining = max(0.0, self.failing_since + self._wait - now)
        if not self._probed or self._by_hand:
            return remaining
        return min(now - self._opened_at, self._policy.reset_timeout)

    def retry_after_slow_start(self, now: float) -> float:
        """Seconds after which somebody whom the slow start sends away had better come back: it is taken to last as
        long again as it has lasted, as it doubles what it lets through."""
        lasted = 0.0 if self._starting_since is None else now - self._starting_since
        return max(_SOON, min(lasted, self._policy.reset_timeout))

    def rate(self, now: float) -> float:
        """Successes a second over the window: how fast callers are being served."""
        return self._window.totals(now)[0] / self._policy.window

    # -- inside --------------------------------------------------------------------------------------------

    def _move(
        self,
        state: str,
        now: float,
        cause: str,
        *,
        slow_start: bool = False,
        by_hand: bool = False,
        no_answer: bool = False,
    ) -> Transition:
        transition = Transition(self.state, state, cause)
        self._no_answer = no_answer
        self.state = state
        self._probes.clear()
        self._allowance = self._policy.half_open_max_calls
        self._starting_since = None
        self._period = self.closed_permit = None
        self._by_hand = by_hand and state == OPEN
        if state == OPEN:
            self.failing_since = now
            if transition.old == CLOSED:
                self._opened_at = now
                if now >= self._closed_at + self._policy.window:
                    self._longest = self._policy.reset_timeout
            if by_hand:  # nobody has seen the node fail
                self._wait = self._policy.reset_timeout
            else:
                self._wait = self._longest * (1.0 - self._rng() / 2)
                self._longest = min(self._longest * _GROWTH, self._policy.max_reset_timeout)
        elif state == CLOSED:
            self._window.clear()
            self._closed_at = self._absorbed_at = now
            self._seen_dead = False
            self._period = Permit(probe=False, issued_at=now)
            self._starting = self._policy.slow_start_calls if slow_start else 0
            if not self._starting:
                self._end_slow_start(now)
        return transition

    def _come_nearer(self, now: float) -> None:
        """One more answer in the slow start."""
        self._starting -= 1
        if self._starting <= 0:
            self._end_slow_start(now)

    def _end_slow_start(self, now: float) -> None:
        """All may call. Those of the slow start who have not reported yet still count, as all others do."""
        self._starting = 0
        self._absorbed_at = now
        self.closed_permit = self._period

    def _is_too_much(self, number: int, calls: int, share: float) -> bool:
        return calls >= self._policy.minimum_calls and number >= share * calls

    def _awaited(self, now: float) -> int:
        """How many calls stand in the way of another."""
        if self.state != CLOSED:
            return len(self._probes)
        return sum(now < permit.issued_at + _OVERDUE for permit in self._probes)

    def _forget_lost_probes(self, now: float) -> None:
        """A probe whose caller neither finishes nor gives up must not hold the circuit for ever."""
        for permit in [p for p in self._probes if now >= p.issued_at + self._policy.reset_timeout]:
            del self._probes[permit]
