"""That every benchmark runs and compares something. What it finds at this size means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resilientdb.testing import Postgres


def test_each_gives_ratios(tmp_path: Path, resilientdb_postgres: Postgres) -> None:
    assert resilientdb_postgres.running  # only asked for so that a skip is told
    found = tmp_path / "found.json"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--smoke", "--json", str(found)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "## targets" in finished.stdout
    reports = {report["name"]: report for report in json.loads(found.read_text("utf-8"))["reports"]}
    assert set(reports) == {"checkout", "select", "refused", "contention", "overload", "import", "breaker"}
    for name, report in reports.items():
        ratios = [row["ratio"]["median"] for row in report["rows"] if row["ratio"] is not None]
        assert len(ratios) >= 2, name
        assert all(ratio > 0 for ratio in ratios), name
