"""The circuit's state machine, next to a model of it that keeps every outcome and counts them all each time."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilientdb import BreakerPolicy
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, OPEN, BreakerCore, Permit, Transition

RESET = 5.0
LONGEST = 12.0
WINDOW = 10.0
SLICE = WINDOW / 10


class Circuit(RuleBasedStateMachine):
    """``permits`` remembers every permit ever given, with the period of the circuit in which it was: permits of
    all earlier periods go on being reported, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.state = CLOSED
        self.period = 0
        self.permits: list[tuple[Permit, int]] = []
        self.awaited: dict[Permit, float] = {}
        """Permits for one call without an outcome: probes, and calls of the slow start."""
        self.outcomes: list[tuple[float, str]] = []
        self.last_failure = 0.0
        self.seen_dead = False
        self.by_hand = False
        self.no_answer = False
        """It opened because a call got no answer that was let through to see whether there is one."""
        self.opened_at = self.closed_at = self.now
        self.longest = self.wait_for = RESET
        self.missing = 0
        """Answers until the slow start is over."""
        self.at_once = 0
        self.chance = itertools.cycle([0.0, 0.5, 0.125, 0.875])
        self.drawn = 0.0

    def draw(self) -> float:
        self.drawn = next(self.chance)
        return self.drawn

    @initialize(
        minimum=st.integers(1, 4),
        threshold=st.sampled_from([0.25, 0.5, 1.0]),
        slow_threshold=st.sampled_from([0.25, 0.5, 1.0]),
        most=st.integers(1, 3),
        slow_start=st.sampled_from([0, 1, 2, 5]),
        probed=st.booleans(),
    )
    def make(
        self,
        minimum: int,
        threshold: float,
        slow_threshold: float,
        most: int,
        slow_start: int,
        probed: bool,
    ) -> None:
        self.probed = probed
        self.policy = BreakerPolicy(
            failure_rate_threshold=threshold,
            slow_call_rate_threshold=slow_threshold,
            slow_call_duration=1.0,
            minimum_calls=minimum,
            window=WINDOW,
            reset_timeout=RESET,
            max_reset_timeout=LONGEST,
            half_open_max_calls=most,
            slow_start_calls=slow_start,
        )
        self.core = BreakerCore(self.policy, self.now, rng=self.draw, probed=probed)

    def expect(
        self, moved: Transition | None, new: str | None, *, by_hand: bool = False, no_answer: bool = False
    ) -> None:
        """The circuit moved to ``new`` (None: not at all), and said so."""
        if new is None:
            assert moved is None
            return
        assert moved is not None
        assert (moved.old, moved.new) == (self.state, new)
        assert moved.cause
        assert not moved.would_be
        self.no_answer = no_answer
        old, self.state = self.state, new
        self.period += 1
        self.awaited.clear()
        self.by_hand = by_hand and new == OPEN
        self.missing = 0
        self.at_once = self.policy.half_open_max_calls
        if new == OPEN:
            self.last_failure = self.now
            if old == CLOSED:
                self.opened_at = self.now
                if self.now - self.closed_at >= WINDOW:
                    self.longest = RESET
            if by_hand:
                self.wait_for = RESET
            else:
                self.wait_for = self.longest - self.longest / 2 * self.drawn
                self.longest = min(2 * self.longest, LONGEST)
        if new == CLOSED:
            self.outcomes.clear()
            self.seen_dead = False
            self.closed_at = self.now
            self.missing = 0 if by_hand else self.policy.slow_start_calls

    def counted(self) -> tuple[int, int, int]:
        """Good, bad and slow (which are good) within the window: slices leave as a whole."""
        oldest = math.floor(self.now / SLICE + 1e-9) - 9
        recent = [what for at, what in self.outcomes if math.floor(at / SLICE + 1e-9) >= oldest]
        return recent.count("good") + recent.count("slow"), recent.count("bad"), recent.count("slow")

    def too_much(self, number: int, share: float) -> bool:
        good, bad, _ = self.counted()
        return good + bad >= self.policy.minimum_calls and number / (good + bad) >= share

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.5, RESET, WINDOW, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        permit, moved = self.core.try_acquire(self.now)
        if self.state == CLOSED and not self.missing:
            assert permit is not None
            assert not permit.probe
            self.expect(moved, None)
        else:
            waited_enough = self.state == OPEN and self.now >= self.last_failure + self.wait_for
            self.expect(moved, HALF_OPEN if waited_enough else None)
            for lost in [one for one, since in self.awaited.items() if self.now >= since + RESET]:
                del self.awaited[lost]
            in_the_way = [
                since for since in self.awaited.values() if self.state != CLOSED or self.now < since + 1
            ]
            if self.state == OPEN or len(in_the_way) >= self.at_once:
                assert permit is None
                return
            assert permit is not None
            assert permit.probe
            assert permit not in self.awaited, "a permit is for one call"
            self.awaited[permit] = self.now
        self.permits.append((permit, self.period))

    @rule()
    def go_on(self) -> None:
        """A call that has had an answer goes on under the permit of all others, before they may take it."""
        permit = self.core.following
        assert (permit is not None) == (self.state == CLOSED)
        if permit is not None:
            assert not permit.probe
            self.permits.append((permit, self.period))

    def answered(self, permit: Permit, period: int, *, slow: bool) -> str | None:
        """The state that an answer leads to."""
        if permit in self.awaited:
            if self.state == HALF_OPEN:
                return OPEN if slow else CLOSED
            del self.awaited[permit]
            if self.missing:
                self.missing -= 1
                self.at_once += not slow
        elif period != self.period or permit.probe:
            return None
        elif self.missing and not slow:
            return None  # what it has been told of already, by the first answer
        self.outcomes.append((self.now, "slow" if slow else "good"))
        if slow and self.too_much(self.counted()[2], self.policy.slow_call_rate_threshold):
            return OPEN
        return None

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), repeat=st.integers(1, 3))
    def succeed(self, data: st.DataObject, repeat: int) -> None:
        permit, period = data.draw(st.sampled_from(self.permits))
        for _ in range(repeat):
            moved = self.core.record_success(permit, self.now)
            self.expect(moved, self.answered(permit, period, slow=False))

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), repeat=st.integers(1, 3))
    def succeed_slowly(self, data: st.DataObject, repeat: int) -> None:
        permit, period = data.draw(st.sampled_from(self.permits))
        for _ in range(repeat):
            was_probe = self.state == HALF_OPEN and permit in self.awaited
            moved = self.core.record_slow(permit, self.now)
            self.expect(moved, self.answered(permit, period, slow=True), no_answer=was_probe)

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), repeat=st.integers(1, 3), no_answer=st.booleans())
    def fail(self, data: st.DataObject, repeat: int, *, no_answer: bool) -> None:
        permit, period = data.draw(st.sampled_from(self.permits))
        for _ in range(repeat):
            moved = self.core.record_failure(permit, self.now, "why", no_answer=no_answer)
            if permit in self.awaited and self.state == HALF_OPEN:
                self.expect(moved, OPEN, no_answer=no_answer)
            elif permit in self.awaited and self.missing:
                del self.awaited[permit]
                self.outcomes.append((self.now, "bad"))
                good, bad, _ = self.counted()
                if bad / (good + bad) >= self.policy.failure_rate_threshold:
                    self.expect(moved, OPEN, no_answer=no_answer)
                else:
                    self.expect(moved, None)
                    self.at_once = max(self.policy.half_open_max_calls, self.at_once // 2)
                    self.missing = min(self.missing + 3, self.policy.slow_start_calls)
            elif permit in self.awaited or (period == self.period and not permit.probe):
                self.awaited.pop(permit, None)
                self.outcomes.append((self.now, "bad"))
                trips = self.too_much(self.counted()[1], self.policy.failure_rate_threshold)
                self.expect(moved, OPEN if trips else None)
            else:
                self.expect(moved, None)

    @precondition(lambda self: self.permits)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        permit, _ = data.draw(st.sampled_from(self.permits))
        self.core.release(permit)
        self.awaited.pop(permit, None)

    @rule()
    def prober_answers(self) -> None:
        moved = self.core.prober_succeeded(self.now)
        if self.state == CLOSED or self.by_hand:
            self.expect(moved, None)
        elif self.seen_dead:
            self.expect(moved, CLOSED)
        else:
            too_soon = self.no_answer and self.now < self.last_failure + self.wait_for / 4
            self.expect(moved, HALF_OPEN if self.state == OPEN and not too_soon else None)

    @rule()
    def prober_fails(self) -> None:
        moved = self.core.prober_failed(self.now, "silence")
        self.expect(moved, None if self.state == OPEN else OPEN)
        self.seen_dead = True
        self.last_failure = self.now

    @rule(state=st.sampled_from([CLOSED, OPEN, HALF_OPEN]))
    def force(self, state: str) -> None:
        moved = self.core.force(state, self.now, "by hand")
        self.expect(moved, None if state == self.state else state, by_hand=True)
        if state == OPEN:
            self.by_hand = True
            self.wait_for = RESET
        if state == CLOSED:
            self.missing = 0
            self.longest = RESET
        self.last_failure = self.now

    @rule(number=st.integers(0, 4))
    def absorb(self, number: int) -> None:
        """At once after the last time: nothing to spread."""
        self.core.absorb(0, self.now)
        self.core.absorb(number, self.now)
        if self.state == CLOSED and not self.missing:
            self.outcomes += [(self.now, "good")] * number

    @invariant()
    def it_is_where_it_should_be(self) -> None:
        assert self.core.state == self.state
        asks_nobody = self.state == CLOSED and not self.missing
        assert (self.core.closed_permit is not None) == asks_nobody
        starting = (self.at_once, self.missing) if self.state == CLOSED and self.missing else None
        assert self.core.slow_start == starting

    @invariant()
    def it_never_stays_open_for_longer_than_it_may(self) -> None:
        assert RESET / 2 <= self.wait_for <= LONGEST

    @invariant()
    def it_says_when_to_come_back(self) -> None:
        after = self.core.retry_after(self.now)
        if self.state == CLOSED:
            assert after is None
            assert 0 < self.core.retry_after_slow_start(self.now) <= RESET
        elif self.state == HALF_OPEN:
            assert after == 0.0
        else:
            expected = max(0.0, self.last_failure + self.wait_for - self.now)
            if self.probed and not self.by_hand:
                # The prober may close it at any moment: it will last about as long as it has lasted.
                expected = min(self.now - self.opened_at, RESET)
            assert after == pytest.approx(expected)

    @invariant()
    def the_rate_is_that_of_the_window(self) -> None:
        if self.state == CLOSED:
            assert self.core.rate(self.now) == pytest.approx(self.counted()[0] / WINDOW)


TestCircuit = Circuit.TestCase


# -- the rules one by one, as the module says them ------------------------------------------------------------------


def make(*, probed: bool = False, draws: list[float] | None = None, **options: Any) -> BreakerCore:
    """``draws``: what chance gives, in order; then, and without, 0: the longest open time."""
    defaults = {"minimum_calls": 2, "window": WINDOW, "reset_timeout": RESET}
    chance = itertools.chain(draws or [], itertools.repeat(0.0))
    policy = BreakerPolicy(**{**defaults, **options})
    return BreakerCore(policy, 0.0, rng=lambda: next(chance), probed=probed)


def acquire(core: BreakerCore, now: float) -> Permit:
    permit, _ = core.try_acquire(now)
    assert permit is not None
    return permit


def first_try(core: BreakerCore, since: float) -> tuple[float, Permit]:
    """When the open circuit lets a call through, asked every millisecond; and the leave for it."""
    now = since
    while (permit := core.try_acquire(now)[0]) is None:
        now += 0.001
        assert now < since + 100, "nobody is ever let through"
    return now, permit


def test_a_late_result_from_before_the_trip_neither_closes_nor_opens() -> None:
    core = make()
    early = acquire(core, 0.0)
    core.record_failure(early, 1.0, "x")
    assert core.record_failure(early, 1.0, "x") is not None
    assert core.record_success(early, 2.0) is None
    assert core.record_slow(early, 2.0) is None
    assert core.record_failure(early, 4.0, "x") is None
    assert core.retry_after(4.0) == 2.0, "nor does it put off the next attempt"
    probe = acquire(core, 6.0)
    assert core.record_failure(early, 6.5, "x") is None
    assert core.record_success(probe, 7.0) is not None
    for _ in range(50):
        assert core.record_failure(early, 8.0, "x") is None
    assert core.state == CLOSED


# -- a probe's time -------------------------------------------------------------------------------------------------


def test_a_probe_without_an_outcome_gives_its_place_to_another_after_the_reset_timeout() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    lost = acquire(core, RESET)
    assert core.try_acquire(2 * RESET - 0.1)[0] is None
    again = acquire(core, 2 * RESET)
    assert core.record_success(lost, 2 * RESET) is None
    assert core.record_failure(lost, 2 * RESET, "x") is None
    assert core.state == HALF_OPEN
    assert core.record_success(again, 2 * RESET) is not None


def test_that_time_does_not_grow_with_the_open_time() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    core.record_failure(acquire(core, 5.0), 5.0, "x")
    lost = acquire(core, 15.0)
    assert core.try_acquire(19.9)[0] is None
    assert acquire(core, 20.0) is not lost


def test_a_late_probe_whose_place_nobody_has_taken_still_counts() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    late = acquire(core, RESET)
    assert core.record_success(late, 10 * RESET) is not None


@pytest.mark.parametrize("outcome", ["success", "slow", "failure"])
def test_a_probe_of_an_earlier_half_open_time_counts_for_nothing_in_a_later_one(outcome: str) -> None:
    core = make(half_open_max_calls=2)
    core.prober_failed(0.0, "x")
    late, failing = acquire(core, 5.0), acquire(core, 5.0)
    core.record_failure(failing, 5.1, "x")
    now, _ = first_try(core, 5.1)
    assert core.state == HALF_OPEN
    if outcome == "failure":
        assert core.record_failure(late, now, "x") is None
    else:
        assert (core.record_success if outcome == "success" else core.record_slow)(late, now) is None
    assert core.state == HALF_OPEN


def test_a_lost_call_of_the_slow_start_gives_its_place_to_another_as_well() -> None:
    core = make(slow_start_calls=4)
    core.prober_failed(0.0, "x")
    core.prober_succeeded(1.0)
    lost = acquire(core, 1.0)
    assert core.try_acquire(1.9)[0] is None
    overdue = acquire(core, 2.0)
    assert core.try_acquire(2.9)[0] is None
    core.record_success(overdue, 2.9)
    assert core.slow_start == (2, 3), "an answer counts when it comes, be it late"
    acquire(core, 1.0 + RESET)
    assert core.record_failure(lost, 1.0 + RESET, "x") is None, "but not for ever"
    assert core.slow_start == (2, 3)


def test_who_has_had_an_answer_keeps_nobody_out_and_can_still_fail() -> None:
    core = make(slow_start_calls=8)
    core.prober_failed(0.0, "x")
    core.prober_succeeded(1.0)
    core.record_success(acquire(core, 1.0), 1.01)
    going_on = core.following
    assert going_on is not None
    assert core.slow_start == (2, 7)
    assert core.record_success(going_on, 1.02) is None, "its end is nothing new"
    assert core.slow_start == (2, 7)
    first, second = acquire(core, 1.03), acquire(core, 1.03)
    assert core.try_acquire(1.03)[0] is None
    assert core.record_failure(going_on, 1.04, "x") is not None, (
        "as at any other time: two calls are enough here"
    )
    assert core.following is None
    for late in (going_on, first, second):
        assert core.record_success(late, 1.05) is None


def test_a_released_probe_makes_room_for_another() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    core.release(acquire(core, RESET))
    acquire(core, RESET)
    assert core.try_acquire(RESET)[0] is None


# -- the open time --------------------------------------------------------------------------------------------------


def fail_again(core: BreakerCore, since: float) -> float:
    """The first call let through fails; how long that took."""
    now, probe = first_try(core, since)
    core.record_failure(probe, now, "x")
    assert core.state == OPEN
    return now - since


def test_it_doubles_each_time_up_to_its_limit() -> None:
    core = make(max_reset_timeout=30.0)
    core.prober_failed(0.0, "x")
    now, waits = 0.0, []
    for _ in range(6):
        waits.append(fail_again(core, now))
        now += waits[-1]
    assert waits == pytest.approx([5.0, 10.0, 20.0, 30.0, 30.0, 30.0], abs=0.01)


def test_chance_takes_up_to_a_half_off_it() -> None:
    core = make(draws=[0.5, 0.999, 0.0], max_reset_timeout=60.0)
    core.prober_failed(0.0, "x")
    now, waits = 0.0, []
    for _ in range(3):
        waits.append(fail_again(core, now))
        now += waits[-1]
    assert waits == pytest.approx([3.75, 5.005, 20.0], abs=0.01)


def test_processes_that_opened_together_spread_over_half_of_it() -> None:
    chance = random.Random(7)
    waits = []
    for _ in range(1_000):
        core = BreakerCore(BreakerPolicy(reset_timeout=RESET), 0.0, rng=chance.random)
        core.prober_failed(0.0, "x")
        after = core.retry_after(0.0)
        assert after is not None
        waits.append(after)
    assert RESET / 2 < min(waits) < 0.51 * RESET
    assert 0.99 * RESET < max(waits) <= RESET
    busiest = max(sum(start <= wait < start + 0.25 for wait in waits) for start in (2.5, 3.0, 3.5, 4.0, 4.5))
    assert busiest < 150, "a tenth of the time has about a tenth of them"


@pytest.mark.parametrize(("well_for", "longest"), [(WINDOW - 0.1, 10.0), (WINDOW, 5.0)])
def test_it_starts_again_once_the_circuit_has_been_closed_for_a_window(
    well_for: float, longest: float
) -> None:
    core = make()
    core.prober_failed(0.0, "x")
    core.record_success(acquire(core, 5.0), 5.0)
    core.prober_failed(5.0 + well_for, "x")
    assert core.retry_after(5.0 + well_for) == pytest.approx(longest)


def test_the_prober_need_not_wait_for_it() -> None:
    core = make()
    now = 0.0
    core.prober_failed(now, "x")
    for _ in range(4):
        now += fail_again(core, now)
    core.prober_failed(now, "x")
    assert core.prober_succeeded(now + 0.25) is not None
    assert core.state == CLOSED


def test_a_circuit_that_never_failed_by_itself_does_not_pay_for_being_opened_by_hand() -> None:
    core = make(draws=[0.9])
    for _ in range(5):
        core.force(OPEN, 0.0, "maintenance")
        assert core.retry_after(0.0) == RESET
        core.force(HALF_OPEN, 0.0, "try")
    core.record_failure(acquire(core, 0.0), 0.0, "x")
    assert core.retry_after(0.0) == pytest.approx(RESET * 0.55)


# -- the slow start -------------------------------------------------------------------------------------------------


def recovering(**options: Any) -> BreakerCore:
    """Closed at second 1 by the prober."""
    core = make(**options)
    core.prober_failed(0.0, "x")
    moved = core.prober_succeeded(1.0)
    assert moved is not None
    assert moved.new == CLOSED
    return core


def take_all(core: BreakerCore, now: float) -> list[Permit]:
    permits: list[Permit] = []
    while core.closed_permit is None and (permit := core.try_acquire(now)[0]) is not None:
        permits.append(permit)
    return permits


@pytest.mark.parametrize("most", [1, 3])
def test_it_doubles_with_each_response_time(most: int) -> None:
    core = recovering(slow_start_calls=32, half_open_max_calls=most)
    now, rounds = 1.0, []
    while core.closed_permit is None:
        permits = take_all(core, now)
        rounds.append(len(permits))
        now += 0.02
        for permit in permits:
            core.record_success(permit, now)
    assert rounds == {1: [1, 2, 4, 8, 16, 32], 3: [3, 6, 12, 24]}[most]
    assert now <= 1.121


def test_a_slow_node_is_asked_no_more_than_it_answers() -> None:
    core = recovering(slow_start_calls=32)
    first = take_all(core, 1.0)
    assert len(first) == 1
    assert take_all(core, 1.9) == [], "as long as it has not answered"
    assert len(take_all(core, 5.9)) == 1, "or only one more, in case that it was the call"
    core.record_success(first[0], 5.9)
    assert core.slow_start == (2, 31)
    assert len(take_all(core, 5.9)) == 1, "with the one under way"


def test_an_idle_circuit_waits_for_its_first_callers() -> None:
    core = recovering(slow_start_calls=32)
    assert len(take_all(core, 10_000.0)) == 1


@pytest.mark.parametrize("good", [0, 1])
def test_failures_open_it_again_and_for_longer_however_few(good: int) -> None:
    core = recovering(slow_start_calls=32, minimum_calls=1_000, half_open_max_calls=3)
    one, other, third = take_all(core, 1.0)
    if good:
        core.record_success(third, 1.0)
    moved = core.record_failure(one, 1.1, "reset")
    assert moved is not None
    assert (moved.old, moved.new) == (CLOSED, OPEN)
    assert core.retry_after(1.1) == 10.0
    assert core.record_success(other, 1.2) is None
    assert core.state == OPEN


def test_a_failure_now_and_then_halves_what_is_let_through() -> None:
    core = recovering(slow_start_calls=32)
    for _ in range(9):
        core.record_success(acquire(core, 1.0), 1.0)
    assert core.slow_start == (10, 23)
    for expected in ((5, 26), (2, 29), (1, 32), (1, 32)):
        assert core.record_failure(acquire(core, 1.0), 1.0, "x") is None
        assert core.slow_start == expected, "halved, and its end put off, but not beyond the beginning"


def test_a_call_that_showed_nothing_is_no_answer() -> None:
    core = recovering(slow_start_calls=2)
    for _ in range(10):
        core.release(acquire(core, 1.0))
    assert core.slow_start == (1, 2)


def test_those_still_out_when_it_ends_count_as_all_others() -> None:
    core = recovering(slow_start_calls=2, minimum_calls=4, half_open_max_calls=4)
    one, two, three, four = take_all(core, 1.0)
    core.record_success(one, 1.0)
    core.record_success(two, 1.0)
    assert core.closed_permit is not None
    assert core.record_failure(three, 1.0, "x") is None, "1 of 3"
    assert core.record_failure(three, 1.0, "x") is None, "told already"
    assert core.record_failure(four, 1.0, "x") is not None, "2 of 4"


def test_none_is_an_option() -> None:
    assert recovering(slow_start_calls=0).closed_permit is not None


def test_a_circuit_closed_by_hand_needs_none() -> None:
    core = make()
    core.force(OPEN, 0.0, "x")
    core.force(CLOSED, 0.0, "x")
    assert core.closed_permit is not None
    core = recovering()
    core.force(CLOSED, 1.0, "x")
    assert core.closed_permit is not None


def test_whom_it_sends_away_it_tells_to_come_back_soon_and_later_the_longer_it_takes() -> None:
    core = recovering()
    assert core.retry_after(3_600.0) is None, "it is closed"
    assert core.retry_after_slow_start(3_600.0) == 0.05
    acquire(core, 3_600.0)
    assert core.retry_after_slow_start(3_600.0) == 0.05
    assert core.retry_after_slow_start(3_601.0) == 1.0
    assert core.retry_after_slow_start(3_700.0) == RESET


# -- slow calls -----------------------------------------------------------------------------------------------------


def test_a_share_of_slow_calls_opens() -> None:
    core = make(minimum_calls=4, slow_call_rate_threshold=0.5)
    permit = acquire(core, 0.0)
    core.record_slow(permit, 0.0)
    core.record_success(permit, 0.0)
    core.record_success(permit, 0.0)
    moved = core.record_slow(permit, 0.0)
    assert moved is not None
    assert (moved.new, moved.cause) == (OPEN, "2 of 4 calls were slow")


def test_slow_calls_are_successes_and_leave_with_the_window() -> None:
    core = make(minimum_calls=2, slow_call_rate_threshold=1.0)
    permit = acquire(core, 0.0)
    core.record_slow(permit, 0.0)
    assert core.rate(0.0) == pytest.approx(1 / WINDOW)
    assert core.record_failure(permit, 0.0, "x") is not None, "1 of 2: the slow one is no failure"
    core = make(minimum_calls=2, slow_call_rate_threshold=1.0)
    permit = acquire(core, 0.0)
    core.record_slow(permit, 0.0)
    core.record_success(permit, 20.0)
    assert core.record_slow(permit, 20.0) is None, "1 of 2"


def test_a_slow_probe_opens_again() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    moved = core.record_slow(acquire(core, 5.0), 6.0)
    assert moved is not None
    assert moved.new == OPEN


def test_a_slow_answer_keeps_the_slow_start_going_but_asks_no_more() -> None:
    core = recovering(slow_start_calls=3, minimum_calls=100)
    for _ in range(2):
        core.record_slow(acquire(core, 1.0), 1.0)
    assert core.slow_start == (1, 1)
    core.record_slow(acquire(core, 1.0), 1.0)
    assert core.closed_permit is not None


# -- the prober, and by hand ----------------------------------------------------------------------------------------


def test_what_opened_although_the_prober_saw_it_alive_needs_a_real_call_to_close() -> None:
    core = make()
    permit = acquire(core, 0.0)
    core.record_failure(permit, 0.0, "x")
    core.record_failure(permit, 0.0, "x")
    moved = core.prober_succeeded(0.1)
    assert moved is not None
    assert moved.new == HALF_OPEN
    assert core.prober_succeeded(0.2) is None
    assert core.record_success(acquire(core, 0.3), 0.3) is not None


def test_absorbed_successes_are_spread_over_the_time_since_the_last() -> None:
    core = make(window=10.0)
    core.absorb(400, 40.0)
    assert core.rate(40.0) == pytest.approx(10.0), "100 of the 400 fell into the last 10 of 40 seconds"
    core.absorb(50, 45.0)
    assert core.rate(45.0) == pytest.approx(15.0)


def test_successes_are_absorbed_into_closed_periods_only() -> None:
    core = make(window=10.0, slow_start_calls=0)
    core.prober_failed(0.0, "x")
    core.absorb(1_000, 1.0)
    core.prober_succeeded(101.0)
    assert core.rate(101.0) == 0
    core.absorb(100, 106.0)
    assert core.rate(106.0) == pytest.approx(10.0), "counted from when it closed, not from when it opened"


def test_with_a_prober_an_outage_is_expected_to_last_as_long_as_it_has() -> None:
    core = make(probed=True)
    core.prober_failed(100.0, "silence")
    assert core.retry_after(100.5) == pytest.approx(0.5)
    core.prober_failed(103.0, "silence")
    assert core.retry_after(103.0) == pytest.approx(3.0)
    core.prober_failed(130.0, "silence")
    assert core.retry_after(130.0) == 5.0


def test_a_circuit_opened_by_hand_stays_so_whatever_the_prober_sees() -> None:
    core = make(probed=True, draws=[0.9])
    core.force(OPEN, 100.0, "maintenance")
    assert core.prober_succeeded(101.0) is None
    assert core.retry_after(101.0) == pytest.approx(4.0)
    permit, _ = core.try_acquire(105.0)
    assert permit is not None
    assert permit.probe
