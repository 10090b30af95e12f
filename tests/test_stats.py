"""What the numbers promise to whoever reports them."""

from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.stats import BOUNDS, Histogram, Holder, PoolStats

COUNTS = st.lists(st.integers(0, 50), min_size=len(BOUNDS) + 1, max_size=len(BOUNDS) + 1).map(tuple)


def histogram(**counts: int) -> Histogram:
    """``histogram(b0=2, b14=1)``: two in the first bucket, one in the last."""
    return Histogram(counts=tuple(counts.get(f"b{i}", 0) for i in range(len(BOUNDS) + 1)), sum=1.0)


# -- histograms -----------------------------------------------------------------------------------------------------


def test_an_empty_histogram_knows_nothing() -> None:
    empty = Histogram(counts=(0,) * (len(BOUNDS) + 1), sum=0.0)
    assert (empty.count, empty.mean, empty.quantile(0.5)) == (0, None, None)


def test_count_and_mean() -> None:
    some = Histogram(counts=(1, 2, 1), sum=6.0, bounds=(1.0, 2.0))
    assert (some.count, some.mean) == (4, 1.5)


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    some = Histogram(counts=(90, 9, 1), sum=0.0, bounds=(0.5, 1.0))
    assert [some.quantile(q) for q in (0.0, 0.5, 0.9, 0.91, 0.99, 0.991, 1.0)] == [
        *(0.5, 0.5, 0.5, 1.0, 1.0),
        *(math.inf, math.inf),
    ]


@pytest.mark.parametrize("percent", [7, 14, 28, 55, 56, 57])
def test_a_share_that_is_just_covered_is_covered(percent: int) -> None:
    """In floating-point numbers 0.07 * 100 is more than 7."""
    assert Histogram(counts=(percent, 100 - percent), sum=0.0, bounds=(1.0,)).quantile(percent / 100) == 1.0


@given(counts=COUNTS, percent=st.integers(0, 100))
def test_no_smaller_bound_covers_the_share_that_was_asked_for(counts: tuple[int, ...], percent: int) -> None:
    some = Histogram(counts=counts, sum=0.0)
    bound = some.quantile(percent / 100)
    if not some.count:
        assert bound is None
        return
    assert bound is not None
    bounds = (*BOUNDS, math.inf)
    upto = {end: sum(counts[: place + 1]) for place, end in enumerate(bounds)}
    rank = max(1, math.ceil(Fraction(percent, 100) * some.count))
    assert upto[bound] >= rank
    assert all(upto[end] < rank for end in bounds[: bounds.index(bound)])


@pytest.mark.parametrize("q", [-0.01, 1.01, 99, math.nan])
def test_a_quantile_is_a_share(q: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        histogram(b0=1).quantile(q)


def test_the_difference_is_what_came_in_between() -> None:
    earlier = Histogram(counts=(1, 0, 2), sum=1.5, bounds=(1.0, 2.0))
    later = Histogram(counts=(3, 0, 2), sum=2.5, bounds=(1.0, 2.0))
    assert later - earlier == Histogram(counts=(2, 0, 0), sum=1.0, bounds=(1.0, 2.0))
    with pytest.raises(ValueError, match="different buckets"):
        later - histogram(b0=1)


# -- the pool's -----------------------------------------------------------------------------------------------------

GAUGES = {"total", "active", "idle", "waiting", "limit", "max_waiting", "waiting_by_criticality"}


def pool_stats(times: int) -> PoolStats:
    """Every number tells from which field it is."""
    counted = {
        field.name: times * place
        for place, field in enumerate(dataclasses.fields(PoolStats))
        if field.type == "int"
    }
    one = histogram(b0=times, b14=2 * times)
    return PoolStats(
        **counted,
        limit=15,
        max_waiting=50,
        waiting_by_criticality={"critical": times},
        refused={"pool-shed": times, "pool-saturated": 10 * times},
        retired={"age": times} if times == 1 else {"age": times, "uses": times},
        wait=one,
        hold=one,
        create=one,
    )


def test_since_keeps_gauges_and_takes_all_else_as_the_difference() -> None:
    earlier, later = pool_stats(1), pool_stats(3)
    between = later.since(earlier)
    for field in dataclasses.fields(PoolStats):
        now, was, came = (getattr(one, field.name) for one in (later, earlier, between))
        if field.name in GAUGES:
            assert came == now, field.name
        elif isinstance(now, dict):
            assert came == {key: now[key] - was.get(key, 0) for key in now}, field.name
        else:
            assert came == now - was, field.name
    assert between.retired == {"age": 2, "uses": 3}, (
        "a reason that had not come up before counts from nothing"
    )


def test_since_nothing_measured_takes_what_is_there_now() -> None:
    later = pool_stats(2)
    blind = dataclasses.replace(later, wait=None, hold=None, create=None)
    assert later.since(blind).wait == later.wait
    assert blind.since(later).wait is None


def test_the_defaults_are_a_pool_in_which_nothing_has_happened() -> None:
    stats = PoolStats(total=0, active=0, idle=0, waiting=0, limit=None, max_waiting=None)
    assert stats.since(stats) == stats
    assert (stats.refused, stats.retired, stats.wait) == ({}, {}, None)


@pytest.mark.parametrize("thing", [pool_stats(2), histogram(b3=1), Holder(node="db:5432", seconds=1.5)])
def test_they_are_frozen_and_survive_a_task_queue(thing: object) -> None:
    assert pickle.loads(pickle.dumps(thing)) == thing
    assert hash(pickle.loads(pickle.dumps(thing))) == hash(thing)
    name = dataclasses.fields(thing)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, name, None)
