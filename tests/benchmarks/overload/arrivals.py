"""The visitors: writes the scheduled time of each request, when it is due, to standard output.

A process of its own, so that a service at its limits cannot slow its own load down. Imports nothing but the
standard library. Arguments, as JSON: ``phases``, each its length in seconds and the rate of each kind of request,
and ``seed``. The output is ``ARRIVAL`` records: first the moment the first phase begins, then each arrival and
its kind. At its end, or when nobody reads any more, it tells on standard error how late its own writing was.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ARRIVAL", "main", "schedule"]

ARRIVAL = struct.Struct("=dB")
"""When, on the monotonic clock, and which kind of request."""
_HEAD_START = 0.1
_STDOUT = 1


def main() -> None:
    options = json.loads(sys.argv[1])
    begin = time.monotonic() + _HEAD_START
    due = [(begin + at, kind) for at, kind in schedule(options["phases"], options["seed"])]
    delays: list[float] = []
    try:
        os.write(_STDOUT, ARRIVAL.pack(begin, 0))
        done = 0
        while done < len(due):
            now = time.monotonic()
            first = due[done][0]
            if first > now:
                time.sleep(first - now)
                continue
            batch = bytearray()
            while done < len(due) and due[done][0] <= now:
                batch += ARRIVAL.pack(*due[done])
                done += 1
            _write(bytes(batch))
            delays.append(time.monotonic() - first)
    except BrokenPipeError:
        pass  # the service has seen enough
    delays.sort()
    late = delays[int(0.99 * (len(delays) - 1))] if delays else 0.0
    print(json.dumps({"late_p99": late}), file=sys.stderr)


def schedule(phases: Sequence[tuple[float, Sequence[float]]], seed: str) -> list[tuple[float, int]]:
    """A Poisson stream of each kind of request: (seconds since the first phase began, kind), in order."""
    rng = random.Random(seed)
    arrivals: list[tuple[float, int]] = []
    begin = 0.0
    for seconds, rates in phases:
        for kind, rate in enumerate(rates):
            at = begin + rng.expovariate(rate)
            while at < begin + seconds:
                arrivals.append((at, kind))
                at += rng.expovariate(rate)
        begin += seconds
    return sorted(arrivals)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]


if __name__ == "__main__":
    main()
