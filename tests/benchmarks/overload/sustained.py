"""More requests than the connections can serve, for as long as the load lasts."""

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


def run(bench: Bench) -> Report:
    scale, course = bench.scale, Course(bench)
    rows: list[Row] = []
    notes = [
        f"{CONNECTIONS} connections, queries of {_QUERY_TIME * 1e3:g} ms, deadline {DEADLINE:g} s",
        f"{scale.load_time:g} s of load, then half the capacity for at most {scale.tail_time:g} s",
    ]
    for mode in MODES:
        for times in scale.loads:
            capacity = course.capacity(mode, _QUERY_TIME)
            notes.append(f"{mode} {times:g}x: capacity {capacity:.0f} a second")
            load = Load(
                mode=mode,
                query_times=(_QUERY_TIME,),
                capacities=(capacity,),
                phases=((scale.load_time, (capacity * times,)),),
                tail_time=scale.tail_time,
                light=(capacity / 2,),
                quick=5 * _QUERY_TIME,
                seed=f"{mode} {times}",  # the same visitors for every system
            )
            results = course.run_all(CLIENTS, load)
            rows += [
                _row(f"{mode} {times:g}x", name, result, results[PLAIN], wanted=times >= 2)
                for name, result in results.items()
            ]
    return Report("overload", "open-loop arrivals over capacity", rows, ratio_of="goodput", notes=notes)


def _row(case: str, name: str, result: Result, base: Result, *, wanted: bool) -> Row:
    figures: dict[str, Any] = result.figures
    goodput, p99, normal = figures["goodput"] * 100, ms(figures["answered_p99"]), figures["normal_after"]
    targets = (
        Target(f"{case} {name}: goodput %", goodput, 99, at_least=True),
        Target(f"{case} {name}: p99 ms of the answered", p99, 250),
        Target(f"{case} {name}: normal after s", normal, 0.5),
    )
    return row(
        case,
        name,
        result,
        {
            "goodput %": goodput,
            "p50 ms": ms(figures["answered_p50"]),
            "p99 ms": p99,
            "refused p99 ms": ms(figures["refused_p99"]),
            "normal s": "never" if normal is None else normal,
            "in flight": float(figures["most_in_flight"]),
        },
        ratio_to(base, result),
        targets if wanted and name.startswith("guarded") else (),
    )
