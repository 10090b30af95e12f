"""The clock that tests move by hand."""

from __future__ import annotations

import math

import pytest

from resilientdb.testing import FakeClock


def test_stands_still_until_it_is_advanced() -> None:
    clock = FakeClock()
    first = clock()
    assert clock() == first
    assert clock.advance(0.25) == first + 0.25
    assert clock() == first + 0.25


def test_does_not_start_at_zero() -> None:
    assert FakeClock()() != 0


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf])
def test_refuses_what_a_monotonic_clock_cannot_do(seconds: float) -> None:
    clock = FakeClock(5.0)
    with pytest.raises(ValueError, match="cannot advance"):
        clock.advance(seconds)
    assert clock() == 5.0
