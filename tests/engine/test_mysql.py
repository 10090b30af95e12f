"""MySQL's drivers on a real MariaDB: sockets, deadlines, the prober, a promoted replica, start-up validation."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.config import Lifecycle
from resilientdb.engine.drivers import driver_of
from resilientdb.testing import faults
from resilientdb.testing.mariadb import MariaDB
from tests.engine.conftest import until
from tests.engine.provoking import ASYNC
from tests.engine.test_drivers import Opened, linux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing.toxiproxy import Proxy

DRIVERS = ["pymysql", "aiomysql", "asyncmy"]
LATE = 0.1
"""Seconds after its deadline by which a call must have ended, in the best of three: machines have pauses."""


class App:
    """An engine of the library, sync or async, and one way to use both: each call is one transaction."""

    def __init__(self, url: str, driver: str, **options: Any) -> None:
        self.loop = asyncio.new_event_loop() if driver in ASYNC else None
        make: Any = rdb.create_async_engine if self.loop else rdb.create_engine
        self.engine = make(url, **options)
        self.control: Any = rdb.control(self.engine)

    def run(self, sql: str) -> Any:
        if self.loop is None:
            with self.engine.begin() as connection:
                result = connection.exec_driver_sql(sql)
                return result.scalar() if result.returns_rows else None
        return self.loop.run_until_complete(self._run(sql))

    async def _run(self, sql: str) -> Any:
        async with self.engine.begin() as connection:
            result = await connection.exec_driver_sql(sql)
            return result.scalar() if result.returns_rows else None

    def close(self) -> None:
        if self.loop is None:
            self.engine.dispose()
            return
        self.loop.run_until_complete(self.engine.dispose())
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def apps(driver: str) -> Iterator[Callable[..., App]]:
    made: list[App] = []

    def make(url: str, **options: Any) -> App:
        made.append(App(url, driver, **options))
        return made[-1]

    yield make
    for app in made:
        app.close()


@pytest.fixture
def opened(driver: str, resilientdb_mariadb: MariaDB) -> Iterator[Callable[..., Opened]]:
    made: list[Opened] = []

    def make(query: str = "", lifecycle: Lifecycle | None = None) -> Opened:
        made.append(Opened(resilientdb_mariadb.url(driver) + query, driver, lifecycle))
        return made[-1]

    yield make
    for one in made:
        one.close()


# -- what is known of the drivers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_described_under_both_names(driver: str, dialect: str) -> None:
    make: Any = rdb.create_async_engine if driver in ASYNC else rdb.create_engine
    engine = make(f"{dialect}+{driver}://u@h/d")
    assert driver_of(engine.dialect).name == driver
    assert driver_of(engine.dialect).role_query is not None


@linux
def test_socket_options_are_set(opened: Callable[..., Opened]) -> None:
    lifecycle = Lifecycle(connect_timeout=7, tcp_user_timeout=3.25, keepalive_idle=9)
    options = {"keepalive": 1, "idle": 9, "interval": 3, "count": 3, "user_timeout": 3250}
    assert opened(lifecycle=lifecycle).options() == options


def test_no_descriptor_after_the_end(driver: str, resilientdb_mariadb: MariaDB) -> None:
    one = Opened(resilientdb_mariadb.url(driver), driver)
    fd = one.driver.socket_fd(one.dbapi)
    assert fd is not None
    one.close()
    assert one.driver.socket_fd(one.dbapi) is None
    one.driver.after_connect(one.dbapi, Lifecycle())
    assert one.driver.socket_fd(object()) is None
    assert one.driver.transaction_status(object()) is None


def test_transaction_status(opened: Callable[..., Opened]) -> None:
    one = opened()

    def status() -> tuple[str | None, bool]:
        return one.driver.transaction_status(one.dbapi), one.driver.is_idle(one.dbapi)

    assert status() == (None, False), "without autocommit a SELECT may have begun a transaction, unnoticed"
    one.run("CREATE TEMPORARY TABLE t (k int PRIMARY KEY) ENGINE=InnoDB")
    one.run("INSERT INTO t VALUES (1)")
    assert status() == ("undecided", False)
    assert not one.driver.has_declared_read_only(one.dbapi)
    one.wait(one.connection.rollback())
    one.run("SET autocommit = 1")
    assert status() == ("idle", True)
    one.run("BEGIN")
    assert status() == ("undecided", False)
    one.run("ROLLBACK")
    one.run("START TRANSACTION READ ONLY")
    assert one.driver.has_declared_read_only(one.dbapi)
    one.run("ROLLBACK")
    assert not one.driver.has_declared_read_only(one.dbapi)


def test_role(opened: Callable[..., Opened], resilientdb_mariadb: MariaDB) -> None:
    one = opened()

    def role() -> str:
        return one.driver.read_role(one.run(str(one.driver.role_query)).one())

    assert role() == "primary"
    resilientdb_mariadb.query("SET GLOBAL read_only = 1")
    try:
        assert role() == "replica"
    finally:
        resilientdb_mariadb.query("SET GLOBAL read_only = 0")
    for row, expected in {("OFF", 0): "primary", ("NO_LOCK", 0): "replica", (0, "1"): "replica"}.items():
        assert one.driver.read_role(row) == expected


# -- deadlines ------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_a_statement(
    apps: Callable[..., App], driver: str, resilientdb_mariadb: MariaDB
) -> None:
    app = apps(resilientdb_mariadb.url(driver))
    app.run("SELECT 1")
    assert 0.4 < min(cut_after(app, "SELECT SLEEP(5)") for _ in range(3)) < 0.5 + LATE
    assert app.run("SELECT 1") == 1


def cut_after(app: App, sql: str) -> float:
    """Seconds after which a deadline of 0.5 s has ended the call."""
    began = time.monotonic()
    with pytest.raises(rdb.DeadlineExceeded), rdb.deadline(0.5):
        app.run(sql)
    return time.monotonic() - began


@pytest.mark.parametrize("connected", [True, False], ids=["in a statement", "while connecting"])
def test_a_deadline_ends_silence(
    apps: Callable[..., App],
    driver: str,
    resilientdb_mariadb: MariaDB,
    resilientdb_mariadb_proxy: Proxy,
    connected: bool,
) -> None:
    """Without a prober, which would notice first."""
    app = apps(
        resilientdb_mariadb.url(driver, port=resilientdb_mariadb_proxy.listen_port),
        resilience=rdb.Resilience(
            breaker=rdb.BreakerPolicy(enabled=False), lifecycle=rdb.Lifecycle(connect_timeout=1.0)
        ),
    )
    seconds = []
    for _ in range(3):
        if connected:
            app.run("SELECT 1")
        with faults.hang(resilientdb_mariadb_proxy):
            seconds.append(cut_after(app, "SELECT 1"))
    assert 0.4 < min(seconds) < 0.5 + LATE
    assert app.run("SELECT 1") == 1


# -- the prober -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hang", "stopped process", "down"])
def test_the_prober_opens_the_circuit_and_heals_it(
    apps: Callable[..., App],
    driver: str,
    resilientdb_mariadb: MariaDB,
    resilientdb_mariadb_proxy: Proxy,
    how: str,
) -> None:
    app = apps(resilientdb_mariadb.url(driver, port=resilientdb_mariadb_proxy.listen_port))
    app.run("SELECT 1")
    breaker = app.control.breaker()
    until(lambda: bool(breaker.current_state == "closed"), "closed")
    time.sleep(0.3)  # the prober is connected, too
    block = {
        "hang": lambda: faults.hang(resilientdb_mariadb_proxy),
        "down": lambda: faults.down(resilientdb_mariadb_proxy),
        "stopped process": resilientdb_mariadb.hang,
    }[how]
    context: Any = block()
    with context:
        began = time.monotonic()
        until(lambda: bool(breaker.current_state == "open"), "open")
        noticed = time.monotonic() - began
        with pytest.raises(rdb.CircuitOpen):
            app.run("SELECT 1")
    assert noticed < 1.5
    began = time.monotonic()
    until(lambda: bool(breaker.current_state != "open"), "no longer open")
    assert time.monotonic() - began < 1.5
    until(lambda: _answers(app), "answers")


def _answers(app: App) -> bool:
    with contextlib.suppress(rdb.ResilienceError, sa.exc.DBAPIError):
        return bool(app.run("SELECT 1") == 1)
    return False


# -- a primary and its replica --------------------------------------------------------------------------------------


def test_writes_follow_the_primary(apps: Callable[..., App], driver: str) -> None:
    """The primary is made read-only and the replica promoted, as an operator does; nobody tells the application."""
    with MariaDB() as primary, MariaDB.replica(primary) as replica:
        primary.query("CREATE TABLE t (k int PRIMARY KEY)", database="app")
        app = apps(primary.url(driver), replicas=[replica.address])
        app.run("INSERT INTO t VALUES (1)")
        replica.wait_caught_up(primary)
        with rdb.read_only():
            assert app.run("SELECT @@port") == replica.port
            assert app.run("SELECT count(*) FROM t") == 1
        primary.query("SET GLOBAL read_only = 1")
        with pytest.raises((rdb.NoPrimaryAvailable, sa.exc.OperationalError)) as caught:
            app.run("INSERT INTO t VALUES (2)")
        if not isinstance(caught.value, rdb.NoPrimaryAvailable):
            assert rdb.classify(caught.value) is rdb.Fault.WRONG_ROLE
        replica.wait_caught_up(primary)
        replica.promote()
        until(lambda: bool(app.control.snapshot().primary == replica.address), "the replica is the primary")
        app.run("INSERT INTO t VALUES (3)")
        assert replica.query("SELECT k FROM t ORDER BY k", database="app") == [(1,), (3,)]
        primary.demote(replica)
        primary.wait_caught_up(replica)
        with rdb.read_only():
            until(lambda: bool(app.run("SELECT @@port") == primary.port), "reads go to the old primary")
            assert app.run("SELECT count(*) FROM t") == 2


# -- start-up validation --------------------------------------------------------------------------------------------


def test_validation(apps: Callable[..., App], driver: str, resilientdb_mariadb: MariaDB) -> None:
    app = apps(resilientdb_mariadb.url(driver), pool_size=5, max_overflow=10)
    app.control.validate(processes=6)
    with pytest.raises(rdb.ConfigurationError) as caught:
        app.control.validate(processes=7)
    assert caught.value.key == "pool_size"
    for words in (
        f"{resilientdb_mariadb.address} has room for 100 connections (max_connections 100)",
        "7 processes x (pool_size 5 + max_overflow 10) may ask for 105",
    ):
        assert words in str(caught.value)


def test_an_account_may_have_less(
    apps: Callable[..., App], driver: str, resilientdb_mariadb: MariaDB
) -> None:
    resilientdb_mariadb.query("CREATE USER few@'%' WITH MAX_USER_CONNECTIONS 4")
    try:
        url = resilientdb_mariadb.url(driver, database="").replace("app@", "few@")
        with pytest.raises(
            rdb.ConfigurationError, match=r"has room for 4 connections \(max_user_connections 4\)"
        ):
            apps(url).control.validate()
    finally:
        resilientdb_mariadb.query("DROP USER few@'%'")


def test_validation_tells_the_role_and_a_wrong_password(
    apps: Callable[..., App], driver: str, resilientdb_mariadb: MariaDB
) -> None:
    same = resilientdb_mariadb.url(host="localhost").partition("@")[2].partition("/")[0]
    with pytest.raises(rdb.ConfigurationError, match="is a primary, not a replica"):
        apps(resilientdb_mariadb.url(driver), replicas=[same]).control.validate(processes=None)
    with pytest.raises(rdb.ConfigurationError, match="check the user, password") as caught:
        apps(resilientdb_mariadb.url(driver).replace("app@", "app:hunter2@")).control.validate()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("10.5.27-MariaDB-log", "is MariaDB 10.5.27; 10.6 or newer is needed"),
        ("5.7.44-log", "is MySQL 5.7.44; 8.0 or newer is needed"),
        ("8.0.36", None),
    ],
)
def test_a_server_too_old_is_said_to_be(
    version: str, words: str | None, resilientdb_mariadb: MariaDB
) -> None:
    """A real server that says that it is another: ``version`` may be set at the start."""
    with MariaDB(name="pretending", settings={"version": version}) as server:
        control = rdb.control(rdb.create_engine(server.url()))
        if words is None:
            control.validate()
        else:
            with pytest.raises(rdb.ConfigurationError, match=words):
                control.validate()


# -- the test server itself -----------------------------------------------------------------------------------------


def test_the_server_s_life() -> None:
    with MariaDB(name="life") as server:
        assert server.running
        assert "running" in repr(server)
        server.query("CREATE TABLE t (k int)", database="app")
        pid = server.pid
        server.kill()
        assert server.pid is None
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((server.host, server.port), timeout=1).close()
        server.start()
        assert server.pid != pid
        assert server.query("SELECT count(*) FROM t", database="app") == [(0,)]
        with server.hang():
            answered = threading.Event()

            def ask() -> None:
                server.query("SELECT 1")
                answered.set()

            thread = threading.Thread(target=ask)
            thread.start()
            assert not answered.wait(0.2)
        assert answered.wait(10)
        thread.join()
        server.restart()
    assert not server.data.exists()
