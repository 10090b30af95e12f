"""``python -m tests.benchmarks``: run them, by turns, and say what was found."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import breaker, checkout, classify, contention, import_time, line, reading, refused, select_one
from .measure import FULL, QUICK, SMOKE
from .outage import hang, heal
from .overload import brownout, mixed, sustained
from .report import as_json, into_document, machine, render, render_targets
from .systems import Bench

if TYPE_CHECKING:
    from collections.abc import Callable

    from .report import Report

BENCHMARKS: dict[str, Callable[[Bench], Report]] = {
    "checkout": checkout.run,
    "select": select_one.run,
    "reading": reading.run,
    "refused": refused.run,
    "contention": contention.run,
    "breaker": breaker.run,
    "classify": classify.run,
    "hang": hang.run,
    "heal": heal.run,
    "line": line.run,
    "import": import_time.run,
    "overload": sustained.run,
    "brownout": brownout.run,
    "mixed": mixed.run,
}
_DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 even if a target is missed: a figure is for reading, not for gating."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything there")
    parser.add_argument("--docs", action="store_true", help="also put the tables into docs/benchmarks.md")
    parser.add_argument(
        "--quick", action="store_const", const=QUICK, dest="scale", help="shorter and noisier"
    )
    parser.add_argument("--smoke", action="store_const", const=SMOKE, dest="scale", help=argparse.SUPPRESS)
    parser.set_defaults(scale=FULL)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    reports = []
    with Bench(options.scale) as bench:
        for name in options.names or BENCHMARKS:
            begun = time.monotonic()
            report = BENCHMARKS[name](bench)
            reports.append(report)
            print(f"\n{render(report)}\n\n({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"\n{render_targets(reports)}")
    if options.json is not None:
        options.json.write_text(as_json(reports), encoding="utf-8")
    if options.docs:
        how = {FULL: "a full run", QUICK: "a --quick run"}.get(options.scale, "a smoke run: worthless")
        into_document(_DOCUMENT, reports, how)
    return 0


if __name__ == "__main__":
    sys.exit(main())
