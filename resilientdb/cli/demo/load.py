"""The load generator: the same stream of requests to both applications, in a process of its own.

Open loop: requests are sent when their time comes, whatever became of those before, as visitors do. Each has a
deadline of ``PATIENCE`` seconds from the moment it was due (so a generator that lags would count against both
applications alike); then its client hangs up. Arrivals are a seeded Poisson process: two
runs with the same seed differ only in when the rate was changed.

Talks to its parent in lines of JSON. stdin: ``{"rate": 40}`` changes the rate, ``{"stop": true}`` or the end of
input lets what is under way come to its end and stops. stdout, ten times a second: ``{"lag": worst seconds late,
"results": [[number, app, kind, sent_at, seconds, status, retry_after, reason], …]}``. ``sent_at`` is the monotonic
clock, which all processes of a machine share; ``status`` 0 = no answer in time, -1 = the connection failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from typing import Any, Final

from resilientdb.cli.demo.client import ConnectionBroken, Pool

__all__ = ["BROKEN", "KINDS", "LATE", "MAX_IN_FLIGHT", "PATIENCE", "WEIGHTS"]

PATIENCE: Final = 1.0
"""Seconds a client waits for its answer."""

KINDS: Final = ("items", "slow", "add")
WEIGHTS: Final = (60, 25, 15)
"""Of a hundred requests, how many are of each kind."""
_MAX_SECONDS: Final = 600.0
MAX_IN_FLIGHT: Final = 900
"""Most requests under way to one application; those beyond are not sent, and counted as unanswered."""

LATE: Final = 0
BROKEN: Final = -1


class _Generator:
    def __init__(self, targets: dict[str, int], seed: int, rate: float) -> None:
        self._pools = {app: Pool("127.0.0.1", port) for app, port in targets.items()}
        self._rng = random.Random(seed)
        self._rate = rate
        self._changed = asyncio.Event()
        self._stopped = False
        self._results: list[list[Any]] = []
        self._lag = 0.0
        self._running: set[asyncio.Task[None]] = set()
        self._in_flight = dict.fromkeys(targets, 0)

    async def run(self) -> None:
        listening = asyncio.ensure_future(self._listen())
        telling = asyncio.ensure_future(self._tell())
        await self._arrivals(time.monotonic() + _MAX_SECONDS)
        if self._running:
            await asyncio.wait(self._running, timeout=PATIENCE + 1.0)
        for task in (listening, telling):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._flush()
        for pool in self._pools.values():
            pool.close()

    async def _arrivals(self, end: float) -> None:
        number = 0
        due = time.monotonic()
        while not self._stopped and time.monotonic() < end:
            due += self._rng.expovariate(1.0) / self._rate
            kind = self._rng.choices(KINDS, WEIGHTS)[0]
            wait = due - time.monotonic()
            if wait > 0:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)
                if self._changed.is_set():  # the gap was drawn for the old rate: go on from now
                    due = min(due, time.monotonic())
                    continue
            self._lag = max(self._lag, time.monotonic() - due)
            number += 1
            for app, pool in self._pools.items():
                task = asyncio.ensure_future(self._request(number, app, pool, kind, due))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _request(self, number: int, app: str, pool: Pool, kind: str, due: float) -> None:
        status, retry_after, reason = LATE, None, ""
        if self._in_flight[app] < MAX_IN_FLIGHT:
            self._in_flight[app] += 1
            method, path = ("POST", f"/items?key={number}") if kind == "add" else ("GET", f"/{kind}")
            try:
                async with asyncio.timeout(PATIENCE - (time.monotonic() - due)):
                    response = await pool.request(method, path)
                status, retry_after, reason = response.status, response.retry_after, response.reason
            except TimeoutError:
                pass
            except (ConnectionBroken, OSError) as error:
                status, reason = BROKEN, type(error).__name__
            finally:
                self._in_flight[app] -= 1
        seconds = round(time.monotonic() - due, 5)
        self._results.append([number, app, kind, round(due, 5), seconds, status, retry_after, reason])

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            order = json.loads(line)
            self._rate = float(order.get("rate", self._rate))
            self._stopped = bool(order.get("stop", False))
            self._changed.set()
        self._stopped = True
        self._changed.set()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self._flush()

    def _flush(self) -> None:
        results, self._results = self._results, []
        lag, self._lag = self._lag, 0.0
        sys.stdout.write(json.dumps({"lag": round(lag, 5), "results": results}) + "\n")
        sys.stdout.flush()


def _main(seed: str, rate: str, *targets: str) -> None:
    ports = {name: int(port) for name, _, port in (target.partition("=") for target in targets)}

    async def generate() -> None:
        await _Generator(ports, int(seed), float(rate)).run()

    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        asyncio.run(generate())


if __name__ == "__main__":
    _main(*sys.argv[1:])
