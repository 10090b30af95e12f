"""The server under load: reads arrivals on standard input and serves each one through the client it was told.

Argument, as JSON: ``client``, ``mode`` ("threads" or "asyncio"), ``url``, ``query_times``, and either
``capacity_time`` (measure, closed-loop, how many requests a second of the first kind the connections can serve, and
say so), or ``slow_times`` (of queries that begin during the load; empty = as ever), ``capacities``, ``deadline``,
``quick``, ``warm_time``, ``load_time``, ``tail_time``. Says "ready" when the pool is warm, and its figures, as JSON,
when all is normal again after the load or ``tail_time`` is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrivals import ARRIVAL
from .clients import CONNECTIONS, Queries, async_client, client
from .verdict import OK, History, figures, normal_since

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["main"]

_WORKERS = 200
_BACKLOG = 2048
_STDIN = 0
_CHUNK = 65536 - 65536 % ARRIVAL.size


def main() -> None:
    options = json.loads(sys.argv[1])
    run = _serve_tasks if options["mode"] == "asyncio" else _serve_threads
    run(options)


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


def _finish(what: object) -> None:
    """Say the result and leave, whatever is still waiting."""
    _say(what)
    os._exit(0)


class _Reader:
    """Takes the arrivals off standard input and hands each request's number and kind to ``serve``."""

    def __init__(
        self,
        options: dict[str, Any],
        history: History,
        queries: Queries[Any],
        serve: Callable[[int, int], object],
    ) -> None:
        self._options = options
        self._history = history
        self._queries = queries
        self._serve = serve
        self._rest = b""

    def read(self) -> bool:
        """Take what is there, waiting for the first byte; False at the end."""
        chunk = os.read(_STDIN, _CHUNK)
        data = self._rest + chunk
        whole = len(data) - len(data) % ARRIVAL.size
        self._rest = data[whole:]
        for at, kind in ARRIVAL.iter_unpack(data[:whole]):
            if self._history.begin:
                self._serve(self._history.arrived(at, kind), kind)
            else:
                self._begin(at + self._options["warm_time"])
        return bool(chunk)

    def _begin(self, at: float) -> None:
        self._history.begin_at(at, self._options["load_time"])
        if self._options["slow_times"]:
            self._queries.slow_until = self._history.end_of_load
            self._queries.slow_from = at


def _watch(history: History, options: dict[str, Any]) -> None:
    """Tell the figures once there is nothing more to learn."""
    normal = None
    held_up: list[tuple[float, float]] = []
    while normal is None:
        time.sleep(0.1)
        now = time.monotonic()
        if not history.begin or now < history.begin:
            continue
        if not held_up or (now >= history.end_of_load and len(held_up) == 1):
            held_up.append((now, _held_up()))
        if now < history.end_of_load:
            continue
        normal = normal_since(history, now)
        if now > history.end_of_load + options["tail_time"]:
            break
    (begun, before), (ended, after) = held_up
    share = (after - before) / (ended - begun)
    _finish({**figures(history, options["capacities"]), "normal_after": normal, "held_up": share})


def _held_up() -> float:
    """Seconds that threads of this process have stood ready without a processor; 0 where nobody counts."""
    nanoseconds = 0
    for counted in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            nanoseconds += int(counted.read_text("ascii").split()[1])
    return nanoseconds / 1e9


# -- threads -------------------------------------------------------------------------------------------------


def _serve_threads(options: dict[str, Any]) -> None:
    request, queries = client(
        options["client"], options["url"], options["query_times"], options.get("slow_times", ())
    )
    _all_at_once(request)
    if "capacity_time" in options:
        before, begun = _held_up(), time.monotonic()
        capacity = _thread_capacity(request, options["capacity_time"])
        _finish({"capacity": capacity, "held_up": (_held_up() - before) / (time.monotonic() - begun)})
    history = History(deadline=options["deadline"], quick=options["quick"])
    backlog: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            number, kind = backlog.get()
            try:
                begun = request(kind)
            except Exception as error:  # noqa: BLE001 - every way of being refused is counted
                history.ended[number] = (type(error).__name__, time.monotonic(), math.inf)
            else:
                history.ended[number] = (OK, time.monotonic(), begun)

    def take(number: int, kind: int) -> None:
        if backlog.qsize() >= _BACKLOG:
            history.ended[number] = ("backlog full", time.monotonic(), math.inf)
        else:
            backlog.put((number, kind))

    for _ in range(_WORKERS):
        threading.Thread(target=work, daemon=True).start()
    reader = _Reader(options, history, queries, take)

    def accept() -> None:
        while reader.read():
            pass

    threading.Thread(target=accept, daemon=True).start()
    _say("ready")
    _watch(history, options)


def _all_at_once(request: Callable[[int], object]) -> None:
    """Open every connection of the pool."""
    for _ in range(2):
        threads = [threading.Thread(target=request, args=(0,)) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _thread_capacity(request: Callable[[int], object], seconds: float) -> float:
    rates: list[float] = []

    def work() -> None:
        done = 0
        now = begun = time.monotonic()
        while now < begun + seconds:
            request(0)
            done += 1
            now = time.monotonic()
        rates.append(done / (now - begun))

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


# -- asyncio -------------------------------------------------------------------------------------------------


def _serve_tasks(options: dict[str, Any]) -> None:
    asyncio.run(_serve_in_loop(options))


async def _serve_in_loop(options: dict[str, Any]) -> None:
    request, queries = await async_client(
        options["client"], options["url"], options["query_times"], options.get("slow_times", ())
    )
    for _ in range(2):
        await asyncio.gather(*(request(0) for _ in range(CONNECTIONS)))
    if "capacity_time" in options:
        before, begun = _held_up(), time.monotonic()
        capacity = await _task_capacity(request, options["capacity_time"])
        _finish({"capacity": capacity, "held_up": (_held_up() - before) / (time.monotonic() - begun)})
    history = History(deadline=options["deadline"], quick=options["quick"])
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    async def serve(number: int, kind: int) -> None:
        try:
            begun = await request(kind)
        except Exception as error:  # noqa: BLE001 - every way of being refused is counted
            history.ended[number] = (type(error).__name__, time.monotonic(), math.inf)
        else:
            history.ended[number] = (OK, time.monotonic(), begun)

    def take(number: int, kind: int) -> None:
        task = loop.create_task(serve(number, kind))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    reader = _Reader(options, history, queries, take)

    def accept() -> None:
        if not reader.read():
            loop.remove_reader(_STDIN)

    loop.add_reader(_STDIN, accept)
    threading.Thread(target=_watch, args=(history, options), daemon=True).start()
    _say("ready")
    await asyncio.Event().wait()


async def _task_capacity(request: Callable[[int], Awaitable[object]], seconds: float) -> float:
    async def work() -> float:
        done = 0
        now = begun = time.monotonic()
        while now < begun + seconds:
            await request(0)
            done += 1
            now = time.monotonic()
        return done / (now - begun)

    return sum(await asyncio.gather(*(work() for _ in range(CONNECTIONS))))


if __name__ == "__main__":
    main()
