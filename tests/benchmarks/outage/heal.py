"""The database was gone, and is back: how soon somebody is served again, and everybody."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from resilientdb.testing import faults

from ..measure import spread
from ..report import Report, Row, Target
from .clients import CONNECTIONS, GUARDED, HURRIED, PLAIN
from .episodes import MODES, RATE, run_all

if TYPE_CHECKING:
    from ..systems import Bench
    from .episodes import Result

__all__ = ["run"]


def run(bench: Bench) -> Report:
    scale = bench.scale
    rows: list[Row] = []
    for mode in MODES:
        results = run_all(
            bench, mode, faults.down, outages=scale.outages, seconds=scale.outage, watch=scale.watch
        )
        rows += [_row(mode, name, result, results[PLAIN]) for name, result in results.items()]
    notes = [
        f"{RATE:g} requests a second, {CONNECTIONS} connections",
        f"{scale.outages} outages of {scale.outage:g} s: connections are cut, and new ones refused",
        "the latest of the outages; normal: 95 % of those who come within a second are served within 100 ms",
        f"served: of those who came in the {scale.watch:g} s after each",
        "pybreaker: reset_timeout 5 s",
    ]
    return Report("heal", "the database is back after an outage", rows, ratio_of="served", notes=notes)


def _row(mode: str, name: str, result: Result, base: Result) -> Row:
    first, normal = result.worst("first_ok"), result.worst("normal")
    served, against = _served(result), _served(base)
    targets = (
        Target(f"{mode} {name}: first ok s", first, 0.25),
        Target(f"{mode} {name}: normal after s", normal, 0.5),
    )
    return Row(
        mode,
        name,
        {
            "first ok s": "never" if first is None else first,
            "normal s": "never" if normal is None else normal,
            "served %": served * 100,
            "begun late p99 ms": result.late * 1e3,
        },
        spread([served / against]) if against else None,
        targets if name in {GUARDED, HURRIED} else (),
    )


def _served(result: Result) -> float:
    return statistics.fmean(one.served for one in result.figures)
