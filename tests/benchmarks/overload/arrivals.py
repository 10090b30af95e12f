"""The visitors: writes the scheduled time of each request, when it is due, to standard output.

A process of its own, so that a service at its limits cannot slow its own load down. Imports nothing but the
standard library. Arguments, as JSON: ``rate`` and ``load_time``, then ``tail_rate`` and ``tail_time``, ``seed``.
The output is native doubles: first the moment the load begins, then each arrival. At its end, or when nobody
reads any more, it tells on standard error how late its own writing was.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time

__all__ = ["DOUBLE", "main"]

DOUBLE = struct.Struct("d")
_HEAD_START = 0.1
_STDOUT = 1


def main() -> None:
    options = json.loads(sys.argv[1])
    rng = random.Random(options["seed"])
    begin = time.monotonic() + _HEAD_START
    end_of_load = begin + options["load_time"]
    schedule = [
        *_poisson(rng, options["rate"], begin, end_of_load),
        *_poisson(rng, options["tail_rate"], end_of_load, end_of_load + options["tail_time"]),
    ]
    delays: list[float] = []
    try:
        os.write(_STDOUT, DOUBLE.pack(begin))
        due = 0
        while due < len(schedule):
            now = time.monotonic()
            if schedule[due] > now:
                time.sleep(schedule[due] - now)
                continue
            batch = bytearray()
            while due < len(schedule) and schedule[due] <= now:
                batch += DOUBLE.pack(schedule[due])
                due += 1
            _write(bytes(batch))
            delays.append(time.monotonic() - schedule[due - len(batch) // DOUBLE.size])
    except BrokenPipeError:
        pass  # the service has seen enough
    delays.sort()
    late = delays[int(0.99 * (len(delays) - 1))] if delays else 0.0
    print(json.dumps({"late_p99": late}), file=sys.stderr)


def _poisson(rng: random.Random, rate: float, begin: float, end: float) -> list[float]:
    times = []
    at = begin + rng.expovariate(rate)
    while at < end:
        times.append(at)
        at += rng.expovariate(rate)
    return times


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]


if __name__ == "__main__":
    main()
