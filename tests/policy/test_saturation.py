"""Slots and the line: checked step by step against a model that is too simple to be wrong."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilientdb.policy.saturation import Admission

CONNECTION = "connection"
NOTHING = "nothing yet"


class Waiter:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<{self.number}>"


class Pool(RuleBasedStateMachine):
    """Callers, slots and idle connections, together with who should be where."""

    def __init__(self) -> None:
        super().__init__()
        self.admission: Admission[Waiter] = Admission(limit=1, max_waiting=None)
        self.numbers = itertools.count()
        self.idle = 0
        self.holding: dict[Waiter, str] = {}
        self.waiting: list[Waiter] = []
        self.allowed: float = 0
        """The most slots there may be: the limit, or what there was when it was lowered."""
        self.was_raised = False

    @initialize(limit=st.none() | st.integers(1, 4), max_waiting=st.none() | st.integers(0, 3))
    def make(self, limit: int | None, max_waiting: int | None) -> None:
        self.admission = Admission(limit=limit, max_waiting=max_waiting)

    def serve(self, waiter: Waiter | None, what: str) -> bool:
        """Check who was served, and hand it over."""
        if waiter is None:
            return False
        assert waiter is self.waiting.pop(0), "first come, first served; and none who has left"
        self.holding[waiter] = what
        return True

    @rule()
    def arrive(self) -> None:
        caller = Waiter(next(self.numbers))
        limit, total = self.admission.limit, self.admission.total
        if self.idle:
            self.idle -= 1
            self.holding[caller] = CONNECTION
        elif self.admission.try_take():
            assert limit is None or total < limit
            self.holding[caller] = NOTHING
        elif self.admission.join(caller):
            self.waiting.append(caller)
        else:
            assert len(self.waiting) == self.admission.max_waiting

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        assert self.admission.leave(gone)
        assert not self.admission.leave(gone), "only once"

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def leave_too_late(self, data: st.DataObject) -> None:
        assert not self.admission.leave(data.draw(st.sampled_from(list(self.holding))))

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        self.holding[data.draw(st.sampled_from(list(self.holding)))] = CONNECTION

    @precondition(lambda self: CONNECTION in self.holding.values())
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        holders = [caller for caller, what in self.holding.items() if what == CONNECTION]
        del self.holding[data.draw(st.sampled_from(holders))]
        if not self.serve(self.admission.next_in_line(), CONNECTION):
            assert not self.waiting
            self.idle += 1

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """The connection is lost, or was never made."""
        over = self.admission.limit is not None and self.admission.total > self.admission.limit
        somebody_waits = bool(self.waiting)
        del self.holding[data.draw(st.sampled_from(list(self.holding)))]
        assert self.serve(self.admission.vacate(), NOTHING) is (somebody_waits and not over)

    @precondition(lambda self: self.idle)
    @rule()
    def close_idle(self) -> None:
        self.idle -= 1
        self.serve(self.admission.vacate(), NOTHING)

    @rule(limit=st.integers(1, 4))
    def change_limit(self, limit: int) -> None:
        before, self.admission.limit = self.admission.limit, limit
        self.was_raised |= before is not None and limit > before

    @rule()
    def dismiss(self) -> None:
        assert self.admission.dismiss() == self.waiting
        for gone in self.waiting:
            assert not self.admission.leave(gone)
        self.waiting.clear()

    @invariant()
    def no_slot_is_lost_or_invented(self) -> None:
        assert self.admission.total == self.idle + len(self.holding)

    @invariant()
    def never_more_than_allowed(self) -> None:
        limit = self.admission.limit
        total = self.admission.total
        if limit is not None:
            self.allowed = max(limit, min(self.allowed, total) if self.allowed else total)
            assert total <= self.allowed

    @invariant()
    def the_line_is_as_long_as_it_looks(self) -> None:
        assert list(self.admission.line) == self.waiting
        assert self.admission.waiting == len(self.waiting)
        if self.admission.max_waiting is not None:
            assert len(self.waiting) <= self.admission.max_waiting

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if self.waiting:
            assert self.idle == 0
            assert self.was_raised or self.holding, "somebody will give back"


TestPool = Pool.TestCase


# -- many steps of virtual time -----------------------------------------------------------------------------------


class Simulation:
    """Callers come at random, wait for at most a while, hold for a while, and sometimes lose what they hold."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.admission: Admission[Waiter] = Admission(limit=5, max_waiting=12)
        self.now = 0.0
        self.serial = itertools.count()
        self.events: list[tuple[float, int, str, Waiter]] = []
        self.idle = 0
        self.holding: dict[Waiter, bool] = {}
        self.line: deque[Waiter] = deque()
        self.seen: Counter[str] = Counter()

    def later(self, mean: float, what: str, who: Waiter) -> None:
        at = self.now + self.chance.expovariate(1 / mean)
        heapq.heappush(self.events, (at, next(self.serial), what, who))

    def hold(self, who: Waiter, *, connected: bool) -> None:
        assert who not in self.holding
        self.holding[who] = connected
        self.later(1.0 if connected else 1.5, "finish", who)

    def pass_on(self, who: Waiter | None, *, connected: bool) -> bool:
        if who is None:
            return False
        assert who is self.line.popleft()
        self.seen["handed on"] += 1
        self.hold(who, connected=connected)
        return True

    def arrive(self, who: Waiter) -> None:
        # Load swings between half and twice of what five connections can bear.
        self.later(0.4 if self.now // 50 % 2 else 0.1, "arrive", Waiter(next(self.serial)))
        if self.idle:
            self.idle -= 1
            self.hold(who, connected=True)
        elif self.admission.try_take():
            self.hold(who, connected=False)
        elif self.admission.join(who):
            self.line.append(who)
            self.later(2.0, "give up", who)
        else:
            self.seen["refused"] += 1

    def give_up(self, who: Waiter) -> None:
        if self.admission.leave(who):
            self.line.remove(who)
            self.seen["gave up"] += 1
        else:
            assert who not in self.line

    def finish(self, who: Waiter) -> None:
        del self.holding[who]
        self.seen["served"] += 1
        if self.chance.random() < 0.1:
            self.seen["lost"] += 1
            self.pass_on(self.admission.vacate(), connected=False)
        elif not self.pass_on(self.admission.next_in_line(), connected=True):
            self.idle += 1

    def run(self, steps: int) -> None:
        actions = {"arrive": self.arrive, "give up": self.give_up, "finish": self.finish}
        self.arrive(Waiter(next(self.serial)))
        for step in range(steps):
            self.now, _, what, who = heapq.heappop(self.events)
            actions[what](who)
            if step % 5_000 == 4_999:
                self.seen["dismissed"] += len(self.admission.dismiss())
                self.line.clear()
            admission = self.admission
            assert admission.total == self.idle + len(self.holding) <= 5
            assert admission.waiting == len(self.line) <= 12
            assert not (self.line and self.idle)
            assert not self.line or admission.total == 5
        assert list(self.admission.line) == list(self.line)


@pytest.mark.parametrize("seed", range(3))
def test_a_day_in_virtual_time(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(60_000)
    assert min(simulation.seen[what] for what in ("served", "handed on", "refused", "gave up", "lost")) > 100
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


def test_zero_places_to_wait() -> None:
    admission: Admission[Waiter] = Admission(limit=1, max_waiting=0)
    assert admission.try_take()
    assert not admission.join(Waiter(0))
    assert admission.waited == 0
