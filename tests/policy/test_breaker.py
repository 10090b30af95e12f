"""The circuit's state machine, next to a model of it that keeps every outcome and counts them all each time."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilientdb import BreakerPolicy
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, OPEN, BreakerCore, Permit, Transition

RESET = 5.0
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
        self.probes: dict[Permit, float] = {}
        self.outcomes: list[tuple[float, bool]] = []
        self.last_failure = 0.0
        self.seen_dead = False
        self.by_hand = False
        self.opened_at = self.now

    @initialize(
        minimum=st.integers(1, 4),
        threshold=st.sampled_from([0.25, 0.5, 1.0]),
        most=st.integers(1, 3),
        probed=st.booleans(),
    )
    def make(self, minimum: int, threshold: float, most: int, probed: bool) -> None:
        self.probed = probed
        self.policy = BreakerPolicy(
            failure_rate_threshold=threshold,
            minimum_calls=minimum,
            window=WINDOW,
            reset_timeout=RESET,
            half_open_max_calls=most,
        )
        self.core = BreakerCore(self.policy, self.now, probed=probed)

    def expect(self, moved: Transition | None, new: str | None) -> None:
        """The circuit moved to ``new`` (None: not at all), and said so."""
        if new is None:
            assert moved is None
            return
        assert moved is not None
        assert (moved.old, moved.new) == (self.state, new)
        assert moved.cause
        if (self.state, new) == (CLOSED, OPEN):
            self.opened_at = self.now
        self.state = new
        self.period += 1
        self.probes.clear()
        self.by_hand = False
        if new == OPEN:
            self.last_failure = self.now
        if new == CLOSED:
            self.outcomes.clear()
            self.seen_dead = False

    def counted(self) -> tuple[int, int]:
        """Good and bad within the window: slices leave as a whole."""
        oldest = math.floor(self.now / SLICE + 1e-9) - 9
        recent = [good for at, good in self.outcomes if math.floor(at / SLICE + 1e-9) >= oldest]
        return recent.count(True), recent.count(False)

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.5, RESET, WINDOW, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        permit, moved = self.core.try_acquire(self.now)
        if self.state == CLOSED:
            assert permit is not None
            assert not permit.probe
            self.expect(moved, None)
        else:
            waited_enough = self.state == OPEN and self.now >= self.last_failure + RESET
            self.expect(moved, HALF_OPEN if waited_enough else None)
            for lost in [one for one, since in self.probes.items() if self.now >= since + RESET]:
                del self.probes[lost]
            if self.state == OPEN or len(self.probes) == self.policy.half_open_max_calls:
                assert permit is None
                return
            assert permit is not None
            assert permit.probe
            assert permit not in self.probes, "a permit is for one call"
            self.probes[permit] = self.now
        self.permits.append((permit, self.period))

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), repeat=st.integers(1, 3))
    def succeed(self, data: st.DataObject, repeat: int) -> None:
        permit, period = data.draw(st.sampled_from(self.permits))
        for _ in range(repeat):
            moved = self.core.record_success(permit, self.now)
            if permit in self.probes:
                self.expect(moved, CLOSED)
            else:
                self.expect(moved, None)
                if period == self.period and not permit.probe:
                    self.outcomes.append((self.now, True))

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), repeat=st.integers(1, 3))
    def fail(self, data: st.DataObject, repeat: int) -> None:
        permit, period = data.draw(st.sampled_from(self.permits))
        for _ in range(repeat):
            moved = self.core.record_failure(permit, self.now, "why")
            if permit in self.probes:
                self.expect(moved, OPEN)
            elif period != self.period or permit.probe:
                self.expect(moved, None)
            else:
                self.outcomes.append((self.now, False))
                good, bad = self.counted()
                trips = (
                    good + bad >= self.policy.minimum_calls
                    and bad / (good + bad) >= self.policy.failure_rate_threshold
                )
                self.expect(moved, OPEN if trips else None)

    @precondition(lambda self: self.permits)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        permit, _ = data.draw(st.sampled_from(self.permits))
        self.core.release(permit)
        self.probes.pop(permit, None)

    @rule()
    def prober_answers(self) -> None:
        moved = self.core.prober_succeeded(self.now)
        if self.state == CLOSED or self.by_hand:
            self.expect(moved, None)
        elif self.seen_dead:
            self.expect(moved, CLOSED)
        else:
            self.expect(moved, HALF_OPEN if self.state == OPEN else None)

    @rule()
    def prober_fails(self) -> None:
        moved = self.core.prober_failed(self.now, "silence")
        self.expect(moved, None if self.state == OPEN else OPEN)
        self.seen_dead = True
        self.last_failure = self.now

    @rule(state=st.sampled_from([CLOSED, OPEN, HALF_OPEN]))
    def force(self, state: str) -> None:
        moved = self.core.force(state, self.now, "by hand")
        self.expect(moved, None if state == self.state else state)
        self.by_hand = state == OPEN
        self.last_failure = self.now

    @rule(number=st.integers(0, 4))
    def absorb(self, number: int) -> None:
        """At once after the last time: nothing to spread."""
        self.core.absorb(0, self.now)
        self.core.absorb(number, self.now)
        if self.state == CLOSED:
            self.outcomes += [(self.now, True)] * number

    @invariant()
    def it_is_where_it_should_be(self) -> None:
        assert self.core.state == self.state
        assert (self.core.closed_permit is None) == (self.core.state != CLOSED)

    @invariant()
    def it_says_when_to_come_back(self) -> None:
        after = self.core.retry_after(self.now)
        if self.state == CLOSED:
            assert after is None
        elif self.state == HALF_OPEN:
            assert after == 0.0
        else:
            expected = max(0.0, self.last_failure + RESET - self.now)
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


def make(**options: object) -> BreakerCore:
    defaults = {"minimum_calls": 2, "window": WINDOW, "reset_timeout": RESET}
    return BreakerCore(BreakerPolicy(**{**defaults, **options}), 0.0)  # type: ignore[arg-type]


def acquire(core: BreakerCore, now: float) -> Permit:
    permit, _ = core.try_acquire(now)
    assert permit is not None
    return permit


def test_a_late_result_from_before_the_trip_neither_closes_nor_opens() -> None:
    core = make()
    early = acquire(core, 0.0)
    core.record_failure(early, 1.0, "x")
    assert core.record_failure(early, 1.0, "x") is not None
    assert core.record_success(early, 2.0) is None
    assert core.record_failure(early, 4.0, "x") is None
    assert core.retry_after(4.0) == 2.0, "nor does it put off the next attempt"
    probe = acquire(core, 6.0)
    assert core.record_failure(early, 6.5, "x") is None
    assert core.record_success(probe, 7.0) is not None
    for _ in range(50):
        assert core.record_failure(early, 8.0, "x") is None
    assert core.state == CLOSED


def test_a_lost_probe_is_forgotten_after_the_reset_timeout() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    lost = acquire(core, RESET)
    assert core.try_acquire(2 * RESET - 0.1)[0] is None
    again = acquire(core, 2 * RESET)
    assert core.record_success(lost, 2 * RESET) is None
    assert core.state == HALF_OPEN
    assert core.record_success(again, 2 * RESET) is not None


def test_a_released_probe_makes_room_for_another() -> None:
    core = make()
    core.prober_failed(0.0, "x")
    core.release(acquire(core, RESET))
    acquire(core, RESET)
    assert core.try_acquire(RESET)[0] is None


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


def test_a_disabled_breaker_stays_closed() -> None:
    core = make(enabled=False)
    for _ in range(100):
        assert core.record_failure(acquire(core, 0.0), 0.0, "x") is None
    assert core.state == CLOSED


def test_absorbed_successes_are_spread_over_the_time_since_the_last() -> None:
    core = make(window=10.0)
    core.absorb(400, 40.0)
    assert core.rate(40.0) == pytest.approx(10.0), "100 of the 400 fell into the last 10 of 40 seconds"
    core.absorb(50, 45.0)
    assert core.rate(45.0) == pytest.approx(15.0)


def test_successes_are_absorbed_into_closed_periods_only() -> None:
    core = make(window=10.0)
    core.prober_failed(0.0, "x")
    core.absorb(1_000, 1.0)
    core.prober_succeeded(101.0)
    assert core.rate(101.0) == 0
    core.absorb(100, 106.0)
    assert core.rate(106.0) == pytest.approx(10.0), "counted from when it closed, not from when it opened"


def test_with_a_prober_an_outage_is_expected_to_last_as_long_as_it_has() -> None:
    core = BreakerCore(BreakerPolicy(reset_timeout=5.0), 100.0, probed=True)
    core.prober_failed(100.0, "silence")
    assert core.retry_after(100.5) == pytest.approx(0.5)
    core.prober_failed(103.0, "silence")
    assert core.retry_after(103.0) == pytest.approx(3.0)
    core.prober_failed(130.0, "silence")
    assert core.retry_after(130.0) == 5.0


def test_a_circuit_opened_by_hand_stays_so_whatever_the_prober_sees() -> None:
    core = BreakerCore(BreakerPolicy(reset_timeout=5.0), 100.0, probed=True)
    core.force(OPEN, 100.0, "maintenance")
    assert core.prober_succeeded(101.0) is None
    assert core.retry_after(101.0) == pytest.approx(4.0)
    permit, _ = core.try_acquire(105.0)
    assert permit is not None
    assert permit.probe
