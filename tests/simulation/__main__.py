"""``python -m tests.simulation``: run them, print what came of it, and put it into the documentation if asked."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.simulation import herd
from tests.simulation.plots import Line, chart
from tests.simulation.systems import SYSTEMS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.simulation.herd import Outcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "herd.md"
IMAGES = DOCUMENT.parent / "images"
START, END = "<!-- generated:herd -->", "<!-- /generated:herd -->"
SIZES = (10, 100, 1_000)
MAIN = ("ours", "pybreaker", "plain")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="system", help=f"of {', '.join(SYSTEMS)}; all if none")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--docs", action="store_true", help="write the table and the drawings of docs/herd.md"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in SYSTEMS]:
        parser.error(f"no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")

    outcomes: dict[tuple[str, int], Outcome] = {}
    for name in options.names or SYSTEMS:
        for size in options.sizes:
            began = time.monotonic()
            outcomes[name, size] = outcome = herd.run(SYSTEMS[name], size, seed=options.seed)
            said = in_words(outcome)
            print(f"{name:22}{size:7}  {said:50} ({time.monotonic() - began:.1f} s)", flush=True)
    if options.docs:
        write(outcomes, options.sizes)
    return 0


def in_words(outcome: Outcome) -> str:
    if outcome.recovery is None:
        late = outcome.shares[-herd.STEADY :]
        return (
            f"not within {len(outcome.shares) - herd.STARTS:.0f} s ({sum(late) / len(late):.0%} at the end)"
        )
    relapses = f", {outcome.relapses} relapses" if outcome.relapses else ""
    return f"{outcome.recovery:.0f} s{relapses}"


def table(outcomes: dict[tuple[str, int], Outcome], sizes: Sequence[int]) -> str:
    names = list(dict.fromkeys(name for name, _ in outcomes))
    rows = [
        ["", *(f"{size:,} processes" for size in sizes), "unanswered", "busiest"],
        ["---"] * (len(sizes) + 3),
    ]
    for name in names:
        largest = outcomes[name, max(sizes)]
        rows.append(
            [
                SYSTEMS[name].label,
                *(in_words(outcomes[name, size]) for size in sizes),
                f"{largest.lost:.1f} s' worth",
                f"{max(largest.active[int(herd.STARTS) :]) / largest.knee:.1f} knees",
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def drawings(outcomes: dict[tuple[str, int], Outcome], size: int) -> dict[str, str]:
    """File name → SVG."""
    marks = [(herd.DIES, "dies"), (herd.STARTS, "is back")]
    parts = [name for name, _ in outcomes if name not in {"pybreaker", "plain"}]
    parts = list(dict.fromkeys(parts))

    def answered(names: Sequence[str]) -> list[Line]:
        return [
            Line(SYSTEMS[name].label, [100 * share for share in outcomes[name, size].shares])
            for name in names
        ]

    def busy(names: Sequence[str]) -> list[Line]:
        found = [outcomes[name, size] for name in names]
        return [
            Line(SYSTEMS[outcome.system].label, [active / outcome.knee for active in outcome.active])
            for outcome in found
        ]

    return {
        "herd-answered.svg": chart(
            f"Answered in time, {size:,} processes", " %", answered(MAIN), top=100, marks=marks
        ),
        "herd-busy.svg": chart(
            f"Statements and connects at once, in knees, {size:,} processes",
            "",
            busy(MAIN),
            top=8,
            marks=marks,
        ),
        "herd-parts.svg": chart(
            f"Answered in time without a part of it, {size:,} processes",
            " %",
            answered(parts),
            top=100,
            marks=marks,
        ),
    }


def write(outcomes: dict[tuple[str, int], Outcome], sizes: Sequence[int]) -> None:
    IMAGES.mkdir(exist_ok=True)
    drawn = 1_000 if 1_000 in sizes else max(sizes)
    for name, drawing in drawings(outcomes, drawn).items():
        (IMAGES / name).write_text(drawing, encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{START} … {END} is missing in {DOCUMENT.name}")
    DOCUMENT.write_text(f"{before}{START}\n\n{table(outcomes, sizes)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
