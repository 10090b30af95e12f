"""Runs one system under one load, in processes of their own, and makes its row of a table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure import spread
from ..report import Row, Target
from .clients import PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..measure import Spread
    from ..systems import Bench

__all__ = ["DEADLINE", "MODES", "Course", "Load", "Result", "ms", "ratio_to", "row"]

MODES = ("threads", "asyncio")
DEADLINE = 1.0
"""Seconds after which a visitor has gone, whoever is told of it."""
_ROOT = Path(__file__).parents[3]
_PATIENCE = 60.0
"""Seconds a process may take beyond what it was told to; then the run has failed."""
_LATE = 0.005
"""Seconds: arrivals written later than this, at the 99th percentile, are another load than the one meant. A process
that only sleeps and writes is so late only where the machine has too much else to do."""
_HELD_UP = 0.15
"""Share of the time that a measurement of the capacity may stand ready without a processor."""
_TRIES = 3
"""Runs of a system that were disturbed, until it is left at that."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What arrives and what it asks for, the same for every system. Seconds; tuples are by kind of request."""

    mode: str
    query_times: tuple[float, ...]
    slow_times: tuple[float, ...] = ()
    """Of queries that begin during the load; empty = as ever."""
    capacities: tuple[float, ...]
    """Requests a second that the connections can serve during the load, if all were of that kind."""
    phases: tuple[tuple[float, tuple[float, ...]], ...]
    """The load: how long, and the rates of arrivals."""
    warm_time: float = 0.0
    """How long ``light`` arrives before."""
    tail_time: float
    """How long ``light`` arrives afterwards, at most."""
    light: tuple[float, ...]
    quick: float | None
    """Within which nearly everybody is answered once all is well; None: it is not asked when that is."""
    seed: str

    @property
    def load_time(self) -> float:
        return sum(seconds for seconds, _ in self.phases)


@dataclass(frozen=True)
class Result:
    """``figures``: as ``verdict`` has them, with ``normal_after`` and ``held_up``: the share of the time of the load
    that threads of the service stood ready without a processor, all added up. ``late``: seconds, how late arrivals
    were written, 99 %.

    ``held_up`` makes nothing void: a system that wakes many threads at once holds itself up.
    """

    figures: dict[str, Any]
    late: float
    judged: bool = True

    @property
    def valid(self) -> bool:
        return not self.judged or self.late <= _LATE


class Course:
    """Where the systems run: one server for all, and what it can do for each."""

    def __init__(self, bench: Bench) -> None:
        self.scale = bench.scale
        self._url = bench.server.url("")
        self._best: dict[tuple[str, float], float] = {}

    def capacity(self, mode: str, query_time: float) -> float:
        """Requests a second that plain SQLAlchemy serves with one caller a connection, measured now.

        The best seen so far: other work on the machine can only hide capacity.
        """
        seconds = min(3.0, self.scale.load_time)
        options = {
            "client": PLAIN,
            "mode": mode,
            "url": self._url,
            "query_times": [query_time],
            "capacity_time": seconds,
        }
        for _ in range(_TRIES):
            with _start("service", options, stdout=subprocess.PIPE) as service:
                said, _ = service.communicate(timeout=seconds + _PATIENCE)
            measured = json.loads(said.splitlines()[-1])
            best = max(self._best.get((mode, query_time), 0.0), float(measured["capacity"]))
            self._best[mode, query_time] = best
            if measured["held_up"] <= _HELD_UP or not self.scale.judged:
                break
        return best

    def run_all(self, systems: Sequence[str], load: Load) -> dict[str, Result]:
        """As many of the systems as the scale allows."""
        return {name: self._run(name, load) for name in systems[: self.scale.contestants]}

    def _run(self, name: str, load: Load) -> Result:
        """The least disturbed run of the system."""
        results: list[Result] = []
        while len(results) < _TRIES and not any(result.valid for result in results):
            results.append(self._run_once(name, load))
        return min(results, key=lambda result: result.late)

    def _run_once(self, name: str, load: Load) -> Result:
        service_options = {
            **asdict(load),
            "client": name,
            "url": self._url,
            "deadline": DEADLINE,
            "load_time": load.load_time,
        }
        phases = [(load.warm_time, load.light), *load.phases, (load.tail_time + 1, load.light)]
        with _start("service", service_options, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as service:
            assert service.stdin is not None
            assert service.stdout is not None
            if json.loads(service.stdout.readline() or "null") != "ready":
                raise AssertionError(f"{name} did not start ({load.mode})")
            arrival_options = {"phases": phases, "seed": load.seed}
            with _start(
                "arrivals", arrival_options, stdout=service.stdin, stderr=subprocess.PIPE
            ) as arrivals:
                service.stdin.close()
                service.stdin = None
                whole = sum(seconds for seconds, _ in phases)
                said, _ = service.communicate(timeout=whole + _PATIENCE)
                _, told = arrivals.communicate(timeout=_PATIENCE)
        late = json.loads(told.splitlines()[-1])["late_p99"]
        return Result(json.loads(said.splitlines()[-1]), late, self.scale.judged)


def row(
    case: str,
    name: str,
    result: Result,
    figures: Mapping[str, float | Spread | str | None],
    ratio: Spread | None,
    targets: Sequence[Target] = (),
) -> Row:
    """The row of one system, with what every table tells at its end; void if the run was disturbed."""
    disturbed: dict[str, float | str | None] = {
        "arrivals late p99 ms": ms(result.late),
        "held up %": result.figures["held_up"] * 100,
    }
    if not result.valid:
        void: dict[str, float | str | None] = dict.fromkeys(figures)
        targets = tuple(replace(target, measured=None, valid=False) for target in targets)
        return Row(
            case, name, {**void, **disturbed, "outcomes": "INVALID: arrivals were late"}, None, targets
        )
    outcomes = ", ".join(f"{kind} {count}" for kind, count in result.figures["outcomes"].items())
    return Row(case, name, {**figures, **disturbed, "outcomes": outcomes}, ratio, tuple(targets))


def ratio_to(base: Result, result: Result) -> Spread | None:
    """Of the goodput; None where one of the two is worth nothing."""
    against = base.figures["goodput"]
    return spread([result.figures["goodput"] / against]) if against and base.valid and result.valid else None


def ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


class _Process(subprocess.Popen[str]):
    """One that does not outlive its block."""

    def __exit__(self, *raised: object) -> None:
        self.kill()
        super().__exit__(*raised)  # type: ignore[arg-type]


def _start(module: str, options: dict[str, Any], **streams: Any) -> _Process:
    command = [sys.executable, "-m", f"{__package__}.{module}", json.dumps(options)]
    return _Process(command, cwd=_ROOT, text=True, encoding="utf-8", **streams)
