"""Takes one system through its outages, in a process of its own, and judges each of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .clients import DEADLINE, SYSTEMS
from .verdict import Figures, Request, figures

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from resilientdb.testing import Proxy

    from ..systems import Bench

__all__ = ["MODES", "RATE", "Result", "run_all"]

MODES = ("threads", "asyncio")
RATE = 50.0
"""Requests a second; the pool can serve ten times as many."""
_WARM = 1.0
_GRACE = 1.5
_PATIENCE = 60.0
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Result:
    """``figures``: one for each outage. ``late``: seconds, how late requests were begun, 99 %."""

    figures: list[Figures]
    late: float

    def worst(self, name: str) -> float | None:
        """The largest of a figure; None if it was None in one of the outages."""
        values = [getattr(one, name) for one in self.figures]
        return None if None in values else max(values)

    def least(self, name: str) -> float | None:
        """The smallest of a figure; None if it was None in one of the outages."""
        values = [getattr(one, name) for one in self.figures]
        return None if None in values else min(values)


def run_all(
    bench: Bench,
    mode: str,
    fault: Callable[[Proxy], AbstractContextManager[object]],
    *,
    outages: int,
    seconds: float,
    watch: float,
) -> dict[str, Result]:
    """By system. ``outages`` of so many ``seconds``, each followed by ``watch`` seconds of health."""
    results: dict[str, Result] = {}
    for name in SYSTEMS[: bench.scale.contestants]:
        with bench.toxiproxy.proxy(bench.server.address) as proxy:
            warm = min(_WARM, seconds)
            whole = warm + outages * (seconds + watch) + 0.5
            options = {
                "client": name,
                "mode": mode,
                "url": bench.server.url("", port=proxy.listen_port),
                "rate": RATE,
                "seconds": whole,
                "grace": min(_GRACE, watch),
            }
            moments: list[tuple[float, float, float]] = []
            with _start(options) as service:
                assert service.stdout is not None
                if json.loads(service.stdout.readline() or "null") != "ready":
                    raise AssertionError(f"{name} did not start ({mode})")
                time.sleep(warm)
                for _ in range(outages):
                    with fault(proxy):
                        broken = time.monotonic()
                        time.sleep(seconds)
                        ended = time.monotonic()
                    moments.append((broken, ended, time.monotonic()))
                    time.sleep(watch)
                said, _ = service.communicate(timeout=whole + _PATIENCE)
        results[name] = _judged(json.loads(said.splitlines()[-1]), moments, watch)
    return results


def _judged(said: dict[str, Any], moments: list[tuple[float, float, float]], watch: float) -> Result:
    requests = [
        Request(due, float("inf") if ended is None else ended, how) for due, ended, how in said["requests"]
    ]
    return Result(
        [
            figures(requests, broken, ended, healed, healed + watch, deadline=DEADLINE)
            for broken, ended, healed in moments
        ],
        said["late_p99"],
    )


class _Process(subprocess.Popen[str]):
    """One that does not outlive its block."""

    def __exit__(self, *raised: object) -> None:
        self.kill()
        super().__exit__(*raised)  # type: ignore[arg-type]


def _start(options: dict[str, Any]) -> _Process:
    command = [sys.executable, "-m", f"{__package__}.service", json.dumps(options)]
    return _Process(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
