"""From the history of one run to its figures. Pure; times are seconds on the monotonic clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..measure import percentile

__all__ = ["OK", "UNFINISHED", "History", "figures", "normal_since"]

OK = "ok"
UNFINISHED = "unfinished"
_STEP = 0.1
_SPAN = 1.0
_NORMAL_SHARE = 0.95
_UNFINISHED = (UNFINISHED, float("inf"))


@dataclass
class History:
    """What happened to each request. Appended to by the server's threads, one field of one request each.

    ``ended`` is written once a request; a request that is not in it has not ended.
    """

    deadline: float
    """Seconds after which an answer is worth nothing."""
    quick: float
    """Seconds in which nearly everybody is answered when all is well."""
    begin: float = 0.0
    end_of_load: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When each was scheduled, by its number."""
    ended: dict[int, tuple[str, float]] = field(default_factory=dict)
    """How it ended (``OK`` or what went wrong), and when."""
    most_in_flight: int = 0

    def begin_at(self, begin: float, load_time: float) -> None:
        self.end_of_load = begin + load_time
        self.begin = begin

    def arrived(self, scheduled: float) -> int:
        """Note a request; returns its number. For the one thread that reads the arrivals."""
        self.arrivals.append(scheduled)
        if scheduled < self.end_of_load:
            self.most_in_flight = max(self.most_in_flight, len(self.arrivals) - len(self.ended))
        return len(self.arrivals) - 1


def normal_since(history: History, now: float) -> float | None:
    """Seconds from the end of the load until all was well again; None if it is not yet, or cannot be told yet.

    Well: of the light load that goes on, at least 95 % of one second's arrivals were answered within
    ``history.quick``.
    """
    quick = history.quick
    tail = [
        (scheduled, number)
        for number, scheduled in enumerate(list(history.arrivals))
        if scheduled >= history.end_of_load
    ]
    step = 0
    while True:
        since = history.end_of_load + step * _STEP
        if since + _SPAN + quick > now:
            return None
        mine = [(at, number) for at, number in tail if since <= at < since + _SPAN]
        good = sum(
            how == OK and when - at <= quick
            for at, number in mine
            for how, when in [history.ended.get(number, _UNFINISHED)]
        )
        if mine and good >= _NORMAL_SHARE * len(mine):
            return step * _STEP
        step += 1


def figures(history: History, capacity: float) -> dict[str, Any]:
    """``goodput``: answered within the deadline and within the time of the load, as a share of what ``capacity``
    (requests a second) allows. Percentiles are of the requests that arrived during the load."""
    load_time = history.end_of_load - history.begin
    good = 0
    answered: list[float] = []
    refused: list[float] = []
    kinds: Counter[str] = Counter()
    for number, scheduled in enumerate(list(history.arrivals)):
        if scheduled >= history.end_of_load:
            break
        how, when = history.ended.get(number, _UNFINISHED)
        kinds[how] += 1
        latency = when - scheduled
        if how == OK:
            answered.append(latency)
            good += latency <= history.deadline and when <= history.end_of_load
        elif how != UNFINISHED:
            refused.append(latency)
    return {
        "goodput": good / (capacity * load_time),
        "arrived": sum(kinds.values()),
        "answered_p50": percentile(answered, 0.50),
        "answered_p99": percentile(answered, 0.99),
        "refused_p99": percentile(refused, 0.99),
        "most_in_flight": history.most_in_flight,
        "outcomes": dict(kinds),
    }
