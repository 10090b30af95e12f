"""Every fault provoked on a real server, through SQLAlchemy, with each of the four PostgreSQL drivers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from resilientdb.engine.drivers import driver_of
from resilientdb.policy.faults import Fault, Phase, classify, describe, evidence, sqlstate_of
from resilientdb.testing import faults
from resilientdb.testing.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing.postgres import Postgres
    from resilientdb.testing.toxiproxy import Proxy

DRIVERS = ["psycopg", "psycopg_async", "psycopg2", "asyncpg"]


class Client:
    """One connection of one driver, sync or async, driven from one thread."""

    def __init__(self, url: str, driver: str, **connect_args: Any) -> None:
        self.loop = asyncio.new_event_loop() if driver in {"psycopg_async", "asyncpg"} else None
        make: Any = create_async_engine if self.loop else sa.create_engine
        self.engine = make(url, poolclass=NullPool, connect_args=connect_args)
        self.connection: Any = None

    def wait(self, result: Any) -> Any:
        return self.loop.run_until_complete(result) if self.loop else result

    def connect(self) -> None:
        self.connection = self.wait(self.engine.connect().start()) if self.loop else self.engine.connect()

    def run(self, sql: str) -> Any:
        return self.wait(self.connection.exec_driver_sql(sql))

    def value(self, sql: str) -> Any:
        return self.run(sql).scalar()

    def commit(self) -> None:
        self.wait(self.connection.commit())

    def rollback(self) -> None:
        self.wait(self.connection.rollback())

    def close(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(Exception):
                self.wait(self.connection.invalidate())
            with contextlib.suppress(Exception):
                self.wait(self.connection.close())
        self.wait(self.engine.dispose())
        if self.loop:
            self.loop.run_until_complete(asyncio.sleep(0.01))  # transports say goodbye
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


class Clients:
    """Makes clients of the driver under test, and closes them."""

    def __init__(self, postgres: Postgres, driver: str) -> None:
        self.postgres = postgres
        self.driver = driver
        self.made: list[Client] = []

    def new(self, url: str | None = None, **connect_args: Any) -> Client:
        client = Client(url or self.url(), self.driver, **connect_args)
        self.made.append(client)
        return client

    def connected(self, url: str | None = None, **connect_args: Any) -> Client:
        client = self.new(url, **connect_args)
        client.connect()
        return client

    def url(self, **parts: Any) -> str:
        return self.postgres.url(self.driver, **parts)

    def close(self) -> None:
        while self.made:
            self.made.pop().close()

    def through(self, proxy: Proxy) -> str:
        return self.url(port=proxy.listen_port)


@pytest.fixture(params=DRIVERS)
def clients(request: pytest.FixtureRequest, resilientdb_postgres: Postgres) -> Iterator[Clients]:
    made = Clients(resilientdb_postgres, request.param)
    yield made
    made.close()


@pytest.fixture
def table(clients: Clients, resilientdb_postgres: Postgres) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex[:12]}"
    resilientdb_postgres.query(f"CREATE TABLE {name} (k int PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    resilientdb_postgres.query(f"INSERT INTO {name} VALUES (1, 0), (2, 0)")
    yield name
    clients.close()  # their locks would keep it
    resilientdb_postgres.query(f"DROP TABLE {name}")


@pytest.fixture
def role(clients: Clients, resilientdb_postgres: Postgres) -> Iterator[str]:
    name = f"r_{uuid.uuid4().hex[:12]}"
    resilientdb_postgres.query(f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
    yield name
    clients.close()
    resilientdb_postgres.query(f"DROP ROLE {name}")


def provoke(call: Callable[[], object]) -> BaseException:
    """The error that ``call`` raises, checked to be told without its secrets."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - cancellations are wanted too
        caught = error
    else:
        pytest.fail("nothing went wrong")
    line = describe(caught)
    assert "\n" not in line
    for secret in ("postgres@", "user", "hunter2", "SELECT", "INSERT", "VALUES", "t_"):
        assert secret not in line.removeprefix("psycopg").removeprefix("asyncpg")
    return caught


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


# --- connecting ---


def test_refused(clients: Clients) -> None:
    port = free_port()
    error = provoke(clients.new(clients.url(port=port)).connect)
    assert classify(error, Phase.CONNECT) is Fault.CANNOT_CONNECT
    assert f"127.0.0.1:{port}" in describe(error)


def test_refused_by_every_address_of_a_name(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(host="localhost", port=free_port())).connect)
    assert classify(error, Phase.CONNECT) is Fault.CANNOT_CONNECT
    assert classify(error, Phase.STATEMENT) is Fault.CANNOT_CONNECT


def test_unknown_host(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(host="no-such-host.invalid")).connect)
    assert classify(error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_silent_server(clients: Clients, resilientdb_proxy: Proxy) -> None:
    client = clients.new(clients.through(resilientdb_proxy))
    timeout = driver_of(client.engine.dialect).connect_timeout_param(0.5)
    client = clients.new(clients.through(resilientdb_proxy), **timeout)
    with faults.hang(resilientdb_proxy):
        error = provoke(client.connect)
    assert classify(error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_accepted_and_closed(clients: Clients, resilientdb_proxy: Proxy) -> None:
    client = clients.new(clients.through(resilientdb_proxy))
    with faults.reset(resilientdb_proxy):
        error = provoke(client.connect)
    assert classify(error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_missing_database(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(database="nowhere")).connect)
    assert classify(error, Phase.CONNECT) is Fault.CONFIGURATION
    if clients.driver == "asyncpg":
        assert sqlstate_of(error) == "3D000"


def test_wrong_password(clients: Clients, role: str) -> None:
    postgres = clients.postgres
    rules = Path(postgres.query("SHOW hba_file")[0][0])
    before = rules.read_text()
    with rules.open("w") as file:
        file.write(f"host all {role} 127.0.0.1/32 scram-sha-256\n{before}")
    postgres.reload()
    try:
        right = clients.url().replace("postgres@", f"{role}:hunter2@")
        clients.connected(right)
        error = provoke(clients.new(right.replace("hunter2", "wrong-hunter2")).connect)
    finally:
        with rules.open("w") as file:
            file.write(before)
        postgres.reload()
    assert classify(error, Phase.CONNECT) is Fault.CONFIGURATION


def test_too_many_connections(clients: Clients, role: str) -> None:
    clients.postgres.query(f"ALTER ROLE {role} CONNECTION LIMIT 1")
    url = clients.url().replace("postgres@", f"{role}@")
    clients.connected(url)
    error = provoke(clients.new(url).connect)
    assert classify(error, Phase.CONNECT) is Fault.OVERLOAD
    assert sqlstate_of(error) in {"53300", None}


def test_a_standby_where_a_primary_was_asked_for(clients: Clients, resilientdb_standby: Postgres) -> None:
    url = f"{resilientdb_standby.url(clients.driver)}?target_session_attrs=read-write"
    error = provoke(clients.new(url).connect)
    assert classify(error, Phase.CONNECT) is Fault.WRONG_ROLE


# --- in a statement ---


def test_terminated_in_query(clients: Clients) -> None:
    client = clients.connected()
    pid = client.value("SELECT pg_backend_pid()")
    thread, errors = in_thread(lambda: client.run("SELECT pg_sleep(30)"))
    until(clients.postgres, f"SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = {pid}")
    clients.postgres.query(f"SELECT pg_terminate_backend({pid})")
    thread.join(10)
    assert classify(errors[0]) is Fault.CONNECTION_LOST
    assert errors[0].connection_invalidated  # type: ignore[attr-defined]


def test_terminated_while_idle(clients: Clients) -> None:
    client = clients.connected()
    pid = client.value("SELECT pg_backend_pid()")
    clients.postgres.query(f"SELECT pg_terminate_backend({pid})")
    assert classify(provoke(lambda: client.run("SELECT 1"))) is Fault.CONNECTION_LOST


def test_cut_in_query(clients: Clients, resilientdb_proxy: Proxy) -> None:
    client = clients.connected(clients.through(resilientdb_proxy))
    client.run("SELECT 1")
    with faults.down(resilientdb_proxy):
        assert classify(provoke(lambda: client.run("SELECT 1"))) is Fault.CONNECTION_LOST


def test_idle_in_transaction_too_long(clients: Clients) -> None:
    client = clients.connected()
    pid = client.value("SELECT pg_backend_pid()")
    client.run("SET idle_in_transaction_session_timeout = 20")
    until(clients.postgres, f"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {pid}")
    error = provoke(lambda: client.run("SELECT 1"))
    assert classify(error) is Fault.CONNECTION_LOST


@pytest.mark.parametrize(
    ("statement", "code", "fault"),
    [
        ("SELEC 1", "42601", Fault.APPLICATION),
        ("SELECT 1/0", "22012", Fault.APPLICATION),
        ("INSERT INTO {table} VALUES (1)", "23505", Fault.APPLICATION),
        ("INSERT INTO {table} VALUES (3, NULL)", "23502", Fault.APPLICATION),
    ],
)
def test_the_application_s_own_errors(
    clients: Clients, table: str, statement: str, code: str, fault: Fault
) -> None:
    client = clients.connected()
    error = provoke(lambda: client.run(statement.format(table=table)))
    assert (sqlstate_of(error), classify(error)) == (code, fault)
    again = provoke(lambda: client.run("SELECT 1"))
    assert (sqlstate_of(again), classify(again)) == ("25P02", Fault.APPLICATION)
    client.rollback()
    assert client.value("SELECT 1") == 1


def test_statement_timeout(clients: Clients) -> None:
    client = clients.connected()
    client.run("SET statement_timeout = 50")
    error = provoke(lambda: client.run("SELECT pg_sleep(10)"))
    assert (sqlstate_of(error), classify(error)) == ("57014", Fault.TIMEOUT)


def test_lock_timeout(clients: Clients, table: str) -> None:
    holder, waiter = clients.connected(), clients.connected()
    holder.run(f"SELECT * FROM {table} WHERE k = 1 FOR UPDATE")
    waiter.run("SET lock_timeout = 50")
    error = provoke(lambda: waiter.run(f"UPDATE {table} SET n = 1 WHERE k = 1"))
    assert (sqlstate_of(error), classify(error)) == ("55P03", Fault.TIMEOUT)


def test_deadlock(clients: Clients, table: str) -> None:
    one, two = clients.connected(), clients.connected()
    two.run("SET deadlock_timeout = '60s'")  # so that the other is the victim
    one.run("SET deadlock_timeout = '50ms'")
    one.run(f"UPDATE {table} SET n = 1 WHERE k = 1")
    two.run(f"UPDATE {table} SET n = 1 WHERE k = 2")
    pid = two.value("SELECT pg_backend_pid()")
    thread, errors = in_thread(lambda: two.run(f"UPDATE {table} SET n = 1 WHERE k = 1"))
    until(clients.postgres, f"SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {pid}")
    error = provoke(lambda: one.run(f"UPDATE {table} SET n = 1 WHERE k = 2"))
    one.rollback()
    thread.join(10)
    assert not errors
    assert (sqlstate_of(error), classify(error)) == ("40P01", Fault.RETRY_TRANSACTION)


def test_serialization_failure(clients: Clients, table: str) -> None:
    client, other = clients.connected(), clients.connected()
    client.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    client.run(f"SELECT * FROM {table}")
    other.run(f"UPDATE {table} SET n = n + 1")
    other.commit()
    error = provoke(lambda: client.run(f"UPDATE {table} SET n = n + 1"))
    assert (sqlstate_of(error), classify(error)) == ("40001", Fault.RETRY_TRANSACTION)


def test_write_on_a_standby(clients: Clients, table: str, resilientdb_standby: Postgres) -> None:
    resilientdb_standby.wait_caught_up(clients.postgres)
    client = clients.connected(resilientdb_standby.url(clients.driver))
    error = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9)"))
    assert (sqlstate_of(error), classify(error)) == ("25006", Fault.WRONG_ROLE)


# --- at COMMIT ---


@pytest.mark.parametrize("lost", ["reply", "request"])
def test_commit_without_an_answer(clients: Clients, table: str, resilientdb_proxy: Proxy, lost: str) -> None:
    client = clients.connected(clients.through(resilientdb_proxy))
    client.run(f"INSERT INTO {table} VALUES (7)")
    fault = faults.reply_lost if lost == "reply" else faults.commit_lost
    with fault(resilientdb_proxy):
        error = provoke(client.commit)
    assert classify(error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.CONNECTION_LOST
    written = clients.postgres.query(f"SELECT count(*) FROM {table} WHERE k = 7")[0][0]
    assert written == (1 if lost == "reply" else 0)  # the same error either way


def test_terminated_before_commit(clients: Clients, table: str) -> None:
    client = clients.connected()
    client.run(f"INSERT INTO {table} VALUES (7)")
    pid = client.value("SELECT pg_backend_pid()")
    clients.postgres.query(f"SELECT pg_terminate_backend({pid})")
    error = provoke(client.commit)
    assert classify(error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.CONNECTION_LOST


def test_commit_refused_by_a_deferred_constraint(clients: Clients, table: str) -> None:
    clients.postgres.query(
        f"ALTER TABLE {table} ADD FOREIGN KEY (n) REFERENCES {table} DEFERRABLE INITIALLY DEFERRED NOT VALID"
    )
    client = clients.connected()
    client.run(f"INSERT INTO {table} VALUES (7, 4711)")
    error = provoke(client.commit)
    assert (sqlstate_of(error), classify(error, Phase.COMMIT)) == ("23503", Fault.APPLICATION)


def test_commit_refused_by_serializable(clients: Clients, table: str) -> None:
    one, two = clients.connected(), clients.connected()
    for client, read, write in ((one, 1, 2), (two, 2, 1)):
        client.run("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        client.run(f"SELECT * FROM {table} WHERE k = {read}")
        client.run(f"UPDATE {table} SET n = n + 1 WHERE k = {write}")
    one.commit()
    error = provoke(two.commit)
    assert (sqlstate_of(error), classify(error, Phase.COMMIT)) == ("40001", Fault.RETRY_TRANSACTION)


# --- cancelled ---


@pytest.mark.parametrize("clients", ["psycopg_async", "asyncpg"], indirect=True)
def test_cancelled_in_query_and_in_commit(clients: Clients, table: str) -> None:
    client = clients.connected()

    async def cancel(call: Any) -> None:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0.1)
        task.cancel()
        await task

    error = provoke(lambda: client.wait(cancel(client.connection.exec_driver_sql("SELECT pg_sleep(5)"))))
    assert classify(error) is Fault.CANCELLED
    assert classify(error, Phase.COMMIT) is Fault.IN_DOUBT


@pytest.mark.parametrize("clients", ["asyncpg"], indirect=True)
def test_command_timeout_is_a_bare_timeout(clients: Clients, table: str, resilientdb_proxy: Proxy) -> None:
    client = clients.connected(clients.through(resilientdb_proxy), command_timeout=0.3)
    client.run(f"INSERT INTO {table} VALUES (7)")
    with faults.hang(resilientdb_proxy):
        error = provoke(client.commit)
    assert isinstance(error, TimeoutError)
    assert classify(error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.TIMEOUT


def until(postgres: Postgres, question: str) -> None:
    """Wait until the server answers the question with true."""
    pause = threading.Event()
    for _ in range(500):
        rows = postgres.query(question)
        if rows and rows[0][0]:
            return
        pause.wait(0.01)
    pytest.fail(f"never true: {question}")
