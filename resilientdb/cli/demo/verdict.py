"""What it all comes to: figures per phase, time back to normal, the ledger, and whether the goals were met.

The goals are the guarded application's, and the exit code tells them:

* In every phase at least 95 % of the requests were answered in time, or correctly refused (503 with
  ``Retry-After``, in time).
* Refusing everything would be correct too, so: while nothing is wrong at least 95 % were answered, and so were
  at least 90 % of the reads while only the primary was broken.
* It was back to normal within 2 s of the end of each fault.
* Every acknowledged write is in the surviving database exactly once, and none that was refused is there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from resilientdb.cli.demo.record import Figures, Phase, Sample, figures_of
from resilientdb.cli.demo.services import APPS, App
from resilientdb.testing import LedgerReport, Operation, Outcome, check_ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Goal", "PhaseResult", "Recovery", "Verdict", "judge", "ledger_of"]

GOOD_SHARE: Final = 0.95
READS_SHARE: Final = 0.90
BACK_WITHIN: Final = 2.0

_PRIMARY_ONLY: Final = ("slow", "hang", "promote")
_NORMAL_WINDOW: Final = 0.5
_NORMAL_SHARE: Final = 0.95
_STEP: Final = 0.05

_OUTCOMES: Final = {"answered": Outcome.OK, "refused": Outcome.FAIL}
"""A refusal promises that nothing was done. All else proves nothing."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds from the end of a fault to normal service (half a second in which 95 % are answered in time);
    ``seconds`` None = not within the ``watched`` seconds until the next fault, or the end."""

    seconds: float | None
    watched: float


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One application in one phase: all its requests, its reads, and for a fault what came after it."""

    all: Figures
    reads: Figures
    recovery: Recovery | None


@dataclass(frozen=True, slots=True)
class Goal:
    """One thing that was wanted, and the figure that says whether it came true."""

    what: str
    met: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """``phases`` in order: the phase, and by application its result."""

    phases: tuple[tuple[Phase, Mapping[App, PhaseResult]], ...]
    totals: Mapping[App, Figures]
    ledgers: Mapping[App, LedgerReport]
    errors: Mapping[App, Mapping[str, int]]
    """How requests failed, and how often."""
    reasons: Mapping[str, int]
    """Why the guarded application refused, and how often."""
    goals: tuple[Goal, ...]

    @property
    def passed(self) -> bool:
        return all(goal.met for goal in self.goals)

    def as_json(self, zero: float) -> dict[str, Any]:
        """Plain data; times in seconds since ``zero``."""
        return {
            "passed": self.passed,
            "goals": [asdict(goal) for goal in self.goals],
            "totals": {app: _figures_json(figures) for app, figures in self.totals.items()},
            "phases": [
                {
                    "name": phase.name,
                    "kind": phase.kind,
                    "what": phase.what,
                    "rate": phase.rate,
                    "started_at": round(phase.started_at - zero, 3),
                    "ended_at": round((phase.ended_at or phase.started_at) - zero, 3),
                    "healed_at": None if phase.healed_at is None else round(phase.healed_at - zero, 3),
                    "proofs": phase.proofs,
                    **{
                        app: {
                            **_figures_json(result.all),
                            "reads": _figures_json(result.reads),
                            "recovery": None if result.recovery is None else asdict(result.recovery),
                        }
                        for app, result in results.items()
                    },
                }
                for phase, results in self.phases
            ],
            "writes": {app: _ledger_json(report) for app, report in self.ledgers.items()},
            "errors": {app: dict(counts) for app, counts in self.errors.items()},
            "refusals": dict(self.reasons),
        }


def judge(phases: Sequence[Phase], samples: Sequence[Sample], ledgers: Mapping[App, LedgerReport]) -> Verdict:
    """Draw up the verdict of a finished run."""
    by_app: dict[App, list[Sample]] = {app: [] for app in APPS}
    for sample in samples:
        by_app[sample.app].append(sample)
    results = tuple(
        (phase, {app: _result(phase, index, phases, by_app[app]) for app in APPS})
        for index, phase in enumerate(phases)
    )
    return Verdict(
        phases=results,
        totals={app: figures_of(by_app[app]) for app in APPS},
        ledgers=ledgers,
        errors={app: _tally(sample.error for sample in by_app[app]) for app in APPS},
        reasons=_tally(
            sample.reason or "no reason given" for sample in by_app["guarded"] if sample.outcome == "refused"
        ),
        goals=tuple(_goals(results, ledgers["guarded"])),
    )


def ledger_of(samples: Iterable[Sample], app: App, rows: Iterable[tuple[str, str]]) -> LedgerReport:
    """Compare an application's writes with the surviving database's rows (application, key)."""
    writes = [sample for sample in samples if sample.app == app and sample.kind == "add"]
    operations = [
        Operation(
            number=index,
            id=str(write.number),
            invoked_at=write.sent_at,
            completed_at=write.sent_at + write.seconds,
            outcome=_OUTCOMES.get(write.outcome, Outcome.INFO),
            error=write.error or None,
        )
        for index, write in enumerate(writes)
    ]
    return check_ledger(operations, [key for owner, key in rows if owner == app])


def _result(phase: Phase, index: int, phases: Sequence[Phase], samples: Sequence[Sample]) -> PhaseResult:
    end = phase.ended_at if phase.ended_at is not None else phase.started_at
    inside = [sample for sample in samples if phase.started_at <= sample.sent_at < end]
    recovery = None
    if phase.healed_at is not None:
        later = [other.started_at for other in phases[index + 1 :] if other.kind == "fault"]
        last = phases[-1]
        limit = later[0] if later else (last.ended_at or last.started_at)
        recovery = _recovery(phase.healed_at, limit, samples)
    return PhaseResult(
        all=figures_of(inside),
        reads=figures_of(sample for sample in inside if sample.kind != "add"),
        recovery=recovery,
    )


def _recovery(healed_at: float, limit: float, samples: Sequence[Sample]) -> Recovery:
    after = sorted(
        (sample.sent_at, sample.outcome == "answered")
        for sample in samples
        if healed_at <= sample.sent_at < limit
    )
    start = healed_at
    while start + _NORMAL_WINDOW <= limit:
        window = [good for sent_at, good in after if start <= sent_at < start + _NORMAL_WINDOW]
        if window and sum(window) >= _NORMAL_SHARE * len(window):
            return Recovery(round(start - healed_at, 2), round(limit - healed_at, 2))
        start += _STEP
    return Recovery(None, round(limit - healed_at, 2))


def _goals(
    results: Sequence[tuple[Phase, Mapping[App, PhaseResult]]], ledger: LedgerReport
) -> Iterable[Goal]:
    guarded = [(phase, result["guarded"]) for phase, result in results]
    good = [(result.all.good_share or 0.0, phase.name) for phase, result in guarded]
    yield _at_least(GOOD_SHARE, good, "answered in time or correctly refused, in every phase")
    calm = [(r.all.answered_share or 0.0, p.name) for p, r in guarded if p.kind == "calm"]
    yield _at_least(GOOD_SHARE, calm, "answered in time while nothing is wrong")
    reads = [(r.reads.answered_share or 0.0, p.name) for p, r in guarded if p.name in _PRIMARY_ONLY]
    yield _at_least(READS_SHARE, reads, "of the reads answered in time while only the primary is broken")
    recoveries = [(r.recovery, p.name) for p, r in guarded if r.recovery is not None]
    slow = [(recovery, name) for recovery, name in recoveries if recovery.seconds is None]
    slow += [(recovery, name) for recovery, name in recoveries if (recovery.seconds or 0.0) > BACK_WITHIN]
    yield Goal(
        f"back to normal within {BACK_WITHIN:g} s of the end of every fault",
        not slow,
        "; ".join(f"after {name}: {_seconds(recovery)}" for recovery, name in slow)
        or f"at most {max((recovery.seconds or 0.0 for recovery, _ in recoveries), default=0.0):.2f} s",
    )
    yield Goal(
        "every acknowledged write is there exactly once, and no refused one",
        ledger.valid,
        "; ".join(ledger.violations()) or f"{ledger.acknowledged} acknowledged, all there once",
    )


def _at_least(wanted: float, shares: Sequence[tuple[float, str]], what: str) -> Goal:
    below = [(share, name) for share, name in shares if share < wanted]
    lowest, where = min(shares, default=(0.0, "no phase"))
    figure = "; ".join(f"{name}: {share:.1%}" for share, name in below) or f"at least {lowest:.1%} ({where})"
    return Goal(f"at least {wanted:.0%} {what}", bool(shares) and not below, figure)


def _seconds(recovery: Recovery) -> str:
    return f"not in {recovery.watched:.1f} s" if recovery.seconds is None else f"{recovery.seconds:.2f} s"


def _tally(words: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        if word:
            counts[word] = counts.get(word, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _figures_json(figures: Figures) -> dict[str, Any]:
    return {
        **asdict(figures),
        "answered_share": figures.answered_share,
        "good_share": figures.good_share,
    }


def _ledger_json(report: LedgerReport) -> dict[str, Any]:
    return {
        "valid": report.valid,
        "violations": report.violations(),
        "attempted": report.attempted,
        "acknowledged": report.acknowledged,
        "refused": report.failed,
        "unknown": report.unknown,
        "unknown_present": report.unknown_present,
        "lost": len(report.lost),
        "duplicated": len(report.duplicated),
        "there_though_refused": len(report.resurrected),
        "final": report.final,
    }
