"""What the demo runs on: PostgreSQL primary and standby, Toxiproxy, and the two applications.

Each application reaches each node through a proxy of its own, and every fault is put on both proxies of a node in
the same moment. One shared proxy would do the same to both; two let each application's fault be proven apart
(a probe goes through each), and keep one application's connections out of the other's way.

Replication goes directly from node to node, past the faults, and is synchronous: a write is acknowledged once the
standby has it, so that a crash of the primary cannot lose one that was. Without that, PostgreSQL itself gives no
such promise, and the ledger at the end would show its losses and not the applications'.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import resilientdb
from resilientdb.cli.demo.app import SCHEMA
from resilientdb.testing import Postgres, ServiceFailed, ToxiproxyServer
from resilientdb.testing.processes import ServerProcess, free_port, run_folder
from resilientdb.testing.toxiproxy_binary import locate_toxiproxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.cli.demo.interrupts import Interrupts
    from resilientdb.testing import Proxy

__all__ = ["APPS", "App", "Driver", "Services", "python_environment"]

App = Literal["plain", "guarded"]
Driver = Literal["psycopg", "asyncpg"]
APPS: Final[tuple[App, ...]] = ("plain", "guarded")

_STANDBY: Final = "standby"


class Services:
    """All services, running. ``close()`` ends every process and removes every folder, also half-way up."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver: Driver = driver
        self._seed = seed
        self._stack = contextlib.ExitStack()
        self.ports: dict[App, int] = {}
        self.urls: dict[App, list[str]] = {}
        """What each application was given: its primary, and the guarded one its replica."""
        self.primary: Postgres
        self.standby: Postgres
        self.toxiproxy: ToxiproxyServer
        self.primary_proxies: dict[App, Proxy] = {}
        self.standby_proxies: dict[App, Proxy] = {}

    def start(self, interrupts: Interrupts, say: Callable[[str], None]) -> None:
        """Start everything; ``say`` is told what is being done. Raises ``testing.TestingError``."""
        for driver in ("psycopg", self.driver):  # the first for the demo's own questions
            importlib.import_module(driver)
        say("looking for Toxiproxy (built once where there is none: about half a minute)")
        binary = locate_toxiproxy()
        say("starting PostgreSQL")
        with interrupts.held():
            self.primary = self._stack.enter_context(Postgres())
        self.primary.query(SCHEMA)
        say("starting its streaming standby")
        with interrupts.held():
            # The standby copies the primary's settings. Promoted, it must not wait for a standby of its own.
            standby = Postgres.standby(
                self.primary, name=_STANDBY, settings={"synchronous_standby_names": ""}
            )
            self.standby = self._stack.enter_context(standby)
        self.primary.configure(synchronous_standby_names=_STANDBY)
        self.primary.reload()
        self._wait_synchronous()
        say("starting Toxiproxy and the two applications")
        with interrupts.held():
            self.toxiproxy = self._stack.enter_context(ToxiproxyServer(seed=self._seed, binary=binary))
        for app in APPS:
            self.primary_proxies[app] = self.toxiproxy.proxy(self.primary.address, name=f"{app}_primary")
        self.standby_proxies["guarded"] = self.toxiproxy.proxy(self.standby.address, name="guarded_standby")
        urls = {
            app: [self.primary.url(self.driver, port=self.primary_proxies[app].listen_port)] for app in APPS
        }
        replica = self.standby_proxies["guarded"].listen_port
        urls["guarded"].append(self.standby.url(self.driver, port=replica))
        self.urls = urls
        for app in APPS:
            with interrupts.held():
                self._start_app(app)

    def close(self) -> None:
        """End everything. May be called twice."""
        self._stack.close()

    def versions(self) -> dict[str, str]:
        """What runs, and of which version."""
        return {
            "resilientdb": resilientdb.__version__,
            "Python": platform.python_version(),
            "PostgreSQL": str(self.standby.query("SHOW server_version")[0][0]),
            "Toxiproxy": self.toxiproxy.version(),
            **{name: metadata.version(name) for name in ("SQLAlchemy", self.driver, "starlette", "uvicorn")},
        }

    def addresses(self) -> dict[str, str]:
        """Where everything can be reached, as it is at the end of the timeline."""
        return {
            "plain application": f"http://127.0.0.1:{self.ports['plain']}/items",
            "guarded application": f"http://127.0.0.1:{self.ports['guarded']}/items",
            "  its health": f"http://127.0.0.1:{self.ports['guarded']}/health",
            "PostgreSQL (the promoted standby)": self.standby.url(""),
            "PostgreSQL through the proxy": self.standby.url(
                "", port=self.standby_proxies["guarded"].listen_port
            ),
            "Toxiproxy control": f"http://{self.toxiproxy.address}/proxies",
        }

    def node_names(self) -> dict[str, str]:
        """The guarded engine's names of its nodes (``host:port``), and ours."""
        return {
            self.primary_proxies["guarded"].address: "primary",
            self.standby_proxies["guarded"].address: "standby",
        }

    def _wait_synchronous(self) -> None:
        end = time.monotonic() + 15.0
        while self.primary.query("SELECT sync_state FROM pg_stat_replication") != [("sync",)]:
            if time.monotonic() > end:
                raise ServiceFailed(
                    f"the standby did not become synchronous in 15 s\n{self.standby.log_tail()}"
                )
            time.sleep(0.02)
        self.standby.wait_caught_up(self.primary)

    def _start_app(self, app: App) -> None:
        self.ports[app] = port = free_port()
        process = ServerProcess(
            f"the {app} application",
            [sys.executable, "-m", "resilientdb.cli.demo.app", app, str(port), *self.urls[app]],
            log=run_folder().folder("apps") / f"{app}.log",
            env=python_environment(),
        )
        self._stack.callback(process.stop, timeout=2.0)
        process.wait_ready(functools.partial(_answers, port), timeout=30.0)


def python_environment() -> dict[str, str]:
    """What our own Python processes need to import this very package, wherever it lies."""
    paths = [str(Path(resilientdb.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
