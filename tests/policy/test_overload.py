"""The verdict "overloaded", and the estimate of how fast a line moves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.policy.overload import DrainRate, Overload

TARGET, INTERVAL = 50, 1000
"""Whole milliseconds here, so that sums are exact."""

STEPS = st.integers(0, 400)
WAITS = st.integers(0, 120)
OBSERVATIONS = st.lists(st.tuples(STEPS, WAITS), max_size=40)


def make() -> Overload:
    return Overload(TARGET, INTERVAL)


def overloaded() -> tuple[Overload, int]:
    overload = make()
    overload.observe(60, 0)
    overload.observe(60, INTERVAL)
    assert overload.now
    return overload, INTERVAL


# -- the verdict --------------------------------------------------------------------------------------------------


def test_a_burst_that_drains_within_the_interval_is_no_overload() -> None:
    overload = make()
    for now in range(0, INTERVAL, 10):
        overload.observe(900, now)
        assert not overload.now
    overload.observe(TARGET, INTERVAL)
    assert not overload.now


def test_a_line_that_stands_for_an_interval_is() -> None:
    overload = make()
    for now in range(0, INTERVAL, 10):
        overload.observe(TARGET + 1, now)
    assert not overload.now
    overload.observe(TARGET + 1, INTERVAL)
    assert overload.now


def test_one_short_wait_ends_it() -> None:
    overload, now = overloaded()
    overload.observe(TARGET, now + 1)
    assert not overload.now
    overload.observe(60, now + 2)
    assert not overload.now, "a new interval begins"


def test_a_short_wait_proves_nothing_while_callers_are_sent_away() -> None:
    overload, now = overloaded()
    overload.sent_away(now)
    overload.observe(0, now + INTERVAL - 1)
    assert overload.now
    overload.observe(0, now + INTERVAL)
    assert not overload.now


def test_an_empty_line_ends_it_at_once() -> None:
    overload, now = overloaded()
    overload.sent_away(now)
    overload.drained()
    assert not overload.now
    overload.observe(60, now + 1)
    assert not overload.now


@given(OBSERVATIONS)
def test_overloaded_exactly_while_all_waits_of_an_interval_were_long(
    observations: list[tuple[int, int]],
) -> None:
    overload, now, long_since = make(), 0, None
    for step, wait in observations:
        now += step
        overload.observe(wait, now)
        if wait <= TARGET:
            long_since = None
        elif long_since is None:
            long_since = now
        assert overload.now == (long_since is not None and now - long_since >= INTERVAL)


@given(OBSERVATIONS, st.sets(st.integers(0, 39)))
def test_sending_away_prolongs_it_by_an_interval_at_most_and_never_begins_it(
    observations: list[tuple[int, int]], sent_away_before: set[int]
) -> None:
    overload, bare = make(), make()
    now, last = 0, -INTERVAL
    for number, (step, wait) in enumerate(observations):
        now += step
        was = overload.now
        if number in sent_away_before:
            overload.sent_away(now)
            last = now
        overload.observe(wait, now)
        bare.observe(wait, now)
        assert overload.now >= bare.now
        assert bare.now or was or not overload.now
        if wait <= TARGET:
            assert overload.now == (was and now - last < INTERVAL)


# -- how fast a line moves ----------------------------------------------------------------------------------------


def moving(gap: float, times: int = 10) -> tuple[DrainRate, float]:
    """A line that has moved by one every ``gap`` seconds, the last time at the moment returned."""
    drain = DrainRate()
    drain.begins(0.0)
    for number in range(times):
        drain.served((number + 1) * gap)
    return drain, times * gap


def test_nothing_is_known_before_anybody_was_served() -> None:
    drain = DrainRate()
    assert drain.wait(1, 0.0) is None
    drain.begins(0.0)
    assert drain.wait(1, 10.0) is None


def test_the_first_in_line_teaches_it_too() -> None:
    drain = DrainRate()
    drain.begins(1.0)
    drain.served(1.5)
    assert drain.wait(1, 1.5) == pytest.approx(0.5)


def test_a_steady_line_is_known_exactly() -> None:
    drain, now = moving(0.02)
    for place in (1, 5, 50):
        assert drain.wait(place, now) == pytest.approx(place * 0.02)


def test_a_line_that_has_stopped_is_not_taken_to_move_as_before() -> None:
    drain, now = moving(0.02)
    assert drain.wait(10, now + 0.02) == pytest.approx(0.2)
    assert drain.wait(10, now + 2.0) == pytest.approx(10.0)


def test_a_pause_in_which_nobody_waited_does_not_count() -> None:
    drain, now = moving(0.02)
    drain.drained()
    assert drain.wait(10, now + 3600) == pytest.approx(0.2)
    drain.begins(now + 3600)
    assert drain.wait(10, now + 3600) == pytest.approx(0.2)
    drain.served(now + 3600.02)
    assert drain.wait(10, now + 3600.02) == pytest.approx(0.2)


def test_it_follows_a_server_that_becomes_slower_and_faster_again() -> None:
    drain, now = moving(0.004)
    for gap, times in ((0.4, 30), (0.004, 60)):
        for _ in range(times):
            now += gap
            drain.served(now)
        estimate = drain.wait(1, now)
        assert estimate is not None
        assert gap * 0.9 < estimate < gap * 1.5


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=50), st.integers(1, 100))
def test_the_estimate_lies_among_what_was_seen(gaps: list[float], place: int) -> None:
    drain = DrainRate()
    drain.begins(0.0)
    times = list(itertools.accumulate(gaps))
    for now in times:
        drain.served(now)
    one, many = drain.wait(1, times[-1]), drain.wait(place, times[-1])
    assert one is not None
    assert min(gaps) * 0.999 <= one <= max(gaps) * 1.001
    assert many == pytest.approx(place * one)


@given(st.lists(st.tuples(st.sampled_from(["begins", "served", "drained"]), st.floats(-1, 5)), max_size=40))
def test_never_negative_even_if_threads_look_at_the_clock_in_another_order(
    steps: list[tuple[str, float]],
) -> None:
    drain, now = DrainRate(), 0.0
    for what, step in steps:
        now += step
        if what == "drained":
            drain.drained()
        else:
            getattr(drain, what)(now)
        wait = drain.wait(3, now)
        assert wait is None or wait >= 0
