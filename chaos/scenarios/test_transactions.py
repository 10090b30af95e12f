"""Transactions: run again as a whole where that is safe, never where nobody knows whether they were committed."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import resilientdb as rdb
from chaos.bodies import Ledger, echo
from chaos.invariants import eventually, known_errors, own_answers
from chaos.workloads import Call, Load, Work, once
from resilientdb.testing import History, check_ledger, faults
from resilientdb.testing.checkers import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection

    from chaos.conftest import Run
    from chaos.drivers import Stack
    from resilientdb.testing import Postgres, Proxy
    from resilientdb.testing.faults import ActiveFault

_ACCOUNTS = 60
_READ = text("SELECT amount FROM account WHERE id = :id")
_PAUSE = text("SELECT pg_sleep(0.01)")
_RATE = 150.0
_ADD = text("UPDATE account SET amount = amount + :amount WHERE id = :id")


def outcome(call: Call) -> Outcome:
    """What its caller may believe. Refused before anything was sent, or rolled back by the server's own word."""
    if call.ok:
        return Outcome.OK
    if isinstance(call.error, rdb.PoolSaturated | rdb.PoolTimeout | rdb.CircuitOpen | rdb.NoPrimaryAvailable):
        return Outcome.FAIL
    original = getattr(call.error, "orig", None)
    code = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return Outcome.FAIL if code in {"40001", "40P01"} else Outcome.INFO


@pytest.mark.parametrize("isolation", ["SERIALIZABLE", "READ COMMITTED"])
def test_conflicts_and_cuts(
    run: Run, isolation: str, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy
) -> None:
    """Transfers that conflict (serialization failures; deadlocks) while backends are terminated and connections
    cut: what is acknowledged is there once, what is refused is not, and no money is made or lost."""
    profile = run.profile
    ledger = Ledger(resilientdb_postgres, "transfers")
    resilientdb_postgres.query("DROP TABLE IF EXISTS account")
    resilientdb_postgres.query("CREATE TABLE account (id integer PRIMARY KEY, amount integer NOT NULL)")
    resilientdb_postgres.query(f"INSERT INTO account SELECT n, 100 FROM generate_series(1, {_ACCOUNTS}) n")
    pairs = [run.rng.sample(range(1, _ACCOUNTS + 1), 2) for _ in range(profile.works)]

    def transfer(connection: Connection, number: int) -> int:
        giver, taker = pairs[number]
        connection.execute(_READ, {"id": giver}).scalar_one()
        connection.execute(_ADD, {"id": giver, "amount": -1})
        connection.execute(_PAUSE)
        connection.execute(_ADD, {"id": taker, "amount": 1})
        ledger.insert(connection, number)
        return number

    # Waiting longer than that for a lock is a deadlock: PostgreSQL looks after a second unless told otherwise.
    resilientdb_postgres.query("ALTER SYSTEM SET deadlock_timeout = '20ms'")
    resilientdb_postgres.reload()
    history = History()
    work = Work(body=transfer, whole=True, deadline=5.0)
    with run.stack(
        resilientdb_postgres, port=resilientdb_proxy.listen_port, isolation_level=isolation
    ) as stack:
        with (
            _terminating(run, stack, resilientdb_postgres),
            _cutting(resilientdb_proxy) as cuts,
            Load(stack, [work] * profile.works, rate=_RATE) as load,
        ):
            time.sleep(profile.works / _RATE)
        calls = load.calls
        for call in calls:
            history.complete(history.invoke(call.number), outcome(call), call.error)
        report = check_ledger(history, ledger.rows(resilientdb_postgres))
        retried = stack.snapshot().retries if run.guarded else 0
        refused = calls.errors()["CircuitOpen"]
        run.record(
            f"{calls.ok_share:4.0%} committed, {retried} retries; {len(cuts)} cuts, {refused} refused",
            calls,
            retries=retried,
            cuts=len(cuts),
            unknown=report.unknown,
            circuit_moves=len(stack.transitions),
        )
        report.raise_for_violations()
        total = resilientdb_postgres.query("SELECT sum(amount) FROM account")[0][0]
        assert total == 100 * _ACCOUNTS, f"the accounts hold {total}"
        if not run.guarded:
            assert calls.failed, "nothing was in the way"
            return
        known_errors(calls)
        assert retried > 0, "nothing had to be run again"


@pytest.mark.parametrize("lost", ["reply", "request"])
def test_commit_in_doubt(
    run: Run, lost: str, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy
) -> None:
    """The reply to COMMIT is lost, or COMMIT itself: the same error, and only one of them is committed.

    The library says that nobody knows, and runs nothing again. A caller that just tries again, as bare ones do,
    writes twice where the reply was lost: this scenario can fail.
    """
    ledger = Ledger(resilientdb_postgres, f"doubt_{lost}")
    history = History()
    block = faults.reply_lost if lost == "reply" else faults.commit_lost
    runs: list[int] = []
    tries = 1 if run.guarded else 2
    with run.stack(resilientdb_postgres, port=resilientdb_proxy.listen_port) as stack:
        for key in range(run.profile.rounds):
            for attempt in range(tries):
                with contextlib.ExitStack() as fault:
                    strike = attempt == 0
                    work = Work(
                        body=_entry(
                            ledger, key, runs, (lambda: block(resilientdb_proxy)) if strike else None, fault
                        ),
                        whole=True,
                    )
                    number = history.invoke(key)
                    (call,) = once(stack, work)
                history.complete(number, Outcome.OK if call.ok else Outcome.INFO, call.error)
                if strike:
                    assert not call.ok, "COMMIT was acknowledged"
                if run.guarded:
                    assert isinstance(call.error, rdb.CommitOutcomeUnknown), repr(call.error)
                    assert isinstance(call.error.__cause__, Exception)
                    eventually(stack.is_closed, "the circuit is closed again")
                else:
                    assert call.ok or isinstance(call.error, DBAPIError | ConnectionError)
        rows = [row[0] for row in ledger.rows(resilientdb_postgres)]
        report = check_ledger(history, rows)
        run.record(
            f"{run.profile.rounds} commits in doubt, {len(runs)} runs, {len(report.duplicated)} written twice",
            runs=len(runs),
            twice=len(report.duplicated),
            present=len(rows),
        )
        if not run.guarded:
            assert len(report.duplicated) == (run.profile.rounds if lost == "reply" else 0)
            return
        assert len(runs) == run.profile.rounds, "a transaction in doubt was run again"
        assert len(rows) == (run.profile.rounds if lost == "reply" else 0)
        report.raise_for_violations()


def test_cancelled_anywhere(run: Run, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy) -> None:
    """Tasks cancelled at any await, threads out of time anywhere: no slot goes missing, the next caller gets a
    clean connection, and what was acknowledged is there."""
    profile = run.profile
    ledger = Ledger(resilientdb_postgres, "cancelled")
    history = History()

    def three(connection: Connection, number: int) -> int:
        answer = echo(connection, number)
        ledger.insert(connection, number)
        return answer + echo(connection, number) - number

    works = []
    for _ in range(profile.works):
        work = Work(body=three, commit=True)
        if run.rng.random() < 0.7:
            threaded = run.guarded and run.driver == "psycopg"
            at = run.rng.randrange(1, 40 if threaded else 14)
            work = replace(work, deadline=at / 1000) if threaded else replace(work, cancel_at=at)
        works.append(work)
    with run.stack(resilientdb_postgres, port=resilientdb_proxy.listen_port, pool_size=3) as stack:
        with faults.latency(resilientdb_proxy, 0.002), Load(stack, works, in_flight=6) as load:
            pass
        calls = load.calls
        for call in calls:
            history.complete(history.invoke(call.number), outcome(call), call.error)
        given_up = calls.where(lambda call: call.work.cancel_at is not None or call.work.deadline is not None)
        run.record(
            f"{len(calls.failed)} of {len(calls)} given up, {len(stack.connects)} connects",
            calls,
            connects=len(stack.connects),
        )
        own_answers(calls)
        check_ledger(history, ledger.rows(resilientdb_postgres)).raise_for_violations()
        patient = calls.where(lambda call: call.work.cancel_at is None and call.work.deadline is None)
        assert not patient.failed, f"others paid for it: {dict(patient.errors())}"
        if run.guarded or run.driver != "psycopg":
            assert given_up.failed, "nobody was cancelled"
        own_answers(once(stack, *[Work(body=echo)] * 20))
        assert not _left_open(resilientdb_postgres, stack), "a transaction was left open"


def _entry(
    ledger: Ledger,
    key: int,
    runs: list[int],
    block: Callable[[], AbstractContextManager[ActiveFault]] | None,
    fault: contextlib.ExitStack,
) -> Callable[[Connection, int], None]:
    """A transaction whose last act is to break the line over which its COMMIT will go."""

    def body(connection: Connection, _number: int) -> None:
        runs.append(key)
        ledger.insert(connection, key)
        if block is not None:
            fault.enter_context(block())

    return body


@contextlib.contextmanager
def _terminating(run: Run, stack: Stack, postgres: Postgres) -> Iterator[None]:
    """Every 100 ms one of the stack's backends is terminated, in whatever it does."""

    def strike() -> None:
        postgres.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s "
            "AND state LIKE 'idle in%%' ORDER BY md5(pid::text || %s) LIMIT 1",
            [stack.application, str(run.rng.random())],
        )

    with _every(0.1, strike):
        yield


@contextlib.contextmanager
def _cutting(proxy: Proxy) -> Iterator[list[float]]:
    """Every 300 ms some connections are reset."""
    cuts: list[float] = []

    def strike() -> None:
        with faults.reset(proxy, toxicity=0.5):
            time.sleep(0.01)
        cuts.append(time.monotonic())

    with _every(0.3, strike):
        yield cuts


@contextlib.contextmanager
def _every(seconds: float, strike: Callable[[], None]) -> Iterator[None]:
    """Strike again and again beside the block; what goes wrong there is raised at its end."""
    stop = threading.Event()
    failures: list[Exception] = []

    def go_on() -> None:
        while not stop.wait(seconds):
            try:
                strike()
            except Exception as error:  # noqa: BLE001 - raised where it is seen
                failures.append(error)
                return

    thread = threading.Thread(target=go_on, name="chaos-strikes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _left_open(postgres: Postgres, stack: Stack) -> bool:
    rows = postgres.query(
        "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND state LIKE 'idle in%%'",
        [stack.application],
    )
    return bool(rows)
