"""What should become of a pool's connections: which are too old, unused for too long, in doubt, or missing.

How long a connection has lain unused is learnt by looking, since a healthy checkin must cost nothing, not even a
look at the clock: each checkout writes down when it began, and a connection found idle twice with the same mark
has been unused since the first of the two looks at least. What is due is thus seen late by up to the time between
two looks, and never early. A look is worth its while only when something may be due, and says when that is.

Connections that have been unused for a moment *doze*: they lie apart, are asked whether they live before they are
used, and need no looking after until they are too old, in the way, or to be kept alive. So an idle service is left
alone, however often a busy one is looked at.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from resilientdb.config import Lifecycle

__all__ = ["IdleConnection", "Orders", "Retirement", "Upkeep"]

_SPREAD = 0.1
"""The part of ``max_age`` over which the ends of connections opened together are spread."""

_GLANCES = 10
"""How often to look within the shortest time that matters, where nothing dozes: late by a tenth is early enough."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
"""Seconds before a connection is opened again in the background, after the first and after many failures."""


class Retirement(enum.Enum):
    """Why a connection that works is closed; the value is the reason in the statistics."""

    AGE = "age"
    """Open for ``max_age``."""
    USES = "uses"
    """Checked out ``max_uses`` times; counted, and so ordered, by its owner."""
    IDLE = "idle"
    """Unused for ``idle_timeout``, above ``min_size``."""


class IdleConnection(Protocol):
    """A connection that nobody holds. All times are monotonic seconds."""

    since: float
    """When its last checkout began; written by every checkout, and by nothing else."""
    retire_at: float
    """When it is too old; ``math.inf`` = never."""
    seen_since: float
    """``Upkeep``'s memory: ``since`` at the last look that found it idle. -1.0 in a new one."""
    idle_from: float
    """``Upkeep``'s memory: the first look that found it idle with that ``since``."""


T = TypeVar("T", bound=IdleConnection)


@dataclass(frozen=True, slots=True)
class Orders(Generic[T]):
    """What to do after a look; no connection is in two of the lists.

    Each may have been taken into use in the meantime, and is then to be left alone: the next look sees to it.
    """

    retire: list[tuple[T, Retirement]]
    """To be closed."""
    ping: list[T]
    """To be asked whether they live, and closed if not. Their ``since`` stays what it was."""
    doze: list[T]
    """To be laid apart, and asked whether they live before they are used."""
    open: int
    """Connections to be opened in the background now."""
    next_look: float | None
    """Seconds until it is worth looking again. None: not before something happens (a connection is opened, or could
    not be, or is lost; a dozing one is taken)."""


class Upkeep:
    """One pool's. ``rng`` draws uniformly from [0, 1).

    One thread may look at a time. ``retire_at``, ``opened`` and ``open_failed`` may be called by any other
    meanwhile; of two failures at once, one may go uncounted.
    """

    __slots__ = ("_glance", "_limit", "_looked_at", "_not_before", "_policy", "_rng")

    def __init__(self, policy: Lifecycle, rng: Callable[[], float]) -> None:
        self._policy = policy
        self._rng = rng
        self._looked_at = -math.inf
        self._not_before = -math.inf
        """Until when no connection is opened in the background."""
        self._limit = _FIRST_PAUSE
        """The longest pause that the next failure may cause."""
        self._glance = _glance(policy)

    def retire_at(self, now: float) -> float:
        """When a connection opened ``now`` will be too old."""
        age = self._policy.max_age
        return math.inf if age is None else now + age * (1 - _SPREAD * self._rng())

    def opened(self) -> None:
        """A connection could be opened."""
        self._limit = _FIRST_PAUSE
        self._not_before = -math.inf

    def open_failed(self, now: float) -> None:
        """A connection could not be opened: pause, for longer each time (exponential, full jitter).

        What fails during a pause was begun before it, and tells nothing new.
        """
        if now < self._not_before:
            return
        self._not_before = now + self._limit * self._rng()
        self._limit = min(2 * self._limit, _LONGEST_PAUSE)

    def look(self, idle: Iterable[T], dozing: Iterable[T], total: int, opening: int, now: float) -> Orders[T]:
        """What is due at ``now``.

        ``idle`` and ``dozing`` are the connections that nobody holds, ``total`` counts those in use too. ``opening``
        are being opened in the background; where ``total`` has them already, fewer are ordered at a time than
        might be, never too many.
        """
        awake, asleep = list(idle), list(dozing)
        retire: list[tuple[T, Retirement]] = []
        staying: list[T] = []
        for one in (*awake, *asleep):
            since = one.since
            if since != one.seen_since:
                one.seen_since, one.idle_from = since, now
            if one.retire_at <= now:
                retire.append((one, Retirement.AGE))
            else:
                staying.append(one)
        unneeded = self._unneeded(staying, total - len(retire), now)
        retire += [(one, Retirement.IDLE) for one in unneeded]
        leaving = {id(one) for one, _ in retire}
        staying = [one for one in staying if id(one) not in leaving]
        ping = [one for one in staying if self._ping_at(one, self._looked_at) <= now]
        leaving.update(map(id, ping))
        doze = [one for one in awake if self._doze_at(one) <= now and id(one) not in leaving]
        self._looked_at = now

        remain = total - len(retire)
        missing = self._policy.min_size - remain - opening
        resting = now < self._not_before
        moments = [self._not_before] if resting and missing > 0 else []
        if total > len(asleep):
            moments.append(self._glance_at(awake, now))
        for one in staying:
            moments += one.retire_at, self._ping_at(one, now)
            if remain > self._policy.min_size:
                moments.append(self._idle_at(one))
        next_look = min(moments, default=math.inf)
        return Orders(
            retire=retire,
            ping=ping,
            doze=doze,
            open=0 if resting else max(0, min(missing, self._policy.max_connecting - opening)),
            next_look=None if next_look == math.inf else max(0.0, next_look - now),
        )

    def _unneeded(self, idle: list[T], total: int, now: float) -> list[T]:
        """Those unused for too long, the longest unused first, but for ``min_size`` of all."""
        most = total - self._policy.min_size
        if most <= 0:
            return []
        stale = [one for one in idle if self._idle_at(one) <= now]
        return sorted(stale, key=lambda one: (one.idle_from, one.since))[:most]

    def _idle_at(self, one: IdleConnection) -> float:
        """When it will have been unused for too long."""
        limit = self._policy.idle_timeout
        return math.inf if limit is None else one.idle_from + limit

    def _doze_at(self, one: IdleConnection) -> float:
        """When it is in doubt."""
        limit = self._policy.validate_idle
        return math.inf if limit is None else one.idle_from + limit

    def _ping_at(self, one: IdleConnection, after: float) -> float:
        """When it is next to be asked whether it lives: each time that ``keepalive`` has passed, so that the
        questions, which are no use of it, do not keep it from growing idle."""
        period = self._policy.keepalive
        if period is None:
            return math.inf
        asked = max(0.0, after - one.idle_from) // period
        return one.idle_from + (asked + 1) * period

    def _glance_at(self, awake: list[T], now: float) -> float:
        """When to look again because somebody may have used a connection, or stopped using it, unseen.

        Also at those that are to doze, ping or end by these very orders: they may have been taken meanwhile.
        """
        if self._glance is None:
            return math.inf
        soonest = min((at for at in map(self._doze_at, awake) if at > now), default=math.inf)
        # However many moments there are to begin with, looks come together: at most two in each glance's time.
        return min(now + self._glance, max(soonest, now + self._glance / 2))


def _glance(policy: Lifecycle) -> float | None:
    """Seconds between two looks while connections are in use; None: nothing depends on how they are used."""
    if policy.validate_idle:
        return policy.validate_idle
    limits = [limit for limit in (policy.idle_timeout, policy.keepalive, policy.max_age) if limit is not None]
    return min(limits) / _GLANCES if limits else None
