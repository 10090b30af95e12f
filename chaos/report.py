"""Both results of every scenario: ``report/chaos.json`` for programs, a table at the end of the run for people."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from chaos.workloads import Calls

__all__ = ["Report", "Result", "latencies"]

Number = float | int | str | bool | None


@dataclass(kw_only=True)
class Result:
    """What one variant did in one scenario."""

    scenario: str
    driver: str
    variant: str
    says: str = ""
    """In words, for the table."""
    held: bool = False
    """Whether the scenario passed: for a bare run, whether the fault was felt."""
    numbers: dict[str, Number] = field(default_factory=dict)


class Report:
    """All results of a run."""

    def __init__(self, profile: str, seed: int) -> None:
        self.profile = profile
        self.seed = seed
        self.results: list[Result] = []

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "profile": self.profile,
            "seed": self.seed,
            "python": platform.python_version(),
            "results": [asdict(result) for result in self.results],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def lines(self) -> Iterable[str]:
        """The table: two lines a scenario and driver."""
        last = None
        for result in sorted(self.results, key=lambda result: result.scenario):
            if result.scenario != last:
                yield result.scenario
                last = result.scenario
            mark = "" if result.held else "  ← FAILED"
            yield f"  {result.driver:<14}{result.variant:<9}{result.says}{mark}"


def latencies(calls: Calls) -> dict[str, Number]:
    """The usual numbers of some calls, seconds."""
    return {
        "calls": len(calls),
        "ok": len(calls.ok),
        "ok_share": round(calls.ok_share, 4),
        "p50": round(calls.quantile(0.5), 4),
        "p99": round(calls.quantile(0.99), 4),
        "slowest": round(calls.slowest, 4),
    }
