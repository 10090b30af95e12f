"""Is the line standing, or only passing? And how fast is it moving?

A full line is no sign of trouble if it drains at once; a short one is, if it never does. CoDel (Nichols and Jacobson,
2012) tells the two apart by the *minimum* wait over an interval: one short wait proves that the line does drain. The
sizes are those of a database (Elixir's ``db_connection``: 50 ms over 1 s), ten times a packet queue's.
"""

from __future__ import annotations

import math

__all__ = ["DrainRate", "Overload"]


class Overload:
    """Whether everybody who was served over the last ``interval`` seconds waited longer than ``target``.

    The wait looked at is that of the *oldest* in line, not of the one served: under overload the newest is served
    first, and its short wait says nothing about the line. Nor does a short wait after somebody was sent away: the
    line is short because of that. Nor one that is seen while nobody is served. Not thread-safe: guarded by its
    owner's lock.
    """

    __slots__ = ("_above_since", "_interval", "_sent_away_at", "_target", "now")

    def __init__(self, target: float, interval: float) -> None:
        """``interval``: infinite where the verdict shall never be reached."""
        self._target = target
        self._interval = interval
        self._above_since: float | None = None
        self._sent_away_at = -math.inf
        self.now = False
        """The verdict."""

    def observe(self, oldest_wait: float, now: float) -> None:
        """Somebody is served at ``now``."""
        if oldest_wait <= self._target:
            if not self.now or now - self._sent_away_at >= self._interval:
                self.drained()
        elif self._above_since is None:
            self._above_since = now
        elif now - self._above_since >= self._interval:
            self.now = True

    def stands(self, oldest_wait: float, now: float) -> None:
        """Nobody is served at ``now``.

        It does not matter how often this is called: the interval begins when the oldest had waited for ``target``.
        """
        if oldest_wait <= self._target:
            return
        if self._above_since is None:
            self._above_since = now - (oldest_wait - self._target)
        if now - self._above_since >= self._interval:
            self.now = True

    def is_too_old(self, waited: float) -> bool:
        """Whether somebody who has waited so long is to be sent away."""
        return self.now and waited > 2 * self._target

    def makes_room(self, waited: float) -> bool:
        """Whether the oldest, who has waited so long, gives its place to a newcomer who finds none left.

        One of the two is turned away in any case, so no answer is lost by it, and who is served has waited less. It
        needs no verdict, which takes an interval: until then all would be served only after a full line's wait, or,
        when the database has become slow, after they have given up. It takes a target more than ``is_too_old``, so
        that in a spike that soon passes hardly anybody waits for nothing.
        """
        return self.now or (waited > 3 * self._target and self._interval != math.inf)

    def next_look(self, oldest_wait: float, now: float) -> float:
        """Seconds until a line that stands shows something new: its oldest has waited for ``target``, the verdict,
        somebody who is too old. For the last, who is so already is taken to stay. Infinite: nothing ever."""
        if self._interval == math.inf:
            return math.inf
        if self.now:
            left = 2 * self._target - oldest_wait
            return left if left > 0 else 2 * self._target
        if self._above_since is None:
            return self._target - oldest_wait
        return self._above_since + self._interval - now

    def sent_away(self, now: float) -> None:
        """Somebody was taken out of the line for the good of the others."""
        self._sent_away_at = now

    def drained(self) -> None:
        """Nobody waits any more.

        That ends it at once, even if the line is empty because it was shed: under a load that can just be served, a
        verdict that outlived its line would go on turning callers away, and the slots would have nothing to do.
        """
        self._above_since = None
        self.now = False


class DrainRate:
    """How long a place in line takes, from how long the last ones took.

    An exponentially weighted mean of the time between one served and the next while somebody waits; for the first,
    of the time it waited. So whoever is served teaches it, and no estimate of an hour ago outlives the next. A
    line that has stopped moving is not taken to move as before: the time since the last was served counts too.
    """

    __slots__ = ("_gap", "_last")

    _WEIGHT = 0.1

    def __init__(self) -> None:
        self._gap: float | None = None
        self._last: float | None = None

    def begins(self, now: float, left_at: float | None = None) -> None:
        """Somebody joins an empty line. ``left_at``: it is the same one still, empty since then only because
        nobody was served and all gave up; the time in between does not count."""
        if left_at is None or self._last is None:
            self._last = now
        else:
            self._last += now - left_at

    def served(self, now: float) -> None:
        """The line moved by one."""
        if self._last is not None:
            now = max(
                now, self._last
            )  # threads may come to it in another order than they looked at the clock
            gap = now - self._last
            self._gap = gap if self._gap is None else self._gap + self._WEIGHT * (gap - self._gap)
        self._last = now

    def drained(self) -> None:
        """Nobody waits any more: the time until somebody does says nothing."""
        self._last = None

    def wait(self, place: int, now: float) -> float | None:
        """Seconds until the ``place``-th in line is served; None while nothing is known."""
        if self._gap is None:
            return None
        standing = 0.0 if self._last is None else now - self._last
        return place * max(self._gap, standing / 2)
