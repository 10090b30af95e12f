"""How a database comes back behind the circuit: callers, calls and a prober in virtual time, at random, seeded."""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from resilientdb import BreakerPolicy
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, BreakerCore, Permit

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = range(40)
HEALED = 20.0
PROBE = 0.25


class Recovery:
    """A database that is dead until ``HEALED``, and callers who come ``rate`` times a second. ``works`` says whether
    a call that begins now succeeds, and after how long."""

    def __init__(
        self,
        seed: int,
        works: Callable[[Recovery], tuple[bool, float]],
        *,
        rate: float = 500.0,
        prober: bool = True,
        **options: object,
    ) -> None:
        self.chance = random.Random(seed)
        policy = BreakerPolicy(reset_timeout=2.0, **options)  # type: ignore[arg-type]
        self.core = BreakerCore(policy, 0.0, rng=self.chance.random, probed=prober)
        self.works = works
        self.rate = rate
        self.now = 0.0
        self.serial = itertools.count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.at_once = 0
        """Calls that are at the database."""
        self.most_at_once = 0
        self.answered = 0
        self.asked: list[tuple[float, bool]] = []
        """When each caller came, and whether it was let through and got an answer."""
        self.first_success: float | None = None
        self.first_answer: float | None = None
        """When the prober got its first."""
        self.later(0.0, self.arrive)
        if prober:
            self.later(self.chance.random() * PROBE, self.probe)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.serial), what))

    def run(self, until: float) -> Recovery:
        while self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self

    @property
    def is_well(self) -> bool:
        return self.now >= HEALED

    def probe(self) -> None:
        if self.is_well:
            self.core.prober_succeeded(self.now)
            self.first_answer = self.first_answer or self.now
        else:
            self.core.prober_failed(self.now, "refused")
        self.later(PROBE, self.probe)

    def arrive(self) -> None:
        self.later(self.chance.expovariate(self.rate), self.arrive)
        permit, _ = self.core.try_acquire(self.now)
        if permit is None:
            self.asked.append((self.now, False))
            return
        if not self.is_well:
            self.end(permit, self.now, 0.0, good=False)
            return
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        good, seconds = self.works(self)
        came = self.now
        self.later(seconds, lambda: self.leave(permit, came, good=good))

    def leave(self, permit: Permit, came: float, *, good: bool) -> None:
        self.at_once -= 1
        self.end(permit, came, self.now, good=good)

    def end(self, permit: Permit, came: float, at: float, *, good: bool) -> None:
        self.asked.append((came, good))
        if good:
            self.answered += 1
            self.first_success = self.first_success or at
            self.core.record_success(permit, self.now)
        else:
            self.core.record_failure(permit, self.now, "refused")

    def normal_from(self) -> float:
        """Since when 95 of 100 callers in every tenth of a second are served."""
        end = max(came for came, _ in self.asked)
        tenths: dict[int, list[bool]] = {}
        for came, good in self.asked:
            if came >= HEALED:
                tenths.setdefault(int((came - HEALED) * 10), []).append(good)
        bad = [tenth for tenth, served in tenths.items() if sum(served) < 0.95 * len(served)]
        assert end > HEALED + 1
        return (max(bad) + 1) / 10 if bad else 0.0


def fast(_: Recovery) -> tuple[bool, float]:
    return True, 0.02


def test_a_fast_database_has_its_traffic_back_at_once() -> None:
    runs = [Recovery(seed, fast).run(HEALED + 2.0) for seed in SEEDS]
    for run in runs:
        assert run.first_answer is not None
        assert run.first_success is not None
        assert run.first_answer <= HEALED + PROBE
        assert run.first_success <= run.first_answer + 0.05, "the next caller after the prober's answer"
        assert run.normal_from() <= 0.5
    firsts = [run.first_success - HEALED for run in runs if run.first_success is not None]
    assert statistics.median(firsts) <= 0.25
    without = [Recovery(seed, fast, slow_start_calls=0).run(HEALED + 2.0).normal_from() for seed in SEEDS]
    assert statistics.mean(run.normal_from() for run in runs) <= statistics.mean(without) + 0.2


def test_nor_is_it_kept_waiting_where_nobody_probes() -> None:
    for seed in SEEDS:
        run = Recovery(seed, fast, prober=False, max_reset_timeout=4.0).run(HEALED + 6.0)
        assert run.first_success is not None
        assert run.first_success <= HEALED + 4.0 + 0.05, "the longest open time"
        assert run.normal_from() <= run.first_success - HEALED + 0.3


def fragile(run: Recovery) -> tuple[bool, float]:
    """Serves two at once; whoever comes on top of that breaks it, and gets an error."""
    return run.at_once <= 2, 0.02


@pytest.mark.parametrize("prober", [True, False])
def test_a_database_that_serves_two_at_once_is_not_hit_by_fifty(prober: bool) -> None:
    # 2,500 a second, of 20 ms each, would be fifty at once.
    options: dict[str, Any] = {"rate": 2_500.0, "prober": prober, "max_reset_timeout": 4.0}
    for seed in SEEDS[:10]:
        run = Recovery(seed, fragile, **options).run(HEALED + 10.0)
        assert run.most_at_once <= 8, "an answer later it is noticed, and few more have been let through"
        bare = Recovery(seed, fragile, slow_start_calls=0, **options).run(HEALED + 10.0)
        assert bare.most_at_once > 20, "without, it is: this test can fail"
        assert run.answered > 2 * bare.answered, "and what it can do is made use of"


@pytest.mark.parametrize("prober", [True, False])
def test_a_database_that_fails_a_call_now_and_then_gets_through_it(prober: bool) -> None:
    """One call in ten fails, which is no reason to open: nor is it after an outage."""
    for seed in SEEDS[:10]:
        run = Recovery(
            seed, lambda run: (run.chance.random() > 0.1, 0.02), prober=prober, max_reset_timeout=4.0
        )
        run.run(HEALED + 15.0)
        served = [good for came, good in run.asked if came > HEALED + 10.0]
        assert sum(served) > 0.85 * len(served)


def cold(run: Recovery) -> tuple[bool, float]:
    """Its caches are empty: it works on two at once, and on more as it warms up with each answer."""
    capacity = 2 + run.answered / 4
    return True, 0.02 * max(1.0, run.at_once / capacity)


def test_a_cold_database_is_asked_as_it_warms_up() -> None:
    for seed in SEEDS[:10]:
        run = Recovery(seed, cold, rate=2_500.0)
        while run.core.slow_start is None and (run.core.state != CLOSED or run.now < HEALED):
            run.run(run.events[0][0])
        while run.core.slow_start is not None:
            run.run(run.events[0][0])
            assert run.at_once <= 1 + run.answered
        run.run(HEALED + 2.0)
        assert run.normal_from() <= 0.8


def test_the_simulated_outage_is_one() -> None:
    run = Recovery(1, fast).run(HEALED - 1.0)
    assert run.answered == 0
    assert run.core.state not in {CLOSED, HALF_OPEN}
