"""Runs every system at every load, and makes the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure import spread
from ..report import Report, Row, Target
from .clients import CLIENTS, CONNECTIONS, PLAIN

if TYPE_CHECKING:
    from ..systems import Bench

__all__ = ["run"]

_ROOT = Path(__file__).parents[3]
_QUERY_TIME = 0.02
_DEADLINE = 1.0
_QUICK = 5 * _QUERY_TIME
_PATIENCE = 60.0
"""Seconds a process may take beyond what it was told to; then the run has failed."""
_LATE = 0.02
"""Seconds: arrivals later than this, at the 99th percentile, spoil a run."""


def run(bench: Bench) -> Report:
    rows: list[Row] = []
    notes = [
        f"{CONNECTIONS} connections, queries of {_QUERY_TIME * 1e3:g} ms, deadline {_DEADLINE:g} s",
        f"{bench.scale.load_time:g} s of load, then half the capacity for at most {bench.scale.tail_time:g} s",
    ]
    url = bench.server.url("")
    for mode in ("threads", "asyncio"):
        capacity = 0.0
        for load in bench.scale.loads:
            # The best seen so far: other work on the machine can only hide capacity.
            capacity = max(capacity, _capacity(mode, url, min(3.0, bench.scale.load_time)))
            notes.append(f"{mode} {load:g}x: capacity {capacity:.0f} a second")
            results = {
                name: _one(mode, name, url, capacity, load, bench, notes)
                for name in CLIENTS[: bench.scale.contestants]
            }
            base = results[PLAIN]["goodput"]
            rows += [
                _row(f"{mode} {load:g}x", name, figures, base, strict=load >= 10)
                for name, figures in results.items()
            ]
    return Report("overload", "open-loop arrivals over capacity", rows, ratio_of="goodput", notes=notes)


def _row(case: str, name: str, figures: dict[str, Any], base: float, *, strict: bool) -> Row:
    goodput = figures["goodput"] * 100
    targets = (
        (
            Target(f"{case} {name}: goodput %", goodput, 95, at_least=True),
            Target(f"{case} {name}: normal after s", figures["normal_after"], 0.5),
        )
        if strict and name.startswith("guarded")
        else ()
    )
    normal = figures["normal_after"]
    return Row(
        case,
        name,
        {
            "goodput %": goodput,
            "p50 ms": _ms(figures["answered_p50"]),
            "p99 ms": _ms(figures["answered_p99"]),
            "refused p99 ms": _ms(figures["refused_p99"]),
            "normal s": "never" if normal is None else normal,
            "in flight": float(figures["most_in_flight"]),
            "outcomes": ", ".join(f"{kind} {count}" for kind, count in figures["outcomes"].items()),
        },
        spread([figures["goodput"] / base]) if base else None,
        targets,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _capacity(mode: str, url: str, seconds: float) -> float:
    """Requests a second that plain SQLAlchemy serves with one caller a connection."""
    options = {"client": PLAIN, "mode": mode, "url": url, "query_time": _QUERY_TIME, "capacity_time": seconds}
    with _start("service", options, stdout=subprocess.PIPE) as service:
        said, _ = service.communicate(timeout=seconds + _PATIENCE)
    return float(json.loads(said.splitlines()[-1])["capacity"])


def _one(
    mode: str, name: str, url: str, capacity: float, load: float, bench: Bench, notes: list[str]
) -> dict[str, Any]:
    """One system under one load."""
    scale = bench.scale
    service_options = {
        "client": name,
        "mode": mode,
        "url": url,
        "query_time": _QUERY_TIME,
        "capacity": capacity,
        "deadline": _DEADLINE,
        "quick": _QUICK,
        "load_time": scale.load_time,
        "tail_time": scale.tail_time,
    }
    arrival_options = {
        "rate": capacity * load,
        "load_time": scale.load_time,
        "tail_rate": capacity / 2,
        "tail_time": scale.tail_time + 1,
        "seed": f"{mode} {load}",  # the same visitors for every system
    }
    with _start("service", service_options, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        if json.loads(service.stdout.readline() or "null") != "ready":
            raise AssertionError(f"{name} did not start ({mode})")
        with _start("arrivals", arrival_options, stdout=service.stdin, stderr=subprocess.PIPE) as arrivals:
            service.stdin.close()
            service.stdin = None
            said, _ = service.communicate(timeout=scale.load_time + scale.tail_time + _PATIENCE)
            _, told = arrivals.communicate(timeout=_PATIENCE)
    late = json.loads(told.splitlines()[-1])["late_p99"]
    if late > _LATE:
        notes.append(
            f"{mode} {load:g}x {name}: arrivals were late (p99 {late * 1e3:.0f} ms); distrust this row"
        )
    figures: dict[str, Any] = json.loads(said.splitlines()[-1])
    return figures


class _Process(subprocess.Popen[str]):
    """One that does not outlive its block."""

    def __exit__(self, *raised: object) -> None:
        self.kill()
        super().__exit__(*raised)  # type: ignore[arg-type]


def _start(module: str, options: dict[str, Any], **streams: Any) -> _Process:
    command = [sys.executable, "-m", f"{__package__}.{module}", json.dumps(options)]
    return _Process(command, cwd=_ROOT, text=True, encoding="utf-8", **streams)
