"""What a benchmark found: rows to read, ratios to compare, targets to meet."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .measure import Spread

__all__ = ["Report", "Row", "Target", "as_json", "into_document", "machine", "render", "render_targets"]


@dataclass(frozen=True)
class Target:
    """What a figure should be."""

    what: str
    measured: float | None
    limit: float
    at_least: bool = False
    """Whether ``limit`` is the smallest allowed value, instead of the largest."""
    valid: bool = True
    """Whether the measurement is worth anything: one that was disturbed neither meets nor misses a target."""

    @property
    def met(self) -> bool:
        if self.measured is None or not self.valid:
            return False
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def verdict(self) -> str:
        if not self.valid:
            return "invalid"
        return "met" if self.met else "MISSED"

    def __str__(self) -> str:
        measured = "none" if self.measured is None else f"{self.measured:.3g}"
        return f"{measured} (want {'>=' if self.at_least else '<='} {self.limit:g})"


@dataclass(frozen=True)
class Row:
    """One system in one case."""

    case: str
    system: str
    figures: Mapping[str, float | Spread | str | None]
    """By column heading, which names the unit."""
    ratio: Spread | None = None
    """To the first system of the same case; None where there is nothing to compare."""
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Report:
    name: str
    about: str
    rows: Sequence[Row]
    ratio_of: str = "time"
    notes: Sequence[str] = field(default=())

    @property
    def targets(self) -> list[Target]:
        return [target for row in self.rows for target in row.targets]


def render(report: Report) -> str:
    """A table to be read in a terminal; also valid Markdown."""
    return f"## {report.name}: {report.about}\n\n{render_rows(report)}"


def render_rows(report: Report) -> str:
    columns = list(dict.fromkeys(key for row in report.rows for key in row.figures))
    head = ["case", "system", *columns, f"{report.ratio_of} ratio to the first"]
    body = [
        [
            row.case,
            row.system,
            *(_cell(row.figures.get(column)) for column in columns),
            _cell(row.ratio),
        ]
        for row in report.rows
    ]
    lines = _table(head, body)
    if report.notes:
        lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines)


def render_targets(reports: Sequence[Report]) -> str:
    body = [
        [report.name, target.what, str(target), target.verdict]
        for report in reports
        for target in report.targets
    ]
    if not body:
        return "No target concerns what was measured."
    return "\n".join(["## targets", "", *_table(["benchmark", "figure", "measured", ""], body)])


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)]


def _cell(value: float | Spread | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def into_document(path: Path, reports: Sequence[Report], how: str) -> None:
    """Put the tables where the document has ``<!-- figures: NAME -->`` … ``<!-- /figures -->``."""
    text = path.read_text(encoding="utf-8")
    parts = {report.name: _with_targets(report) for report in reports}
    parts["machine"] = f"{how}; " + ", ".join(f"{name} {value}" for name, value in machine().items())
    for name, part in parts.items():
        opening, closing = f"<!-- figures: {name} -->\n", "<!-- /figures -->"
        before, found, rest = text.partition(opening)
        _, closed, after = rest.partition(closing)
        if not (found and closed):
            raise ValueError(f"{path} has no place for the figures of {name}")
        text = f"{before}{opening}\n{part}\n\n{closing}{after}"
    path.write_text(text, encoding="utf-8")


def _with_targets(report: Report) -> str:
    told = [
        f"- {target.verdict.replace('MISSED', '**missed**')}: {target.what} {target}"
        for target in report.targets
    ]
    return "\n".join([render_rows(report), *([""] if told and not report.notes else []), *told])


def as_json(reports: Sequence[Report]) -> str:
    return json.dumps(
        {
            "machine": machine(),
            "reports": [
                {
                    "name": report.name,
                    "about": report.about,
                    "ratio_of": report.ratio_of,
                    "notes": list(report.notes),
                    "rows": [_row(row) for row in report.rows],
                }
                for report in reports
            ],
        },
        indent=1,
    )


def _row(row: Row) -> dict[str, Any]:
    return {
        "case": row.case,
        "system": row.system,
        "figures": {
            name: value._asdict() if isinstance(value, tuple) else value
            for name, value in row.figures.items()
        },
        "ratio": row.ratio._asdict() if row.ratio is not None else None,
        "targets": [
            {
                "what": target.what,
                "measured": target.measured,
                "limit": target.limit,
                "met": target.met,
                "valid": target.valid,
            }
            for target in row.targets
        ],
    }


def machine() -> dict[str, str]:
    """What the figures depend on, without a word of where they were taken."""
    found = {
        "shared cores": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for package in ("sqlalchemy", "psycopg", "asyncpg", "psycopg_pool", "pybreaker"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
