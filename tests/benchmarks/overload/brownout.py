"""A database ten times slower than usual, under a load that it served with ease, and its recovery.

Nothing fails and nobody sends more than before; what was half the capacity is five times the capacity now. A bound on
the queue that was right for the usual speed lets everybody wait ten times too long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..report import Report, Row, Target
from .clients import CLIENTS, CONNECTIONS, PLAIN
from .harness import DEADLINE, MODES, Course, Load, ms, ratio_to, row

if TYPE_CHECKING:
    from ..systems import Bench
    from .harness import Result

__all__ = ["run"]

_QUERY_TIME = 0.02
_SLOWER = 10
_SHARE = 0.5
_WARM_TIME = 1.0


def run(bench: Bench) -> Report:
    scale, course = bench.scale, Course(bench)
    rows: list[Row] = []
    notes = [
        f"{CONNECTIONS} connections, arrivals always {_SHARE:g}x the usual capacity, deadline {DEADLINE:g} s",
        f"queries of {_QUERY_TIME * 1e3:g} ms; {_SLOWER} times as long for {scale.load_time:g} s",
        "goodput: of what the slowed database can do; all other figures, of those who came meanwhile",
    ]
    for mode in MODES:
        usual = course.capacity(mode, _QUERY_TIME)
        slowed = course.capacity(mode, _QUERY_TIME * _SLOWER)
        notes.append(f"{mode}: capacity {usual:.0f} a second, slowed {slowed:.1f}")
        arrivals = (usual * _SHARE,)
        load = Load(
            mode=mode,
            query_times=(_QUERY_TIME,),
            slow_times=(_QUERY_TIME * _SLOWER,),
            capacities=(slowed,),
            phases=((scale.load_time, arrivals),),
            warm_time=min(_WARM_TIME, scale.load_time),
            tail_time=scale.tail_time,
            light=arrivals,
            quick=5 * _QUERY_TIME,
            seed=f"{mode} brown-out",
        )
        results = course.run_all(CLIENTS, load)
        rows += [_row(mode, name, result, results[PLAIN]) for name, result in results.items()]
    return Report("brownout", "queries ten times slower for a while", rows, ratio_of="goodput", notes=notes)


def _row(case: str, name: str, result: Result, base: Result) -> Row:
    figures: dict[str, Any] = result.figures
    goodput, normal = figures["goodput"] * 100, figures["normal_after"]
    targets = (
        Target(f"{case} {name}: goodput %", goodput, 90, at_least=True),
        Target(f"{case} {name}: normal after s", normal, 0.5),
    )
    return row(
        case,
        name,
        result,
        {
            "goodput %": goodput,
            "p50 ms": ms(figures["answered_p50"]),
            "p99 ms": ms(figures["answered_p99"]),
            "refused p99 ms": ms(figures["refused_p99"]),
            "normal s": "never" if normal is None else normal,
            "in flight": float(figures["most_in_flight"]),
        },
        ratio_to(base, result),
        targets if name.startswith("guarded") else (),
    )
