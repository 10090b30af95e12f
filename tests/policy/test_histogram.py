"""Counting in buckets, against a list of all that was ever measured."""

from __future__ import annotations

import math
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.policy.histogram import Recorder
from resilientdb.stats import BOUNDS, Histogram

SECONDS = st.lists(
    st.one_of(st.sampled_from([0.0, *BOUNDS]), st.floats(min_value=0.0, max_value=100.0)), max_size=60
)


@given(SECONDS)
def test_everything_is_in_the_bucket_that_ends_at_or_above_it(measured: list[float]) -> None:
    recorder = Recorder()
    for seconds in measured:
        recorder.add(seconds)
    histogram = recorder.snapshot()
    for bucket, (above, upto) in enumerate(zip((-math.inf, *BOUNDS), (*BOUNDS, math.inf), strict=True)):
        assert histogram.counts[bucket] == sum(above < seconds <= upto for seconds in measured)
    assert histogram.count == len(measured)
    assert histogram.sum == pytest.approx(sum(measured))


@given(SECONDS, SECONDS)
def test_it_goes_on_where_another_has_stopped(first: list[float], second: list[float]) -> None:
    one, whole = Recorder(), Recorder()
    for seconds in first:
        one.add(seconds)
        whole.add(seconds)
    other = Recorder(one.snapshot())
    for seconds in second:
        other.add(seconds)
        whole.add(seconds)
    assert other.snapshot() == whole.snapshot()
    assert one.snapshot().count == len(first), "what was handed on is not shared"


def test_a_snapshot_does_not_change() -> None:
    recorder = Recorder()
    recorder.add(0.003)
    before = recorder.snapshot()
    recorder.add(0.003)
    assert before.counts[bisect_left(BOUNDS, 0.003)] == 1
    assert recorder.snapshot() - before == before


def test_other_buckets_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match="other buckets"):
        Recorder(Histogram(counts=(0, 0), sum=0.0, bounds=(1.0,)))
