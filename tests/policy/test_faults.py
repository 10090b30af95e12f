"""The table of faults, row by row, without any driver: errors are made here under the drivers' names."""

from __future__ import annotations

import asyncio
import errno
import pickle
import socket
import ssl
import timeit
from typing import Any

import pytest
import sqlalchemy.exc
from hypothesis import given
from hypothesis import strategies as st

from resilientdb import errors
from resilientdb.policy.faults import (
    Fault,
    Phase,
    blame_the_application,
    classify,
    describe,
    evidence,
    sqlstate_of,
)

LOST = Fault.CONNECTION_LOST
UNREACHABLE = Fault.CANNOT_CONNECT


def made_by(module: str, name: str, *arguments: object, **attributes: object) -> Exception:
    """An exception as a driver would raise it: a class of that name in the DBAPI's tree."""
    base = type("Error", (Exception,), {"__module__": module})
    if name in {"OperationalError", "InternalError", "IntegrityError", "ProgrammingError", "DataError"}:
        base = type("DatabaseError", (base,), {"__module__": module})
    cls = type(name, (base,), {"__module__": module})
    error: Exception = cls(*arguments)
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


def psycopg(text: str = "", sqlstate: str | None = None, name: str = "OperationalError") -> Exception:
    return made_by("psycopg", name, text, sqlstate=sqlstate)


def wrapped(orig: BaseException, *, invalidated: bool = False) -> sqlalchemy.exc.DBAPIError:
    error = sqlalchemy.exc.DBAPIError(
        "UPDATE secret_table", {"p": "secret"}, orig, connection_invalidated=invalidated
    )
    error.__cause__ = orig
    return error


SQLSTATES = [
    # code, in a statement, while connecting, at COMMIT
    ("08000", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("08003", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("08006", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("08S01", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("08001", UNREACHABLE, UNREACHABLE, Fault.IN_DOUBT),
    ("08007", Fault.IN_DOUBT, UNREACHABLE, Fault.IN_DOUBT),
    ("08004", Fault.CONFIGURATION, Fault.CONFIGURATION, Fault.CONFIGURATION),
    ("08P01", Fault.OVERLOAD, Fault.OVERLOAD, Fault.IN_DOUBT),
    ("22P02", Fault.APPLICATION, Fault.CONFIGURATION, Fault.APPLICATION),
    ("23505", Fault.APPLICATION, Fault.CONFIGURATION, Fault.APPLICATION),
    ("25006", Fault.WRONG_ROLE, Fault.WRONG_ROLE, Fault.WRONG_ROLE),
    ("25P02", Fault.APPLICATION, Fault.CONFIGURATION, Fault.APPLICATION),
    ("25P03", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("25P04", Fault.TIMEOUT, UNREACHABLE, Fault.IN_DOUBT),
    ("26000", Fault.CONFIGURATION, Fault.CONFIGURATION, Fault.CONFIGURATION),
    ("28000", Fault.CONFIGURATION, Fault.CONFIGURATION, Fault.CONFIGURATION),
    ("28P01", Fault.CONFIGURATION, Fault.CONFIGURATION, Fault.CONFIGURATION),
    ("3D000", Fault.CONFIGURATION, Fault.CONFIGURATION, Fault.CONFIGURATION),
    ("40001", Fault.RETRY_TRANSACTION, Fault.RETRY_TRANSACTION, Fault.RETRY_TRANSACTION),
    ("40P01", Fault.RETRY_TRANSACTION, Fault.RETRY_TRANSACTION, Fault.RETRY_TRANSACTION),
    ("40003", Fault.IN_DOUBT, UNREACHABLE, Fault.IN_DOUBT),
    ("42601", Fault.APPLICATION, Fault.CONFIGURATION, Fault.APPLICATION),
    ("53100", Fault.OVERLOAD, Fault.OVERLOAD, Fault.OVERLOAD),
    ("53300", Fault.OVERLOAD, Fault.OVERLOAD, Fault.IN_DOUBT),
    ("55P03", Fault.TIMEOUT, UNREACHABLE, Fault.TIMEOUT),
    ("57014", Fault.TIMEOUT, UNREACHABLE, Fault.IN_DOUBT),
    ("57P01", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("57P02", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("57P03", UNREACHABLE, UNREACHABLE, Fault.IN_DOUBT),
    ("57P05", LOST, UNREACHABLE, Fault.IN_DOUBT),
    ("58000", Fault.OVERLOAD, Fault.OVERLOAD, Fault.IN_DOUBT),
    ("XX000", Fault.APPLICATION, Fault.CONFIGURATION, Fault.IN_DOUBT),
]


@pytest.mark.parametrize(
    ("code", "statement", "connect", "commit"), SQLSTATES, ids=[row[0] for row in SQLSTATES]
)
def test_sqlstate_by_phase(code: str, statement: Fault, connect: Fault, commit: Fault) -> None:
    for error in (
        psycopg("text", code),
        made_by("psycopg2", "OperationalError", "text", pgcode=code),
        made_by("sqlalchemy.dialects.postgresql.asyncpg", "Error", "text", sqlstate=code),
        made_by("asyncpg.exceptions", "PostgresError", "text", sqlstate=code),
        wrapped(psycopg("text", code)),
        wrapped(psycopg("text", code), invalidated=True),
    ):
        assert classify(error, Phase.STATEMENT) is statement
        assert classify(error, Phase.BEGIN) is statement
        assert classify(error, Phase.CONNECT) is connect
        assert classify(error, Phase.CHECKOUT) is connect
        assert classify(error, Phase.COMMIT) is commit
        assert evidence(error, Phase.COMMIT) is statement
        assert sqlstate_of(error) == code


@pytest.mark.parametrize(
    ("code", "text", "fault"),
    [
        ("08P01", "query_wait_timeout", Fault.OVERLOAD),
        ("08P01", "no more connections allowed (max_client_conn)", Fault.OVERLOAD),
        ("08P01", "server login has been failing, cached error: x", UNREACHABLE),
        ("08P01", "pooler is shutting down", UNREACHABLE),
        ("08P01", "no such database: shop", Fault.CONFIGURATION),
        ("08P01", "server conn crashed?", LOST),
        ("08P01", "query_timeout", Fault.TIMEOUT),
        ("58000", "checkout timeout", Fault.OVERLOAD),
        ("08006", "odyssey: c1: too many connections", Fault.OVERLOAD),
        ("XX000", "MaxClientsInSessionMode: max clients reached", Fault.OVERLOAD),
        ("XX000", "Tenant or user not found", Fault.CONFIGURATION),
    ],
)
def test_what_poolers_say_under_one_code(code: str, text: str, fault: Fault) -> None:
    assert classify(psycopg(text, code)) is fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('connection to server at "10.0.0.1", port 5432 failed: Connection refused', UNREACHABLE),
        ("connection timeout expired", UNREACHABLE),
        ('could not translate host name "nope" to address: Name or service not known', UNREACHABLE),
        ("FATAL:  the database system is starting up", UNREACHABLE),
        ("server closed the connection unexpectedly", UNREACHABLE),
        ("ein Fehler in einer anderen Sprache", UNREACHABLE),
        ('FATAL:  password authentication failed for user "shop"', Fault.CONFIGURATION),
        ('FATAL:  database "shop" does not exist', Fault.CONFIGURATION),
        ("FATAL:  no pg_hba.conf entry for host", Fault.CONFIGURATION),
        ("FATAL:  sorry, too many clients already", Fault.OVERLOAD),
        ("FATAL:  remaining connection slots are reserved for roles", Fault.OVERLOAD),
        ('connection to server at "a", port 1 failed: session is read-only', Fault.WRONG_ROLE),
    ],
)
def test_connecting_through_libpq_gives_only_text(text: str, fault: Fault) -> None:
    assert classify(psycopg(text), Phase.CONNECT) is fault
    assert classify(wrapped(made_by("psycopg2", "OperationalError", text)), Phase.CONNECT) is fault


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (psycopg("consuming input failed: server closed the connection unexpectedly"), LOST),
        (psycopg("the connection is closed"), LOST),
        (psycopg("eine andere Sprache"), LOST),
        (psycopg("sending query failed: another command is already in progress"), Fault.APPLICATION),
        (psycopg("the cursor is closed", name="InterfaceError"), Fault.APPLICATION),
        (made_by("psycopg2", "InterfaceError", "connection already closed"), LOST),
        (made_by("psycopg2", "DatabaseError", "lost synchronization with server"), LOST),
        (made_by("asyncpg.exceptions", "InterfaceError", "the underlying connection is closed"), LOST),
        (made_by("asyncpg.exceptions", "ProtocolError", "?"), LOST),
        (made_by("asyncpg.exceptions", "ClientConfigurationError", "?"), Fault.CONFIGURATION),
        (made_by("asyncpg.exceptions", "TargetServerAttributeNotMatched", "?"), Fault.WRONG_ROLE),
        (
            made_by("asyncpg.exceptions", "InvalidCachedStatementError", "?", sqlstate="0A000"),
            Fault.RETRY_TRANSACTION,
        ),
        (wrapped(made_by("oracledb", "OperationalError", "DPY"), invalidated=True), LOST),
        (made_by("oracledb", "OperationalError", "DPY"), Fault.APPLICATION),
        (sqlalchemy.exc.DisconnectionError("x"), LOST),
        (sqlalchemy.exc.InvalidRequestError("x"), Fault.APPLICATION),
        (KeyError("x"), Fault.APPLICATION),
    ],
)
def test_errors_without_a_code_in_a_statement(error: Exception, fault: Fault) -> None:
    assert classify(error) is fault


MYSQL = [
    *[(number, LOST) for number in (2006, 2013, 2055, 2014, 1053, 1927, 4031, 2777)],
    *[(number, UNREACHABLE) for number in (2002, 2003, 2005)],
    *[(number, Fault.RETRY_TRANSACTION) for number in (1213, 1020, 3101, 1412, 1615)],
    *[(number, Fault.OVERLOAD) for number in (1040, 1203, 1226, 1129, 9001, 1114, 1206)],
    *[(number, Fault.TIMEOUT) for number in (1205, 3024, 1317, 1969, 3572)],
    *[(number, Fault.CONFIGURATION) for number in (1045, 1044, 1049, 1130, 1862, 3118, 4151)],
    *[(number, Fault.WRONG_ROLE) for number in (1792, 1836, 1047)],
    *[(number, Fault.APPLICATION) for number in (1062, 1064, 1290, 2031, 2068)],
]


@pytest.mark.parametrize(("number", "fault"), MYSQL)
def test_mysql_numbers(number: int, fault: Fault) -> None:
    assert classify(made_by("pymysql.err", "OperationalError", number, "text")) is fault
    assert classify(wrapped(made_by("asyncmy.errors", "Error", number, "text"))) is fault
    connector = made_by("mysql.connector.errors", "Error", "text", errno=number, sqlstate="HY000")
    assert classify(connector) is fault


def test_mysql_words_and_commit() -> None:
    def mysql(*arguments: object) -> Exception:
        return made_by("pymysql.err", "OperationalError", *arguments)

    assert classify(mysql(1290, "running with the --read-only option")) is Fault.WRONG_ROLE
    assert classify(made_by("pymysql.err", "InterfaceError", 0, "")) is LOST
    assert classify(made_by("pymysql.err", "InterfaceError", "(0, 'Not connected')")) is LOST
    assert classify(made_by("pymysql.err", "InternalError", "Packet sequence number wrong - got 1")) is LOST
    gone = made_by(
        "asyncmy.errors", "InternalError", "network operation failed due to asyncmy attribute error"
    )
    assert classify(gone) is LOST
    assert classify(mysql(2013, "Lost connection"), Phase.COMMIT) is Fault.IN_DOUBT
    assert classify(mysql(1180, "Got error during COMMIT"), Phase.COMMIT) is Fault.IN_DOUBT
    assert classify(mysql(1205, "Lock wait timeout"), Phase.COMMIT) is Fault.TIMEOUT
    assert classify(mysql(1213, "Deadlock"), Phase.COMMIT) is Fault.RETRY_TRANSACTION


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (5, Fault.RETRY_TRANSACTION),
        (517, Fault.RETRY_TRANSACTION),  # BUSY_SNAPSHOT: an extended code
        (6, Fault.RETRY_TRANSACTION),
        (13, Fault.OVERLOAD),
        (14, UNREACHABLE),
        (2067, Fault.APPLICATION),  # CONSTRAINT_UNIQUE
        (1, Fault.APPLICATION),
    ],
)
def test_sqlite_codes(code: int, fault: Fault) -> None:
    assert classify(made_by("sqlite3", "OperationalError", "text", sqlite_errorcode=code)) is fault


def test_sqlite_busy_at_commit_has_not_committed() -> None:
    busy = made_by("sqlite3", "OperationalError", "database is locked", sqlite_errorcode=5)
    assert classify(busy, Phase.COMMIT) is Fault.RETRY_TRANSACTION
    without_code = made_by("sqlite3", "OperationalError", "database is locked")
    assert classify(without_code, Phase.COMMIT) is Fault.RETRY_TRANSACTION


@pytest.mark.parametrize(
    ("error", "connect", "statement", "commit"),
    [
        (ConnectionRefusedError(111, "refused"), UNREACHABLE, UNREACHABLE, Fault.IN_DOUBT),
        (ConnectionResetError(104, "reset"), UNREACHABLE, LOST, Fault.IN_DOUBT),
        (ConnectionError("unexpected connection_lost() call"), UNREACHABLE, LOST, Fault.IN_DOUBT),
        (TimeoutError(), UNREACHABLE, Fault.TIMEOUT, Fault.IN_DOUBT),
        (socket.gaierror(-2, "Name or service not known"), UNREACHABLE, UNREACHABLE, Fault.IN_DOUBT),
        (
            OSError("Multiple exceptions: [Errno 111] Connect call failed"),
            UNREACHABLE,
            UNREACHABLE,
            Fault.IN_DOUBT,
        ),
        (OSError(errno.EHOSTUNREACH, "no route"), UNREACHABLE, LOST, Fault.IN_DOUBT),
        (FileNotFoundError(2, "no socket"), UNREACHABLE, Fault.APPLICATION, Fault.IN_DOUBT),
        (OSError(errno.EMFILE, "files"), Fault.LOCAL_REJECTION, Fault.LOCAL_REJECTION, Fault.IN_DOUBT),
        (ssl.SSLCertVerificationError("x"), *[Fault.CONFIGURATION] * 3),
        (ssl.SSLError("x"), UNREACHABLE, LOST, Fault.IN_DOUBT),
        (asyncio.CancelledError(), Fault.CANCELLED, Fault.CANCELLED, Fault.IN_DOUBT),
        (KeyboardInterrupt(), Fault.CANCELLED, Fault.CANCELLED, Fault.IN_DOUBT),
        (GeneratorExit(), Fault.CANCELLED, Fault.CANCELLED, Fault.IN_DOUBT),
        (RuntimeError("Event loop is closed"), Fault.CONFIGURATION, Fault.APPLICATION, Fault.IN_DOUBT),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_raw_errors(error: BaseException, connect: Fault, statement: Fault, commit: Fault) -> None:
    assert classify(error, Phase.CONNECT) is connect
    assert classify(error, Phase.STATEMENT) is statement
    assert classify(error, Phase.COMMIT) is commit
    assert classify(wrapped(error), Phase.STATEMENT) is statement


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    "error",
    [
        errors.PoolSaturated("x"),
        errors.PoolTimeout("x"),
        errors.CircuitOpen("x"),
        errors.NoPrimaryAvailable("x"),
        errors.PoolDraining("x"),
        sqlalchemy.exc.TimeoutError("QueuePool limit"),
        made_by("psycopg_pool", "PoolTimeout", "x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_refused_on_this_side(error: Exception, phase: Phase) -> None:
    error.__cause__ = psycopg("gone", "57P01")  # what opened the circuit is no new evidence
    assert classify(error, phase) is Fault.LOCAL_REJECTION
    assert classify(sqlalchemy.exc.StatementError("m", "q", {}, error), phase) is Fault.LOCAL_REJECTION


def test_our_own_words_about_a_commit() -> None:
    assert classify(errors.CommitOutcomeUnknown("x")) is Fault.IN_DOUBT
    assert classify(errors.DeadlineExceeded("x")) is Fault.LOCAL_REJECTION
    assert classify(errors.DeadlineExceeded("x"), Phase.COMMIT) is Fault.LOCAL_REJECTION
    assert classify(errors.ConfigurationError("x")) is Fault.CONFIGURATION


@pytest.mark.parametrize(
    "error",
    [
        psycopg("anything"),
        psycopg("another command is already in progress"),
        psycopg("", name="InterfaceError"),
        made_by("asyncpg.exceptions", "InternalClientError", "?"),
        made_by("oracledb", "OperationalError", "?"),
        made_by("nobody.knows", "Failure", "?"),
    ],
)
def test_at_commit_nothing_vague_is_settled(error: Exception) -> None:
    assert classify(error, Phase.COMMIT) is Fault.IN_DOUBT
    assert classify(wrapped(error), Phase.COMMIT) in {Fault.IN_DOUBT, Fault.APPLICATION}


def test_a_session_in_the_wrong_state_sent_no_commit() -> None:
    assert classify(sqlalchemy.exc.PendingRollbackError("x"), Phase.COMMIT) is Fault.APPLICATION


def test_causes_are_found_and_the_nearest_wins() -> None:
    hidden = RuntimeError("service failed")
    hidden.__cause__ = wrapped(psycopg("gone", "57P01"))
    assert classify(hidden) is LOST
    assert sqlstate_of(hidden) == "57P01"
    outer = psycopg("duplicate", "23505")
    outer.__cause__ = hidden
    assert classify(outer) is Fault.APPLICATION
    group = ExceptionGroup("tasks", [ValueError("x"), wrapped(psycopg("deadlock", "40P01"))])
    assert classify(group) is Fault.RETRY_TRANSACTION
    # Raised while handling another error is not caused by it.
    context = ValueError("bug in a handler")
    context.__context__ = psycopg("gone", "57P01")
    assert classify(context) is Fault.APPLICATION


def test_blamed_on_the_application_it_stays_so() -> None:
    refused = psycopg("cannot execute INSERT in a read-only transaction", "25006")
    assert classify(wrapped(refused)) is Fault.WRONG_ROLE
    blame_the_application(refused)
    assert {classify(wrapped(refused), phase) for phase in (Phase.STATEMENT, Phase.COMMIT)} == {
        Fault.APPLICATION
    }
    blame_the_application(HostileError())  # nothing happens


def test_a_plan_for_each_fault() -> None:
    """What follows from each verdict, as a table that has to be changed on purpose."""

    def plan(fault: Fault) -> tuple[bool, ...]:
        return (
            fault.is_node_failure,
            fault.is_healthy_reply,
            fault.retry_connect,
            fault.retry_transaction,
            fault.evicts_connection,
        )

    no, yes = False, True
    assert {fault.name: plan(fault) for fault in Fault} == {
        "CONNECTION_LOST": (yes, no, yes, yes, yes),
        "CANNOT_CONNECT": (yes, no, yes, no, yes),
        "WRONG_ROLE": (no, no, no, yes, yes),
        "RETRY_TRANSACTION": (no, yes, no, yes, no),
        "IN_DOUBT": (no, no, no, no, yes),
        "OVERLOAD": (yes, no, yes, no, no),
        "TIMEOUT": (no, no, no, no, no),
        "CONFIGURATION": (no, no, no, no, yes),
        "APPLICATION": (no, yes, no, no, no),
        "CANCELLED": (no, no, no, no, yes),
        "LOCAL_REJECTION": (no, no, no, no, no),
    }
    assert len({fault.value for fault in Fault}) == len(Fault)
    assert pickle.loads(pickle.dumps(LOST)) is LOST


def test_describe_says_where_and_what_and_no_more() -> None:
    libpq = psycopg(
        'connection failed: connection to server at "10.1.2.3", port 5432 failed: FATAL:  '
        'password authentication failed for user "accountant"\n password=hunter2 postgresql://u:hunter2@h/db'
    )
    assert describe(wrapped(libpq)) == "psycopg.OperationalError 10.1.2.3:5432 authentication failed"
    asyncpg = ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 5432)")
    assert describe(asyncpg) == "ConnectionRefusedError [111] 127.0.0.1:5432 connect call failed"
    unique = psycopg("Key (email)=(ada@example.org) already exists", "23505", "UniqueViolation")
    assert describe(wrapped(unique)) == "psycopg.UniqueViolation [23505]"
    mysql = made_by("pymysql.err", "OperationalError", 2003, "Can't connect to MySQL server on 'db-1'")
    assert describe(mysql) == "pymysql.OperationalError [2003] db-1 can't connect"
    deadlock = made_by("asyncmy.errors", "OperationalError", 1213, "Deadlock found", sqlstate="40001")
    assert describe(wrapped(deadlock)) == "asyncmy.OperationalError [1213]"
    assert describe(KeyError(4711)) == "KeyError"
    assert describe(errors.PoolSaturated("Full: 5\nof 5")) == "PoolSaturated: Full: 5 of 5"


SECRET = "hunter2"
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["password=", "postgresql://u:", 'server at "', "host '", "user=", "failed: "]).map(
        lambda prefix: f"{prefix}{SECRET}@h port 1"
    ),
)


@given(text=texts, code=st.sampled_from([None, "57P01", "23505"]))
def test_describe_never_tells_a_password(text: str, code: str | None) -> None:
    for error in (psycopg(text, code), OSError(text), ValueError(text), wrapped(psycopg(text, code))):
        line = describe(error)
        assert SECRET not in line
        assert "\n" not in line


class HostileError(Exception):
    """Everything a classifier looks at raises."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __str__(self) -> str:
        raise RuntimeError("str")


class OddError(Exception):
    sqlstate: object = None
    pgcode: object = None
    errno: object = None
    orig: object = None
    sqlite_errorcode: object = None


values = st.one_of(
    st.none(), st.integers(), st.text(max_size=6), st.lists(st.integers(), max_size=2), st.just("40001")
)
CLASSES: list[type[BaseException]] = [
    OddError,
    HostileError,
    KeyError,
    OSError,
    TimeoutError,
    KeyboardInterrupt,
    type(psycopg()),
    type(made_by("pymysql.err", "OperationalError")),
    type(made_by("sqlite3", "OperationalError")),
    type("NoModule", (Exception,), {"__module__": None}),
]


@given(data=st.data())
def test_classify_never_raises(data: st.DataObject) -> None:
    """Any graph of exceptions, with cycles, odd attributes and hostile ones."""
    kinds = data.draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=8))
    indexes = st.integers(0, len(kinds))
    nodes: list[Any] = [kind(*data.draw(st.lists(values, max_size=2))) for kind in kinds]
    for node in nodes:
        # By number: drawing from a list of them, hypothesis would look at the hostile ones.
        cause, orig = data.draw(indexes), data.draw(indexes)
        BaseException.__setattr__(node, "__cause__", nodes[cause] if cause < len(nodes) else None)
        BaseException.__setattr__(node, "orig", nodes[orig] if orig < len(nodes) else data.draw(values))
        for name in ("sqlstate", "pgcode", "errno", "sqlite_errorcode", "diag"):
            if data.draw(st.booleans()):
                BaseException.__setattr__(node, name, data.draw(values))
    for phase in Phase:
        assert isinstance(classify(nodes[0], phase), Fault)
    assert "\n" not in describe(nodes[0])
    sqlstate_of(nodes[0])


def test_a_long_chain_costs_little() -> None:
    first = error = ValueError("0" * 100_000)
    for _ in range(5_000):
        error.__cause__ = ValueError("x")
        error = error.__cause__
    slowest = [
        first,
        wrapped(psycopg("x" * 100_000, name="InterfaceError")),
        wrapped(psycopg("duplicate", "23505")),
    ]
    for case in slowest:
        # 20 µs is the promise; ten times that tells a loaded machine from a search without bounds.
        seconds = timeit.repeat("classify(case)", globals={"classify": classify, "case": case}, number=100)
        assert min(seconds) / 100 < 200e-6
