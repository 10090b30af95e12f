"""Examples as their users run them: a process of their own, a real server, a database behind a real proxy."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from resilientdb.testing.processes import ServerProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing import Postgres, Proxy

EXAMPLES = Path(__file__).parents[2] / "examples"
_numbers = itertools.count(1)


@pytest.fixture
def database(resilientdb_postgres: Postgres) -> Iterator[str]:
    """The name of an empty database."""
    name = f"example_{next(_numbers)}"
    resilientdb_postgres.query(f"CREATE DATABASE {name}")
    yield name
    resilientdb_postgres.query(f"DROP DATABASE {name} WITH (FORCE)")


class Site:
    """A running application, as a client sees it. ``fetch`` fails on an answer that took too long."""

    patience = 3.0
    """Seconds within which every request must be answered; the examples' own deadline is 2."""

    def __init__(self, process: ServerProcess, port: int) -> None:
        self.process = process
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=self.patience)

    def fetch(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._client.request(method, path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.fetch("GET", path, **options)

    def until(self, status: int, path: str, *, within: float) -> httpx.Response:
        """Ask until the answer has this status; fails after ``within`` seconds."""
        give_up = time.monotonic() + within
        while True:
            response = self.get(path)
            if response.status_code == status:
                return response
            assert time.monotonic() < give_up, (
                f"GET {path}: {response.status_code} {response.text} after {within} s\n{self.process.log_tail()}"
            )
            time.sleep(0.02)

    def is_up(self) -> bool:
        try:
            return self.get("/internal/livez").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def serve(
    resilientdb_postgres: Postgres, resilientdb_proxy: Proxy, database: str, tmp_path: Path
) -> Iterator[Callable[..., Site]]:
    """Start an example: ``serve(server, name, driver, **environment)``; its database is behind the proxy."""
    sites: list[Site] = []

    def start(server: str, name: str, driver: str, **environment: str) -> Site:
        port = free_port()
        commands = {
            "uvicorn": ["uvicorn", "--app-dir", str(EXAMPLES), f"{name}:app", "--port", str(port)],
            "flask": ["flask", "--app", str(EXAMPLES / name), "run", "--port", str(port)],
        }
        driver, _, query = driver.partition("?")
        url = resilientdb_postgres.url(driver, database, port=resilientdb_proxy.listen_port)
        process = ServerProcess(
            name,
            [sys.executable, "-W", "error", "-m", *commands[server]],
            log=tmp_path / f"{name}.log",
            env={"DATABASE_URL": f"{url}?{query}" if query else url, **environment},
        )
        site = Site(process, port)
        sites.append(site)
        process.wait_ready(site.is_up)
        return site

    yield start
    for site in sites:
        site.close()
        site.process.stop()
