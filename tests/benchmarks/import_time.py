"""What ``import resilientdb`` adds to ``import sqlalchemy``, in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

from .measure import in_turns, spread
from .report import Report, Row, Target

if TYPE_CHECKING:
    from .systems import Bench

__all__ = ["run"]

_WANTED = 50.0
"""Milliseconds over SQLAlchemy's own."""
_SHOWN = 12


def run(bench: Bench) -> Report:
    _import_seconds("sqlalchemy")  # compiles what was never imported
    _import_seconds("resilientdb")
    seconds = in_turns(
        {
            "import sqlalchemy": lambda: _import_seconds("sqlalchemy"),
            "import resilientdb": lambda: _import_seconds("resilientdb"),
            "resilientdb after sqlalchemy": lambda: _import_seconds("resilientdb", after="sqlalchemy"),
        },
        bench.scale.imports,
    )
    base = seconds["import sqlalchemy"]
    added = spread(seconds["resilientdb after sqlalchemy"]).median * 1e3
    rows = [
        Row(
            "whole",
            name,
            {"ms": spread(taken).median * 1e3},
            spread([mine / plain for mine, plain in zip(taken, base, strict=True)]),
            (Target("added ms", added, _WANTED),) if name == "resilientdb after sqlalchemy" else (),
        )
        for name, taken in seconds.items()
    ]
    packages, modules = _costs(max(1, bench.scale.imports // 2))
    rows += [Row("package", name, {"ms": ms}) for name, ms in packages.most_common(_SHOWN)]
    rows += [Row("module", name, {"ms": ms}) for name, ms in modules.most_common(_SHOWN)]
    return Report(
        "import",
        "import time over SQLAlchemy's",
        rows,
        notes=[
            "packages and modules: own time under -X importtime, which slows it; without what sqlalchemy imports",
        ],
    )


def _import_seconds(name: str, *, after: str = "time") -> float:
    program = f"import {after}, time; begun = time.perf_counter(); import {name}; print(time.perf_counter() - begun)"
    return float(_python("-c", program).stdout)


def _costs(times: int) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds of their own by package and by module, median of several interpreters."""
    found: dict[str, list[float]] = {}
    for _ in range(times):
        for name, ms in _own_times().items():
            found.setdefault(name, []).append(ms)
    modules = Counter({name: spread(ms).median for name, ms in found.items()})
    packages: Counter[str] = Counter()
    for name, ms in modules.items():
        packages[name.partition(".")[0]] += ms
    return packages, modules


def _own_times() -> dict[str, float]:
    # Lines read "import time: self [us] | cumulative | imported package", innermost first.
    lines = _python("-X", "importtime", "-c", "import sqlalchemy; import resilientdb").stderr.splitlines()
    times: dict[str, float] = {}
    for line in lines:
        fields = line.removeprefix("import time:").split("|")
        if len(fields) != 3 or not fields[0].strip().isdigit():
            continue
        name = fields[2].strip()
        times[name] = int(fields[0]) / 1e3
        if fields[2] == " sqlalchemy":
            times.clear()  # that is not on our bill
    return times


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60, encoding="utf-8"
    )
