"""How many retries a database can be asked to bear."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb import RetryBudget
from resilientdb.policy.budget import Budget


@given(
    pauses=st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0, 20.0]), max_size=60),
    rate=st.sampled_from([0.0, 1.0, 25.0]),
    floor=st.integers(0, 4),
    ratio=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_within_any_window_no_more_than_its_share(
    pauses: list[float], rate: float, floor: int, ratio: float
) -> None:
    budget = Budget(RetryBudget(ratio=ratio, window=10.0, floor=floor))
    now, granted = 1_000.0, []
    for pause in pauses:
        now += pause
        left = budget.left(now, rate)
        allowed = floor + ratio * rate * 10.0
        yes = budget.try_spend(now, rate)
        assert budget.exhausted is not yes
        assert 0.0 <= budget.left(now, rate) <= left <= 1.0
        if yes:
            granted.append(now)
        recent = sum(now - at < 9.0 for at in granted)
        # The last one may begin within the share and end a fraction above it.
        assert recent < allowed + 1
        assert yes or sum(now - at < 10.0 for at in granted) >= allowed


def test_an_idle_service_has_the_floor_again_in_each_window() -> None:
    budget = Budget(RetryBudget(ratio=0.2, window=10.0, floor=3))
    assert [budget.try_spend(0.0, 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert budget.left(0.0, 0.0) == 0.0
    assert not budget.try_spend(9.9, 0.0)
    assert budget.try_spend(10.0, 0.0)
    assert not budget.exhausted


def test_successes_earn_retries() -> None:
    budget = Budget(RetryBudget(ratio=0.2, window=10.0, floor=0))
    assert not budget.try_spend(0.0, 0.0)
    assert [budget.try_spend(1.0, 1.0) for _ in range(3)] == [True, True, False]


def test_nothing_allowed_is_nothing_left() -> None:
    budget = Budget(RetryBudget(ratio=0.0, window=10.0, floor=0))
    assert budget.left(0.0, 1_000.0) == 0.0
    assert not budget.try_spend(0.0, 1_000.0)


def test_what_is_left_is_a_share() -> None:
    budget = Budget(RetryBudget(ratio=0.0, window=10.0, floor=4))
    budget.try_spend(0.0, 0.0)
    assert budget.left(0.0, 0.0) == pytest.approx(0.75)
