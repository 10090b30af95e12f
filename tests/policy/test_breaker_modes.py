"""The circuit in each of its modes, driven at random: what a mode promises holds whatever happens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb import BreakerPolicy
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, OPEN, BreakerCore, Permit, Transition
from resilientdb.policy.breaker_modes import MODES, Circuit, Mode

RESET = 5.0
POLICY = {"minimum_calls": 2, "reset_timeout": RESET, "slow_call_duration": 1.0, "slow_start_calls": 4}


def make(mode: Mode = "normal", now: float = 0.0, **options: object) -> Circuit:
    policy = BreakerPolicy(mode=mode, **{**POLICY, **options})  # type: ignore[arg-type]
    return Circuit(policy, now, rng=lambda: 0.0)


def fail(circuit: Circuit, now: float, times: int = 2) -> list[Transition]:
    moves: list[Transition] = []
    for _ in range(times):
        permit, moved = circuit.try_acquire(now)
        assert permit is not None
        moves += moved + circuit.record_failure(permit, now, "x")
    return moves


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "good", "slow", "bad", "release", "answers", "dead", "open", "close", "absorb", "look"]
        ),
        st.sampled_from([0.0, 0.25, 1.0, RESET, 30.0]),
        st.integers(0, 10**6),
    ),
    max_size=60,
)


def drive(circuit: Circuit, steps: list[tuple[str, float, int]], now: float = 0.0) -> list[Transition]:
    """What happens to it; returns its moves. What is promised of any mode is checked on the way."""
    moves: list[Transition] = []
    permits: list[Permit] = [] if circuit.permit is None else [circuit.permit]
    for what, pause, which in steps:
        now += pause
        permit = permits[which % len(permits)] if permits else Permit(probe=True, issued_at=now)
        if what == "ask":
            given, moved = circuit.try_acquire(now)
            moves += moved
            if given is not None:
                permits.append(given)
        elif what == "good":
            moves += circuit.record_success(permit, now)
        elif what == "slow":
            moves += circuit.record_slow(permit, now)
        elif what == "bad":
            moves += circuit.record_failure(permit, now, "x")
        elif what == "release":
            circuit.release(permit)
        elif what == "answers":
            moves += circuit.prober_succeeded(now)
        elif what == "dead":
            moves += circuit.prober_failed(now, "x")
        elif what == "open":
            moves += circuit.force(OPEN, now, "x")
        elif what == "close":
            moves += circuit.force(CLOSED, now, "x")
        elif what == "absorb":
            moves += circuit.absorb(which % 5, now)
        assert (circuit.permit is None) == (circuit.state != CLOSED or circuit.slow_start is not None)
        assert circuit.rate(now) >= 0
    return moves


@given(steps=STEPS)
def test_normal_is_the_state_machine_itself(steps: list[tuple[str, float, int]]) -> None:
    chance, other_chance = random.Random(3), random.Random(3)
    policy = BreakerPolicy(**POLICY)  # type: ignore[arg-type]
    circuit = Circuit(policy, 0.0, rng=chance.random)
    core = BreakerCore(policy, 0.0, rng=other_chance.random)
    now = 0.0
    for what, pause, which in steps:
        now += pause
        if what == "ask":
            (one, moves), (other, moved) = circuit.try_acquire(now), core.try_acquire(now)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                outcome = ("record_success", "record_slow")[which % 2]
                moves += getattr(circuit, outcome)(one, now)
                moved = getattr(core, outcome)(other, now) or moved
        elif what == "dead":
            moves, moved = circuit.prober_failed(now, "x"), core.prober_failed(now, "x")
        elif what == "answers":
            moves, moved = circuit.prober_succeeded(now), core.prober_succeeded(now)
        else:
            continue
        assert moves[-1:] == (() if moved is None else (moved,))
        assert (circuit.state, circuit.slow_start) == (core.state, core.slow_start)
        assert circuit.retry_after(now) == core.retry_after(now)


@given(steps=STEPS, mode=st.sampled_from(["metrics_only", "disabled"]))
def test_these_refuse_nobody_whatever_happens(mode: Mode, steps: list[tuple[str, float, int]]) -> None:
    circuit = make(mode)
    permit = circuit.permit
    moves = drive(circuit, steps)
    assert circuit.permit is permit is not None, "not even for a moment: who waits with it is not sent away"
    assert circuit.try_acquire(10**6)[0] is permit
    assert (circuit.state, circuit.retry_after(10**6), circuit.slow_start) == (CLOSED, None, None)
    assert all(moved.would_be for moved in moves)
    if mode == "disabled":
        assert moves == []


@given(steps=STEPS)
def test_held_open_nothing_closes_it(steps: list[tuple[str, float, int]]) -> None:
    circuit = make("forced_open")
    assert drive(circuit, steps) == []
    assert circuit.try_acquire(10**6) == (None, ())
    assert (circuit.state, circuit.retry_after(10**6), circuit.permit) == (OPEN, RESET, None)


@given(before=STEPS, after=STEPS, old=st.sampled_from(MODES), new=st.sampled_from(MODES))
def test_a_change_of_mode_begins_anew(
    old: Mode, new: Mode, before: list[tuple[str, float, int]], after: list[tuple[str, float, int]]
) -> None:
    circuit = make(old)
    permit = circuit.permit
    drive(circuit, before)
    was = circuit.state
    now = 10.0**4
    moves = circuit.set_mode(new, now)
    assert circuit.mode == new
    if old == new:
        assert moves == ()
        return
    assert [(moved.old, moved.new, moved.would_be) for moved in moves] == (
        [] if was == circuit.state else [(was, circuit.state, False)]
    )
    if permit is not None:
        assert not circuit.is_current(permit)
        assert circuit.record_failure(permit, now, "x") == ()
    drive(circuit, after, now)


# -- one by one -----------------------------------------------------------------------------------------------------


def test_metrics_only_says_what_would_have_been() -> None:
    circuit = make("metrics_only")
    permit = circuit.permit
    assert permit is not None
    (opened,) = fail(circuit, 0.0)
    assert (opened.old, opened.new, opened.would_be) == (CLOSED, OPEN, True)
    assert (circuit.state, circuit.would_be) == (CLOSED, OPEN)
    assert circuit.record_success(permit, RESET - 1) == (), "it would not have been let through"
    half_opened, closed = circuit.record_success(permit, RESET)
    assert (half_opened.new, closed.new, circuit.would_be) == (HALF_OPEN, CLOSED, CLOSED)
    assert fail(circuit, RESET, 1)[0].new == OPEN, "it would have been slow to start"


def test_what_was_tallied_elsewhere_shows_metrics_only_that_it_is_over() -> None:
    circuit = make("metrics_only")
    fail(circuit, 0.0)
    assert circuit.absorb(100, 1.0) == ()
    assert [moved.new for moved in circuit.absorb(100, RESET)] == [HALF_OPEN, CLOSED]
    fail(circuit, RESET, 1)
    assert circuit.would_be == CLOSED, "1 of 100: the slow start would be over"


def test_disabled_counts_successes_for_the_retry_budget() -> None:
    circuit = make("disabled")
    permit = circuit.permit
    assert permit is not None
    circuit.absorb(30, 5.0)
    for _ in range(10):
        circuit.record_success(permit, 5.0)
        circuit.record_slow(permit, 5.0)
        circuit.record_failure(permit, 5.0, "x")
    assert circuit.rate(5.0) == pytest.approx(5.0)


def test_not_enabled_is_disabled() -> None:
    assert make(enabled=False).mode == "disabled"


def test_what_was_held_open_comes_back_slowly() -> None:
    circuit = make("forced_open")
    (moved,) = circuit.set_mode("normal", 1.0)
    assert (moved.old, moved.new) == (OPEN, CLOSED)
    assert circuit.slow_start == (1, 4)
    circuit = make("disabled")
    circuit.set_mode("normal", 1.0)
    assert circuit.slow_start is None
    circuit = make("forced_open", slow_start_calls=0)
    circuit.set_mode("normal", 1.0)
    assert circuit.permit is not None
