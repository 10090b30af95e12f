"""Counts over the last seconds, against a list of all that ever happened."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from resilientdb.policy.window import Window

STEPS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0, 9.5, 10.0, 1e6]), st.booleans()), max_size=40
)


@given(steps=STEPS, length=st.sampled_from([1.0, 10.0]), slices=st.sampled_from([1, 2, 8]))
@example(steps=[(0.0, True), (10.0, True)], length=10.0, slices=1)
def test_it_counts_what_the_list_counts(steps: list[tuple[float, bool]], length: float, slices: int) -> None:
    window = Window(length, slices)
    now, history = 1_000.0, []
    for pause, good in steps:
        now += pause
        history.append((now, good))
        window.success(now) if good else window.failure(now)
        this = math.floor(now * slices / length)
        within = [was for at, was in history if math.floor(at * slices / length) > this - slices]
        assert window.totals(now) == (within.count(True), within.count(False))


@given(steps=STEPS)
def test_it_covers_at_least_nine_tenths_and_never_more_than_all_of_its_length(
    steps: list[tuple[float, bool]],
) -> None:
    window = Window(10.0)
    now, history = 0.0, []
    for pause, _ in steps:
        now += pause
        history.append(now)
        window.success(now)
        good, bad = window.totals(now)
        assert bad == 0
        assert sum(now - at < 9.0 for at in history) <= good <= sum(now - at < 10.0 for at in history)


def test_an_outcome_timed_before_another_threads_is_not_lost() -> None:
    window = Window(10.0)
    window.success(1_000.0)
    window.failure(999.0)
    window.success(900.0)
    assert window.totals(1_000.0) == (2, 1)


def test_clearing_forgets_everything() -> None:
    window = Window(10.0)
    window.success(5.0, 7)
    window.failure(5.0)
    window.clear()
    assert window.totals(5.0) == (0, 0)


def test_many_at_once() -> None:
    window = Window(10.0)
    window.success(5.0, 100)
    window.success(6.0)
    assert window.totals(14.9) == (101, 0)
    assert window.totals(15.0) == (1, 0)
