"""Is the line standing, or only passing? And how fast is it moving?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.policy.overload import DrainRate, Overload

TARGET, INTERVAL = 0.05, 1.0


def test_one_short_wait_within_the_interval_proves_that_the_line_drains() -> None:
    overload = Overload(TARGET, INTERVAL)
    for tenth in range(40):
        overload.observe(0.04 if tenth % 9 == 0 else 3.0, tenth / 10)
        assert not overload.now


def test_a_line_that_stands_for_the_interval_is_overload_until_a_short_wait() -> None:
    overload = Overload(TARGET, INTERVAL)
    verdicts = []
    for wait, now in ((0.06, 10.0), (0.06, 10.9), (0.06, 11.0), (0.06, 50.0), (TARGET, 50.1), (0.06, 50.2)):
        overload.observe(wait, now)
        verdicts.append(overload.now)
    assert verdicts == [False, False, True, True, False, False]


@given(
    waits=st.lists(st.tuples(st.sampled_from([0.0, 0.05, 0.051, 2.0]), st.sampled_from([0.01, 0.3, 1.0]))),
)
def test_the_verdict_is_that_of_the_minimum_over_the_interval(waits: list[tuple[float, float]]) -> None:
    overload = Overload(TARGET, INTERVAL)
    now, above_since = 5.0, None
    for wait, pause in waits:
        now += pause
        overload.observe(wait, now)
        above_since = None if wait <= TARGET else now if above_since is None else above_since
        assert overload.now == (above_since is not None and now - above_since >= INTERVAL)


def test_a_place_takes_as_long_as_the_last_ones_took() -> None:
    drain = DrainRate()
    assert drain.wait(1, 0.0) is None, "nothing is known"
    drain.begins(0.0)
    for step in range(1, 101):
        drain.served(0.02 * step)
    assert drain.wait(1, 2.0) == pytest.approx(0.02)
    assert drain.wait(10, 2.0) == pytest.approx(0.2)
    for step in range(1, 101):
        drain.served(2.0 + 0.1 * step)
    assert drain.wait(1, 12.0) == pytest.approx(0.1, rel=0.01), "it follows"


def test_a_line_that_has_stopped_moving_is_not_taken_to_move_as_before() -> None:
    drain = DrainRate()
    drain.begins(0.0)
    drain.served(0.02)
    assert drain.wait(1, 0.02) == pytest.approx(0.02)
    assert drain.wait(1, 4.02) == pytest.approx(2.0)


def test_the_time_in_which_nobody_waits_says_nothing() -> None:
    drain = DrainRate()
    drain.begins(0.0)
    drain.served(0.02)
    drain.drained()
    assert drain.wait(1, 3_600.0) == pytest.approx(0.02)
    drain.served(3_600.0)
    assert drain.wait(1, 3_600.0) == pytest.approx(0.02)


def test_the_first_in_line_teaches_it_too() -> None:
    drain = DrainRate()
    drain.begins(0.0)
    drain.served(5.0)
    for minute in range(60):
        drain.begins(60.0 * minute)
        drain.served(60.0 * minute + 0.01)
    wait = drain.wait(1, 3_600.0)
    assert wait is not None
    drain.drained()
    wait = drain.wait(1, 3_600.0)
    assert wait is not None
    assert wait < 0.05


def test_threads_that_looked_at_the_clock_in_another_order() -> None:
    drain = DrainRate()
    drain.begins(1.0)
    drain.served(1.5)
    drain.served(1.4)
    wait = drain.wait(1, 1.5)
    assert wait is not None
    assert 0 < wait <= 0.5
