"""Comparing by turns: every contender is measured in every round, and only ratios within a round count.

A machine that is shared, or changes its clock rate, makes absolute times useless; it slows two neighbours in the
same round alike.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = [
    "FULL",
    "QUICK",
    "SMOKE",
    "Lap",
    "Scale",
    "Spread",
    "in_turns",
    "percentile",
    "pinned",
    "race",
    "spread",
]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long to measure. Times in seconds."""

    rounds: int
    turn: float
    """One contender's turn in one round."""
    refused_calls: int
    contention_turn: float
    contention_rounds: int
    callers: tuple[int, ...]
    """Threads, then tasks, that contend."""
    loads: tuple[float, ...]
    """Arrivals, as multiples of the capacity."""
    load_time: float
    tail_time: float
    """Longest watch for the return to normal."""
    imports: int
    hang: float
    """How long the database is silent."""
    outages: int
    outage: float
    """How often, and for how long each, it is gone."""
    watch: float
    """Watched after each; longer than anybody's reset timeout."""
    contestants: int | None = None
    """How many of the systems under load; None = all."""
    judged: bool = True
    """Whether a load that was held up by other work on the machine is repeated, and void in the end."""


FULL = Scale(
    rounds=201,
    turn=0.01,
    refused_calls=4000,
    contention_turn=2.0,
    contention_rounds=7,
    callers=(4, 16, 64),
    loads=(1, 2, 5, 10),
    load_time=15.0,
    tail_time=20.0,
    imports=21,
    hang=10.0,
    outages=3,
    outage=5.0,
    watch=8.0,
)
QUICK = Scale(
    rounds=75,
    turn=0.005,
    refused_calls=1000,
    contention_turn=0.5,
    contention_rounds=3,
    callers=(4, 16, 64),
    loads=(2, 5, 10),
    load_time=3.0,
    tail_time=5.0,
    imports=7,
    hang=5.0,
    outages=1,
    outage=4.0,
    watch=7.0,
)
SMOKE = Scale(
    rounds=3,
    turn=0.002,
    refused_calls=20,
    contention_turn=0.1,
    contention_rounds=1,
    callers=(8,),
    loads=(2,),
    contestants=2,
    load_time=0.3,
    tail_time=1.5,
    imports=1,
    hang=0.6,
    outages=1,
    outage=0.4,
    watch=0.8,
    judged=False,
)
"""Only shows that everything runs; its figures mean nothing."""


class Spread(NamedTuple):
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}-{self.high:.3g}]"


class Lap(NamedTuple):
    """One contender's result: seconds for one operation, and the ratio to the first contender's."""

    seconds: Spread
    ratio: Spread


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that is not below ``share`` of them; None of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """Who goes first in round ``number``: everybody in turn, forwards and backwards."""
    start = number // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let everybody have a turn in each of ``rounds`` rounds; returns what the turns gave."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()  # what was there before is nobody's garbage
    try:
        for number in range(rounds):
            for name in turn_order(list(contenders), number):
                results[name].append(contenders[name]())
    finally:
        gc.unfreeze()
    return results


def race(contenders: Mapping[str, Callable[[int], float]], scale: Scale) -> dict[str, Lap]:
    """Time one operation of each contender against the first one's."""
    base, first = next(iter(contenders.items()))
    repeats = _repeats(first, scale.turn)
    for turn in contenders.values():
        turn(repeats)
    bound = {name: lambda turn=turn: turn(repeats) / repeats for name, turn in contenders.items()}
    seconds = in_turns(bound, scale.rounds)
    return {
        name: Lap(
            spread(taken), spread([mine / plain for mine, plain in zip(taken, seconds[base], strict=True)])
        )
        for name, taken in seconds.items()
    }


def _repeats(turn: Callable[[int], float], seconds: float) -> int:
    """How often the operation fits in ``seconds``."""
    repeats = 1
    while (taken := turn(repeats)) < seconds / 4:
        repeats *= 4
    return max(1, round(repeats * seconds / taken))


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread, and those it starts, on one processor: for what never leaves the process."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
