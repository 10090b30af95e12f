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
critical newcomer takes the place of the least critical who has waited longest. A caller whose time would be over
before its turn comes is refused on arrival: it would only stand in the way. The first in line never is: it stands in
nobody's way, and finds out whether the line still moves as slowly as it did.

The bound in time is kept by the waiter itself, who leaves when it is over. Leaving and being served exclude each
other: ``leave`` answers whether the waiter was still in line, and a waiter who was served a moment before must take
or return what it was given. So no slot is ever lost and none is given twice, whoever times out or is cancelled when.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from resilientdb.policy.overload import DrainRate, Overload

__all__ = ["Admission", "Lane", "Refusal", "Waiting"]


class Lane(enum.IntEnum):
    """The lines, in the order in which they are served: the criticality of those who stand in them."""

    CRITICAL_PLUS = 0
    CRITICAL = 1
    SHEDDABLE_PLUS = 2
    SHEDDABLE = 3


_LANES = tuple(Lane)
_LEAST_CRITICAL_FIRST = _LANES[::-1]

_SHARES = {Lane.CRITICAL_PLUS: 1.0, Lane.CRITICAL: 1.0, Lane.SHEDDABLE_PLUS: 0.5, Lane.SHEDDABLE: 0.25}
"""The part of all places to wait that may be taken when somebody of that criticality joins."""


class Refusal(enum.Enum):
    """Why a caller was sent away; the value is the ``reason`` of its error."""

    FULL = "pool-saturated"
    """All places to wait are taken, or all that its criticality may take."""
    HOPELESS = "pool-would-be-late"
    """Its time would be over before its turn."""
    DISPLACED = "pool-displaced"
    """It had to make room for a more critical caller, or, under overload, for a newer one."""
    SHED = "pool-shed"
    """Its line is overloaded, and it had waited more than twice the target; or it had too little time left."""


class Waiting(Protocol):
    """Somebody in line. These are the line's, written when it is joined."""

    lane: Lane
    since: float
    remaining: float | None


W = TypeVar("W", bound=Waiting)


class Admission(Generic[W]):
    """The slots of one node and the lines in front of it.

    Not thread-safe: every method requires the owner's lock. All O(1), shedding amortised.
    """

    __slots__ = (
        "_drain",
        "_lines",
        "_overloads",
        "_target",
        "limit",
        "max_waiting",
        "total",
        "waited",
        "waiting",
    )

    def __init__(
        self, *, limit: int | None, max_waiting: int | None, target: float = 0.05, interval: float = 1.0
    ) -> None:
        """``target``: the longest wait, in seconds, that everybody in a line may have over ``interval`` seconds
        without its being overloaded."""
        self.limit = limit
        """Most slots at once; None = unlimited."""
        self.max_waiting = max_waiting
        """Most waiters at once; None = unlimited, 0 = nobody waits."""
        self.total = 0
        """Slots in existence."""
        self.waiting = 0
        """Callers in line."""
        self.waited = 0
        """How many have joined a line so far."""
        self._target = target
        self._overloads = tuple(Overload(target, interval) for _ in Lane)
        self._drain = DrainRate()
        self._lines: tuple[OrderedDict[W, None], ...] = tuple(OrderedDict() for _ in Lane)

    def overloaded(self) -> tuple[bool, ...]:
        """The verdict on each lane."""
        return tuple(overload.now for overload in self._overloads)

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

        Returns None when the waiter stands in line; a ``Refusal`` when it does not; or the waiter who had to make
        room for it, and is in line no longer.
        """
        if not self.waiting:
            self._drain.begins(now)
        if not self._lines[lane]:
            self._overloads[lane].drained()
        crowded: Lane | None = None
        if self.max_waiting is not None and self.waiting >= round(self.max_waiting * _SHARES[lane]):
            crowded = self._lane_to_shorten(lane)
            if crowded is None:
                return Refusal.FULL
        if remaining is not None and self.waiting:
            # Who would be first in line always stays: it finds out how fast the line moves now.
            wait = self.expected_wait(lane, now)
            if wait is not None and wait > remaining - self._time_to_use(remaining, now):
                return Refusal.HOPELESS
        displaced = None if crowded is None else self._send_away_first(crowded, now)
        waiter.lane = lane
        waiter.since = now
        waiter.remaining = remaining
        self._lines[lane][waiter] = None
        self.waiting += 1
        self.waited += 1
        return displaced

    def expected_wait(self, lane: Lane, now: float) -> float | None:
        """Seconds until a newcomer of ``lane`` would be served; None while nothing is known."""
        if not self.waiting:
            self._drain.drained()  # the time since the last was served says nothing
        ahead = sum(len(line) for line in self._lines[:lane])
        if not self._overloads[lane].now:
            ahead += len(self._lines[lane])
        return self._drain.wait(ahead + 1, now)

    def leave(self, waiter: W) -> bool:
        """Leave the line; False when the waiter has been served or sent away already."""
        try:
            del self._lines[waiter.lane][waiter]
        except KeyError:
            return False
        self.waiting -= 1
        return True

    def next_in_line(self, now: float = 0.0) -> W | None:
        """Take the next to be served out of its line, to be given a slot with its connection; None: nobody waits."""
        if not self.waiting:
            for overload in self._overloads:
                overload.drained()
            self._drain.drained()
            return None
        self._drain.served(now)
        first: Lane | None = None
        for lane, line, overload in zip(_LANES, self._lines, self._overloads, strict=True):
            if not line:
                overload.drained()
                continue
            overload.observe(now - next(iter(line)).since, now)
            if first is None:
                first = lane
        assert first is not None  # somebody waits
        self.waiting -= 1
        return self._lines[first].popitem(last=self._overloads[first].now)[0]

    def overdue(self, now: float) -> list[W]:
        """Take out, and return, those to be shed before the next is served: who has too little time left to use
        the slot, and under overload all who waited more than twice the target.

        The newest of the most critical stays, however long it has waited: there is a slot for it. So does the last in
        line. Who stands behind somebody with more time left is looked at when its turn comes.
        """
        shed: list[W] = []
        for lane in _LEAST_CRITICAL_FIRST:
            line = self._lines[lane]
            while line and self.waiting > 1:
                first = next(iter(line))
                if not self._is_late(first, now) and not (
                    self._is_too_old(first, now) and (len(line) > 1 or lane != self._first())
                ):
                    break
                shed.append(self._send_away_first(lane, now))
        return shed

    def _is_too_old(self, waiter: W, now: float) -> bool:
        return self._overloads[waiter.lane].now and now - waiter.since > 2 * self._target

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

    def vacate(self, now: float = 0.0) -> W | None:
        """A slot has lost its connection: it goes to the waiter returned, or ceases to be.

        Above a ``limit`` that was lowered, slots are not handed on.
        """
        if self.waiting and (self.limit is None or self.total <= self.limit):
            return self.next_in_line(now)
        self.total -= 1
        return None

    def dismiss(self) -> list[W]:
        """Empty the lines; those returned hold no slot."""
        dismissed = [waiter for line in self._lines for waiter in line]
        for line in self._lines:
            line.clear()
        self.waiting = 0
        return dismissed

    def _first(self) -> Lane:
        """The most critical lane in which somebody waits."""
        return next(lane for lane in _LANES if self._lines[lane])

    def _lane_to_shorten(self, lane: Lane) -> Lane | None:
        """Whose longest waiting makes room for a newcomer of ``lane``: the least critical's, or, under overload, its
        own. None: nobody's."""
        for less_critical in _LEAST_CRITICAL_FIRST[: Lane.SHEDDABLE - lane]:
            if self._lines[less_critical]:
                return less_critical
        return lane if self._lines[lane] and self._overloads[lane].now else None

    def _send_away_first(self, lane: Lane, now: float) -> W:
        self.waiting -= 1
        self._overloads[lane].sent_away(now)
        return self._lines[lane].popitem(last=False)[0]
