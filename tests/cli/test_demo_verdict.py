"""What the demo makes of its figures, without services: endings, recovery, ledger, goals, and a page that escapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from resilientdb.cli.demo import wording
from resilientdb.cli.demo.record import Event, Phase, Record, Sample, figures_of, percentile
from resilientdb.cli.demo.report import Report, write_report
from resilientdb.cli.demo.series import lanes_of
from resilientdb.cli.demo.timeline import plan
from resilientdb.cli.demo.verdict import Recovery, Verdict, judge, ledger_of

if TYPE_CHECKING:
    from pathlib import Path

    from resilientdb.cli.demo.services import App
    from resilientdb.testing import LedgerReport


def _sample(
    at: float,
    status: int = 200,
    *,
    app: App = "guarded",
    kind: str = "items",
    seconds: float = 0.01,
    number: int = 0,
    retry_after: str | None = None,
    reason: str = "",
) -> Sample:
    return Sample(number, app, kind, at, seconds, status, retry_after, reason)


@pytest.mark.parametrize(
    ("sample", "outcome"),
    [
        (_sample(0, 200), "answered"),
        (_sample(0, 201, seconds=1.2), "hung"),
        (_sample(0, 503, retry_after="2"), "refused"),
        (_sample(0, 503, retry_after="2", seconds=1.01), "hung"),
        (_sample(0, 503), "error"),
        (_sample(0, 503, retry_after="soon"), "error"),
        (_sample(0, 500, reason="commit-outcome-unknown"), "unknown"),
        (_sample(0, 500), "error"),
        (_sample(0, 404), "error"),
        (_sample(0, -1), "error"),
        (_sample(0, 0, seconds=1.0), "hung"),
    ],
)
def test_how_a_request_ended(sample: Sample, outcome: str) -> None:
    assert sample.outcome == outcome


def test_percentiles_and_words() -> None:
    assert percentile([], 0.99) is None
    assert percentile([1.0], 0.5) == 1.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert figures_of([_sample(0, 0, seconds=3.0)]).p99 == 1.0
    assert wording.share(0.9999) == "99.9 %"
    assert wording.share(1.0) == "100 %"
    assert wording.latency(1.0) == "> 1 s"
    assert wording.back(Recovery(None, 3.0), last=False) == "> 3.0 s"
    assert wording.back(Recovery(None, 3.0), last=True) == "never"


def test_the_plan_keeps_to_the_seconds() -> None:
    assert sum(phase.seconds for phase in plan(50)) == pytest.approx(50)
    assert sum(phase.seconds for phase in plan(18)) < 21
    assert min(phase.seconds for phase in plan(15)) >= 1.2


def _phases() -> list[Phase]:
    """Calm for 2 s, a fault for 2 s, 4 s to recover."""
    calm = Phase("calm", "calm", "", 10, 2, started_at=100, ended_at=102)
    fault = Phase("hang", "fault", "<silence>", 10, 2, started_at=102, ended_at=104, healed_at=104)
    after = Phase("after hang", "recovery", "", 10, 4, started_at=104, ended_at=108)
    return [calm, fault, after]


def _ledgers(samples: list[Sample]) -> dict[App, LedgerReport]:
    return {"plain": ledger_of(samples, "plain", []), "guarded": ledger_of(samples, "guarded", [])}


def _verdict(down_until: float) -> Verdict:
    """Ten requests a second, unanswered from the start of the fault to ``down_until``."""
    times = [100 + n / 10 for n in range(80)]
    samples = [_sample(at, 0 if 102 <= at < down_until else 200) for at in times]
    return judge(_phases(), samples, _ledgers(samples))


@pytest.mark.parametrize(("down_until", "back"), [(104.0, 0.0), (105.0, 1.0), (107.8, None), (109.0, None)])
def test_time_back_to_normal(down_until: float, back: float | None) -> None:
    result = {phase.name: results["guarded"] for phase, results in _verdict(down_until).phases}["hang"]
    assert result.recovery is not None
    assert result.recovery.watched == 4.0
    if back is None:
        assert result.recovery.seconds is None
    else:
        assert result.recovery.seconds == pytest.approx(back, abs=0.1)


def test_goals_that_are_missed_are_named() -> None:
    goals = {goal.what.split()[0]: goal for goal in _verdict(109.0).goals}
    assert not _verdict(109.0).passed
    assert "after hang" in goals["back"].figure
    assert not goals["back"].met


def _write(number: int, status: int, **more: str) -> Sample:
    return _sample(0, status, kind="add", number=number, **more)  # type: ignore[arg-type]


def test_the_ledger_finds_lost_doubled_and_refused_writes() -> None:
    writes = [
        _write(1, 201),
        _write(2, 201),
        _write(3, 201),
        _write(4, 503, retry_after="1"),
        _write(5, 500, reason="commit-outcome-unknown"),
        _write(6, 0),
    ]
    rows = [
        ("guarded", "1"),
        ("guarded", "2"),
        ("guarded", "2"),
        ("guarded", "4"),
        ("guarded", "6"),
        ("plain", "3"),
    ]
    report = ledger_of(writes, "guarded", rows)
    assert report.lost == {"3"}
    assert report.duplicated == {"2": 2}
    assert report.resurrected == {"4"}
    assert (report.unknown, report.unknown_present) == (2, 1)


def test_lanes_follow_the_events() -> None:
    events = [
        Event(103.0, "CircuitStateChanged", "primary", "closed", "open", "x"),
        Event(104.0, "PrimaryChanged", "", "primary", "standby", ""),
        Event(106.0, "CircuitStateChanged", "primary", "open", "closed", "x"),
    ]
    lanes = lanes_of(events, 100.0, 8.0)
    assert [(part.start, part.end, part.value) for part in lanes["breaker of the primary"]] == [
        (0.0, 3.0, "closed"),
        (3.0, 6.0, "open"),
        (6.0, 8.0, "closed"),
    ]
    assert [part.value for part in lanes["writes go to"]] == ["primary", "standby"]


def test_the_page_escapes_everything(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    record = Record()
    record.phases = _phases()
    record.phases[1].proofs.append(evil)
    samples = [
        _sample(101, 503, retry_after="1", reason=evil),
        _sample(103, 500, reason=evil),
        _sample(103, 200, app="plain"),
    ]
    events = [Event(103.0, "CircuitStateChanged", "primary", "closed", evil, evil)]
    record.add(samples, 0.0)
    record.add_state("healthy", {}, events)
    verdict = judge(record.phases, samples, _ledgers(samples))
    write_report(Report(verdict, record, 1, {"thing": evil}), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "<silence>" not in text
    assert text.count("</script>") == 2
