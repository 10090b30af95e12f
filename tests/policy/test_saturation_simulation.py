"""Slots and the lines over many steps of virtual time: callers of every kind, each promise checked at each step."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest

from resilientdb.policy.saturation import Admission, Lane, Refusal

LIMIT, PLACES, TARGET, INTERVAL = 5, 12, 0.5, 5.0


class Waiter:
    def __init__(self, number: int, lane: Lane, patience: float | None) -> None:
        self.number = number
        self.lane = lane
        self.patience = patience
        self.since = 0.0
        self.remaining: float | None = None


class Simulation:
    """Callers come at random, wait for at most a while, hold for a while, and sometimes lose what they hold."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.admission: Admission[Waiter] = Admission(
            limit=LIMIT, max_waiting=PLACES, target=TARGET, interval=INTERVAL
        )
        self.now = 0.0
        self.serial = itertools.count()
        self.events: list[tuple[float, int, str, Waiter]] = []
        self.idle = 0
        self.holding: set[Waiter] = set()
        self.lines: dict[Lane, dict[Waiter, None]] = {lane: {} for lane in Lane}
        """In the order in which they came."""
        self.seen: Counter[str] = Counter()

    def newcomer(self) -> Waiter:
        lane = self.chance.choices(list(Lane), (1, 5, 2, 2))[0]
        return Waiter(next(self.serial), lane, self.chance.choice((None, None, 1.0, 4.0)))

    def later(self, mean: float, what: str, who: Waiter) -> None:
        at = self.now + self.chance.expovariate(1 / mean)
        heapq.heappush(self.events, (at, next(self.serial), what, who))

    def hold(self, who: Waiter, *, connected: bool) -> None:
        assert who not in self.holding
        self.holding.add(who)
        self.later(1.0 if connected else 1.5, "finish", who)

    def take_out(self, who: Waiter, what: str) -> None:
        del self.lines[who.lane][who]  # KeyError: was not in line, or is taken out twice
        self.seen[what] += 1

    def arrive(self, who: Waiter) -> None:
        # Load swings between half and four times of what five connections can bear.
        self.later((0.4, 0.2, 0.05)[int(self.now // 40) % 3], "arrive", self.newcomer())
        if self.idle:
            self.idle -= 1
            self.hold(who, connected=True)
        elif self.admission.try_take():
            self.hold(who, connected=False)
        else:
            self.join(who)

    def join(self, who: Waiter) -> None:
        answer = self.admission.join(who, who.lane, self.now, who.patience)
        if isinstance(answer, Refusal):
            self.seen[answer.value] += 1
            return
        if answer is not None:
            assert answer.lane >= who.lane, "nobody makes room for the less critical"
            assert answer is next(iter(self.lines[answer.lane]))
            assert not any(self.lines[lane] for lane in Lane if lane > max(answer.lane, who.lane))
            self.take_out(answer, "pool-displaced")
        self.lines[who.lane][who] = None
        self.later(2.0 if who.patience is None else who.patience, "give up", who)

    def give_up(self, who: Waiter) -> None:
        if self.admission.leave(who):
            self.take_out(who, "gave up")
        else:
            assert who not in self.lines[who.lane]

    def finish(self, who: Waiter) -> None:
        self.holding.remove(who)
        self.seen["served"] += 1
        overloaded = self.admission.overloaded()
        for gone in self.admission.overdue(self.now):
            waited = self.now - gone.since
            assert (overloaded[gone.lane] and waited > 2 * TARGET) or (
                gone.patience and waited > gone.patience / 2
            )
            self.take_out(gone, "pool-shed")
            assert self.admission.waiting, "the last in line is never shed"
        if self.chance.random() < 0.1:
            self.seen["lost"] += 1
            self.pass_on(self.admission.vacate(self.now), connected=False)
        elif not self.pass_on(self.admission.next_in_line(self.now), connected=True):
            self.idle += 1

    def pass_on(self, who: Waiter | None, *, connected: bool) -> bool:
        if who is None:
            assert not any(self.lines.values())
            return False
        line = next(filter(None, self.lines.values()))
        newest_first = self.admission.overloaded()[who.lane]
        assert who is next(reversed(line) if newest_first else iter(line))
        self.take_out(who, "newest first" if newest_first else "first come first served")
        self.hold(who, connected=connected)
        return True

    def run(self, steps: int) -> None:
        actions = {"arrive": self.arrive, "give up": self.give_up, "finish": self.finish}
        self.arrive(self.newcomer())
        admission = self.admission
        for step in range(steps):
            self.now, _, what, who = heapq.heappop(self.events)
            actions[what](who)
            if step % 5_000 == 4_999:
                for gone in admission.dismiss():
                    self.take_out(gone, "dismissed")
            assert admission.total == self.idle + len(self.holding) <= LIMIT
            assert admission.depths() == tuple(map(len, self.lines.values()))
            assert admission.waiting == sum(admission.depths()) <= PLACES
            assert not admission.waiting or (admission.total == LIMIT and not self.idle)


EVERYTHING = {
    *("served", "first come first served", "newest first", "gave up", "lost"),
    *(why.value for why in Refusal),
}


@pytest.mark.parametrize("seed", range(3))
def test_a_day_in_virtual_time(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(60_000)
    assert {what: simulation.seen[what] for what in EVERYTHING if simulation.seen[what] < 100} == {}
    assert simulation.seen["dismissed"] > 0


@pytest.mark.nightly
def test_a_year_in_virtual_time() -> None:
    Simulation(4).run(1_500_000)


def test_two_simulations_of_one_seed_are_the_same() -> None:
    twins = [Simulation(9), Simulation(9)]
    for twin in twins:
        twin.run(2_000)
    assert twins[0].seen == twins[1].seen
    assert twins[0].now == twins[1].now
