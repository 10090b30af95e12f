"""A database in virtual time, with the pool's own admission in front of it.

The database is a processor-sharing queue with a knee: ``cores`` queries run at full speed; more share these cores,
and each one beyond them takes ``contention`` of the whole away (locks, caches, switches). A hold is work in the
database and then time *away* from it, the connection held: the network, the application, or a sleep. Arrivals are
open-loop, each with a deadline of a second; a refused one does not come again. Seeded, so that it can be repeated.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from resilientdb.policy.saturation import Admission, Lane, Refusal

from ..measure import percentile
from .controllers import CANDIDATES, FIRST, HIGHEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .controllers import Controller

__all__ = ["LIMITS", "SCENARIOS", "Outcome", "Scenario", "run", "simulate"]

LIMITS = (2, 3, 4, 6, 10, 15, 20, 30, 50)
_PROCESSES = 2
_DEADLINE = 1.0


@dataclass(frozen=True)
class Kind:
    """A class of queries: its share of the traffic, mean work in the database, mean time away from it."""

    share: float
    work: float
    away: float = 0.0


@dataclass(frozen=True)
class Phase:
    """How it is for ``seconds``: arrivals a second, and the database's speed."""

    seconds: float
    rate: float
    kinds: tuple[Kind, ...] = (Kind(1.0, 0.02),)
    speed: float = 1.0


@dataclass(frozen=True)
class Scenario:
    name: str
    phases: tuple[Phase, ...]
    cores: float = 4
    contention: float = 0.0
    calm: float = 10.0
    """Seconds of half the first phase's load before it begins, not measured: what the candidates learn from."""


def _steady(name: str, rate: float, *kinds: Kind, **options: float) -> Scenario:
    return Scenario(name, (Phase(60, rate, kinds or (Kind(1.0, 0.02),)),), **options)


_AWAY, _SLEEP = Kind(1.0, 0.02, 0.08), Kind(1.0, 0.0, 0.1)
_FAST_AND_SLOW = (Kind(0.9, 0.01), Kind(0.1, 0.11))
_AND_REPORTS = (Kind(0.7, 0.02), Kind(0.3, 0.0, 0.3))

# Four cores and 20 ms of work: 200 a second at best.
SCENARIOS = (
    _steady("plateau, 1.5x", 300),
    _steady("mild knee, 1.5x", 300, contention=0.01),
    _steady("steep knee, 1.5x", 300, contention=0.05),
    _steady("steep knee, 3x", 600, contention=0.05),
    _steady("steep knee, 1.5x from the start", 300, contention=0.05, calm=0.0),
    _steady("lock convoy, 1.5x", 300, Kind(1.0, 0.005, 0.005), cores=1, contention=0.05),
    _steady("fast and slow, 1.5x", 300, *_FAST_AND_SLOW, contention=0.05),
    _steady("held by the application, 1.5x", 300, _AWAY, contention=0.05),
    _steady("pure latency, 30 busy", 300, _SLEEP, cores=math.inf),
    _steady("pure latency, 1.5x of 50", 750, _SLEEP, cores=math.inf),
    Scenario(
        "steep knee, 0.8x and a burst",
        (Phase(10, 160), Phase(2, 600), Phase(48, 160)),
        contention=0.05,
    ),
    Scenario(
        "reports come in, 30 % of 0.3 s",
        (Phase(15, 160), Phase(45, 160 / 0.7, _AND_REPORTS)),
        contention=0.02,
    ),
    Scenario(
        "brown-out: a quarter of the speed",
        (Phase(15, 160), Phase(20, 160, speed=0.25), Phase(25, 160)),
        contention=0.05,
    ),
    Scenario(
        "brown-out: 200 ms more a query",
        (Phase(15, 120), Phase(20, 120, (Kind(1.0, 0.02, 0.2),)), Phase(25, 120)),
        contention=0.02,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """``goodput``: the part of all that came which was answered within the deadline."""

    goodput: float
    p99: float
    limit: float
    """Mean over the last third."""


class _Request:
    """One caller, as the line wants it."""

    __slots__ = ("away", "began", "came", "holds", "lane", "remaining", "since", "work")

    def __init__(self, came: float, work: float, away: float) -> None:
        self.holds = 0
        self.lane = Lane.CRITICAL
        self.since = self.came = came
        self.remaining: float | None = _DEADLINE
        self.began = 0.0
        self.work = work
        self.away = away


class _Database:
    """Everybody inside is given the same share, so one count of the work done for each says who is finished."""

    def __init__(self, cores: float, contention: float) -> None:
        self._cores = cores
        self._contention = contention
        self.speed = 1.0
        self._done = 0.0
        self._now = 0.0
        self._inside: list[tuple[float, int, _Request]] = []
        self._number = 0

    def _share(self) -> float:
        inside = len(self._inside)
        lost = self._contention * max(0.0, inside - self._cores)
        return self.speed * min(1.0, self._cores / inside) / (1 + lost)

    def advance(self, now: float) -> None:
        if self._inside:
            self._done += (now - self._now) * self._share()
        self._now = now

    def enter(self, request: _Request) -> None:
        self._number += 1
        heapq.heappush(self._inside, (self._done + request.work, self._number, request))

    def next_at(self) -> float:
        if not self._inside:
            return math.inf
        return self._now + max(0.0, self._inside[0][0] - self._done) / self._share()

    def finished(self) -> _Request:
        return heapq.heappop(self._inside)[2]


def _arrivals(scenario: Scenario, rng: random.Random) -> Iterator[tuple[float, _Request]]:
    calm = replace(scenario.phases[0], seconds=scenario.calm, rate=scenario.phases[0].rate / 2)
    begins = 0.0
    for phase in (calm, *scenario.phases):
        at = begins + rng.expovariate(phase.rate)
        begins += phase.seconds
        shares = [kind.share for kind in phase.kinds]
        while at < begins:
            (kind,) = rng.choices(phase.kinds, shares)
            work, away = (rng.expovariate(1 / mean) if mean else 0.0 for mean in (kind.work, kind.away))
            yield at, _Request(at, work, away)
            at += rng.expovariate(phase.rate)


def simulate(scenario: Scenario, controller: Controller | int, seed: int) -> Outcome:
    """``controller``: one of the candidates, or a fixed limit."""
    return _Run(scenario, controller, seed).outcome()


class _Run:
    def __init__(self, scenario: Scenario, controller: Controller | int, seed: int) -> None:
        self._controller = None if isinstance(controller, int) else controller
        first = controller if isinstance(controller, int) else controller.limit
        self._admission: Admission[_Request] = Admission(limit=first, max_waiting=HIGHEST)
        self._database = _Database(scenario.cores, scenario.contention)
        self._away: list[tuple[float, int, _Request]] = []
        self._number = 0
        self._lapsing: deque[_Request] = deque()
        """In line, and then some who left it, by the time at which they give up."""
        self._begin = scenario.calm
        self._end = scenario.calm + sum(phase.seconds for phase in scenario.phases)
        self._answered: list[float] = []
        self._came = 0
        self._limits = [(0.0, first)]
        self._play(scenario, random.Random(f"{scenario.name} {seed}"))

    def _play(self, scenario: Scenario, rng: random.Random) -> None:
        changes = deque([(0.0, 1.0)])
        at = scenario.calm
        for phase in scenario.phases:
            changes.append((at, phase.speed))
            at += phase.seconds
        arrivals = _arrivals(scenario, rng)
        arrival = next(arrivals, None)
        while True:
            comes = arrival[0] if arrival else math.inf
            ends = self._database.next_at()
            back = self._away[0][0] if self._away else math.inf
            lapses = self._lapsing[0].came + _DEADLINE if self._lapsing else math.inf
            turns = changes[0][0] if changes else math.inf
            now = min(comes, ends, back, lapses, turns)
            if now == math.inf:
                return
            self._database.advance(now)
            if now == turns:
                self._database.speed = changes.popleft()[1]
            elif now == comes:
                assert arrival is not None
                self._arrive(arrival[1], now)
                arrival = next(arrivals, None)
            elif now == ends:
                self._leave_database(self._database.finished(), now)
            elif now == back:
                self._finish(heapq.heappop(self._away)[2], now)
            else:
                self._admission.leave(self._lapsing.popleft())

    def _arrive(self, request: _Request, now: float) -> None:
        self._came += now >= self._begin
        if self._admission.try_take():
            self._start(request, now)
        elif not isinstance(self._admission.join(request, Lane.CRITICAL, now, _DEADLINE), Refusal):
            self._lapsing.append(request)

    def _start(self, request: _Request, now: float) -> None:
        request.began = now
        if request.work:
            self._database.enter(request)
        else:
            self._leave_database(request, now)

    def _leave_database(self, request: _Request, now: float) -> None:
        if request.away:
            self._number += 1
            heapq.heappush(self._away, (now + request.away, self._number, request))
        else:
            self._finish(request, now)

    def _finish(self, request: _Request, now: float) -> None:
        admission = self._admission
        if request.came >= self._begin:
            self._answered.append(now - request.came)
        if self._controller is not None:
            limit = self._controller.observe(now - request.began, admission.waiting, now)
            if limit != admission.limit:
                admission.limit = limit
                self._limits.append((now, limit))
        # As a slot without a connection, since only those are kept back above a lowered limit.
        _, follower = admission.serve(now, lost=True)
        while follower is not None:
            self._start(follower, now)
            follower = admission.serve(now)[1] if admission.waiting and admission.try_take() else None

    def outcome(self) -> Outcome:
        good = sum(seconds <= _DEADLINE for seconds in self._answered)
        since = self._begin + (self._end - self._begin) * 2 / 3
        area = 0.0
        for (at, limit), (until, _) in zip(self._limits, [*self._limits[1:], (self._end, 0)], strict=True):
            area += limit * max(0.0, min(until, self._end) - max(at, since))
        p99 = percentile(self._answered, 0.99) or math.inf
        return Outcome(good / self._came, p99, area / (self._end - since))


def run(seeds: int = 2) -> tuple[list[str], list[list[str]]]:
    """(headings, rows). A contender's cell: goodput and p99, each in parts of what the best fixed limit has."""
    contenders: dict[str, int | str] = {f"fixed {limit}": limit for limit in LIMITS}
    contenders |= {name: name for name in CANDIDATES}
    default = f"fixed {FIRST}"
    rows: list[list[str]] = []
    parts: dict[str, list[float]] = {name: [] for name in contenders}
    jobs = [
        (scenario, what, seed)
        for scenario in SCENARIOS
        for what in contenders.values()
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(_PROCESSES) as processes:
        outcomes = processes.map(_one, jobs, chunksize=seeds)
        for scenario in SCENARIOS:
            found = {name: _mean([next(outcomes) for _ in range(seeds)]) for name in contenders}
            best = _best({name: found[name] for name in contenders if name not in CANDIDATES})
            mark = found[best]
            for name, outcome in found.items():
                parts[name].append(outcome.goodput / mark.goodput)
            rows.append(
                [
                    scenario.name,
                    best,
                    f"{mark.goodput:.0%}, {mark.p99 * 1e3:.0f} ms",
                    *(
                        f"{found[name].goodput / mark.goodput:.2f}, {found[name].p99 / mark.p99:.1f}"
                        for name in (default, *CANDIDATES)
                    ),
                    " ".join(f"{found[name].limit:.0f}" for name in CANDIDATES),
                ]
            )
    for name, ratios in parts.items():
        rows.append([f"all, {name}", "", f"mean {sum(ratios) / len(ratios):.2f}, worst {min(ratios):.2f}"])
    return ["database", "best", "its goodput, p99", default, *CANDIDATES, "their limits at the end"], rows


def _one(job: tuple[Scenario, int | str, int]) -> Outcome:
    scenario, what, seed = job
    return simulate(scenario, what if isinstance(what, int) else CANDIDATES[what](), seed)


def _mean(outcomes: list[Outcome]) -> Outcome:
    many = len(outcomes)
    return Outcome(
        sum(each.goodput for each in outcomes) / many,
        sum(each.p99 for each in outcomes) / many,
        sum(each.limit for each in outcomes) / many,
    )


def _best(fixed: dict[str, Outcome]) -> str:
    """The limit of the most goodput; of those within half a percent of it, the one with the smallest p99."""
    most = max(outcome.goodput for outcome in fixed.values())
    near = [name for name, outcome in fixed.items() if outcome.goodput >= 0.995 * most]
    return min(near, key=lambda name: fixed[name].p99)
