"""Slots and lines: checked step by step against a model that is too simple to be wrong."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilientdb.policy.saturation import Admission, Lane, Refusal

CONNECTION = "connection"
NOTHING = "nothing yet"
TARGET = 0.05
SHARES = {Lane.CRITICAL_PLUS: 1.0, Lane.CRITICAL: 1.0, Lane.SHEDDABLE_PLUS: 0.5, Lane.SHEDDABLE: 0.25}


class Waiter:
    lane = Lane.CRITICAL
    since = 0.0
    remaining: float | None = None

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
        self.now = 1_000.0
        self.idle = 0
        self.holding: dict[Waiter, str] = {}
        self.lines: dict[Lane, list[Waiter]] = {lane: [] for lane in Lane}
        self.gone: list[Waiter] = []
        self.allowed: float = 0
        """The most slots there may be: the limit, or what there was when it was lowered."""
        self.was_raised = False

    @initialize(limit=st.none() | st.integers(1, 4), max_waiting=st.none() | st.integers(0, 9))
    def make(self, limit: int | None, max_waiting: int | None) -> None:
        self.admission = Admission(limit=limit, max_waiting=max_waiting, target=TARGET, interval=0.5)

    @property
    def waiting(self) -> list[Waiter]:
        return [waiter for line in self.lines.values() for waiter in line]

    def take_out(self, waiter: Waiter) -> None:
        self.lines[waiter.lane].remove(waiter)
        self.gone.append(waiter)

    def serve(self, waiter: Waiter | None, what: str) -> bool:
        """Check who was served, and hand it over."""
        if waiter is None:
            return False
        line = next(line for line in self.lines.values() if line)
        assert waiter is line.pop(-1 if self.admission.overloaded else 0)
        self.holding[waiter] = what
        return True

    def shed(self) -> None:
        """As a pool does before it serves."""
        before = len(self.waiting)
        sent_away = self.admission.overdue(self.now)
        for waiter in sent_away:
            assert waiter is self.lines[waiter.lane][0], "who has waited longest"
            waited = self.now - waiter.since
            out_of_time = waiter.remaining is not None and waited > waiter.remaining / 2
            assert out_of_time or (self.admission.overloaded and waited > 2 * TARGET)
            self.take_out(waiter)
        assert not before or self.waiting, "one stays, for there is a slot for it"

    @rule(seconds=st.sampled_from([0.001, 0.06, 0.3, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(lane=st.sampled_from(Lane), remaining=st.sampled_from([None, None, 0.01, 0.4, 60.0]))
    def arrive(self, lane: Lane, remaining: float | None) -> None:
        caller = Waiter(next(self.numbers))
        limit, total = self.admission.limit, self.admission.total
        if self.idle:
            self.idle -= 1
            self.holding[caller] = CONNECTION
            return
        if self.admission.try_take():
            assert limit is None or total < limit
            self.holding[caller] = NOTHING
            return
        self.join(caller, lane, remaining)

    def join(self, caller: Waiter, lane: Lane, remaining: float | None) -> None:
        places, overloaded = self.admission.max_waiting, self.admission.overloaded
        taken, less_critical = len(self.waiting), [one for one in self.waiting if one.lane > lane]
        full = places is not None and taken >= round(places * SHARES[lane])
        expected = self.admission.expected_wait(lane, self.now)
        answer = self.admission.join(caller, lane, self.now, remaining)
        if isinstance(answer, Refusal):
            self.gone.append(caller)
            if answer is Refusal.FULL:
                assert full
                assert not less_critical, "somebody less critical should have made room"
            else:
                assert answer is Refusal.HOPELESS
                assert taken, "who would be first in line finds out how fast it moves"
                assert remaining is not None
                assert expected is not None
                assert expected > remaining / 2
            return
        if answer is not None:
            assert full
            worst = max(one.lane for one in less_critical) if less_critical else lane
            assert less_critical or overloaded
            assert answer is self.lines[worst][0], "the longest waiting of the least critical"
            self.take_out(answer)
        else:
            assert not full
        self.lines[lane].append(caller)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.waiting))
        self.take_out(waiter)
        assert self.admission.leave(waiter)

    @precondition(lambda self: self.holding or self.gone)
    @rule(data=st.data())
    def leave_too_late(self, data: st.DataObject) -> None:
        assert not self.admission.leave(data.draw(st.sampled_from([*self.holding, *self.gone])))

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        self.holding[data.draw(st.sampled_from(list(self.holding)))] = CONNECTION

    @precondition(lambda self: CONNECTION in self.holding.values())
    @rule(data=st.data(), shed=st.booleans())
    def give_back(self, data: st.DataObject, shed: bool) -> None:
        if shed:
            self.shed()
        holders = [caller for caller, what in self.holding.items() if what == CONNECTION]
        del self.holding[data.draw(st.sampled_from(holders))]
        somebody_waits = bool(self.waiting)
        served = self.serve(self.admission.next_in_line(self.now), CONNECTION)
        assert served is somebody_waits
        self.idle += not served

    @precondition(lambda self: self.holding or self.idle)
    @rule(data=st.data(), shed=st.booleans())
    def lose(self, data: st.DataObject, shed: bool) -> None:
        """A connection is lost, or was never made."""
        if shed:
            self.shed()
        over = self.admission.limit is not None and self.admission.total > self.admission.limit
        somebody_waits = bool(self.waiting)
        if self.idle:
            self.idle -= 1
        else:
            del self.holding[data.draw(st.sampled_from(list(self.holding)))]
        assert self.serve(self.admission.vacate(self.now), NOTHING) is (somebody_waits and not over)

    @rule(limit=st.integers(1, 4))
    def change_limit(self, limit: int) -> None:
        before, self.admission.limit = self.admission.limit, limit
        self.was_raised |= before is not None and limit > before

    @rule()
    def dismiss(self) -> None:
        dismissed = self.admission.dismiss()
        assert sorted(dismissed, key=id) == sorted(self.waiting, key=id)
        for waiter in dismissed:
            self.take_out(waiter)

    @invariant()
    def no_slot_is_lost_or_invented(self) -> None:
        assert self.admission.total == self.idle + len(self.holding)

    @invariant()
    def never_more_than_allowed(self) -> None:
        limit, total = self.admission.limit, self.admission.total
        if limit is not None:
            self.allowed = max(limit, min(self.allowed, total) if self.allowed else total)
            assert total <= self.allowed

    @invariant()
    def the_lines_are_as_long_as_they_look(self) -> None:
        assert self.admission.depths() == tuple(len(line) for line in self.lines.values())
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
    """Callers come at random, wait for at most a while, hold for a while, and sometimes lose what they hold.

    Load swings between half and twice of what the five connections can bear."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.admission: Admission[Waiter] = Admission(limit=5, max_waiting=20, target=0.5, interval=5.0)
        self.now = 0.0
        self.serial = itertools.count()
        self.events: list[tuple[float, int, str, Waiter]] = []
        self.idle = 0
        self.holding: dict[Waiter, bool] = {}
        self.line: set[Waiter] = set()
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
        self.line.remove(who)
        self.seen["handed on"] += 1
        self.seen["newest first"] += self.admission.overloaded
        self.hold(who, connected=connected)
        return True

    def arrive(self, who: Waiter) -> None:
        self.later(0.4 if self.now // 50 % 2 else 0.1, "arrive", Waiter(next(self.serial)))
        if self.idle:
            self.idle -= 1
            self.hold(who, connected=True)
        elif self.admission.try_take():
            self.hold(who, connected=False)
        else:
            lane = Lane(self.chance.randrange(4))
            remaining = self.chance.choice([None, 0.5, 3.0])
            answer = self.admission.join(who, lane, self.now, remaining)
            if isinstance(answer, Refusal):
                self.seen[answer.value] += 1
                return
            if answer is not None:
                self.line.remove(answer)
                self.seen["displaced"] += 1
            self.line.add(who)
            self.later(2.0, "give up", who)

    def give_up(self, who: Waiter) -> None:
        assert self.admission.leave(who) is (who in self.line)
        self.seen["gave up"] += who in self.line
        self.line.discard(who)

    def finish(self, who: Waiter) -> None:
        for late in self.admission.overdue(self.now):
            self.line.remove(late)
            self.seen["shed"] += 1
        del self.holding[who]
        self.seen["served"] += 1
        if self.chance.random() < 0.1:
            self.seen["lost"] += 1
            self.pass_on(self.admission.vacate(self.now), connected=False)
        elif not self.pass_on(self.admission.next_in_line(self.now), connected=True):
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
            assert admission.waiting == len(self.line) <= 20
            assert not (self.line and self.idle)
            assert not self.line or admission.total == 5


@pytest.mark.parametrize("seed", range(3))
def test_a_day_in_virtual_time(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(60_000)
    outcomes = "served|handed on|newest first|pool-saturated|pool-would-be-late|displaced|shed|gave up|lost"
    rare = {what: simulation.seen[what] for what in outcomes.split("|") if simulation.seen[what] < 30}
    assert rare == {}, "everything that can happen did happen"
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


# -- single promises ----------------------------------------------------------------------------------------------


def full(max_waiting: int | None = None) -> Admission[Waiter]:
    admission: Admission[Waiter] = Admission(limit=1, max_waiting=max_waiting)
    assert admission.try_take()
    return admission


def test_zero_places_to_wait() -> None:
    admission = full(max_waiting=0)
    assert admission.join(Waiter(0)) is Refusal.FULL
    assert admission.waited == 0


def test_an_old_stall_does_not_refuse_anybody_for_ever() -> None:
    """Whoever would be first in line is let in, however bad the last estimate, and corrects it."""
    admission = full()
    for number in range(3):
        assert admission.join(Waiter(number), now=0.0) is None
    for at in (0.0, 30.0, 60.0):
        assert admission.next_in_line(at) is not None
    for minute in range(2, 60):
        now = 60.0 * minute
        assert admission.join(Waiter(minute), now=now, remaining=0.8) is None
        assert admission.next_in_line(now + 0.01) is not None
    now = 3_600.0
    assert [admission.join(Waiter(number), now=now, remaining=0.8) for number in range(5)] == [None] * 5


def test_who_cannot_be_served_in_time_is_refused_on_arrival() -> None:
    admission = full()
    for number in range(10):
        assert admission.join(Waiter(number), now=0.0) is None
    for step in range(1, 6):
        assert admission.next_in_line(0.1 * step) is not None
    assert admission.join(Waiter(10), now=0.5, remaining=0.2) is Refusal.HOPELESS
    assert admission.join(Waiter(11), now=0.5, remaining=60.0) is None
    assert admission.join(Waiter(12), Lane.CRITICAL_PLUS, now=0.5, remaining=0.25) is None, "ahead of all"
