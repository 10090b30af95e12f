"""The database is silent: connections are accepted, and nothing is answered any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.testing import faults

from ..measure import spread
from ..report import Report, Row, Target
from .clients import CONNECTIONS, DEADLINE, GUARDED, HURRIED, PLAIN
from .episodes import MODES, RATE, run_all

if TYPE_CHECKING:
    from ..systems import Bench
    from .episodes import Result

__all__ = ["run"]


def run(bench: Bench) -> Report:
    scale = bench.scale
    rows: list[Row] = []
    for mode in MODES:
        results = run_all(bench, mode, faults.hang, outages=1, seconds=scale.hang, watch=scale.watch)
        rows += [_row(mode, name, result, results[PLAIN]) for name, result in results.items()]
    notes = [
        f"{RATE:g} requests a second, {CONNECTIONS} connections, {scale.hang:g} s of silence",
        f"in time: told anything within the deadline of {DEADLINE:g} s and 100 ms",
        "stuck: most requests at once that were not",
        "fast: refused within 50 ms, of those who came after the first who was",
        "latest s: of those who came during the silence",
    ]
    return Report("hang", "the database is silent for a while", rows, ratio_of="latest answer", notes=notes)


def _row(mode: str, name: str, result: Result, base: Result) -> Row:
    (one,) = result.figures
    what = f"{mode} {name}"
    fast = None if one.fast is None else one.fast * 100
    targets = [
        Target(f"{what}: noticed after s", one.noticed, 1.0),
        Target(f"{what}: fast %", fast, 95, at_least=True),
        Target(f"{what}: stuck", float(one.stuck), CONNECTIONS),
        Target(f"{what}: normal after s", one.normal, 0.5),
    ]
    if name == HURRIED:
        targets.append(Target(f"{what}: latest s", one.latest, DEADLINE + 0.1))
    return Row(
        mode,
        name,
        {
            "noticed s": "never" if one.noticed is None else one.noticed,
            "fast %": fast,
            "in time %": None if one.in_time is None else one.in_time * 100,
            "latest s": one.latest,
            "stuck": float(one.stuck),
            "in flight": float(one.in_flight),
            "first ok s": "never" if one.first_ok is None else one.first_ok,
            "normal s": "never" if one.normal is None else one.normal,
            "begun late p99 ms": result.late * 1e3,
            "outcomes": ", ".join(f"{how} {count}" for how, count in one.outcomes.most_common()),
        },
        spread([one.latest / base.figures[0].latest]),
        tuple(targets) if name in {GUARDED, HURRIED} else (),
    )
