"""Slots and the lines: checked step by step against a model that is too simple to be wrong."""

from __future__ import annotations

import itertools
import math

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilientdb.policy.saturation import Admission, Lane, Refusal

CONNECTION = "connection"
NOTHING = "nothing yet"

TARGET = 0.05
INTERVAL = 0.2
SHARES = {
    Lane.CRITICAL_PLUS: 1.0,
    Lane.CRITICAL: 1.0,
    Lane.SHEDDABLE_PLUS: 0.5,
    Lane.SHEDDABLE: 0.25,
}
LANES = st.sampled_from(tuple(SHARES))
SECONDS = st.sampled_from([0.01, 0.04, 0.06, 0.11, 0.25])
REMAINING = st.sampled_from([None, 0.02, 0.2, 1.0])


class Waiter:
    def __init__(self, number: int, holds: int = 0) -> None:
        self.number = number
        self.holds = holds
        self.lane = Lane.CRITICAL
        self.since = 0.0
        self.remaining: float | None = None

    def __repr__(self) -> str:
        return f"<{self.number} {self.lane.name} holds {self.holds}>"


class Pool(RuleBasedStateMachine):
    """Callers, slots and idle connections, together with who should be where, in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.admission: Admission[Waiter] = Admission(limit=1, max_waiting=None)
        self.numbers = itertools.count()
        self.idle = 0
        self.callers: list[Waiter] = []
        """Who holds a slot, or waits for one, or did once."""
        self.lines: dict[Lane, list[Waiter]] = {lane: [] for lane in Lane}
        """In the order in which they came."""
        self.overloaded = dict.fromkeys(Lane, False)
        self.long_since: dict[Lane, float] = {}
        """Since when whoever looked has seen somebody in that lane wait longer than the target."""
        self.sent_away_at = dict.fromkeys(Lane, -1.0)
        self.left_at: float | None = None
        """When somebody last left, unless somebody was served since."""
        self.allowed: float = 0
        """The most slots there may be: the limit, or what there was when it was lowered."""

    @initialize(
        limit=st.sampled_from([1, 2, 2, 3, None]), max_waiting=st.sampled_from([4, 6, 8, 12, None, 0])
    )
    def make(self, limit: int | None, max_waiting: int | None) -> None:
        self.admission = Admission(limit=limit, max_waiting=max_waiting, target=TARGET, interval=INTERVAL)

    @property
    def waiting(self) -> list[Waiter]:
        return [waiter for line in self.lines.values() for waiter in line]

    @property
    def at_work(self) -> list[Waiter]:
        """Who holds a slot and will give it back."""
        return [caller for caller in self.callers if caller.holds and caller not in self.waiting]

    def take_out(self, waiter: Waiter) -> None:
        self.lines[waiter.lane].remove(waiter)  # ValueError: was not in line

    def drained(self, lane: Lane) -> None:
        self.long_since.pop(lane, None)
        self.overloaded[lane] = False

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- coming ------------------------------------------------------------------------------------------------

    @rule(lanes=st.lists(LANES, min_size=1, max_size=8), remaining=REMAINING)
    def arrive(self, lanes: list[Lane], remaining: float | None) -> None:
        for lane in lanes:
            caller = Waiter(next(self.numbers))
            self.callers.append(caller)
            self.ask(caller, lane, remaining)

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), lane=LANES, remaining=REMAINING, count=st.integers(1, 3))
    def ask_for_more(self, data: st.DataObject, lane: Lane, remaining: float | None, count: int) -> None:
        for caller in data.draw(st.permutations(self.at_work))[:count]:
            self.ask(caller, lane, remaining)

    def ask(self, caller: Waiter, lane: Lane, remaining: float | None) -> None:
        limit, total = self.admission.limit, self.admission.total
        if self.idle:
            self.idle -= 1
            caller.holds += 1
        elif self.admission.try_take():
            assert limit is None or total < limit
            caller.holds += 1
        else:
            assert limit is not None
            assert total >= limit
            self.join(caller, lane, remaining)

    def join(self, caller: Waiter, named: Lane, remaining: float | None) -> None:
        lane = Lane.HOLDING if caller.holds else named
        most = self.admission.max_waiting
        others = [waiter for waiter in self.waiting if waiter.lane is not Lane.HOLDING]
        if most is None:
            share_is_taken = False
        elif lane is Lane.HOLDING:
            share_is_taken = most == 0
        else:
            share_is_taken = len(others) >= round(most * SHARES[lane])
        if not self.lines[lane] and (self.left_at is None or self.now - self.left_at > INTERVAL):
            self.drained(lane)
        expected = self.admission.expected_wait(lane, self.now) if self.waiting else None
        less_critical = [line for line in list(self.lines.values())[lane + 1 :] if line]
        answer = self.admission.join(caller, named, self.now, remaining)
        if answer is Refusal.FULL:
            assert share_is_taken
            assert not less_critical
            assert not self.makes_room(lane)
            return
        nobody_else_works = not [other for other in self.at_work if other is not caller]
        assert (answer is Refusal.DEADLOCK) is (caller.holds > 0 and nobody_else_works)
        if answer is Refusal.DEADLOCK:
            return
        if answer is Refusal.HOPELESS:
            assert expected is not None, "the first in line is never refused so"
            assert remaining is not None
            assert expected > remaining / 2, "more than half of it is never kept for use"
            return
        assert not isinstance(answer, Refusal)
        assert expected is None or remaining is None or expected <= remaining
        assert (answer is not None) is share_is_taken
        if answer is not None:
            if less_critical:
                assert answer is less_critical[-1][0], "the least critical who has waited longest"
            else:
                assert self.makes_room(lane)
                assert answer is self.lines[lane][0]
            assert not answer.holds
            self.take_out(answer)
            self.sent_away_at[answer.lane] = self.now
        assert caller.lane is lane
        self.lines[lane].append(caller)

    def makes_room(self, lane: Lane) -> bool:
        """Whether the oldest of a line has to, for somebody who is no more critical."""
        line = self.lines[lane]
        return bool(line) and (self.overloaded[lane] or self.now - line[0].since > 3 * TARGET)

    # -- leaving -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.leave_line(data.draw(st.sampled_from(self.waiting)))

    @precondition(lambda self: self.waiting)
    @rule()
    def all_give_up(self) -> None:
        for gone in self.waiting:
            self.leave_line(gone)

    def leave_line(self, gone: Waiter) -> None:
        self.take_out(gone)
        assert self.admission.leave(gone, self.now)
        self.left_at = self.now

    @precondition(lambda self: len(self.callers) > len(self.waiting))
    @rule(data=st.data())
    def leave_too_late(self, data: st.DataObject) -> None:
        gone = [caller for caller in self.callers if caller not in self.waiting]
        assert not self.admission.leave(data.draw(st.sampled_from(gone)))

    @rule()
    def dismiss(self) -> None:
        assert self.admission.dismiss() == self.waiting
        for gone in self.waiting:
            self.take_out(gone)
        self.left_at = None

    # -- a slot comes free, or none does -----------------------------------------------------------------------

    def hand_on(self, *, lost: bool) -> None:
        """A slot comes back; ``lost``: without its connection."""
        somebody_waits = bool(self.waiting)
        total, limit = self.admission.total, self.admission.limit
        shed, served = self.admission.serve(self.now, lost=lost)
        self.check_shed(shed)
        if served is not None:
            self.check_served(served)
            self.left_at = None
        elif lost:
            assert self.admission.total == total - 1
            assert not somebody_waits or (limit is not None and total > limit), "else it is handed on"
        else:
            assert not somebody_waits
            self.idle += 1
            self.left_at = None

    def check_shed(self, shed: list[Waiter]) -> None:
        before = self.waiting
        for gone in shed:
            assert gone is self.lines[gone.lane][0], "who has waited longest goes first"
            waited = self.now - gone.since
            too_old = self.overloaded[gone.lane] and waited > 2 * TARGET
            too_late = gone.remaining is not None and waited > gone.remaining / 2
            assert too_old or too_late
            self.take_out(gone)
            self.sent_away_at[gone.lane] = self.now
            assert too_late or gone.lane >= self.waiting[0].lane, "there is a slot for the most critical"
        left = self.waiting
        assert left or not before, "the last in line is never shed"
        for waiter in left:
            if self.overloaded[waiter.lane] and self.now - waiter.since > 2 * TARGET:
                assert self.lines[waiter.lane] == [waiter], "the newest"
                assert waiter is left[0] or len(left) == 1, "of the most critical"

    def check_served(self, served: Waiter) -> None:
        for lane, line in self.lines.items():
            if line:
                self.observe(lane, self.now - line[0].since)
        lane, line = next((lane, line) for lane, line in self.lines.items() if line)
        assert served is line[-1 if self.overloaded[lane] else 0], "newest first, under overload only"
        self.take_out(served)
        served.holds += 1

    def observe(self, lane: Lane, oldest_wait: float) -> None:
        if lane is Lane.HOLDING:
            return
        if oldest_wait > TARGET:
            since = self.long_since.setdefault(lane, self.now)
            self.overloaded[lane] |= self.now - since >= INTERVAL
        elif not self.overloaded[lane] or self.now - self.sent_away_at[lane] >= INTERVAL:
            self.drained(lane)  # else it is short only because somebody was sent away

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), count=st.integers(1, 6), pause=SECONDS, lost=st.booleans())
    def finish(self, data: st.DataObject, count: int, pause: float, lost: bool) -> None:
        for caller in data.draw(st.permutations(self.at_work))[:count]:
            self.now += pause
            while caller.holds:
                caller.holds -= 1
                self.hand_on(lost=lost)

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), lost=st.booleans())
    def give_back_one(self, data: st.DataObject, lost: bool) -> None:
        data.draw(st.sampled_from(self.at_work)).holds -= 1
        self.hand_on(lost=lost)

    @precondition(lambda self: self.idle)
    @rule()
    def close_idle(self) -> None:
        self.idle -= 1
        self.hand_on(lost=True)

    @rule(limit=st.integers(1, 4))
    def change_limit(self, limit: int) -> None:
        self.admission.limit = limit
        while self.admission.waiting and self.admission.try_take():
            self.hand_on(lost=True)

    @rule()
    def nothing_comes(self) -> None:
        soon, before = self.admission.next_stall(self.now), dict(self.overloaded)
        shed = self.admission.stalled(self.now)
        for lane, line in self.lines.items():
            if line and lane is not Lane.HOLDING and self.now - line[0].since > TARGET:
                longer = self.now - line[0].since - TARGET
                since = self.long_since.setdefault(lane, self.now - longer)
                self.overloaded[lane] |= self.now - since >= INTERVAL
        self.check_shed(shed)
        if shed or self.overloaded != before:
            assert soon == TARGET / 2, "it was said to be worth it"
        assert self.admission.stalled(self.now) == [], "once is enough"

    # -- always ------------------------------------------------------------------------------------------------

    @invariant()
    def no_slot_is_lost_or_invented(self) -> None:
        assert self.admission.total == self.idle + sum(caller.holds for caller in self.callers)

    @invariant()
    def never_more_than_allowed(self) -> None:
        limit = self.admission.limit
        total = self.admission.total
        if limit is not None:
            self.allowed = max(limit, min(self.allowed, total) if self.allowed else total)
            assert total <= self.allowed

    @invariant()
    def the_lines_are_as_long_as_they_look(self) -> None:
        assert self.admission.depths() == tuple(len(line) for line in self.lines.values())
        assert self.admission.waiting == len(self.waiting)
        if self.admission.max_waiting is not None:
            assert len(self.waiting) - len(self.lines[Lane.HOLDING]) <= self.admission.max_waiting
        assert all((waiter.holds > 0) is (waiter.lane is Lane.HOLDING) for waiter in self.waiting)

    @invariant()
    def the_verdicts_are_those_on_lines_in_which_somebody_waits(self) -> None:
        expected = tuple(self.overloaded[lane] and bool(line) for lane, line in self.lines.items())
        assert self.admission.overloaded() == expected

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if self.waiting:
            assert self.idle == 0
            assert self.at_work, "somebody will give back"

    @invariant()
    def whoever_watches_is_told_when_to_look(self) -> None:
        soon = self.admission.next_stall(self.now)
        if not any(self.lines[lane] for lane in SHARES):
            assert soon is None or self.lines[Lane.HOLDING]
        else:
            assert soon is not None
            assert TARGET / 2 <= soon <= max(INTERVAL, 2 * TARGET) + 1e-9


TestPool = Pool.TestCase
TestPool.settings = hypothesis.settings(
    max_examples=max(200, hypothesis.settings().max_examples), stateful_step_count=80
)


# -- by example -------------------------------------------------------------------------------------------------


def make(max_waiting: int | None = 4, limit: int = 1) -> Admission[Waiter]:
    admission: Admission[Waiter] = Admission(
        limit=limit, max_waiting=max_waiting, target=TARGET, interval=INTERVAL
    )
    while admission.try_take():
        pass
    return admission


def overloaded(max_waiting: int | None = 4) -> tuple[Admission[Waiter], Waiter, float]:
    """One who has waited long is in line. Also returns it, and what time it is."""
    admission = make(max_waiting)
    first, oldest, newest = (Waiter(number) for number in range(3))
    for waiter in (first, oldest, newest):
        admission.join(waiter, Lane.CRITICAL, 0.0)
    assert [admission.serve(now) for now in (1.0, 2.0)] == [([], first), ([], newest)]
    assert admission.overloaded()[Lane.CRITICAL]
    return admission, oldest, 2.0


def serve_all(admission: Admission[Waiter], now: float, every: float) -> float:
    """Empty the lines, one service every so many seconds; returns the time of the last."""
    while admission.waiting:
        now += every
        admission.serve(now)
    return now


def test_zero_places_to_wait() -> None:
    admission = make(max_waiting=0)
    assert admission.join(Waiter(0)) is Refusal.FULL
    assert admission.waited == 0


def test_the_shares_may_be_others() -> None:
    admission: Admission[Waiter] = Admission(limit=0, max_waiting=10, shares=(1.0, 0.1))
    assert [admission.join(Waiter(number), Lane.SHEDDABLE) for number in range(2)] == [None, Refusal.FULL]
    joined = [admission.join(Waiter(number), Lane.SHEDDABLE_PLUS) for number in range(11)]
    assert joined.count(None) == 9, "of ten, one of them in the place of the sheddable one"
    assert joined[-1] is Refusal.FULL


@pytest.mark.parametrize("lane", SHARES)
def test_each_criticality_has_its_share_of_the_places(lane: Lane) -> None:
    admission = make(max_waiting=40)
    answers = [admission.join(Waiter(number), lane) for number in range(50)]
    assert answers == [None] * round(40 * SHARES[lane]) + [Refusal.FULL] * (50 - round(40 * SHARES[lane]))


def test_the_more_critical_displace_the_least_critical_who_has_waited_longest() -> None:
    admission = make(max_waiting=4)
    sheddable, critical, first, second = (Waiter(number) for number in range(4))
    for waiter, lane in (
        (sheddable, Lane.SHEDDABLE),
        (first, Lane.SHEDDABLE_PLUS),
        (critical, Lane.CRITICAL),
        (second, Lane.CRITICAL),
    ):
        assert admission.join(waiter, lane) is None
    plus = [Waiter(number) for number in range(4, 9)]
    answers = [admission.join(waiter, Lane.CRITICAL_PLUS) for waiter in plus]
    assert answers == [sheddable, first, critical, second, Refusal.FULL]
    assert not admission.leave(sheddable), "it stands in line no longer"


def test_a_hopeless_caller_displaces_nobody() -> None:
    admission = make(max_waiting=5)
    for number in range(2):
        admission.join(Waiter(number), Lane.CRITICAL, 0.0)
    for now in (1.0, 2.0):
        admission.serve(now)  # one place a second
    admission.join(Waiter(2), Lane.SHEDDABLE, 2.0)
    for number in range(4):
        admission.join(Waiter(number), Lane.CRITICAL, 2.0)
    assert admission.depths() == (0, 0, 4, 0, 1)
    assert admission.join(Waiter(5), Lane.CRITICAL, 2.0, 4.0) is Refusal.HOPELESS
    assert admission.depths() == (0, 0, 4, 0, 1)
    assert isinstance(admission.join(Waiter(6), Lane.CRITICAL, 2.0, 20.0), Waiter)
    assert admission.depths() == (0, 0, 5, 0, 0)


def test_after_a_standstill_the_first_to_come_is_let_in_and_shows_that_it_is_over() -> None:
    """Else a pool whose callers all have deadlines would refuse them for ever, by what it knew of long ago."""
    admission, now = make(max_waiting=None), 0.0
    for number in range(5):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    now = serve_all(admission, now, every=60.0)
    accepted = []
    for number in range(200):
        first, second = Waiter(number), Waiter(number)
        assert admission.join(first, Lane.CRITICAL, now, 1.0) is None
        accepted.append(admission.join(second, Lane.CRITICAL, now, 1.0) is None)
        now = serve_all(admission, now, every=0.004)
    assert not accepted[0]
    assert all(accepted[100:])


def test_who_comes_to_an_idle_pool_is_not_told_to_wait_as_long_as_it_was_idle() -> None:
    admission, now = make(), 0.0
    for number in range(2):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    for _ in range(2):
        now += 0.01
        admission.serve(now)
    assert admission.expected_wait(Lane.SHEDDABLE, now + 3600) == pytest.approx(0.01)


def test_under_overload_the_newest_is_served_and_the_oldest_makes_room() -> None:
    admission, oldest, now = overloaded(max_waiting=4)
    newcomers = [Waiter(number) for number in range(10, 14)]
    assert [admission.join(waiter, Lane.CRITICAL, now) for waiter in newcomers] == [None, None, None, oldest]
    assert admission.serve(now) == ([], newcomers[-1])


@pytest.mark.parametrize("lane", SHARES)
def test_where_all_places_are_taken_the_oldest_makes_room_once_it_has_waited_three_targets(
    lane: Lane,
) -> None:
    admission = make(max_waiting=40)
    places = round(40 * SHARES[lane])
    waiters = [Waiter(number) for number in range(places)]
    for waiter in waiters:
        assert admission.join(waiter, lane, waiter.number / 1000) is None
    oldest, second = waiters[:2]
    now = 3 * TARGET
    assert admission.join(Waiter(50), lane, now) is Refusal.FULL
    newer = Waiter(51)
    assert admission.join(newer, lane, now + 0.0005) is oldest
    assert admission.join(Waiter(52), lane, now + 0.0005) is Refusal.FULL, "the next one is not so old"
    assert not any(admission.overloaded())
    assert admission.serve(now + 0.0005) == ([], second), "first come first served"


def test_who_finds_a_place_sends_nobody_away() -> None:
    admission = make(max_waiting=3)
    first, second, third = (Waiter(number) for number in range(3))
    assert admission.join(first, Lane.CRITICAL, 0.0) is None
    assert admission.join(second, Lane.CRITICAL, INTERVAL * 0.9) is None
    assert admission.join(third, Lane.CRITICAL, INTERVAL * 0.9) is None
    assert admission.serve(INTERVAL * 0.9) == ([], first)


def test_nobody_makes_room_for_the_less_critical_however_long_it_has_waited() -> None:
    admission = make(max_waiting=4)
    for number in range(4):
        admission.join(Waiter(number), Lane.CRITICAL, 0.0)
    assert admission.join(Waiter(4), Lane.SHEDDABLE_PLUS, 10.0) is Refusal.FULL


def test_nor_where_no_verdict_is_wanted() -> None:
    """An explicit ``pool_timeout`` says how long callers wait."""
    admission: Admission[Waiter] = Admission(limit=0, max_waiting=1, target=TARGET, interval=math.inf)
    assert admission.join(Waiter(0), Lane.CRITICAL, 0.0) is None
    assert admission.join(Waiter(1), Lane.CRITICAL, 3600.0) is Refusal.FULL


def test_a_hopeless_caller_does_not_take_the_place_of_the_oldest_either() -> None:
    admission = make(max_waiting=4)
    for number in range(6):
        admission.join(Waiter(number), Lane.CRITICAL, 0.0)
    for now in (0.05, 0.1):
        admission.serve(now)
    for number in range(6, 8):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    assert admission.join(Waiter(8), Lane.CRITICAL, 0.16, 0.2) is Refusal.HOPELESS
    assert isinstance(admission.join(Waiter(9), Lane.CRITICAL, 0.16, 2.0), Waiter)


def test_shedding_leaves_the_newest_of_the_most_critical() -> None:
    admission, oldest, now = overloaded(max_waiting=None)
    middle, newest, sheddable = (Waiter(number) for number in range(4, 7))
    admission.join(middle, Lane.CRITICAL, now)
    admission.join(newest, Lane.CRITICAL, now)
    admission.join(sheddable, Lane.SHEDDABLE, now + 1.0)
    assert admission.serve(now + 1.0) == ([oldest, middle], newest)
    assert admission.serve(now + 9.0) == ([], sheddable)


def test_where_all_have_too_little_time_left_the_most_critical_stays() -> None:
    admission = make(max_waiting=None)
    plus, sheddable = Waiter(0), Waiter(1)
    admission.join(plus, Lane.CRITICAL_PLUS, 0.0, 1.0)
    admission.join(sheddable, Lane.SHEDDABLE, 0.0, 1.0)
    assert admission.serve(2.0) == ([sheddable], plus)


def test_the_less_critical_are_no_reason_to_shed_the_more_critical() -> None:
    admission, oldest, now = overloaded(max_waiting=None)
    first, second, later = Waiter(4), Waiter(5), Waiter(6)
    for waiter in (first, second):
        admission.join(waiter, Lane.CRITICAL_PLUS, now)
    admission.join(later, Lane.CRITICAL, now + 1.0)
    assert admission.serve(now + 1.0) == ([oldest], first)
    assert admission.overloaded() == (False, False, True, False, False)
    assert admission.serve(now + 1.0) == ([], second)


def test_who_cannot_be_served_in_time_is_refused_on_arrival() -> None:
    admission = make(max_waiting=None)
    for number in range(10):
        admission.join(Waiter(number), Lane.CRITICAL, 0.0)
    for now in (0.1, 0.2):
        admission.serve(now)
    assert admission.join(Waiter(10), Lane.CRITICAL, 0.2, 0.7) is Refusal.HOPELESS
    assert admission.join(Waiter(11), Lane.CRITICAL, 0.2, 10.0) is None
    assert admission.join(Waiter(12), Lane.CRITICAL_PLUS, 0.2, 0.7) is None, "ahead of all"


def test_overload_is_not_over_because_the_line_was_cut_short() -> None:
    admission, oldest, now = overloaded(max_waiting=None)
    for number in range(2):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    assert admission.serve(now)[0] == [oldest]
    assert admission.overloaded()[Lane.CRITICAL]
    admission.serve(now)
    assert admission.serve(now) == ([], None)
    assert not any(admission.overloaded()), "nobody waits any more"
