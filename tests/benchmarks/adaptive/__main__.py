"""``python -m tests.benchmarks.adaptive``: run the simulation and the real thing, and print both tables."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from . import live, simulation

if TYPE_CHECKING:
    from collections.abc import Callable

_PARTS: dict[str, Callable[[], tuple[list[str], list[list[str]]]]] = {
    "simulation": simulation.run,
    "live": live.run,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.adaptive", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(_PARTS)}; both if none")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in _PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(_PARTS)}")
    for part in options.parts or _PARTS:
        begun = time.monotonic()
        head, rows = _PARTS[part]()
        print(f"## {part}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in rows:
            print(f"| {' | '.join([*row, *[''] * (len(head) - len(row))])} |")
        print(f"\n({time.monotonic() - begun:.0f} s)\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
