"""That every benchmark runs and compares something, and that its arithmetic is right. What it finds at this size
means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.benchmarks.__main__ import BENCHMARKS
from tests.benchmarks.outage.verdict import Figures, Request
from tests.benchmarks.outage.verdict import figures as outage_figures
from tests.benchmarks.overload.arrivals import schedule
from tests.benchmarks.overload.harness import Result, ratio_to, row
from tests.benchmarks.overload.verdict import OK, History, figures, normal_since
from tests.benchmarks.report import Report, Target, into_document, render_targets

if TYPE_CHECKING:
    from resilientdb.testing import Postgres

NEVER = float("inf")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_gives_ratios(name: str, tmp_path: Path, resilientdb_postgres: Postgres) -> None:
    assert resilientdb_postgres.running  # only asked for so that a skip is told
    found = tmp_path / "found.json"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", name, "--smoke", "--json", str(found)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert f"## {name}" in finished.stdout
    (report,) = json.loads(found.read_text("utf-8"))["reports"]
    ratios = [row["ratio"]["median"] for row in report["rows"] if row["ratio"] is not None]
    assert len(ratios) >= 2
    assert all(ratio > 0 for ratio in ratios)


# -- the verdict on a load -----------------------------------------------------------------------------------


def history(*requests: tuple[float, str, float, float], kinds: tuple[int, ...] = ()) -> History:
    """A load from 10 to 20, deadline 1. Of each request: scheduled, how it ended, when, when its query began."""
    made = History(deadline=1.0, quick=0.1)
    made.begin_at(10.0, 10.0)
    for number, (scheduled, how, when, begun) in enumerate(requests):
        kind = kinds[number] if kinds else 0
        assert made.arrived(scheduled, kind) == number
        if when < NEVER:
            made.ended[number] = (how, when, begun)
    return made


def test_goodput_is_what_was_answered_in_time() -> None:
    found = figures(
        history(
            (11.0, OK, 11.5, 11.4),
            (12.0, OK, 13.5, 13.4),  # too late
            (13.0, "PoolSaturated", 13.1, NEVER),
            (14.0, "", NEVER, NEVER),
        ),
        [0.1],  # one in ten seconds
    )
    assert found["goodput"] == pytest.approx(1.0)
    assert found["in_time"] == pytest.approx(0.25)
    assert found["outcomes"] == {OK: 2, "PoolSaturated": 1, "unfinished": 1}
    assert found["answered_p99"] == pytest.approx(1.5)
    assert found["refused_p99"] == pytest.approx(0.1)


def test_a_query_at_the_edge_of_the_load_counts_for_its_part() -> None:
    found = figures(
        history(
            (9.5, OK, 10.2, 9.8),  # begun before
            (9.5, OK, 10.3, 10.1),  # arrived before, but all of it inside
            (19.6, OK, 20.3, 19.9),  # a quarter of it inside
            (19.9, OK, 20.5, 20.1),  # nothing
            (21.0, OK, 21.5, 21.4),
        ),
        [0.1],
    )
    assert found["goodput"] == pytest.approx(1.25)
    assert found["arrived"] == 2  # who came before the load, or after it, is not in the other figures


def test_each_kind_of_request_is_measured_by_what_it_costs() -> None:
    found = figures(
        history((11.0, OK, 11.1, 11.0), (11.0, OK, 11.2, 11.0), (12.0, OK, 15.0, 14.8), kinds=(0, 1, 1)),
        [1.0, 0.2],
    )
    assert found["goodput"] == pytest.approx(1 / 10 + 1 / 2)
    assert [kind["in_time"] for kind in found["kinds"]] == [1.0, 0.5]


def test_normal_is_when_nearly_everybody_is_answered_quickly() -> None:
    slow = [(20.0 + n / 10, OK, 20.0 + n / 10 + 0.3, 0.0) for n in range(5)]
    well = [(20.5 + n / 100, OK, 20.5 + n / 100 + 0.05, 0.0) for n in range(200)]
    recovering = history(*slow, *well)
    # 5 of a hundred may be slow: of one second from 20.1 on it is 4 of 64, from 20.2 on 3 of 73.
    assert normal_since(recovering, 23.0) == pytest.approx(0.2)
    assert normal_since(recovering, 21.2) is None  # too early to tell
    recovering.quick = None
    assert normal_since(recovering, 23.0) is None


# -- the verdict on an outage --------------------------------------------------------------------------------


def outage(*requests: tuple[float, float, str]) -> Figures:
    """Silence from 10 to 20, watched until 25. Of each request: when it was due, when it ended, how."""
    return outage_figures([Request(*request) for request in requests], 10.0, 20.0, 20.0, 25.0, deadline=1.0)


def test_an_outage_is_noticed_when_somebody_is_refused_at_once() -> None:
    found = outage(
        (9.9, 10.9, "Lost"),  # came before
        (10.2, 10.9, "Lost"),  # refused, but not at once
        (10.4, 10.43, OK),
        (10.6, 10.62, "CircuitOpen"),
        (11.0, 11.01, "CircuitOpen"),
        (12.0, 12.01, "CircuitOpen"),
        (13.0, 13.2, "CircuitOpen"),
        (14.0, 14.01, OK),  # served, which is no refusal
    )
    assert found.noticed == pytest.approx(0.6)
    assert found.fast == pytest.approx(2 / 4)
    assert found.in_time == 1.0
    assert found.latest == pytest.approx(0.7)
    assert found.outcomes == {"CircuitOpen": 4, OK: 2, "Lost": 1}
    assert outage((11.0, NEVER, "")).noticed is None
    assert outage((11.0, NEVER, "")).fast is None


def test_stuck_is_who_is_still_under_way_when_all_should_know() -> None:
    found = outage(
        (11.0, 12.05, "Late"),  # within the deadline and a tenth
        (11.0, 14.0, "Late"),
        (12.0, NEVER, ""),
        (14.5, NEVER, ""),
        (19.9, 20.1, OK),
    )
    assert found.in_flight == 3
    assert found.stuck == 2
    assert found.in_time == pytest.approx(2 / 5)
    assert found.latest == 13.0  # until the end of the watch, at least
    assert found.first_ok == pytest.approx(0.1)
    assert found.outcomes["unfinished"] == 2


def test_after_an_outage_all_is_normal_when_nearly_everybody_is_served() -> None:
    refused = [(20.0 + n / 50, 20.0 + n / 50, "CircuitOpen") for n in range(20)]
    served = [(20.4 + n / 50, 20.42 + n / 50, OK) for n in range(230)]
    found = outage(*refused, *served)
    assert found.first_ok == pytest.approx(0.42)
    assert found.normal == pytest.approx(0.35)  # from there on two or three of fifty are refused
    assert found.served == pytest.approx(230 / 250)
    slow = [(due, due + 0.2, how) for due, _, how in served]
    assert outage(*refused, *slow).normal is None


# -- arrivals and rows ---------------------------------------------------------------------------------------


def test_arrivals_keep_to_their_phases_and_to_their_seed() -> None:
    phases = [(1.0, (400.0, 10.0)), (2.0, (50.0, 100.0))]
    arrivals = schedule(phases, "seed")
    assert arrivals == sorted(arrivals) == schedule(phases, "seed") != schedule(phases, "other seed")
    for begin, end, rates in [(0.0, 1.0, (400.0, 10.0)), (1.0, 3.0, (50.0, 100.0))]:
        for kind, rate in enumerate(rates):
            came = sum(begin <= at < end and mine == kind for at, mine in arrivals)
            expected = rate * (end - begin)
            assert abs(came - expected) <= 4 * expected**0.5


def result(*, late: float = 0.001, held_up: float = 0.01, goodput: float = 0.5) -> Result:
    found: dict[str, Any] = {"goodput": goodput, "outcomes": {OK: 3}, "held_up": held_up}
    return Result(found, late)


def test_a_row_whose_arrivals_were_late_is_void() -> None:
    target = Target("goodput %", 100.0, 99, at_least=True)
    spoilt, good = result(late=0.5, goodput=1.0), result(held_up=2.0)
    assert ratio_to(good, spoilt) is None
    assert ratio_to(spoilt, good) is None
    void = row("2x", "guarded", spoilt, {"goodput %": 100.0}, None, [target])
    assert void.figures["goodput %"] is None
    assert "INVALID" in str(void.figures["outcomes"])
    assert [target.verdict for target in void.targets] == ["invalid"]
    assert "invalid" in render_targets([Report("overload", "", [void])])
    kept = row("2x", "guarded", good, {"goodput %": 100.0}, ratio_to(good, good), [target])
    assert kept.figures["goodput %"] == 100.0
    assert kept.ratio is not None
    assert [target.verdict for target in kept.targets] == ["met"]


def test_the_tables_find_their_places_in_the_document(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "<!-- figures: machine -->\n<!-- /figures -->\nabove\n"
        "<!-- figures: mixed -->\nold\n<!-- /figures -->\nbelow\n",
        encoding="utf-8",
    )
    void = row("threads", "plain", result(late=0.5), {"goodput %": 1.0}, None, [Target("goodput", 1.0, 2)])
    into_document(document, [Report("mixed", "in bursts", [void])], "a test")
    text = document.read_text("utf-8")
    assert "old" not in text
    assert (
        text.index("above") < text.index("INVALID") < text.index("- invalid: goodput") < text.index("below")
    )
    with pytest.raises(ValueError, match="no place for the figures of brownout"):
        into_document(document, [Report("brownout", "", [void])], "a test")
