"""Every fault provoked on a real MariaDB, through SQLAlchemy, with each of the three drivers."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Any

import pytest

import resilientdb as rdb
from resilientdb.engine.drivers import driver_of
from resilientdb.policy.faults import Fault, Phase, classify, evidence
from resilientdb.testing import faults
from resilientdb.testing.mariadb import MariaDB
from resilientdb.testing.processes import free_port
from tests.engine.provoking import Clients, in_thread, provoke, two_rows, until
from tests.engine.seen import seen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing.toxiproxy import Proxy

DRIVERS = ["pymysql", "aiomysql", "asyncmy"]
SLEEPING = "SELECT count(*) FROM information_schema.processlist WHERE id = {} AND info LIKE '%SLEEP(30)%'"
GONE = "SELECT count(*) = 0 FROM information_schema.processlist WHERE id = {}"


@pytest.fixture(params=DRIVERS)
def clients(request: pytest.FixtureRequest, resilientdb_mariadb: MariaDB) -> Iterator[Clients]:
    with contextlib.closing(Clients(resilientdb_mariadb, request.param)) as made:
        yield made


@pytest.fixture
def table(clients: Clients) -> Iterator[str]:
    with two_rows(clients, "ENGINE=InnoDB", database="app") as name:
        yield name


@pytest.fixture
def account(clients: Clients, resilientdb_mariadb: MariaDB) -> Iterator[str]:
    name = f"r_{uuid.uuid4().hex[:12]}"
    resilientdb_mariadb.query(f"CREATE USER {name}@'%' IDENTIFIED BY 'hunter2'")
    resilientdb_mariadb.query(f"GRANT ALL ON app.* TO {name}@'%'")
    yield name
    clients.close()
    resilientdb_mariadb.query(f"DROP USER {name}@'%'")


def code_of(error: Any) -> int:
    return int(error.orig.args[0])


# --- connecting ---


def test_refused(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(port=free_port())).connect)
    assert seen("refused", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT
    assert classify(error, Phase.STATEMENT) is Fault.CANNOT_CONNECT


def test_unknown_host(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(host="no-such-host.invalid")).connect)
    assert seen("unknown-host", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_silent_server(clients: Clients, resilientdb_mariadb_proxy: Proxy) -> None:
    """None of the drivers would end this by itself: they hold TCP's handshake to their timeout, and no more."""
    client = clients.guarded(
        clients.through(resilientdb_mariadb_proxy),
        resilience=rdb.Resilience(
            lifecycle=rdb.Lifecycle(connect_timeout=0.5),
            retry=rdb.RetryPolicy(attempts=1),
            breaker=rdb.BreakerPolicy(enabled=False),
        ),
    )
    with faults.hang(resilientdb_mariadb_proxy):
        error = provoke(client.connect)
    assert seen("silent-connect", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_accepted_and_closed(clients: Clients, resilientdb_mariadb_proxy: Proxy) -> None:
    client = clients.new(clients.through(resilientdb_mariadb_proxy))
    with faults.reset(resilientdb_mariadb_proxy):
        error = provoke(client.connect)
    assert seen("reset-connect", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_missing_database(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(database="nowhere").replace("app@", "root@")).connect)
    assert seen("unknown-database", clients.driver, error, Phase.CONNECT) is Fault.CONFIGURATION
    assert code_of(error) == 1049


def test_wrong_password(clients: Clients, account: str) -> None:
    right = clients.url().replace("app@", f"{account}:hunter2@")
    clients.connected(right)
    error = provoke(clients.new(right.replace("hunter2", "wrong-hunter2")).connect)
    assert seen("wrong-password", clients.driver, error, Phase.CONNECT) is Fault.CONFIGURATION
    assert code_of(error) == 1045


def test_no_connection_left(clients: Clients) -> None:
    server = clients.server
    server.query("SET GLOBAL max_connections = 10")
    try:
        error = provoke(lambda: [clients.connected() for _ in range(12)])
    finally:
        clients.close()
        until(server, "SELECT count(*) < 9 FROM information_schema.processlist")
        server.query("SET GLOBAL max_connections = 100")
    assert seen("too-many-connections", clients.driver, error, Phase.CONNECT) is Fault.OVERLOAD
    assert code_of(error) == 1040


def test_no_connection_left_for_the_account(clients: Clients, account: str) -> None:
    clients.server.query(f"ALTER USER {account}@'%' WITH MAX_USER_CONNECTIONS 1")
    url = clients.url().replace("app@", f"{account}:hunter2@")
    clients.connected(url)
    error = provoke(clients.new(url).connect)
    assert seen("account-limit", clients.driver, error, Phase.CONNECT) is Fault.OVERLOAD
    assert code_of(error) == 1226


# --- in a statement ---


def test_stopped_in_query(clients: Clients) -> None:
    with MariaDB(name="stopped") as server:
        client = clients.connected(server.url(clients.driver))
        number = client.value("SELECT connection_id()")
        thread, errors = in_thread(lambda: client.run("SELECT SLEEP(30)"))
        until(server, SLEEPING.format(number))
        server.stop("fast")
        thread.join(10)
        clients.close()
    assert seen("stopped", clients.driver, errors[0]) is Fault.CONNECTION_LOST
    assert errors[0].connection_invalidated  # type: ignore[attr-defined]


def test_killed_in_query(clients: Clients) -> None:
    client = clients.connected()
    number = client.value("SELECT connection_id()")
    thread, errors = in_thread(lambda: client.run("SELECT SLEEP(30)"))
    until(clients.server, SLEEPING.format(number))
    clients.server.query(f"KILL {number}")
    thread.join(10)
    assert seen("killed", clients.driver, errors[0]) is Fault.CONNECTION_LOST
    assert errors[0].connection_invalidated  # type: ignore[attr-defined]


def test_killed_while_idle(clients: Clients) -> None:
    client = clients.connected()
    number = client.value("SELECT connection_id()")
    clients.server.query(f"KILL {number}")
    until(clients.server, GONE.format(number))
    error = provoke(lambda: client.run("SELECT 1"))
    assert seen("killed-idle", clients.driver, error) is Fault.CONNECTION_LOST


def test_cut_in_query(clients: Clients, resilientdb_mariadb_proxy: Proxy) -> None:
    client = clients.connected(clients.through(resilientdb_mariadb_proxy))
    client.run("SELECT 1")
    with faults.down(resilientdb_mariadb_proxy):
        error = provoke(lambda: client.run("SELECT 1"))
    assert seen("cut", clients.driver, error) is Fault.CONNECTION_LOST


def test_idle_in_transaction_too_long(clients: Clients, table: str) -> None:
    client = clients.connected()
    number = client.value("SELECT connection_id()")
    client.run("SET idle_transaction_timeout = 1")
    client.run(f"INSERT INTO {table} VALUES (3, 0)")
    until(clients.server, GONE.format(number))
    error = provoke(lambda: client.run("SELECT 1"))
    assert seen("idle-in-transaction", clients.driver, error) is Fault.CONNECTION_LOST


def test_deadlock(clients: Clients, table: str) -> None:
    one, two = clients.connected(), clients.connected()
    one.run(f"UPDATE {table} SET n = 1 WHERE k = 1")
    two.run(f"UPDATE {table} SET n = 1 WHERE k = 2")
    two.run(f"INSERT INTO {table} VALUES (5, 0), (6, 0), (7, 0)")  # the one that did less is the victim
    thread, errors = in_thread(lambda: two.run(f"UPDATE {table} SET n = 1 WHERE k = 1"))
    until(clients.server, "SELECT count(*) FROM information_schema.innodb_lock_waits")
    error = provoke(lambda: one.run(f"UPDATE {table} SET n = 1 WHERE k = 2"))
    one.rollback()
    thread.join(10)
    assert not errors
    assert (code_of(error), seen("deadlock", clients.driver, error)) == (1213, Fault.RETRY_TRANSACTION)


def test_lock_timeout(clients: Clients, table: str) -> None:
    holder, waiter = clients.connected(), clients.connected()
    holder.run(f"SELECT * FROM {table} WHERE k = 1 FOR UPDATE")
    error = provoke(lambda: waiter.run(f"SELECT * FROM {table} WHERE k = 1 FOR UPDATE NOWAIT"))
    assert (code_of(error), seen("lock-timeout", clients.driver, error)) == (1205, Fault.TIMEOUT)


def test_statement_timeout(clients: Clients) -> None:
    client = clients.connected()
    client.run("SET max_statement_time = 0.05")
    error = provoke(lambda: client.run("SELECT SLEEP(30)"))
    assert (code_of(error), seen("statement-timeout", clients.driver, error)) == (1969, Fault.TIMEOUT)


def test_interrupted(clients: Clients) -> None:
    client = clients.connected()
    number = client.value("SELECT connection_id()")
    thread, errors = in_thread(lambda: client.run("SELECT SLEEP(30)"))
    until(clients.server, SLEEPING.format(number))
    clients.server.query(f"KILL QUERY {number}")
    thread.join(10)
    assert (code_of(errors[0]), seen("interrupted", clients.driver, errors[0])) == (1317, Fault.TIMEOUT)


@pytest.fixture
def read_only(resilientdb_mariadb: MariaDB) -> Iterator[None]:
    yield
    resilientdb_mariadb.query("SET GLOBAL read_only = 0")


def test_write_on_a_read_only_server(clients: Clients, table: str, read_only: None) -> None:
    client = clients.connected()
    clients.server.query("SET GLOBAL read_only = 1")
    error = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9, 0)"))
    assert (code_of(error), seen("read-only-server", clients.driver, error)) == (1290, Fault.WRONG_ROLE)


def test_the_application_s_own_read_only_transaction(clients: Clients, table: str) -> None:
    client = clients.guarded()
    client.connect()
    client.run("START TRANSACTION READ ONLY")
    error: Any = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9, 0)"))
    assert (code_of(error), seen("own-read-only", clients.driver, error)) == (1792, Fault.APPLICATION)
    assert not error.connection_invalidated


@pytest.mark.parametrize(
    ("event", "statement", "code"),
    [
        ("syntax", "SELEC 1", 1064),
        ("unique", "INSERT INTO {table} VALUES (1, 0)", 1062),
        ("not-null", "INSERT INTO {table} VALUES (3, NULL)", 1048),
    ],
)
def test_the_application_s_own_errors(
    clients: Clients, table: str, event: str, statement: str, code: int
) -> None:
    client = clients.connected()
    error = provoke(lambda: client.run(statement.format(table=table)))
    assert (code_of(error), seen(event, clients.driver, error)) == (code, Fault.APPLICATION)
    assert client.value("SELECT 1") == 1


# --- at COMMIT ---


@pytest.mark.parametrize("lost", ["reply", "request"])
def test_commit_without_an_answer(
    clients: Clients, table: str, resilientdb_mariadb_proxy: Proxy, lost: str
) -> None:
    client = clients.connected(clients.through(resilientdb_mariadb_proxy))
    client.run(f"INSERT INTO {table} VALUES (7, 0)")
    fault = faults.reply_lost if lost == "reply" else faults.commit_lost
    with fault(resilientdb_mariadb_proxy):
        error = provoke(client.commit)
    assert seen("lost-commit", clients.driver, error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.CONNECTION_LOST
    written = clients.server.query(f"SELECT count(*) FROM {table} WHERE k = 7", database="app")[0][0]
    assert written == (1 if lost == "reply" else 0)  # the same error either way


def test_killed_before_commit(clients: Clients, table: str) -> None:
    client = clients.connected()
    client.run(f"INSERT INTO {table} VALUES (7, 0)")
    number = client.value("SELECT connection_id()")
    clients.server.query(f"KILL {number}")
    until(clients.server, GONE.format(number))
    error = provoke(client.commit)
    assert seen("killed-commit", clients.driver, error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.CONNECTION_LOST


def test_commit_on_a_server_that_became_read_only(clients: Clients, table: str, read_only: None) -> None:
    client = clients.connected()
    client.run(f"INSERT INTO {table} VALUES (7, 0)")
    clients.server.query("SET GLOBAL read_only = 1")
    error = provoke(client.commit)
    assert seen("read-only-commit", clients.driver, error, Phase.COMMIT) is Fault.WRONG_ROLE
    client.rollback()
    assert clients.server.query(f"SELECT count(*) FROM {table} WHERE k = 7", database="app")[0][0] == 0


# --- cancelled ---


@pytest.mark.parametrize("clients", ["aiomysql", "asyncmy"], indirect=True)
def test_cancelled_in_query(clients: Clients) -> None:
    client = clients.connected()
    error = provoke(lambda: client.run_cancelled("SELECT SLEEP(5)"))
    assert seen("cancelled", clients.driver, error) is Fault.CANCELLED
    assert classify(error, Phase.COMMIT) is Fault.IN_DOUBT


def test_the_login_keeps_to_the_users_own_timeout(clients: Clients) -> None:
    client = clients.guarded(clients.url() + "?connect_timeout=7")
    client.connect()
    raw = client.wait(client.connection.get_raw_connection()) if client.loop else client.connection.connection
    driver = driver_of(client.engine.dialect)
    assert driver.socket_fd(raw.dbapi_connection) is not None
    assert getattr(raw.driver_connection, "_read_timeout", None) is None, "statements have no time limit"
