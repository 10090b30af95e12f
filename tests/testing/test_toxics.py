"""What the Toxiproxy server would take for granted is refused before it is sent."""

from __future__ import annotations

import math

import pytest

from resilientdb.testing.toxics import check_attributes, check_toxicity, milliseconds


def test_defaults_are_filled_in() -> None:
    assert check_attributes("latency", "upstream", {"latency": 5}) == {"latency": 5, "jitter": 0}
    assert check_attributes("reset_peer", "downstream", {}) == {"timeout": 0}


@pytest.mark.parametrize(
    ("kind", "stream", "attributes", "message"),
    [
        ("latancy", "upstream", {"latency": 5}, "did you mean 'latency'"),
        ("latency", "sideways", {"latency": 5}, "stream is 'sideways'"),
        ("latency", "upstream", {"latancy": 5}, "did you mean 'latency'"),
        ("latency", "upstream", {}, "needs the attribute 'latency'"),
        ("latency", "upstream", {"latency": 0.2}, "whole number of ms"),
        ("latency", "upstream", {"latency": True}, "whole number of ms"),
        ("bandwidth", "upstream", {"rate": -1}, "0 or more"),
        ("slicer", "upstream", {"average_size": 0}, "1 or more"),
        ("slicer", "upstream", {"average_size": 4, "size_variation": 4}, "below average_size"),
    ],
)
def test_wrong_toxics_are_named(kind: str, stream: str, attributes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attributes(kind, stream, attributes)


@pytest.mark.parametrize("toxicity", [5, 0, -0.1, math.nan, math.inf, 1e-9, True])
def test_senseless_toxicities_are_refused(toxicity: float) -> None:
    with pytest.raises(ValueError, match="toxicity"):
        check_toxicity(toxicity)


def test_a_share_is_kept() -> None:
    assert check_toxicity(0.3) == 0.3
    assert check_toxicity(1) == 1.0


def test_seconds_become_whole_milliseconds() -> None:
    assert milliseconds(0.25, "seconds") == 250
    assert milliseconds(0, "seconds") == 0
    for senseless in (-1.0, math.nan, math.inf, 0.0001):
        with pytest.raises(ValueError, match="seconds="):
            milliseconds(senseless, "seconds")
