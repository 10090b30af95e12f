"""The server under load: reads arrivals on standard input and serves each one through the client it was told.

Argument, as JSON: ``client``, ``mode`` ("threads" or "asyncio"), ``url``, ``query_time``, and either
``capacity_time`` (measure, closed-loop, how many requests a second the connections can serve, and say so), or
``capacity``, ``deadline``, ``quick``, ``load_time``, ``tail_time``. Says "ready" when the pool is warm, and its
figures, as JSON, when all is normal again after the load or ``tail_time`` is over.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from .arrivals import DOUBLE
from .clients import CONNECTIONS, async_client, client
from .verdict import OK, History, figures, normal_since

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["main"]

_WORKERS = 200
_BACKLOG = 2048
_STDIN = 0
_CHUNK = 65536 - 65536 % DOUBLE.size


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
    """Takes the arrivals off standard input and hands each request's number to ``serve``."""

    def __init__(self, history: History, load_time: float, serve: Callable[[int], object]) -> None:
        self._history = history
        self._load_time = load_time
        self._serve = serve
        self._rest = b""

    def read(self) -> bool:
        """Take what is there, waiting for the first byte; False at the end."""
        chunk = os.read(_STDIN, _CHUNK)
        data = self._rest + chunk
        whole = len(data) - len(data) % DOUBLE.size
        self._rest = data[whole:]
        for (at,) in DOUBLE.iter_unpack(data[:whole]):
            if self._history.begin:
                self._serve(self._history.arrived(at))
            else:
                self._history.begin_at(at, self._load_time)
        return bool(chunk)


def _watch(history: History, options: dict[str, Any]) -> None:
    """Tell the figures once there is nothing more to learn."""
    normal = None
    while normal is None:
        time.sleep(0.1)
        now = time.monotonic()
        if not history.begin or now < history.end_of_load:
            continue
        normal = normal_since(history, now)
        if now > history.end_of_load + options["tail_time"]:
            break
    _finish({**figures(history, options["capacity"]), "normal_after": normal})


# -- threads -------------------------------------------------------------------------------------------------


def _serve_threads(options: dict[str, Any]) -> None:
    request = client(options["client"], options["url"], options["query_time"])
    _all_at_once(request)
    if "capacity_time" in options:
        _finish({"capacity": _thread_capacity(request, options["capacity_time"])})
    history = History(deadline=options["deadline"], quick=options["quick"])
    backlog: queue.SimpleQueue[int] = queue.SimpleQueue()

    def work() -> None:
        while True:
            number = backlog.get()
            try:
                request()
            except Exception as error:  # noqa: BLE001 - every way of being refused is counted
                history.ended[number] = (type(error).__name__, time.monotonic())
            else:
                history.ended[number] = (OK, time.monotonic())

    def take(number: int) -> None:
        if backlog.qsize() >= _BACKLOG:
            history.ended[number] = ("backlog full", time.monotonic())
        else:
            backlog.put(number)

    for _ in range(_WORKERS):
        threading.Thread(target=work, daemon=True).start()
    reader = _Reader(history, options["load_time"], take)

    def accept() -> None:
        while reader.read():
            pass

    threading.Thread(target=accept, daemon=True).start()
    _say("ready")
    _watch(history, options)


def _all_at_once(request: Callable[[], object]) -> None:
    """Open every connection of the pool."""
    for _ in range(2):
        threads = [threading.Thread(target=request) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _thread_capacity(request: Callable[[], object], seconds: float) -> float:
    counts = [0] * CONNECTIONS
    over = threading.Event()

    def work(index: int) -> None:
        while not over.is_set():
            request()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    time.sleep(seconds)
    done, taken = sum(counts), time.monotonic() - begun
    over.set()
    for thread in threads:
        thread.join()
    return done / taken


# -- asyncio -------------------------------------------------------------------------------------------------


def _serve_tasks(options: dict[str, Any]) -> None:
    asyncio.run(_serve_in_loop(options))


async def _serve_in_loop(options: dict[str, Any]) -> None:
    request = await async_client(options["client"], options["url"], options["query_time"])
    for _ in range(2):
        await asyncio.gather(*(request() for _ in range(CONNECTIONS)))
    if "capacity_time" in options:
        _finish({"capacity": await _task_capacity(request, options["capacity_time"])})
    history = History(deadline=options["deadline"], quick=options["quick"])
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    async def serve(number: int) -> None:
        try:
            await request()
        except Exception as error:  # noqa: BLE001 - every way of being refused is counted
            history.ended[number] = (type(error).__name__, time.monotonic())
        else:
            history.ended[number] = (OK, time.monotonic())

    def take(number: int) -> None:
        task = loop.create_task(serve(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    reader = _Reader(history, options["load_time"], take)

    def accept() -> None:
        if not reader.read():
            loop.remove_reader(_STDIN)

    loop.add_reader(_STDIN, accept)
    threading.Thread(target=_watch, args=(history, options), daemon=True).start()
    _say("ready")
    await asyncio.Event().wait()


async def _task_capacity(request: Callable[[], Awaitable[object]], seconds: float) -> float:
    done = 0
    over = time.monotonic() + seconds

    async def work() -> None:
        nonlocal done
        while time.monotonic() < over:
            await request()
            done += 1

    begun = time.monotonic()
    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return done / (time.monotonic() - begun)


if __name__ == "__main__":
    main()
