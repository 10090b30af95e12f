"""Where the record comes from: the load generator's process, and the guarded application's own view."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final, cast

from resilientdb.cli.demo.record import Event, Sample
from resilientdb.cli.demo.services import App, python_environment
from resilientdb.testing import ServiceFailed
from resilientdb.testing.processes import server_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from resilientdb.cli.demo.record import Record

__all__ = ["LoadFeed", "StateFeed"]

_POLL: Final = 0.2


class LoadFeed:
    """The load generator, running; it ends by itself when this process does (its stdin ends)."""

    def __init__(self, record: Record, ports: Mapping[App, int], *, seed: int, rate: float) -> None:
        self._record = record
        targets = [f"{app}={port}" for app, port in ports.items()]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "resilientdb.cli.demo.load", str(seed), str(rate), *targets],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env=server_environment(python_environment()),
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent to handle
        )
        self._reader = threading.Thread(target=self._read, name="demo-load", daemon=True)
        self._reader.start()

    def set_rate(self, rate: float) -> None:
        """Requests a second to each application from now on."""
        self._order({"rate": rate})

    def check(self) -> None:
        """Raise ``ServiceFailed`` if the generator is gone: its silence would look like perfect peace."""
        if self._process.poll() is not None:
            raise ServiceFailed(f"the load generator ended with status {self._process.returncode}")

    def finish(self) -> None:
        """Send nothing more, and wait until everything that is under way has ended."""
        self._order({"stop": True})
        self._process.wait(10.0)
        self._reader.join(5.0)
        if self._process.returncode != 0:
            raise ServiceFailed(f"the load generator ended with status {self._process.returncode}")

    def close(self) -> None:
        """End it at once. May be called twice."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(5.0)
        self._reader.join(5.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that nobody read
                    pipe.close()

    def _order(self, order: dict[str, Any]) -> None:
        self.check()
        stdin = cast("IO[str]", self._process.stdin)
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()

    def _read(self) -> None:
        for line in cast("IO[str]", self._process.stdout):
            told = json.loads(line)
            self._record.add([Sample(*result) for result in told["results"]], told["lag"])


class StateFeed:
    """Asks the guarded application five times a second what its engine does. ``close()`` ends it."""

    def __init__(self, record: Record, port: int, nodes: Mapping[str, str]) -> None:
        self._record = record
        self._port = port
        self._nodes = nodes
        self._since = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-state", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._end.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._end.wait(_POLL)
            try:
                self._ask()
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(_POLL)  # too busy, or being stopped

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1.0)
        try:
            connection.request("GET", f"/demo/state?since={self._since}")
            told = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        nodes = told["snapshot"]["nodes"]
        breakers = {self._nodes.get(node["name"], node["name"]): node["breaker"] for node in nodes}
        events = [self._event(event) for event in told["events"]]
        if told["events"]:
            self._since = told["events"][-1]["number"]
        self._record.add_state(told["snapshot"]["state"], breakers, events)

    def _event(self, told: dict[str, Any]) -> Event:
        def named(key: str) -> str:
            value = str(told.get(key) or "")
            return self._nodes.get(value, value)

        cause = str(told.get("cause") or told.get("error") or "")
        return Event(told["at"], told["event"], named("node"), named("old"), named("new"), cause)
