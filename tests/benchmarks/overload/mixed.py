"""Quick queries and long ones through one pool, in bursts: who is served when not everybody can be.

Each kind asks for as much of the connections' time as the other, so forty quick ones come for every long one. Over
the whole the connections could just serve all of it; a pool that lets a burst stand in line is late until the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..report import Report, Row
from .clients import CLIENTS, CONNECTIONS, PLAIN, SPARING
from .harness import DEADLINE, MODES, Course, Load, ms, ratio_to, row

if TYPE_CHECKING:
    from ..systems import Bench
    from .harness import Result

__all__ = ["run"]

_KINDS = {"quick": 0.005, "long": 0.2}
_CALM, _BURST = 0.5, 3.0
"""Arrivals, as multiples of the capacity."""
_CALM_TIME, _BURST_TIME = 2.4, 0.6
_SYSTEMS = (*CLIENTS[:3], SPARING, *CLIENTS[3:])


def run(bench: Bench) -> Report:
    scale, course = bench.scale, Course(bench)
    rows: list[Row] = []
    told = " and ".join(f"{name} of {seconds * 1e3:g} ms" for name, seconds in _KINDS.items())
    notes = [
        f"{CONNECTIONS} connections, queries {told}, deadline {DEADLINE:g} s",
        f"{scale.load_time:g} s: by turns {_CALM_TIME:g} s of {_CALM:g}x capacity, {_BURST_TIME:g} s of {_BURST:g}x",
        "in time %: answered within the deadline, of those who came",
    ]
    for mode in MODES:
        capacities = tuple(course.capacity(mode, seconds) for seconds in _KINDS.values())
        notes.append(
            f"{mode}: capacity " + " or ".join(f"{capacity:.0f} a second" for capacity in capacities)
        )
        calm, burst = (
            tuple(times / len(_KINDS) * capacity for capacity in capacities) for times in (_CALM, _BURST)
        )
        periods = max(1, round(scale.load_time / (_CALM_TIME + _BURST_TIME)))
        stretch = min(1.0, scale.load_time / (_CALM_TIME + _BURST_TIME))
        load = Load(
            mode=mode,
            query_times=tuple(_KINDS.values()),
            capacities=capacities,
            phases=(
                (_CALM_TIME / 2 * stretch, calm),
                (_BURST_TIME * stretch, burst),
                (_CALM_TIME / 2 * stretch, calm),
            )
            * periods,
            tail_time=DEADLINE,
            light=calm,
            quick=None,
            seed=f"{mode} mixed",
        )
        results = course.run_all(_SYSTEMS, load)
        rows += [_row(mode, name, result, results[PLAIN]) for name, result in results.items()]
    return Report("mixed", "quick and long queries, in bursts", rows, ratio_of="goodput", notes=notes)


def _row(case: str, name: str, result: Result, base: Result) -> Row:
    by_kind = dict(zip(_KINDS, result.figures["kinds"], strict=True))
    cells: dict[str, Any] = {"goodput %": result.figures["goodput"] * 100}
    for kind, figures in by_kind.items():
        cells[f"{kind} in time %"] = None if figures["in_time"] is None else figures["in_time"] * 100
        cells[f"{kind} p99 ms"] = ms(figures["answered_p99"])
    cells["in flight"] = float(result.figures["most_in_flight"])
    return row(case, name, result, cells, ratio_to(base, result))
