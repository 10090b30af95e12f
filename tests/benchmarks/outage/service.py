"""The server under load: begins a request every so often and notes what became of each.

Argument, as JSON: ``client``, ``mode`` ("threads" or "asyncio"), ``url``, ``rate``, ``seconds``: for how long
requests come, and ``grace``: how long those under way are waited for at the end. Says "ready" when the pool is warm;
the requests come from then on. When all is over it says, as JSON, when each was due, when it ended (null: it has
not) and how, and how late the requests were begun.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ..measure import percentile
from .clients import CONNECTIONS, async_client, client
from .verdict import OK

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

_HEAD_START = 0.1


def main() -> None:
    options = json.loads(sys.argv[1])
    if options["mode"] == "asyncio":
        asyncio.run(_serve_tasks(options))
    else:
        _serve_threads(options)


class _Record:
    """Of each request, by its number: when it was due; and once it has ended, when and how."""

    def __init__(self) -> None:
        self.due: list[float] = []
        self.ended: dict[int, tuple[float, str]] = {}
        self.late: list[float] = []

    def note(self, number: int, how: str) -> None:
        self.ended[number] = (time.monotonic(), how)

    def say(self) -> None:
        """Say it and leave, whatever is still waiting."""
        requests = [(due, *self.ended.get(number, (None, ""))) for number, due in enumerate(self.due)]
        _say({"requests": requests, "late_p99": percentile(self.late, 0.99)})
        os._exit(0)


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


def _arrive(record: _Record, options: dict[str, Any], begin: Callable[[int], object]) -> None:
    first = time.monotonic() + _HEAD_START
    for number in range(round(options["rate"] * options["seconds"])):
        due = first + number / options["rate"]
        time.sleep(max(0.0, due - time.monotonic()))
        record.due.append(due)
        record.late.append(time.monotonic() - due)
        begin(number)
    time.sleep(options["grace"])
    record.say()


def _serve_threads(options: dict[str, Any]) -> None:
    request = client(options["client"], options["url"])
    warm = [threading.Thread(target=request) for _ in range(CONNECTIONS)]
    for thread in warm:
        thread.start()
    for thread in warm:
        thread.join()
    record = _Record()

    def serve(number: int) -> None:
        try:
            request()
        except Exception as error:  # noqa: BLE001 - every way of being refused is noted
            record.note(number, type(error).__name__)
        else:
            record.note(number, OK)

    _say("ready")
    _arrive(
        record, options, lambda number: threading.Thread(target=serve, args=(number,), daemon=True).start()
    )


async def _serve_tasks(options: dict[str, Any]) -> None:
    request = async_client(options["client"], options["url"])
    await asyncio.gather(*(request() for _ in range(CONNECTIONS)))
    record = _Record()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # of connections that were cut, drivers leave futures behind
    tasks: set[asyncio.Task[None]] = set()

    async def serve(number: int) -> None:
        try:
            await request()
        except Exception as error:  # noqa: BLE001 - every way of being refused is noted
            record.note(number, type(error).__name__)
        else:
            record.note(number, OK)

    def begin(number: int) -> None:
        task = loop.create_task(serve(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    _say("ready")
    arrive = threading.Thread(
        target=_arrive,
        args=(record, options, lambda number: loop.call_soon_threadsafe(begin, number)),
        daemon=True,
    )
    arrive.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
