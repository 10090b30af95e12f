"""Which errors become a problem, and what a problem says and does not say."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sqlite3
import subprocess
import sys
from typing import Any

import psycopg
import psycopg.errors
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
from hypothesis import given
from hypothesis import strategies as st

from resilientdb import errors
from resilientdb.middleware.problem import PROBLEM_BASE, Problem, Problems
from resilientdb.stats import EngineState, NodeStats, Snapshot

CLOSED_PORT = 1
"""Nothing listens there on loopback."""

EARLIEST = Problems(rng=lambda: 0.0)


def snapshot(retry_after: float | None = None, state: EngineState = "healthy") -> Snapshot:
    return Snapshot(state=state, retry_after=retry_after, primary="db1", nodes=())


def operational(original: Exception) -> sqlalchemy.exc.DBAPIError:
    return sqlalchemy.exc.OperationalError("SELECT secret", {"p": "secret"}, original)


def problem_of(error: BaseException, *args: Any, **kwargs: Any) -> Problem:
    problem = EARLIEST.of(error, *args, **kwargs)
    assert problem is not None
    return problem


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.PoolSaturated("x"), "pool-saturated"),
        (errors.PoolTimeout("x"), "pool-timeout"),
        (errors.CircuitOpen("x"), "circuit-open"),
        (errors.DeadlineExceeded("x"), "deadline-exceeded"),
        (errors.NoPrimaryAvailable("x"), "no-primary"),
        (errors.NoReplicaAvailable("x"), "no-replica"),
        (errors.PoolDraining("x"), "draining"),
        (sqlalchemy.exc.TimeoutError("QueuePool limit of size 5 overflow 10 reached"), "pool-timeout"),
        (operational(psycopg.errors.AdminShutdown("x")), "connection-lost"),
        (operational(psycopg.errors.CannotConnectNow("x")), "cannot-connect"),
        (operational(psycopg.errors.ReadOnlySqlTransaction("x")), "no-primary"),
        (operational(psycopg.errors.TooManyConnections("x")), "database-overloaded"),
        (operational(psycopg.errors.DeadlockDetected("x")), "transaction-conflict"),
        (psycopg.errors.AdminShutdown("from a raw connection"), "connection-lost"),
    ],
)
def test_what_is_about_the_service_is_503_and_says_when_to_come_back(error: Exception, reason: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.reason) == (503, reason)
    assert problem.type == f"urn:resilientdb:problem:{reason}"
    assert problem.retry_after == 1


@pytest.mark.parametrize(
    "error",
    [
        errors.CommitOutcomeUnknown("x", retry_after=3.0),
        operational(psycopg.errors.TransactionResolutionUnknown("x")),
    ],
)
def test_a_commit_in_doubt_is_500_and_never_invites_a_second_try(error: Exception) -> None:
    problem = problem_of(error, snapshot(5.0))
    assert (problem.status, problem.reason, problem.retry_after) == (500, "commit-outcome-unknown", None)
    answer = problem.answer()
    assert "Retry-After" not in dict(answer.headers)
    assert "retry_after" not in json.loads(answer.body)


def test_a_connection_lost_in_commit_is_in_doubt_even_as_a_plain_driver_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = sqlalchemy.create_engine("sqlite://")

    def fail(_connection: object) -> None:
        raise sqlite3.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(engine.dialect, "do_commit", fail)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))
        with pytest.raises(sqlalchemy.exc.OperationalError) as caught:
            connection.commit()
    engine.dispose()
    assert problem_of(caught.value).reason == "commit-outcome-unknown"
    assert problem_of(operational(sqlite3.OperationalError("connection is closed"))).status == 503


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        RuntimeError("x"),
        errors.ConfigurationError("x"),
        errors.ResilienceError("x"),
        sqlalchemy.exc.NoResultFound("x"),
        sqlalchemy.exc.IntegrityError("INSERT", {}, psycopg.errors.UniqueViolation("x")),
        sqlalchemy.exc.ProgrammingError("SELEC", {}, psycopg.errors.SyntaxError("x")),
        operational(psycopg.errors.InvalidPassword("x")),
        operational(psycopg.errors.QueryCanceled("x")),
        ConnectionRefusedError("some other service"),
        TimeoutError("some other service"),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
    ],
)
def test_everything_else_is_not_ours(error: BaseException) -> None:
    assert EARLIEST.of(error, snapshot(5.0)) is None


def test_a_statement_timeout_is_ours_only_once_the_requests_deadline_is_over() -> None:
    error = operational(psycopg.errors.QueryCanceled("x"))
    assert EARLIEST.of(error) is None
    assert problem_of(error, expired=True).reason == "deadline-exceeded"


def test_a_write_sent_to_a_replica_on_purpose_is_its_own_mistake_while_there_is_a_primary() -> None:
    error = operational(psycopg.errors.ReadOnlySqlTransaction("x"))
    assert EARLIEST.of(error, snapshot(), read_only=True) is None
    assert problem_of(error, snapshot(state="read_only"), read_only=True).reason == "no-primary"


@pytest.mark.parametrize("silent", [False, True])
def test_a_builtin_error_that_asyncpg_lets_out_while_connecting_is_ours(silent: bool) -> None:
    async def connect(port: int) -> None:
        engine = sqlalchemy.ext.asyncio.create_async_engine(
            f"postgresql+asyncpg://user:secret@127.0.0.1:{port}/db", connect_args={"timeout": 0.1}
        )
        async with engine.connect():
            pass

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:  # accepts, and never says a word
            listener.listen()
        with pytest.raises((ConnectionRefusedError, TimeoutError)) as caught:
            asyncio.run(connect(listener.getsockname()[1]))
    assert caught.type is (TimeoutError if silent else ConnectionRefusedError)
    assert problem_of(caught.value).reason == "cannot-connect"


def test_a_builtin_error_of_another_service_called_inside_run_sync_is_not_ours() -> None:
    def call_elsewhere(_connection: object) -> None:
        socket.create_connection(("127.0.0.1", CLOSED_PORT))

    async def work() -> None:
        engine = sqlalchemy.ext.asyncio.create_async_engine("sqlite+aiosqlite://")
        try:
            async with engine.connect() as connection:
                await connection.run_sync(call_elsewhere)
        finally:
            await engine.dispose()

    with pytest.raises(ConnectionRefusedError) as caught:
        asyncio.run(work())
    assert EARLIEST.of(caught.value) is None


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def test_ours_is_found_behind_what_was_raised_from_it() -> None:
    open_circuit = errors.CircuitOpen("x", retry_after=7.0)
    wrapped = sqlalchemy.exc.StatementError("x", "SELECT 1", {}, open_circuit)
    assert problem_of(wrapped).retry_after == 7
    assert problem_of(raised_from(RuntimeError("repository failed"), wrapped)).reason == "circuit-open"
    circle = RuntimeError("a")
    raised_from(circle, raised_from(RuntimeError("b"), circle))
    assert EARLIEST.of(circle) is None


def test_a_group_is_ours_only_if_all_its_leaves_are_and_agree() -> None:
    busy, open_circuit = errors.PoolSaturated("x", retry_after=2.0), errors.CircuitOpen("x", retry_after=9.0)
    unknown = errors.CommitOutcomeUnknown("x")
    assert problem_of(ExceptionGroup("g", [busy, ExceptionGroup("h", [open_circuit])])).retry_after == 9
    assert EARLIEST.of(ExceptionGroup("g", [busy, ValueError("x")])) is None
    assert EARLIEST.of(ExceptionGroup("g", [busy, unknown])) is None
    assert problem_of(ExceptionGroup("g", [unknown, unknown])).status == 500


def test_retry_after_comes_from_the_error_then_its_node_then_the_engine() -> None:
    node = NodeStats(name="db1", role="primary", breaker="open", retry_after=8.0, pool=None)
    assert (
        problem_of(errors.CircuitOpen("x", retry_after=4.0, snapshot=node), snapshot(12.0)).retry_after == 4
    )
    assert problem_of(errors.CircuitOpen("x", snapshot=node), snapshot(12.0)).retry_after == 8
    assert problem_of(errors.CircuitOpen("x"), snapshot(12.0)).retry_after == 12
    assert problem_of(errors.CircuitOpen("x")).retry_after == 1


@given(
    seconds=st.none() | st.floats(allow_nan=True, allow_infinity=True), rng=st.randoms(use_true_random=False)
)
def test_retry_after_is_a_whole_second_within_its_bounds(seconds: float | None, rng: random.Random) -> None:
    problem = Problems(rng=rng.random).of(errors.CircuitOpen("x", retry_after=seconds))
    assert problem is not None
    assert isinstance(problem.retry_after, int)
    assert 1 <= problem.retry_after <= 30
    if seconds is not None and 1 <= seconds <= 20:
        assert seconds <= problem.retry_after <= 1.5 * seconds + 1


@pytest.mark.parametrize("seconds", [0.2, 5.0, 20.0, 29.5, 600.0])
def test_retry_after_is_spread_so_that_clients_do_not_come_back_together(seconds: float) -> None:
    problems = Problems(rng=random.Random(7).random)
    told = {problems.of(errors.CircuitOpen("x", retry_after=seconds)) for _ in range(200)}
    assert len(told) >= 2


def test_a_seeded_rng_makes_it_repeatable() -> None:
    def told() -> list[int | None]:
        problems = Problems(rng=random.Random(1).random)
        return [problem.retry_after for _ in range(9) if (problem := problems.of(errors.CircuitOpen("x")))]

    assert told() == told()


def test_the_body_is_rfc_9457() -> None:
    answer = problem_of(errors.CircuitOpen("x", retry_after=3.0)).answer(accept="application/json")
    headers = dict(answer.headers)
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Retry-After"] == "3"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Length"] == str(len(answer.body))
    assert json.loads(answer.body) == {
        "type": PROBLEM_BASE + "circuit-open",
        "title": "Database unavailable",
        "status": 503,
        "detail": "The service cannot reach its database at the moment. Please try again in a moment.",
        "reason": "circuit-open",
        "retry_after": 3,
    }


def test_the_type_can_be_a_url_of_ones_own() -> None:
    problem = Problems(base="https://errors.example/").of(errors.PoolDraining("x"))
    assert problem is not None
    assert problem.type == "https://errors.example/draining"


def test_a_reason_that_is_no_slug_is_not_repeated() -> None:
    assert problem_of(errors.CircuitOpen("x", reason="db1.internal: refused")).reason == "circuit-open"
    assert problem_of(errors.PoolSaturated("x", reason="queue-full")).reason == "queue-full"


@pytest.mark.parametrize(
    ("accept", "is_html"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("image/png", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("TEXT/HTML", True),
        ("text/*", True),
        ("application/json, text/html;q=0.9", False),
        ("text/html, application/json", False),
        ("text/html;q=0.9, application/problem+json;q=0.3, */*;q=0.1", True),
        ("text/html;q=0", False),
        ("text/html;q=rubbish", False),
        ("text/html;level=1;q=0.4, application/*;q=0.2", True),
        (";;,,html", False),
    ],
)
def test_html_is_for_those_who_prefer_it(accept: str, is_html: bool) -> None:
    answer = problem_of(errors.PoolSaturated("x")).answer(accept=accept)
    assert dict(answer.headers)["Content-Type"].startswith("text/html") is is_html
    assert answer.body.startswith(b"<!doctype html>") is is_html
    assert dict(answer.headers)["Vary"] == "Accept"


@pytest.mark.parametrize("accept", ["", "text/html"])
def test_head_gets_the_headers_of_get_and_no_body(accept: str) -> None:
    problem = problem_of(errors.PoolSaturated("x"))
    get, head = problem.answer(accept=accept), problem.answer(method="HEAD", accept=accept)
    assert head.headers == get.headers
    assert (head.body, bool(get.body)) == (b"", True)


def test_only_a_draining_process_sends_its_clients_elsewhere() -> None:
    for error, expected in ((errors.PoolDraining("x"), True), (errors.PoolSaturated("x"), False)):
        assert ("Connection", "close") not in problem_of(error).answer().headers
        assert (("Connection", "close") in problem_of(error).answer(may_close=True).headers) is expected


@given(secret=st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=12))
def test_nothing_of_what_went_wrong_reaches_the_client(secret: str) -> None:
    node = NodeStats(
        name=secret, role="primary", breaker="open", retry_after=1.0, pool=None, last_error=secret
    )
    told = Snapshot(state="down", retry_after=1.0, primary=secret, nodes=(node,), detail={secret: secret})
    for error in (
        errors.CircuitOpen(secret, reason=f"{secret} ", snapshot=node),
        errors.CommitOutcomeUnknown(secret),
        sqlalchemy.exc.OperationalError(secret, {secret: secret}, psycopg.OperationalError(secret)),
        sqlalchemy.exc.OperationalError(secret, {}, psycopg.errors.AdminShutdown(secret)),
    ):
        problem = EARLIEST.of(error, told)
        if problem is None:  # a text that classifies it as something else
            continue
        for accept in ("", "text/html"):
            answer = problem.answer(accept=accept)
            plain = problem_of(errors.CircuitOpen("x")).answer(accept=accept).body.decode()
            if secret not in plain:
                assert secret not in answer.body.decode()
                assert json.dumps(secret)[1:-1] not in answer.body.decode()
                assert secret not in str(answer.headers)


def test_the_range_of_retry_after_must_be_one() -> None:
    with pytest.raises(errors.ConfigurationError):
        Problems(minimum=5.0, maximum=1.0)


@pytest.mark.parametrize(
    ("module", "may"),
    [
        ("resilientdb", set()),
        ("resilientdb.health", set()),
        ("resilientdb.middleware.problem", set()),
        ("resilientdb.middleware.wsgi", set()),
        ("resilientdb.middleware.flask", {"flask"}),
        ("resilientdb.middleware.asgi", {"starlette"}),
        ("resilientdb.middleware.starlette", {"starlette"}),
    ],
)
def test_each_framework_is_imported_only_by_its_own_module(module: str, may: set[str]) -> None:
    code = f"import sys, {module}; print(*(set(sys.modules) & {{'flask', 'starlette', 'fastapi'}}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(loaded.split()) == may


def test_importing_the_library_loads_neither_edge_nor_health() -> None:
    code = "import sys, resilientdb; print(*(m for m in sys.modules if m.startswith('resilientdb.')))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {m for m in loaded.split() if m.startswith(("resilientdb.middleware", "resilientdb.health"))}
