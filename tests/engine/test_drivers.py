"""What is known of each driver, held against the real sockets of a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from resilientdb.config import Lifecycle
from resilientdb.engine.drivers import Driver, driver_of
from resilientdb.policy.faults import Fault, classify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing.postgres import Postgres

ASYNC = {"psycopg_async", "asyncpg", "aiosqlite", "aiomysql", "asyncmy"}
POSTGRESQL = ["psycopg", "psycopg_async", "psycopg2", "asyncpg"]


class Opened:
    """One connection opened by a driver with the parameters the library adds, and what it takes to use it."""

    def __init__(self, url: str, name: str, lifecycle: Lifecycle | None = None, **given: Any) -> None:
        self.loop = asyncio.new_event_loop() if name in ASYNC else None
        make: Any = create_async_engine if self.loop else sa.create_engine
        self.engine = make(url, poolclass=NullPool, connect_args=given)
        dialect = self.engine.dialect
        self.driver = driver_of(dialect)
        lifecycle = lifecycle or Lifecycle()

        # As the engine does it: after the URL and connect_args have been merged.
        @sa.event.listens_for(getattr(self.engine, "sync_engine", self.engine), "do_connect")
        def add(_dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
            parameters |= self.driver.socket_defaults(lifecycle, parameters)

        self.connection = self.wait(self.engine.connect().start()) if self.loop else self.engine.connect()
        raw = self.wait(self.connection.get_raw_connection()) if self.loop else self.connection.connection
        self.dbapi = raw.dbapi_connection
        self.driver.after_connect(self.dbapi, lifecycle)

    def wait(self, result: Any) -> Any:
        return self.loop.run_until_complete(result) if self.loop else result

    def run(self, sql: str) -> Any:
        return self.wait(self.connection.exec_driver_sql(sql))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.wait(self.connection.invalidate())
        self.wait(self.connection.close())
        self.wait(self.engine.dispose())
        if self.loop:
            self.loop.run_until_complete(asyncio.sleep(0.01))
            self.loop.close()

    def option(self, level: int, name: int) -> int:
        fd = self.driver.socket_fd(self.dbapi)
        assert fd is not None
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            return duplicate.getsockopt(level, name)

    def options(self) -> dict[str, int]:
        tcp = socket.IPPROTO_TCP
        return {
            "keepalive": self.option(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "idle": self.option(tcp, socket.TCP_KEEPIDLE),
            "interval": self.option(tcp, socket.TCP_KEEPINTVL),
            "count": self.option(tcp, socket.TCP_KEEPCNT),
            "user_timeout": self.option(tcp, socket.TCP_USER_TIMEOUT),
        }


@dataclass
class Opener:
    postgres: Postgres
    name: str
    opened: list[Opened]

    def __call__(self, query: str = "", lifecycle: Lifecycle | None = None, **given: Any) -> Opened:
        url = self.postgres.url(self.name) + query
        self.opened.append(Opened(url, self.name, lifecycle, **given))
        return self.opened[-1]


@pytest.fixture(params=POSTGRESQL)
def opener(request: pytest.FixtureRequest, resilientdb_postgres: Postgres) -> Iterator[Opener]:
    opener = Opener(resilientdb_postgres, request.param, [])
    yield opener
    for opened in opener.opened:
        opened.close()


linux = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux socket options")


def test_the_descriptor_is_the_connection_s_socket(opener: Opener) -> None:
    """Shutting down a dup of it ends a hung call at once, whatever the driver waits with."""
    opened = opener()
    fd = opened.driver.socket_fd(opened.dbapi)
    assert fd is not None
    seconds: list[float] = []
    errors: list[Exception] = []

    def hang() -> None:
        started = time.monotonic()
        try:
            opened.run("SELECT pg_sleep(30)")
        except Exception as error:  # noqa: BLE001 - each driver has its own
            errors.append(error)
        seconds.append(time.monotonic() - started)

    thread = threading.Thread(target=hang)
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        assert duplicate.getpeername() == (opener.postgres.host, opener.postgres.port)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        duplicate.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert not thread.is_alive()
    assert classify(errors[0]) is Fault.CONNECTION_LOST
    assert seconds[0] < 1.0


def test_no_descriptor_after_the_end(opener: Opener) -> None:
    opened = opener()
    opened.close()
    assert opened.driver.socket_fd(opened.dbapi) is None
    opened.driver.after_connect(opened.dbapi, Lifecycle())
    assert opened.driver.transaction_status(opened.dbapi) in {None, "idle"}
    opener.opened.clear()


@linux
def test_socket_options_are_set(opener: Opener) -> None:
    lifecycle = Lifecycle(connect_timeout=7, tcp_user_timeout=3.25, keepalive_idle=9)
    assert opener(lifecycle=lifecycle).options() == {
        "keepalive": 1,
        "idle": 9,
        "interval": 3,
        "count": 3,
        "user_timeout": 3250,
    }


@linux
def test_none_leaves_the_system_s_own(opener: Opener) -> None:
    lifecycle = Lifecycle(connect_timeout=None, tcp_user_timeout=None, keepalive_idle=None)
    opened = opener(lifecycle=lifecycle)
    with socket.socket() as untouched:
        idle = untouched.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    assert (opened.options()["idle"], opened.options()["user_timeout"]) == (idle, 0)
    assert opened.driver.socket_defaults(lifecycle, {}).keys() <= {"async_creator_fn"}


@linux
@pytest.mark.parametrize("opener", ["psycopg", "psycopg_async", "psycopg2"], indirect=True)
def test_what_the_user_set_is_kept(opener: Opener) -> None:
    from_url = opener("?keepalives_idle=77&tcp_user_timeout=8888&connect_timeout=3").options()
    assert (from_url["idle"], from_url["user_timeout"], from_url["interval"]) == (77, 8888, 2)
    from_arguments = opener(keepalives_count=8).options()
    assert (from_arguments["count"], from_arguments["idle"]) == (8, 5)
    assert opener("?keepalives=0").options()["keepalive"] == 0


def test_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)
    lifecycle = Lifecycle(connect_timeout=1.2, tcp_user_timeout=10, keepalive_idle=5)
    libpq = driver_of(sa.create_engine("postgresql+psycopg://").dialect)
    assert libpq.socket_defaults(lifecycle, {}) == {
        "connect_timeout": 2,
        "keepalives": 1,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    given = {"connect_timeout": "30", "tcp_user_timeout": 1, "keepalives": 0}
    assert libpq.socket_defaults(lifecycle, given) == {}
    in_text = {"dsn": "host=a connect_timeout = 3 keepalives_idle=4"}
    assert "connect_timeout" not in libpq.socket_defaults(lifecycle, in_text)
    assert "keepalives_idle" not in libpq.socket_defaults(lifecycle, in_text)
    assert libpq.socket_defaults(lifecycle, in_text)["keepalives"] == 1
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "20")
    assert "connect_timeout" not in libpq.socket_defaults(lifecycle, {})
    assert [libpq.connect_timeout_param(s)["connect_timeout"] for s in (0.1, 2.0, 2.1)] == [2, 2, 3]

    asyncpg = driver_of(create_async_engine("postgresql+asyncpg://").dialect)
    assert asyncpg.socket_defaults(lifecycle, {}) == {"timeout": 1.2}  # not libpq, nor its environment
    assert asyncpg.socket_defaults(lifecycle, {"timeout": 60}) == {}


def test_role(opener: Opener, resilientdb_standby: Postgres) -> None:
    def role(opened: Opened) -> str:
        assert opened.driver.role_query is not None
        return opened.driver.read_role(opened.run(opened.driver.role_query).one())

    primary = opener()
    standby = Opened(resilientdb_standby.url(opener.name), opener.name)
    opener.opened.append(standby)
    assert (role(primary), role(standby)) == ("primary", "replica")


def test_transaction_status(opener: Opener) -> None:
    opened = opener()

    def status() -> str | None:
        return opened.driver.transaction_status(opened.dbapi)

    tells = opener.name != "asyncpg"
    opened.wait(opened.connection.rollback())
    assert status() == "idle"
    opened.run("SELECT 1")
    assert status() == ("open" if tells else "undecided")
    with pytest.raises(sa.exc.DBAPIError):
        opened.run("SELECT 1/0")
    assert status() == ("failed" if tells else "undecided")
    opened.wait(opened.connection.rollback())
    assert status() == "idle"


@pytest.mark.parametrize("name", ["pysqlite", "aiosqlite"])
def test_sqlite(name: str, tmp_path: Any) -> None:
    opened = Opened(f"sqlite+{name}:///{tmp_path}/a.db", name)
    try:
        driver = opened.driver
        assert driver.name == name
        assert driver.role_query is None
        assert not driver.has_server
        assert driver.socket_defaults(Lifecycle(), {}) == {}
        assert driver.connect_timeout_param(1) == {}
        assert driver.socket_fd(opened.dbapi) is None
        opened.run("CREATE TABLE t (k int)")
        opened.run("INSERT INTO t VALUES (1)")
        assert driver.transaction_status(opened.dbapi) == "open"
        opened.wait(opened.connection.commit())
        assert driver.transaction_status(opened.dbapi) == "idle"
    finally:
        opened.close()


def test_drivers_nobody_described() -> None:
    class Dialect(sa.engine.default.DefaultDialect):
        name = "cockroachdb"
        driver = "psycopg2"

    known_wire = driver_of(Dialect())
    assert known_wire.name == "psycopg2"
    assert known_wire.role_query is None
    assert known_wire.connect_timeout_param(5) == {"connect_timeout": 5}

    Dialect.driver = "carrier_pigeon"
    neutral = driver_of(Dialect())
    assert neutral == Driver("carrier_pigeon")
    assert neutral.has_server, "it is not known how to ask it, but there are sessions to be lost"
    assert neutral.socket_defaults(Lifecycle(), {}) == {}
    neutral.after_connect(object(), Lifecycle())
    assert neutral.socket_fd(object()) is None
    assert neutral.transaction_status(object()) is None
