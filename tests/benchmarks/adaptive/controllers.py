"""The candidates: each looks at how long connections were held, and says how many may be in use at once.

Pure and not thread-safe. All that a pool can know is here: when a connection came back, how long it was held, and
whether anybody waits; not what was asked of the database meanwhile. Latency is the *median* hold of a window, so that
a class of slow queries below half of the traffic does not read as a slow database.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

__all__ = [
    "CANDIDATES",
    "FIRST",
    "HIGHEST",
    "LOWEST",
    "Anchored",
    "Climb",
    "Controller",
    "Gradient2",
    "Vegas",
]

LOWEST, HIGHEST = 2, 50
FIRST = 15
"""SQLAlchemy's five connections and ten of overflow."""
_SAMPLES = 20


@dataclass(frozen=True)
class Window:
    """What came back between ``begun`` and ``ended``."""

    begun: float
    ended: float
    holds: list[float]
    waited: int
    """At how many of these returns somebody was waiting."""

    @property
    def latency(self) -> float:
        return statistics.median(self.holds)

    @property
    def rate(self) -> float:
        return len(self.holds) / (self.ended - self.begun)

    @property
    def full(self) -> bool:
        """Whether the limit was what held the callers back, nearly all the time."""
        return self.waited > 0.9 * len(self.holds)

    @property
    def calm(self) -> bool:
        """Whether it hardly ever was."""
        return self.waited < 0.1 * len(self.holds)


class Controller:
    """Base: makes windows of at least ``seconds`` and of ``_SAMPLES`` holds, and asks ``decide`` after each."""

    def __init__(self, seconds: float = 1.0, first: int = FIRST) -> None:
        self.estimate = float(first)
        self.limit = first
        self._seconds = seconds
        self._begun: float | None = None
        self._holds: list[float] = []
        self._waited = 0

    def observe(self, held: float, waiting: int, now: float) -> int:
        """A connection came back after ``held`` seconds; returns the limit from now on."""
        if self._begun is None:
            self._begun = now
            return self.limit
        self._holds.append(held)
        self._waited += waiting > 0
        if now - self._begun >= self._seconds and len(self._holds) >= _SAMPLES:
            self.limit = self.decide(Window(self._begun, now, self._holds, self._waited))
            self._begun, self._holds, self._waited = now, [], 0
        return self.limit

    def decide(self, window: Window) -> int:
        raise NotImplementedError

    def _set(self, estimate: float) -> int:
        self.estimate = min(max(estimate, LOWEST), HIGHEST)
        return round(self.estimate)


class Gradient2(Controller):
    """Netflix's rule (``concurrency-limits``): a long mean of the latency, divided by the latest.

    As published, but for the bounds, which are a pool's, the queue it allows, which is the root of the limit, and the
    median in place of the mean.
    """

    tolerance = 1.5
    smoothing = 0.2

    def __init__(self, seconds: float = 1.0, first: int = FIRST) -> None:
        super().__init__(seconds, first)
        self._long: float | None = None
        self._seen = 0

    def decide(self, window: Window) -> int:
        self._seen += 1
        weight = 1 / self._seen if self._seen <= 10 else 2 / 601  # its warm-up, its long window
        self._long = (
            window.latency if self._long is None else self._long + weight * (window.latency - self._long)
        )
        if self._long > 2 * window.latency:
            self._long *= 0.9
        return self.limit if window.calm else self._set(self._next(self._long, window.latency))

    def _next(self, usual: float, latency: float) -> float:
        gradient = min(max(self.tolerance * usual / latency, 0.5), 1.0)
        target = self.estimate * gradient + math.sqrt(self.estimate)
        return self.estimate + self.smoothing * (target - self.estimate)


class Anchored(Gradient2):
    """Gradient2 against the latency of an unhurried database, so that a steady overload does not become the norm.

    That latency is learned when nobody waits; where that has not happened for ``renew`` windows, by a dip to few
    connections for two of them, the second of which counts (Envoy's ``minRTT`` windows).
    """

    renew = 30
    dip_to = 3

    def __init__(self, seconds: float = 1.0, first: int = FIRST) -> None:
        super().__init__(seconds, first)
        self._learned = -math.inf
        self._dipping = 0

    def decide(self, window: Window) -> int:
        if window.calm and not self._dipping:
            # The smallest of a while: a limit that is nearly reached has made it longer already.
            self._long = window.latency if self._long is None else min(self._long * 1.05, window.latency)
            self._learned = window.ended
            return self.limit
        if self._dipping:
            self._dipping -= 1
            if self._dipping:
                return self.limit
            self._long, self._learned = window.latency, window.ended
            return self._set(self.estimate)
        if self._long is None or window.ended - self._learned > self.renew * self._seconds:
            self._dipping = 2
            return min(self.limit, self.dip_to)
        return self._set(self._next(self._long, window.latency))


class Vegas(Anchored):
    """As TCP Vegas: how many of the connections are a queue inside the database? Steps of one, and anchored.

    Up below one (of larger limits: below a fifth), down above twice that.
    """

    share = 0.2

    def _next(self, usual: float, latency: float) -> float:
        queue = self.estimate * (1 - min(1.0, usual / latency))
        allowed = max(1.0, self.estimate * self.share)
        return self.estimate + (queue < allowed) - (queue > 2 * allowed)


class Climb(Controller):
    """No latency at all: holds the limit a little lower and a little higher in turn, and goes where more is answered.

    What is followed is how much the rate grows, in parts, with a part more of connections (Kiefer-Wolfowitz). The
    first window after each change is only for the queries under way to end.
    """

    swing = 1.2
    gain = 0.3
    forget = 0.3
    ignored = 0.15

    def __init__(self, seconds: float = 1.0, first: int = FIRST) -> None:
        super().__init__(seconds, first)
        self._below: tuple[int, float] | None = None
        self._settling = True
        self._growth = 0.0

    def decide(self, window: Window) -> int:
        if not window.full:
            self._below = None
            return self._set(self.estimate)
        if self._settling:
            self._settling = False
            return self.limit
        self._settling = True
        if self._below is None:
            self._below = self.limit, window.rate
            return min(HIGHEST, max(self.limit + 1, round(self.estimate * self.swing)))
        limit, rate = self._below
        self._below = None
        if self.limit > limit:
            growth = math.log(window.rate / rate) / math.log(self.limit / limit)
            self._growth += self.forget * (max(-2.0, min(1.0, growth)) - self._growth)
        if abs(self._growth) > self.ignored:
            self._set(self.estimate * math.exp(self.gain * self._growth))
        return max(LOWEST, round(self.estimate / self.swing))


CANDIDATES: dict[str, type[Controller]] = {
    "gradient2": Gradient2,
    "anchored": Anchored,
    "vegas": Vegas,
    "climb": Climb,
}
