"""From the history of one run to its figures. Pure; times are seconds on the monotonic clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..measure import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OK", "UNFINISHED", "Ending", "History", "figures", "normal_since"]

OK = "ok"
UNFINISHED = "unfinished"
_STEP = 0.1
_SPAN = 1.0
_NORMAL_SHARE = 0.95

Ending = tuple[str, float, float]
"""How a request ended (``OK`` or what went wrong), when, and when its query had begun (nothing, if it never did)."""
_UNFINISHED: Ending = (UNFINISHED, float("inf"), float("inf"))


@dataclass
class History:
    """What happened to each request. Appended to by the server's threads, one field of one request each.

    ``ended`` is written once a request; a request that is not in it has not ended.
    """

    deadline: float
    """Seconds after which an answer is worth nothing."""
    quick: float | None
    """Seconds in which nearly everybody is answered when all is well; None: it is not asked when that is."""
    begin: float = 0.0
    """When the load begins that is judged. What came before it was to warm up."""
    end_of_load: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When each was scheduled, and its kind, by its number."""
    ended: dict[int, Ending] = field(default_factory=dict)
    most_in_flight: int = 0

    def begin_at(self, begin: float, load_time: float) -> None:
        self.end_of_load = begin + load_time
        self.begin = begin

    def arrived(self, scheduled: float, kind: int) -> int:
        """Note a request; returns its number. For the one thread that reads the arrivals."""
        self.arrivals.append((scheduled, kind))
        if self.begin <= scheduled < self.end_of_load:
            self.most_in_flight = max(self.most_in_flight, len(self.arrivals) - len(self.ended))
        return len(self.arrivals) - 1


def normal_since(history: History, now: float) -> float | None:
    """Seconds from the end of the load until all was well again; None if it is not yet, or cannot be told yet.

    Well: of the light load that goes on, at least 95 % of one second's arrivals were answered within
    ``history.quick``.
    """
    quick = history.quick
    if quick is None:
        return None
    tail = [
        (scheduled, number)
        for number, (scheduled, _) in enumerate(list(history.arrivals))
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
            for how, when, _ in [history.ended.get(number, _UNFINISHED)]
        )
        if mine and good >= _NORMAL_SHARE * len(mine):
            return step * _STEP
        step += 1


def figures(history: History, capacities: Sequence[float]) -> dict[str, Any]:
    """``goodput``: the queries of those who were answered within the deadline, as a share of what the database could
    do while the load lasted: ``capacities``, requests a second, if it were asked for one kind only. A query that
    ran beyond its end counts for the part before; one that had begun before it, when the database may have been
    quicker, does not count.

    Percentiles, outcomes and ``kinds`` are of the requests that arrived during the load; ``in_time`` is the share
    of them that was answered within the deadline.
    """
    load_time = history.end_of_load - history.begin
    goodput = 0.0
    kinds = [_Kind() for _ in capacities]
    for number, (scheduled, kind) in enumerate(list(history.arrivals)):
        if scheduled >= history.end_of_load:
            break
        how, when, begun = history.ended.get(number, _UNFINISHED)
        in_time = how == OK and when - scheduled <= history.deadline
        if in_time and history.begin <= begun < history.end_of_load:
            inside = min(1.0, (history.end_of_load - begun) / max(when - begun, 1e-9))
            goodput += inside / (capacities[kind] * load_time)
        if scheduled >= history.begin:
            kinds[kind].note(how, when - scheduled, in_time=in_time)
    everybody = _Kind(
        sum((kind.outcomes for kind in kinds), Counter()),
        [latency for kind in kinds for latency in kind.answered],
        [latency for kind in kinds for latency in kind.refused],
        sum(kind.in_time for kind in kinds),
    )
    return {
        "goodput": goodput,
        **everybody.figures(),
        "kinds": [kind.figures() for kind in kinds],
        "most_in_flight": history.most_in_flight,
    }


@dataclass
class _Kind:
    outcomes: Counter[str] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    in_time: int = 0

    def note(self, how: str, latency: float, *, in_time: bool) -> None:
        self.outcomes[how] += 1
        self.in_time += in_time
        if how == OK:
            self.answered.append(latency)
        elif how != UNFINISHED:
            self.refused.append(latency)

    def figures(self) -> dict[str, Any]:
        arrived = sum(self.outcomes.values())
        return {
            "arrived": arrived,
            "in_time": self.in_time / arrived if arrived else None,
            "answered_p50": percentile(self.answered, 0.50),
            "answered_p99": percentile(self.answered, 0.99),
            "refused_p99": percentile(self.refused, 0.99),
            "outcomes": dict(self.outcomes),
        }
