"""The verdict "overloaded", and the estimate of how fast a line moves."""

from __future__ import annotations

import itertools
import math

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


# -- a line that stands -------------------------------------------------------------------------------------------


def test_a_line_in_which_nobody_is_served_gets_its_verdict_all_the_same() -> None:
    overload = make()
    for now in (0, TARGET, TARGET + 1, TARGET + INTERVAL - 1):
        overload.stands(now, now)
        assert not overload.now
    overload.stands(TARGET + INTERVAL, TARGET + INTERVAL)
    assert overload.now


@pytest.mark.parametrize("looks", [[1050], [1049, 1050], [51, 1050], [50, 500, 900, 1050]])
def test_it_does_not_matter_how_often_one_looks(looks: list[int]) -> None:
    overload = make()
    for now in looks:
        overload.stands(now, now)
        assert overload.now == (now == looks[-1])


def test_a_short_wait_proves_nothing_while_nobody_is_served() -> None:
    overload, now = overloaded()
    overload.stands(0, now + 5 * INTERVAL)
    assert overload.now
    begun = make()
    begun.observe(60, 0)
    begun.stands(0, INTERVAL - 1)
    begun.observe(60, INTERVAL)
    assert begun.now


def test_there_is_no_verdict_where_none_is_wanted() -> None:
    overload = Overload(TARGET, math.inf)
    for now in range(0, 100 * INTERVAL, INTERVAL):
        overload.stands(now, now)
        overload.observe(now, now)
    assert not overload.now
    assert not overload.is_too_old(now)
    assert overload.next_look(now, now) == math.inf


def test_too_old_is_who_waited_more_than_twice_the_target_under_overload() -> None:
    overload, _ = overloaded()
    assert [overload.is_too_old(waited) for waited in (2 * TARGET, 2 * TARGET + 1)] == [False, True]
    assert not make().is_too_old(100 * TARGET)


def test_room_is_made_by_who_waited_more_than_three_targets_and_under_overload_by_anybody() -> None:
    assert [make().makes_room(waited) for waited in (0, 3 * TARGET, 3 * TARGET + 1)] == [False, False, True]
    overload, _ = overloaded()
    assert overload.makes_room(0)
    assert not Overload(TARGET, math.inf).makes_room(100 * TARGET), "there is no verdict"


def test_when_a_line_that_stands_shows_something_new() -> None:
    overload = make()
    assert overload.next_look(10, 10) == TARGET - 10
    overload.stands(80, 80)
    assert overload.next_look(80, 80) == TARGET + INTERVAL - 80
    overload.stands(2000, 2000)
    assert overload.now
    assert overload.next_look(30, 2000) == 2 * TARGET - 30
    assert overload.next_look(2000, 2000) == 2 * TARGET, "only somebody who has yet to come can be too old"


@given(OBSERVATIONS, st.integers(0, 100))
def test_looking_in_between_makes_no_verdict_milder_and_outlives_no_short_wait(
    observations: list[tuple[int, int]], share: int
) -> None:
    """Between two that are served, a line is seen as the next one served will find it, only earlier."""
    watched, bare = make(), make()
    now = 0
    for step, wait in observations:
        look = min(step, wait) * share // 100  # before the next is served, the same one is the oldest
        watched.stands(wait - look, now + step - look)
        now += step
        watched.observe(wait, now)
        bare.observe(wait, now)
        assert watched.now >= bare.now
        if wait <= TARGET:
            assert watched.now == bare.now


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


def test_a_pause_because_all_gave_up_makes_no_new_line() -> None:
    drain, now = moving(0.02)
    assert drain.wait(1, now + 3) == pytest.approx(1.5)
    drain.begins(now + 4, left_at=now + 3)
    assert drain.wait(1, now + 4) == pytest.approx(1.5), "the second in which nobody waited does not count"
    assert drain.wait(1, now + 5) == pytest.approx(2.0)
    drain.drained()
    drain.begins(now + 6, left_at=now + 5)
    assert drain.wait(1, now + 6) == pytest.approx(0.02)


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


@given(
    st.lists(
        st.tuples(st.sampled_from(["begins", "goes on", "served", "drained"]), st.floats(-1, 5)), max_size=40
    )
)
def test_never_negative_even_if_threads_look_at_the_clock_in_another_order(
    steps: list[tuple[str, float]],
) -> None:
    drain, now = DrainRate(), 0.0
    for what, step in steps:
        before, now = now, now + step
        if what == "drained":
            drain.drained()
        elif what == "goes on":
            drain.begins(now, left_at=before)
        else:
            getattr(drain, what)(now)
        wait = drain.wait(3, now)
        assert wait is None or wait >= 0
