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
SIZES = (10, 100, 1_000)
MAIN = ("ours", "pybreaker", "plain")
SERVERS: dict[str, dict[str, float | bool]] = {
    "as above": {},
    "that ends what was given up": {"heeds": True},
    "that thrashes half as much": {"thrash": 1.0},
    "that thrashes half as much, and ends what was given up": {"thrash": 1.0, "heeds": True},
    "that hardly thrashes": {"thrash": 0.25},
    "whose cache is warm": {"cold": 1.0},
    "whose cache is twice as cold": {"cold": 8.0},
}
"""Other databases, to see how much depends on this one."""
AMONG = 100
"""Processes, of which these are tried."""


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
        write(outcomes, options.sizes, options.seed)
    return 0


def in_words(outcome: Outcome) -> str:
    if outcome.recovery is None:
        late = outcome.shares[-herd.STEADY :]
        return (
            f"not within {len(outcome.shares) - herd.STARTS:.0f} s ({sum(late) / len(late):.0%} at the end)"
        )
    relapses = f", {outcome.relapses} relapse{'s' * (outcome.relapses > 1)}" if outcome.relapses else ""
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
    others = {
        "pybreaker",
        "plain",
        "no budget",
    }  # the last is the same as with one, as long as there is a breaker
    parts = [name for name in dict.fromkeys(name for name, _ in outcomes) if name not in others]

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


def servers(seed: int) -> str:
    """The same on other databases."""
    names = (*MAIN, "no slow start")
    rows = [["a database", *(SYSTEMS[name].label for name in names)], ["---"] * (len(names) + 1)]
    for label, changes in SERVERS.items():
        server = herd.server_for(AMONG, **changes)
        found = [herd.run(SYSTEMS[name], AMONG, seed=seed, server=server) for name in names]
        rows.append([label, *map(in_words, found)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(text: str, name: str, part: str) -> str:
    start, end = f"<!-- generated:{name} -->", f"<!-- /generated:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{start} … {end} is missing in {DOCUMENT.name}")
    return f"{before}{start}\n\n{part}\n{end}{after}"


def write(outcomes: dict[tuple[str, int], Outcome], sizes: Sequence[int], seed: int) -> None:
    IMAGES.mkdir(exist_ok=True)
    drawn = 1_000 if 1_000 in sizes else max(sizes)
    for name, drawing in drawings(outcomes, drawn).items():
        (IMAGES / name).write_text(drawing, encoding="utf-8")
    text = filled(DOCUMENT.read_text(encoding="utf-8"), "herd", table(outcomes, sizes))
    DOCUMENT.write_text(filled(text, "servers", servers(seed)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
