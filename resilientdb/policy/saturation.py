"""Who may hold one of a node's connections, who waits, who is next, and who is sent away.

A **slot** is the place of one connection: open, being opened, or lost and to be opened again. There are at most
``limit`` of them. A caller who finds no idle connection takes a new slot; who finds none left waits in line, and
what is given back goes to the next in line directly (no newcomer can take it in between, as happens with a
condition variable): a slot with its connection, or, where the connection was lost, the slot alone. A slot that
has lost its connection and that nobody waits for ceases to be.

**Who is next.** There is a line for each criticality, served in that order. Within a line first come is first
served, unless it is *overloaded* (``policy.overload``): then the newest is served first, because the oldest
have waited so long that their callers are about to give up, and serving them would waste the slot (adaptive LIFO, as
at Facebook); and whoever has waited more than twice the target is sent away. A slot that comes free under overload
is so always given to somebody who still has time to use it: that is what keeps a brown-out from becoming an outage.
Each line has a verdict of its own: what is too much for the less critical may leave ample room for the others.

**Who may wait.** At most ``max_waiting`` callers; of these, the less critical may take only their share, and a more
critical newcomer takes the place of the least critical who has waited longest. Nor need it be more critical once the
oldest of its own line has waited more than three times the target: one of the two is turned away in any case, and the
newer has more time left. A caller whose time would be over before its turn comes is refused on arrival: it would only
stand in the way. The first in line never is: it stands in nobody's way, and finds out whether the line still moves as
slowly as it did.

**Who holds already** and wants one more keeps others waiting while it waits. So it stands in a line of its own, ahead
of all, always first come first served, from which only its own deadline sends it away. There is room for all of them:
each holds a slot, so they are never more than there are slots. Once *every* slot is held by somebody who waits for
one more, nobody can be served ever again; who would complete that circle is refused on arrival.

The bound in time is kept by the waiter itself, who leaves when it is over. Leaving and being served exclude each
other: ``leave`` answers whether the waiter was still in line, and a waiter who was served a moment before must take
or return what it was given. So no slot is ever lost and none is given twice, whoever times out or is cancelled when.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from resilientdb.policy.overload import DrainRate, Overload

__all__ = ["Admission", "Lane", "Refusal", "Waiting"]


class Lane(enum.IntEnum):
    """The lines, in the order in which they are served: those who hold a slot already, then by criticality."""

    HOLDING = 0
    CRITICAL_PLUS = 1
    CRITICAL = 2
    SHEDDABLE_PLUS = 3
    SHEDDABLE = 4


_LANES = tuple(Lane)
_LEAST_CRITICAL_FIRST = _LANES[::-1]


class Refusal(enum.Enum):
    """Why a caller was sent away; the value is the ``reason`` of its error."""

    FULL = "pool-saturated"
    """All places to wait are taken, or all that its criticality may take."""
    HOPELESS = "pool-would-be-late"
    """Its time would be over before its turn."""
    DEADLOCK = "pool-nested"
    """With it, every slot would be held by somebody who waits for one more: none would ever come free."""
    DISPLACED = "pool-displaced"
    """It had to make room for a more critical caller; or for a newer one, because its line is overloaded, or full
    and it had waited more than three times the target."""
    SHED = "pool-shed"
    """Its line is overloaded, and it had waited more than twice the target; or it had too little time left."""


class Waiting(Protocol):
    """Somebody in line. The attributes are the line's, written when it is joined."""

    lane: Lane
    since: float
    remaining: float | None

    @property
    def holds(self) -> int:
        """Slots that the caller has already and keeps while it waits. No slot is told by two who wait: else a
        deadlock would be seen where there is none."""


W = TypeVar("W", bound=Waiting)


class Admission(Generic[W]):
    """The slots of one node and the lines in front of it.

    Not thread-safe: every method requires the owner's lock. All O(1), shedding amortised.
    """

    __slots__ = (
        "_drain",
        "_held",
        "_left_at",
        "_lines",
        "_memory",
        "_overloads",
        "_shares",
        "_target",
        "limit",
        "max_waiting",
        "total",
        "waited",
        "waiting",
    )

    def __init__(
        self,
        *,
        limit: int | None,
        max_waiting: int | None,
        target: float = 0.05,
        interval: float = 1.0,
        shares: tuple[float, float] = (0.5, 0.25),
    ) -> None:
        """``target``: the longest wait, in seconds, that everybody in a line may have over ``interval`` seconds
        without its being overloaded. ``shares``: the part of all places to wait that may be taken when somebody
        sheddable_plus joins, and when somebody sheddable does."""
        self.limit = limit
        """Most slots at once; None = unlimited. After it was raised, who waits is not served until the owner has
        taken the new slots (``try_take``) and handed them on (``serve``)."""
        self.max_waiting = max_waiting
        """Most waiters at once, not counting those who hold a slot; None = unlimited, 0 = nobody waits, not even
        they."""
        self.total = 0
        """Slots in existence."""
        self.waiting = 0
        """Callers in line."""
        self.waited = 0
        """How many have joined a line so far."""
        self._shares = (1.0, 1.0, 1.0, *shares)
        self._target = target
        self._memory = min(interval, 20 * target)
        """Seconds after which a line that was deserted is forgotten: an interval, or the usual one."""
        self._overloads = tuple(
            Overload(target, math.inf if lane is Lane.HOLDING else interval) for lane in Lane
        )
        self._drain = DrainRate()
        self._lines: tuple[OrderedDict[W, int], ...] = tuple(OrderedDict() for _ in Lane)
        """Who stands there, and how many slots each of them holds."""
        self._held = 0
        """The sum of these: slots held by those who wait."""
        self._left_at: float | None = None
        """When somebody last left unserved; None if somebody was served since."""

    def overloaded(self) -> tuple[bool, ...]:
        """The verdict on each lane; never True of ``HOLDING``, nor of one in which nobody waits."""
        return tuple(
            overload.now and bool(line) for line, overload in zip(self._lines, self._overloads, strict=True)
        )

    def depths(self) -> tuple[int, ...]:
        """Waiters in each lane."""
        return tuple(len(line) for line in self._lines)

    def try_take(self) -> bool:
        """Make a slot for the caller; False when there may be no more."""
        if self.limit is not None and self.total >= self.limit:
            return False
        self.total += 1
        return True

    def join(
        self, waiter: W, lane: Lane = Lane.CRITICAL, now: float = 0.0, remaining: float | None = None
    ) -> Refusal | W | None:
        """Stand in line at ``now``, for ``remaining`` seconds at most (None: as long as it takes).

        Who holds a slot stands with its like, whatever ``lane`` says. Returns None when the waiter stands in line; a
        ``Refusal`` when it does not; or the waiter who had to make room for it, and is in line no longer.
        """
        holds = waiter.holds
        if holds:
            lane = Lane.HOLDING
        if not self._lines[lane]:
            left_at = self._deserted_since(now)
            if left_at is None:
                self._overloads[lane].drained()
            if not self.waiting:
                self._drain.begins(now, left_at)
        crowded: Lane | None = None
        if not self._has_room(lane):
            crowded = self._lane_to_shorten(lane, now)
            if crowded is None:
                return Refusal.FULL
        if holds and self._held + holds >= self.total and not self._may_grow():
            return Refusal.DEADLOCK
        if remaining is not None and self.waiting:
            # Who would be first in line always stays: it finds out how fast the line moves now.
            wait = self.expected_wait(lane, now)
            if wait is not None and wait > remaining - self._time_to_use(remaining, now):
                return Refusal.HOPELESS
        displaced = None if crowded is None else self._send_away_first(crowded, now)
        waiter.lane = lane
        waiter.since = now
        waiter.remaining = remaining
        self._lines[lane][waiter] = holds
        self._held += holds
        self.waiting += 1
        self.waited += 1
        return displaced

    def expected_wait(self, lane: Lane, now: float) -> float | None:
        """Seconds until a newcomer of ``lane`` would be served; None while nothing is known."""
        if not self.waiting and self._deserted_since(now) is None:
            self._drain.drained()  # the time since the last was served says nothing
        ahead = sum(len(line) for line in self._lines[:lane])
        if not self._overloads[lane].now:
            ahead += len(self._lines[lane])
        return self._drain.wait(ahead + 1, now)

    def leave(self, waiter: W, now: float | None = None) -> bool:
        """Leave the line; False when the waiter has been served or sent away already.

        ``now``: so that a line that is empty because all gave up is not taken to have drained.
        """
        try:
            self._held -= self._lines[waiter.lane].pop(waiter)
        except KeyError:
            return False
        self.waiting -= 1
        self._left_at = now
        return True

    def serve(self, now: float = 0.0, *, lost: bool = False) -> tuple[list[W], W | None]:
        """A slot has come free: returns who is sent away before, and who is given it (None: nobody waits).

        ``lost``: it has no connection any more. If it is given to nobody, it ceases to be. Above a ``limit`` that
        was lowered it is given to nobody, unless those who wait hold all the others.
        """
        shed = self.overdue(now)
        return shed, self.vacate(now) if lost else self.next_in_line(now)

    def next_in_line(self, now: float = 0.0) -> W | None:
        """The second half of ``serve``: take the next out of its line, to be given a slot with its connection."""
        self._left_at = None
        if not self.waiting:
            self._drain.drained()
            return None
        self._drain.served(now)
        first = Lane.HOLDING
        for lane in _LEAST_CRITICAL_FIRST:
            if line := self._lines[lane]:
                self._overloads[lane].observe(now - next(iter(line)).since, now)
                first = lane
        return self._take_out(first, newest=self._overloads[first].now)

    def vacate(self, now: float = 0.0) -> W | None:
        """As ``next_in_line``, for a slot that has lost its connection."""
        if self.waiting and (self.limit is None or self.total <= self.limit or self._is_the_last_hope()):
            return self.next_in_line(now)
        self.total -= 1
        return None

    def overdue(self, now: float) -> list[W]:
        """The first half of ``serve``: take out who has too little time left to use the slot, and under overload all
        who waited more than twice the target.

        The newest of the most critical stays, however long it has waited: there is a slot for it. So does the last in
        line. Who stands behind somebody with more time left is looked at when its turn comes.
        """
        shed: list[W] = []
        for lane in _LEAST_CRITICAL_FIRST:
            while self._lines[lane] and self._is_first_overdue(lane, now):
                shed.append(self._send_away_first(lane, now))
        return shed

    def stalled(self, now: float) -> list[W]:
        """Nothing has come back for a while: takes out, and returns, who is sent away although there is no slot.

        By the same rules as when one comes free. Does no harm if something has come back.
        """
        for lane, line in zip(_LANES, self._lines, strict=True):
            if line:
                self._overloads[lane].stands(now - next(iter(line)).since, now)
        return self.overdue(now)

    def next_stall(self, now: float) -> float | None:
        """Seconds until ``stalled`` is worth calling, at least half the target.

        None: not unless somebody joins. A newcomer never makes it much sooner than was said, so a timer that is
        set may stay. A waiter's own deadline is not looked at: it keeps that itself.
        """
        soonest = math.inf
        for lane, line in zip(_LANES, self._lines, strict=True):
            if line:
                if self._is_first_overdue(lane, now):
                    return self._target / 2
                soonest = min(soonest, self._overloads[lane].next_look(now - next(iter(line)).since, now))
        return None if soonest == math.inf else max(soonest, self._target / 2)

    def dismiss(self) -> list[W]:
        """Empty the lines; those returned hold no slot by them."""
        dismissed = [waiter for line in self._lines for waiter in line]
        for line in self._lines:
            line.clear()
        self.waiting = 0
        self._held = 0
        self._left_at = None
        return dismissed

    def recount(self, total: int | None = None) -> None:
        """Make the counts agree with the lines again, after a method was left half-way. ``total``: the slots that the
        owner has counted, if it can."""
        self.waiting = sum(map(len, self._lines))
        self._held = sum(sum(line.values()) for line in self._lines)
        if total is not None:
            self.total = total

    def _deserted_since(self, now: float) -> float | None:
        """If a line that is empty now may be so because all gave up: since when. None once that is too long ago:
        what comes back while nobody waits is not told to us."""
        left_at = self._left_at
        return None if left_at is None or now - left_at > self._memory else left_at

    def _may_grow(self) -> bool:
        return self.limit is None or self.total < self.limit

    def _is_the_last_hope(self) -> bool:
        """Whether those who wait hold every slot but one: if that one ceased to be, none would ever come free."""
        return self._held >= self.total - 1

    def _has_room(self, lane: Lane) -> bool:
        if self.max_waiting is None:
            return True
        if lane is Lane.HOLDING:
            return self.max_waiting > 0
        others = self.waiting - len(self._lines[Lane.HOLDING])
        return others < round(self.max_waiting * self._shares[lane])

    def _is_first_overdue(self, lane: Lane, now: float) -> bool:
        if self.waiting == 1:
            return False
        line = self._lines[lane]
        first = next(iter(line))
        if self._is_late(first, now):
            return True
        return self._overloads[lane].is_too_old(now - first.since) and (
            len(line) > 1 or lane != self._most_critical()
        )

    def _is_late(self, waiter: W, now: float) -> bool:
        return waiter.remaining is not None and now - waiter.since > waiter.remaining - self._time_to_use(
            waiter.remaining, now
        )

    def _time_to_use(self, remaining: float, now: float) -> float:
        """How much of ``remaining`` a caller needs once it is served.

        As long as slots are held on average: by Little's law their number times the time between two that come
        free. Never more than half of what the caller has, since its own work may be shorter than the average.
        """
        gap = self._drain.wait(1, now)
        return 0.0 if gap is None else min(self.total * gap, remaining / 2)

    def _most_critical(self) -> Lane:
        """The first lane in which somebody waits."""
        return next(lane for lane in _LANES if self._lines[lane])

    def _lane_to_shorten(self, lane: Lane, now: float) -> Lane | None:
        """Whose longest waiting makes room for a newcomer of ``lane``: the least critical's, or, once it is old
        enough, its own. None: nobody's."""
        for less_critical in _LEAST_CRITICAL_FIRST[: Lane.SHEDDABLE - lane]:
            if self._lines[less_critical]:
                return less_critical
        line = self._lines[lane]
        return lane if line and self._overloads[lane].makes_room(now - next(iter(line)).since) else None

    def _send_away_first(self, lane: Lane, now: float) -> W:
        self._overloads[lane].sent_away(now)
        return self._take_out(lane)

    def _take_out(self, lane: Lane, *, newest: bool = False) -> W:
        waiter, holds = self._lines[lane].popitem(last=newest)
        self._held -= holds
        self.waiting -= 1
        return waiter
