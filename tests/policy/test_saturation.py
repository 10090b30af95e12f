"""Slots and the lines: checked step by step against a model that is too simple to be wrong."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilientdb.policy.saturation import Admission, Lane, Refusal

CONNECTION = "connection"
NOTHING = "nothing yet"

TARGET = 0.05
INTERVAL = 0.2
SHARES = {Lane.CRITICAL_PLUS: 1.0, Lane.CRITICAL: 1.0, Lane.SHEDDABLE_PLUS: 0.5, Lane.SHEDDABLE: 0.25}


SECONDS = st.sampled_from([0.01, 0.04, 0.06, 0.11, 0.25])
REMAINING = st.sampled_from([None, 0.02, 0.2, 1.0])


class Waiter:
    def __init__(self, number: int) -> None:
        self.number = number
        self.lane = Lane.CRITICAL
        self.since = 0.0
        self.remaining: float | None = None

    def __repr__(self) -> str:
        return f"<{self.number} {self.lane.name}>"


class Pool(RuleBasedStateMachine):
    """Callers, slots and idle connections, together with who should be where, in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.admission: Admission[Waiter] = Admission(limit=1, max_waiting=None)
        self.numbers = itertools.count()
        self.idle = 0
        self.holding: dict[Waiter, str] = {}
        self.lines: dict[Lane, list[Waiter]] = {lane: [] for lane in Lane}
        """In the order in which they came."""
        self.out: set[Waiter] = set()
        """Who has been sent away, or has left."""
        self.long_since: dict[Lane, float] = {}
        """Since when every service has seen somebody in that lane wait longer than the target."""
        self.sent_away_at = dict.fromkeys(Lane, -1.0)
        self.allowed: float = 0
        """The most slots there may be: the limit, or what there was when it was lowered."""
        self.was_raised = False

    @initialize(
        limit=st.sampled_from([1, 1, 2, 3, None]), max_waiting=st.sampled_from([4, 6, 8, 12, None, 0])
    )
    def make(self, limit: int | None, max_waiting: int | None) -> None:
        self.admission = Admission(limit=limit, max_waiting=max_waiting, target=TARGET, interval=INTERVAL)

    @property
    def waiting(self) -> list[Waiter]:
        return [waiter for line in self.lines.values() for waiter in line]

    def take_out(self, waiter: Waiter) -> None:
        assert waiter not in self.out, "only once"
        self.lines[waiter.lane].remove(waiter)  # ValueError: was not in line
        self.out.add(waiter)

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- coming ------------------------------------------------------------------------------------------------

    @rule(lanes=st.lists(st.sampled_from(Lane), min_size=1, max_size=8), remaining=REMAINING)
    def arrive(self, lanes: list[Lane], remaining: float | None) -> None:
        for lane in lanes:
            caller = Waiter(next(self.numbers))
            limit, total = self.admission.limit, self.admission.total
            if self.idle:
                self.idle -= 1
                self.holding[caller] = CONNECTION
            elif self.admission.try_take():
                assert limit is None or total < limit
                self.holding[caller] = NOTHING
            else:
                self.join(caller, lane, remaining)

    def join(self, caller: Waiter, lane: Lane, remaining: float | None) -> None:
        waiting = self.waiting
        if not self.lines[lane]:
            self.long_since.pop(lane, None)
        most = self.admission.max_waiting
        share_is_taken = most is not None and len(waiting) >= round(most * SHARES[lane])
        overloaded = self.admission.overloaded()[lane]
        expected = self.admission.expected_wait(lane, self.now) if waiting else None
        less_critical = [line for line in list(self.lines.values())[lane + 1 :] if line]
        answer = self.admission.join(caller, lane, self.now, remaining)
        if answer is Refusal.FULL:
            assert share_is_taken
            assert not less_critical
            assert not (overloaded and self.lines[lane])
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
                assert overloaded
                assert answer is self.lines[lane][0]
            self.take_out(answer)
            self.sent_away_at[answer.lane] = self.now
        self.lines[lane].append(caller)

    # -- leaving -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.take_out(gone)
        assert self.admission.leave(gone)

    @precondition(lambda self: self.holding or self.out)
    @rule(data=st.data())
    def leave_too_late(self, data: st.DataObject) -> None:
        gone = sorted([*self.holding, *self.out], key=lambda waiter: waiter.number)
        assert not self.admission.leave(data.draw(st.sampled_from(gone)))

    @rule()
    def dismiss(self) -> None:
        assert self.admission.dismiss() == self.waiting
        for gone in self.waiting:
            self.take_out(gone)

    # -- a slot comes free -------------------------------------------------------------------------------------

    def shed(self) -> None:
        """As a pool does before it serves."""
        before, overloaded = self.waiting, self.admission.overloaded()
        for gone in self.admission.overdue(self.now):
            assert gone is self.lines[gone.lane][0], "who has waited longest goes first"
            waited = self.now - gone.since
            too_old = overloaded[gone.lane] and waited > 2 * TARGET
            too_late = gone.remaining is not None and waited > gone.remaining / 2
            assert too_old or too_late
            self.take_out(gone)
            self.sent_away_at[gone.lane] = self.now
            assert too_late or gone.lane >= self.waiting[0].lane, "there is a slot for the most critical"
        left = self.waiting
        assert left or not before, "the last in line is never shed"
        for waiter in left:
            if overloaded[waiter.lane] and self.now - waiter.since > 2 * TARGET:
                assert self.lines[waiter.lane] == [waiter], "the newest"
                assert waiter is left[0] or len(left) == 1, "of the most critical"

    def serve(self, waiter: Waiter | None, before: tuple[bool, ...], what: str) -> bool:
        """Check who was served, and hand it over. ``before``: the verdicts then."""
        if waiter is None:
            if not self.waiting:
                self.long_since.clear()
            return False
        after = self.admission.overloaded()
        for lane, line in self.lines.items():
            if line:
                self.check_verdict(lane, self.now - line[0].since, before[lane])
            else:
                self.long_since.pop(lane, None)
                assert not after[lane]
        line = next(filter(None, self.lines.values()))
        assert waiter is line[-1 if after[waiter.lane] else 0], "newest first, under overload only"
        line.remove(waiter)
        self.holding[waiter] = what
        return True

    def check_verdict(self, lane: Lane, oldest_wait: float, before: bool) -> None:
        after = self.admission.overloaded()[lane]
        if oldest_wait > TARGET:
            since = self.long_since.setdefault(lane, self.now)
            assert after is (before or self.now - since >= INTERVAL)
        elif before and self.now - self.sent_away_at[lane] < INTERVAL:
            assert after, "short only because somebody was sent away"
        else:
            self.long_since.pop(lane, None)
            assert not after

    @precondition(lambda self: self.holding)
    @rule(data=st.data(), count=st.integers(1, 6), pause=SECONDS, lost=st.booleans(), shed=st.booleans())
    def finish(self, data: st.DataObject, count: int, pause: float, lost: bool, shed: bool) -> None:
        for holder in data.draw(st.permutations(list(self.holding)))[:count]:
            self.now += pause
            del self.holding[holder]
            if shed:
                self.shed()
            if lost:
                self.lose()
            else:
                self.give_back()

    def give_back(self) -> None:
        before = self.admission.overloaded()
        if not self.serve(self.admission.next_in_line(self.now), before, CONNECTION):
            assert not self.waiting
            assert not any(self.admission.overloaded())
            self.idle += 1

    def lose(self) -> None:
        """The connection is lost, or was never made."""
        over = self.admission.limit is not None and self.admission.total > self.admission.limit
        somebody_waits, before = bool(self.waiting), self.admission.overloaded()
        served = self.serve(self.admission.vacate(self.now), before, NOTHING)
        assert served is (somebody_waits and not over)

    @precondition(lambda self: self.idle)
    @rule()
    def close_idle(self) -> None:
        self.idle -= 1
        before = self.admission.overloaded()
        self.serve(self.admission.vacate(self.now), before, NOTHING)

    @rule(limit=st.integers(1, 4))
    def change_limit(self, limit: int) -> None:
        before, self.admission.limit = self.admission.limit, limit
        self.was_raised |= before is not None and limit > before

    # -- always ------------------------------------------------------------------------------------------------

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
    assert [admission.next_in_line(now) for now in (1.0, 2.0)] == [first, newest]
    assert admission.overloaded()[Lane.CRITICAL]
    return admission, oldest, 2.0


def test_zero_places_to_wait() -> None:
    admission = make(max_waiting=0)
    assert admission.join(Waiter(0)) is Refusal.FULL
    assert admission.waited == 0


@pytest.mark.parametrize("lane", Lane)
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
        admission.next_in_line(now)  # one place a second
    admission.join(Waiter(2), Lane.SHEDDABLE, 2.0)
    for number in range(4):
        admission.join(Waiter(number), Lane.CRITICAL, 2.0)
    assert admission.depths() == (0, 4, 0, 1)
    assert admission.join(Waiter(5), Lane.CRITICAL, 2.0, 4.0) is Refusal.HOPELESS
    assert admission.depths() == (0, 4, 0, 1)
    assert isinstance(admission.join(Waiter(6), Lane.CRITICAL, 2.0, 20.0), Waiter)
    assert admission.depths() == (0, 5, 0, 0)


def test_after_a_standstill_the_first_to_come_is_let_in_and_shows_that_it_is_over() -> None:
    """Else a pool whose callers all have deadlines would refuse them for ever, by what it knew of long ago."""
    admission, now = make(max_waiting=None), 0.0
    for number in range(5):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    for _ in range(5):
        now += 60.0
        admission.next_in_line(now)
    accepted = []
    for number in range(200):
        first, second = Waiter(number), Waiter(number)
        assert admission.join(first, Lane.CRITICAL, now, 1.0) is None
        accepted.append(admission.join(second, Lane.CRITICAL, now, 1.0) is None)
        while admission.waiting:
            now += 0.004
            admission.next_in_line(now)
    assert not accepted[0]
    assert all(accepted[100:])


def test_who_comes_to_an_idle_pool_is_not_told_to_wait_as_long_as_it_was_idle() -> None:
    admission, now = make(), 0.0
    for number in range(2):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    for _ in range(2):
        now += 0.01
        admission.next_in_line(now)
    assert admission.expected_wait(Lane.SHEDDABLE, now + 3600) == pytest.approx(0.01)


def test_under_overload_the_newest_is_served_and_the_oldest_makes_room() -> None:
    admission, oldest, now = overloaded(max_waiting=4)
    newcomers = [Waiter(number) for number in range(10, 14)]
    assert [admission.join(waiter, Lane.CRITICAL, now) for waiter in newcomers] == [None, None, None, oldest]
    assert admission.next_in_line(now) is newcomers[-1]


def test_shedding_leaves_the_newest_of_the_most_critical() -> None:
    admission, oldest, now = overloaded(max_waiting=None)
    stays = Waiter(4)
    admission.join(stays, Lane.CRITICAL, now)
    assert admission.overdue(now + 1.0) == [oldest]
    assert admission.overdue(now + 2.0) == []
    sheddable = Waiter(5)
    admission.join(sheddable, Lane.SHEDDABLE, now + 2.0)
    assert admission.overdue(now + 2.0) == []
    assert admission.next_in_line(now + 2.0) is stays


def test_where_all_have_too_little_time_left_the_most_critical_stays() -> None:
    admission = make(max_waiting=None)
    plus, sheddable = Waiter(0), Waiter(1)
    admission.join(plus, Lane.CRITICAL_PLUS, 0.0, 1.0)
    admission.join(sheddable, Lane.SHEDDABLE, 0.0, 1.0)
    assert admission.overdue(2.0) == [sheddable]
    assert admission.next_in_line(2.0) is plus


def test_the_less_critical_are_no_reason_to_shed_the_more_critical() -> None:
    admission, _, now = overloaded(max_waiting=None)
    first, second = Waiter(4), Waiter(5)
    for waiter in (first, second):
        admission.join(waiter, Lane.CRITICAL_PLUS, now)
    assert first not in admission.overdue(now + 1.0)
    assert admission.overloaded() == (False, True, False, False)
    assert admission.next_in_line(now + 1.0) is first


def test_who_cannot_be_served_in_time_is_refused_on_arrival() -> None:
    admission = make(max_waiting=None)
    for number in range(10):
        admission.join(Waiter(number), Lane.CRITICAL, 0.0)
    for now in (0.1, 0.2):
        admission.next_in_line(now)
    assert admission.join(Waiter(10), Lane.CRITICAL, 0.2, 0.7) is Refusal.HOPELESS
    assert admission.join(Waiter(11), Lane.CRITICAL, 0.2, 10.0) is None
    assert admission.join(Waiter(12), Lane.CRITICAL_PLUS, 0.2, 0.7) is None, "ahead of all"


def test_overload_is_not_over_because_the_line_was_cut_short() -> None:
    admission, oldest, now = overloaded(max_waiting=None)
    for number in range(2):
        admission.join(Waiter(number), Lane.CRITICAL, now)
    assert admission.overdue(now) == [oldest]
    admission.next_in_line(now)
    assert admission.overloaded()[Lane.CRITICAL]
    admission.next_in_line(now)
    assert admission.next_in_line(now) is None
    assert not any(admission.overloaded()), "nobody waits any more"
