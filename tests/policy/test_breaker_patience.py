"""A node that is weak answers a probe at any time: calls that have just failed hold back the next."""

from __future__ import annotations

import pytest

from resilientdb import BreakerPolicy
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, OPEN, BreakerCore


def core() -> BreakerCore:
    """Of a node that was dead, closed by the prober, in its slow start at 100.0; it stays open for 8 s at first."""
    policy = BreakerPolicy(reset_timeout=8.0, minimum_calls=1)
    found = BreakerCore(policy, 0.0, rng=lambda: 0.0, probed=True)
    found.prober_failed(90.0, "dead")
    found.prober_succeeded(100.0)
    assert (found.state, found.slow_start) == (CLOSED, (1, 32))
    return found


def fail(breaker: BreakerCore, now: float, *, no_answer: bool = True) -> None:
    permit, _ = breaker.try_acquire(now)
    assert permit is not None
    breaker.record_failure(permit, now, "late", no_answer=no_answer)
    assert breaker.state == OPEN


@pytest.mark.parametrize("state", ["slow start", HALF_OPEN])
def test_after_a_call_without_an_answer_the_prober_waits_a_quarter_of_the_open_time(state: str) -> None:
    breaker = core()
    fail(breaker, 101.0)
    wait = 16.0  # the second time
    if state == HALF_OPEN:
        breaker.prober_succeeded(101.0 + wait / 4)
        fail(breaker, 110.0)
        wait = 32.0
    began = breaker.failing_since
    assert breaker.prober_succeeded(began + wait / 4 - 0.01) is None
    moved = breaker.prober_succeeded(began + wait / 4)
    assert moved is not None
    assert moved.new == HALF_OPEN


def test_after_any_other_failure_it_does_not_wait() -> None:
    breaker = BreakerCore(BreakerPolicy(minimum_calls=1), 0.0, rng=lambda: 0.0, probed=True)
    fail(breaker, 50.0)
    moved = breaker.prober_succeeded(50.1)
    assert moved is not None
    assert moved.new == HALF_OPEN
    fail(breaker, 50.2, no_answer=False)
    moved = breaker.prober_succeeded(50.3)
    assert moved is not None
    assert moved.new == HALF_OPEN, "a connection that was reset, say, is no sign of too much to do"


def test_a_node_seen_dead_is_believed_at_once() -> None:
    breaker = core()
    fail(breaker, 101.0)
    breaker.prober_failed(101.1, "dead again")
    moved = breaker.prober_succeeded(101.2)
    assert moved is not None
    assert moved.new == CLOSED
