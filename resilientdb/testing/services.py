"""What our own servers have in common: the life of one process, and of the data beside it.

A :class:`Service` keeps nothing over a stop. A :class:`DatabaseServer` has data of its own, which its first start
makes and ``close()`` removes; what makes it a PostgreSQL or a MariaDB is in the few methods it leaves open.
"""

from __future__ import annotations

import abc
import re
import shutil
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from resilientdb.testing.errors import ServiceFailed
from resilientdb.testing.processes import ServerProcess, free_port, log_tail, run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["ATTEMPTS", "DatabaseServer", "Service"]

ATTEMPTS = 5
"""With how many ports a start is tried: one may be taken between its choice and its use."""


class Service(abc.ABC):
    """One process that serves on 127.0.0.1. As a context manager it is started, and stopped at the end."""

    host: ClassVar[str] = "127.0.0.1"

    def __init__(self, *, port: int = 0) -> None:
        self.port = port
        self._process: ServerProcess | None = None

    @abc.abstractmethod
    def start(self, *, timeout: float = 15.0) -> Self:
        """Start, and return when it answers. Does nothing if it runs already."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Stop it. May be called twice."""

    @property
    def running(self) -> bool:
        """Whether its (main) process runs."""
        return self._process is not None and self._process.running

    @property
    def address(self) -> str:
        """``host:port``, as a proxy wants its upstream."""
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _state(self) -> str:
        return "running" if self.running else "stopped"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self.address}, {self._state}>"


class DatabaseServer(Service):
    """One server and its data. ``start()`` makes the data if there is none yet; ``close()`` removes it.

    It keeps its port over ``stop()`` and ``start()``. As a context manager it is closed at the end.
    """

    _port_taken: ClassVar[str]
    """What its log says when somebody else has its port."""

    def __init__(self, name: str, settings: Mapping[str, str | float] | None, *, kind: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise ValueError(f"name {name!r}: letters, digits and underscores only")
        super().__init__(port=free_port())
        self.name = name
        self.settings = dict(settings or {})
        self._source: tuple[str, int] | None = None
        self._folder = run_folder().folder(f"{kind}-{name}")
        self.data = self._folder / "data"
        self.log = self._folder / "server.log"

    @property
    def pid(self) -> int | None:
        """The server's (main) process, or None when there is none."""
        return self._process.pid if self._process is not None and self._process.running else None

    def start(self, *, timeout: float = 30.0) -> Self:
        """Start, and return when it accepts logins. Does nothing if it runs already."""
        if self.running:
            return self
        fresh = not self.data.exists()
        if fresh:
            self._make_data()
        attempts = ATTEMPTS if fresh else 1  # nobody knows a fresh one's port yet: another will do
        for attempt in range(attempts):
            try:
                self._start_once(timeout)
            except ServiceFailed:
                self._process = None
                if attempt == attempts - 1 or self._port_taken not in self.log_tail():
                    raise
                self.port = free_port()
            else:
                break
        if fresh:
            self._set_up()
        return self

    @abc.abstractmethod
    def stop(self, mode: Literal["fast", "immediate"] = "fast", *, timeout: float = 15.0) -> None:
        """Stop: ``fast`` ends sessions and shuts down, ``immediate`` is a crash.

        After ``timeout`` seconds a shutdown that has not come to an end becomes a crash.
        """

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> Self:
        """Stop and start, on the same port and data."""
        self.stop(mode)
        return self.start()

    def wait_ready(self, *, timeout: float = 30.0) -> float:
        """Wait until it accepts logins; returns the seconds it took."""
        if self._process is None:
            raise ServiceFailed(f"{self.name} is not running")
        return self._process.wait_ready(self._accepts_logins, timeout=timeout)

    def close(self) -> None:
        """Stop at once and remove the data. May be called twice."""
        self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's log."""
        return log_tail(self.log, lines)

    # ------------------------------------------------------------------------------- what a kind fills in

    @abc.abstractmethod
    def _make_data(self) -> None:
        """Make ``data``."""

    @abc.abstractmethod
    def _launch(self) -> ServerProcess:
        """Start the process, on ``port`` and ``data``; do not wait for it."""

    @abc.abstractmethod
    def _accepts_logins(self) -> bool:
        """Whether it does by now."""

    def _set_up(self) -> None:
        """What is done once, in a running server, after its first start."""

    def _start_once(self, timeout: float) -> None:
        self._process = self._launch()
        try:
            self.wait_ready(timeout=timeout)
        except BaseException:
            self._process.kill()
            raise
