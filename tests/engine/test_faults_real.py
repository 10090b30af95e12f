"""Every fault provoked on a real server, through SQLAlchemy, with each of the four PostgreSQL drivers."""

from __future__ import annotations

import contextlib
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from resilientdb.engine.drivers import driver_of
from resilientdb.policy.faults import Fault, Phase, classify, describe, evidence, sqlstate_of
from resilientdb.testing import faults
from resilientdb.testing.postgres import Postgres
from resilientdb.testing.processes import free_port
from tests.engine.provoking import Clients, in_thread, provoke, two_rows, until
from tests.engine.seen import seen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing.toxiproxy import Proxy

DRIVERS = ["psycopg", "psycopg_async", "psycopg2", "asyncpg"]


@pytest.fixture(params=DRIVERS)
def clients(request: pytest.FixtureRequest, resilientdb_postgres: Postgres) -> Iterator[Clients]:
    with contextlib.closing(Clients(resilientdb_postgres, request.param)) as made:
        yield made


@pytest.fixture
def table(clients: Clients) -> Iterator[str]:
    with two_rows(clients) as name:
        yield name


@pytest.fixture
def role(clients: Clients, resilientdb_postgres: Postgres) -> Iterator[str]:
    name = f"r_{uuid.uuid4().hex[:12]}"
    resilientdb_postgres.query(f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
    yield name
    clients.close()
    resilientdb_postgres.query(f"DROP ROLE {name}")


# --- connecting ---


def test_refused(clients: Clients) -> None:
    port = free_port()
    error = provoke(clients.new(clients.url(port=port)).connect)
    assert seen("refused", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT
    assert f"127.0.0.1:{port}" in describe(error)


def test_refused_by_every_address_of_a_name(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(host="localhost", port=free_port())).connect)
    assert classify(error, Phase.CONNECT) is Fault.CANNOT_CONNECT
    assert classify(error, Phase.STATEMENT) is Fault.CANNOT_CONNECT


def test_unknown_host(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(host="no-such-host.invalid")).connect)
    assert seen("unknown-host", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_silent_server(clients: Clients, resilientdb_proxy: Proxy) -> None:
    client = clients.new(clients.through(resilientdb_proxy))
    timeout = driver_of(client.engine.dialect).connect_timeout_param(0.5)
    client = clients.new(clients.through(resilientdb_proxy), **timeout)
    with faults.hang(resilientdb_proxy):
        error = provoke(client.connect)
    assert seen("silent-connect", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_accepted_and_closed(clients: Clients, resilientdb_proxy: Proxy) -> None:
    client = clients.new(clients.through(resilientdb_proxy))
    with faults.reset(resilientdb_proxy):
        error = provoke(client.connect)
    assert seen("reset-connect", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def test_missing_database(clients: Clients) -> None:
    error = provoke(clients.new(clients.url(database="nowhere")).connect)
    assert seen("unknown-database", clients.driver, error, Phase.CONNECT) is Fault.CONFIGURATION
    if clients.driver == "asyncpg":
        assert sqlstate_of(error) == "3D000"


def test_wrong_password(clients: Clients, role: str, resilientdb_postgres: Postgres) -> None:
    postgres = resilientdb_postgres
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
    assert seen("wrong-password", clients.driver, error, Phase.CONNECT) is Fault.CONFIGURATION


def test_too_many_connections(clients: Clients, role: str) -> None:
    clients.server.query(f"ALTER ROLE {role} CONNECTION LIMIT 1")
    url = clients.url().replace("postgres@", f"{role}@")
    clients.connected(url)
    error = provoke(clients.new(url).connect)
    assert seen("account-limit", clients.driver, error, Phase.CONNECT) is Fault.OVERLOAD
    assert sqlstate_of(error) in {"53300", None}


def test_a_standby_where_a_primary_was_asked_for(clients: Clients, resilientdb_standby: Postgres) -> None:
    url = f"{resilientdb_standby.url(clients.driver)}?target_session_attrs=read-write"
    error = provoke(clients.new(url).connect)
    assert seen("standby-connect", clients.driver, error, Phase.CONNECT) is Fault.WRONG_ROLE


def test_no_connection_left(clients: Clients) -> None:
    with Postgres(
        name="full", settings={"max_connections": 5, "superuser_reserved_connections": 1}
    ) as server:
        reserved = 1 if server.binaries.major < 16 else 0
        server.settings["reserved_connections"] = reserved
        server.query("CREATE ROLE visitor LOGIN")
        url = server.url(clients.driver).replace("postgres@", "visitor@")
        error = provoke(lambda: [clients.connected(url) for _ in range(6)])
        clients.close()
    assert seen("too-many-connections", clients.driver, error, Phase.CONNECT) is Fault.OVERLOAD


def test_a_login_while_the_server_shuts_down(clients: Clients) -> None:
    with Postgres(name="leaving") as server:
        url = server.url(clients.driver)
        clients.connected(url)  # for whose end it waits
        thread, _ = in_thread(lambda: server.stop("smart"))
        until_said(server, "received smart shutdown request")
        error = provoke(clients.new(url).connect)
        clients.close()
        thread.join(20)
    assert seen("shutting-down", clients.driver, error, Phase.CONNECT) is Fault.CANNOT_CONNECT


def until_said(server: Postgres, words: str) -> None:
    pause = threading.Event()
    for _ in range(500):
        if words in server.log_tail():
            return
        pause.wait(0.01)
    pytest.fail(f"never said: {words}")


# --- in a statement ---


def test_stopped_in_query(clients: Clients) -> None:
    with Postgres(name="stopped") as server:
        client = clients.connected(server.url(clients.driver))
        pid = client.value("SELECT pg_backend_pid()")
        thread, errors = in_thread(lambda: client.run("SELECT pg_sleep(30)"))
        until(server, f"SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = {pid}")
        server.stop("fast")
        thread.join(10)
        clients.close()
    assert seen("stopped", clients.driver, errors[0]) is Fault.CONNECTION_LOST


@pytest.mark.parametrize("how", ["SET TRANSACTION READ ONLY", "postgresql_readonly"])
def test_the_application_s_own_read_only_transaction(clients: Clients, table: str, how: str) -> None:
    """Told from a standby's refusal: nothing is wrong with the node, nor with the connection."""
    options = {"postgresql_readonly": True} if how == "postgresql_readonly" else {}
    client = clients.guarded(execution_options=options)
    client.connect()
    client.run("SELECT 1" if options else how)
    error = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9)"))
    assert (sqlstate_of(error), seen("own-read-only", clients.driver, error)) == ("25006", Fault.APPLICATION)
    assert not error.connection_invalidated  # type: ignore[attr-defined]


def test_a_server_s_own_default_is_not_the_application_s(clients: Clients, table: str, role: str) -> None:
    """How operators keep writes away from a primary: no transaction asked for READ ONLY."""
    clients.server.query(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    clients.server.query(f"GRANT ALL ON {table} TO {role}")
    client = clients.guarded(clients.url().replace("postgres@", f"{role}:hunter2@"))
    client.connect()
    error = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9)"))
    assert (sqlstate_of(error), classify(error)) == ("25006", Fault.WRONG_ROLE)
    clients.close()
    clients.server.query(f"REVOKE ALL ON {table} FROM {role}")


def test_a_standby_s_refusal_is_not_the_application_s(
    clients: Clients, table: str, resilientdb_standby: Postgres, resilientdb_postgres: Postgres
) -> None:
    resilientdb_standby.wait_caught_up(resilientdb_postgres)
    client = clients.guarded(resilientdb_standby.url(clients.driver))
    client.connect()
    error = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9)"))
    assert (sqlstate_of(error), classify(error)) == ("25006", Fault.WRONG_ROLE)
    assert error.connection_invalidated  # type: ignore[attr-defined]


def test_terminated_in_query(clients: Clients) -> None:
    client = clients.connected()
    pid = client.value("SELECT pg_backend_pid()")
    thread, errors = in_thread(lambda: client.run("SELECT pg_sleep(30)"))
    until(clients.server, f"SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = {pid}")
    clients.server.query(f"SELECT pg_terminate_backend({pid})")
    thread.join(10)
    assert seen("killed", clients.driver, errors[0]) is Fault.CONNECTION_LOST
    assert errors[0].connection_invalidated  # type: ignore[attr-defined]


def test_terminated_while_idle(clients: Clients) -> None:
    client = clients.connected()
    pid = client.value("SELECT pg_backend_pid()")
    clients.server.query(f"SELECT pg_terminate_backend({pid})")
    error = provoke(lambda: client.run("SELECT 1"))
    assert seen("killed-idle", clients.driver, error) is Fault.CONNECTION_LOST


def test_cut_in_query(clients: Clients, resilientdb_proxy: Proxy) -> None:
    client = clients.connected(clients.through(resilientdb_proxy))
    client.run("SELECT 1")
    with faults.down(resilientdb_proxy):
        error = provoke(lambda: client.run("SELECT 1"))
    assert seen("cut", clients.driver, error) is Fault.CONNECTION_LOST


def test_idle_in_transaction_too_long(clients: Clients) -> None:
    client = clients.connected()
    pid = client.value("SELECT pg_backend_pid()")
    client.run("SET idle_in_transaction_session_timeout = 20")
    until(clients.server, f"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {pid}")
    error = provoke(lambda: client.run("SELECT 1"))
    assert seen("idle-in-transaction", clients.driver, error) is Fault.CONNECTION_LOST


@pytest.mark.parametrize(
    ("event", "statement", "code"),
    [
        ("syntax", "SELEC 1", "42601"),
        ("unique", "INSERT INTO {table} VALUES (1)", "23505"),
        ("not-null", "INSERT INTO {table} VALUES (3, NULL)", "23502"),
    ],
)
def test_the_application_s_own_errors(
    clients: Clients, table: str, event: str, statement: str, code: str
) -> None:
    client = clients.connected()
    error = provoke(lambda: client.run(statement.format(table=table)))
    assert (sqlstate_of(error), seen(event, clients.driver, error)) == (code, Fault.APPLICATION)
    again = provoke(lambda: client.run("SELECT 1"))
    assert (sqlstate_of(again), classify(again)) == ("25P02", Fault.APPLICATION)
    client.rollback()
    assert client.value("SELECT 1") == 1


def test_statement_timeout(clients: Clients) -> None:
    client = clients.connected()
    client.run("SET statement_timeout = 50")
    error = provoke(lambda: client.run("SELECT pg_sleep(10)"))
    assert (sqlstate_of(error), seen("statement-timeout", clients.driver, error)) == ("57014", Fault.TIMEOUT)


def test_lock_timeout(clients: Clients, table: str) -> None:
    holder, waiter = clients.connected(), clients.connected()
    holder.run(f"SELECT * FROM {table} WHERE k = 1 FOR UPDATE")
    waiter.run("SET lock_timeout = 50")
    error = provoke(lambda: waiter.run(f"UPDATE {table} SET n = 1 WHERE k = 1"))
    assert (sqlstate_of(error), seen("lock-timeout", clients.driver, error)) == ("55P03", Fault.TIMEOUT)


def test_deadlock(clients: Clients, table: str) -> None:
    one, two = clients.connected(), clients.connected()
    two.run("SET deadlock_timeout = '60s'")  # so that the other is the victim
    one.run("SET deadlock_timeout = '50ms'")
    one.run(f"UPDATE {table} SET n = 1 WHERE k = 1")
    two.run(f"UPDATE {table} SET n = 1 WHERE k = 2")
    pid = two.value("SELECT pg_backend_pid()")
    thread, errors = in_thread(lambda: two.run(f"UPDATE {table} SET n = 1 WHERE k = 1"))
    until(clients.server, f"SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {pid}")
    error = provoke(lambda: one.run(f"UPDATE {table} SET n = 1 WHERE k = 2"))
    one.rollback()
    thread.join(10)
    assert not errors
    assert (sqlstate_of(error), seen("deadlock", clients.driver, error)) == ("40P01", Fault.RETRY_TRANSACTION)


def test_serialization_failure(clients: Clients, table: str) -> None:
    client, other = clients.connected(), clients.connected()
    client.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    client.run(f"SELECT * FROM {table}")
    other.run(f"UPDATE {table} SET n = n + 1")
    other.commit()
    error = provoke(lambda: client.run(f"UPDATE {table} SET n = n + 1"))
    assert (sqlstate_of(error), seen("serialization", clients.driver, error)) == (
        "40001",
        Fault.RETRY_TRANSACTION,
    )


def test_write_on_a_standby(
    clients: Clients, table: str, resilientdb_standby: Postgres, resilientdb_postgres: Postgres
) -> None:
    resilientdb_standby.wait_caught_up(resilientdb_postgres)
    client = clients.connected(resilientdb_standby.url(clients.driver))
    error = provoke(lambda: client.run(f"INSERT INTO {table} VALUES (9)"))
    assert (sqlstate_of(error), seen("read-only-server", clients.driver, error)) == (
        "25006",
        Fault.WRONG_ROLE,
    )


# --- at COMMIT ---


@pytest.mark.parametrize("lost", ["reply", "request"])
def test_commit_without_an_answer(clients: Clients, table: str, resilientdb_proxy: Proxy, lost: str) -> None:
    client = clients.connected(clients.through(resilientdb_proxy))
    client.run(f"INSERT INTO {table} VALUES (7)")
    fault = faults.reply_lost if lost == "reply" else faults.commit_lost
    with fault(resilientdb_proxy):
        error = provoke(client.commit)
    assert seen("lost-commit", clients.driver, error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.CONNECTION_LOST
    written = clients.server.query(f"SELECT count(*) FROM {table} WHERE k = 7")[0][0]
    assert written == (1 if lost == "reply" else 0)  # the same error either way


def test_terminated_before_commit(clients: Clients, table: str) -> None:
    client = clients.connected()
    client.run(f"INSERT INTO {table} VALUES (7)")
    pid = client.value("SELECT pg_backend_pid()")
    clients.server.query(f"SELECT pg_terminate_backend({pid})")
    error = provoke(client.commit)
    assert seen("killed-commit", clients.driver, error, Phase.COMMIT) is Fault.IN_DOUBT
    assert evidence(error, Phase.COMMIT) is Fault.CONNECTION_LOST


def test_commit_refused_by_a_deferred_constraint(clients: Clients, table: str) -> None:
    clients.server.query(
        f"ALTER TABLE {table} ADD FOREIGN KEY (n) REFERENCES {table} DEFERRABLE INITIALLY DEFERRED NOT VALID"
    )
    client = clients.connected()
    client.run(f"INSERT INTO {table} VALUES (7, 4711)")
    error = provoke(client.commit)
    assert (sqlstate_of(error), seen("refused-commit", clients.driver, error, Phase.COMMIT)) == (
        "23503",
        Fault.APPLICATION,
    )


def test_commit_refused_by_serializable(clients: Clients, table: str) -> None:
    one, two = clients.connected(), clients.connected()
    for client, read, write in ((one, 1, 2), (two, 2, 1)):
        client.run("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        client.run(f"SELECT * FROM {table} WHERE k = {read}")
        client.run(f"UPDATE {table} SET n = n + 1 WHERE k = {write}")
    one.commit()
    error = provoke(two.commit)
    assert (sqlstate_of(error), seen("serialization-commit", clients.driver, error, Phase.COMMIT)) == (
        "40001",
        Fault.RETRY_TRANSACTION,
    )


# --- cancelled ---


@pytest.mark.parametrize("clients", ["psycopg_async", "asyncpg"], indirect=True)
def test_cancelled_in_query_and_in_commit(clients: Clients, table: str) -> None:
    client = clients.connected()
    error = provoke(lambda: client.run_cancelled("SELECT pg_sleep(5)"))
    assert seen("cancelled", clients.driver, error) is Fault.CANCELLED
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
