"""``exactly_once=True``: whatever becomes of a COMMIT and its reply, the work is done once, the caller told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, orm
from sqlalchemy.ext.asyncio import async_sessionmaker

import resilientdb as rdb
from resilientdb.engine import outcome as outcome_module
from resilientdb.events import CommitInDoubt, CommitSettled, Event
from resilientdb.testing import faults
from tests.engine import committing
from tests.engine.committing import INSERT, LOST, OnPostgres, cut_soon, server_setting, settle

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from resilientdb.testing import Postgres, Proxy

DRIVERS = ["psycopg", "psycopg2", "psycopg-async", "asyncpg"]

fault = committing.fault


@pytest.fixture(scope="module")
def postgres(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    # What another module has left running at the server would be taken for one of our transactions.
    resilientdb_postgres.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE xact_start IS NOT NULL "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    resilientdb_postgres.query("CREATE TABLE entry (k int)")
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"))
    rdb.install(engine)
    engine.dispose()
    yield resilientdb_postgres
    resilientdb_postgres.query("DROP TABLE entry, resilientdb_token")


@pytest.fixture
def make(postgres: Postgres, resilientdb_proxy: Proxy) -> Iterator[Callable[..., OnPostgres]]:
    postgres.query("DELETE FROM entry")

    def subject(driver: str = "psycopg", **options: Any) -> OnPostgres:
        return OnPostgres(driver, postgres, resilientdb_proxy, **options)

    with committing.subjects(subject) as make:
        yield make


@pytest.fixture(params=DRIVERS)
def subject(request: pytest.FixtureRequest, make: Callable[..., OnPostgres]) -> OnPostgres:
    return make(request.param)


def tokens(postgres: Postgres) -> int:
    return int(postgres.query("SELECT count(*) FROM resilientdb_token")[0][0])


# -- the ordinary course --------------------------------------------------------------------------------------------


def test_the_token_is_committed_with_the_work_or_not_at_all(subject: OnPostgres) -> None:
    before = tokens(subject.postgres)
    assert subject.transact(subject.entry(1)) == 1
    assert (subject.count(1), tokens(subject.postgres)) == (1, before + 1)

    def fail(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 2})
        raise KeyError("mine")

    with pytest.raises(KeyError):
        subject.transact(fail)
    assert (subject.count(2), tokens(subject.postgres)) == (0, before + 1)
    subject.transact(lambda _: None)
    assert tokens(subject.postgres) == before + 2, "also of one that does nothing"


def test_other_transactions_know_nothing_of_it(subject: OnPostgres) -> None:
    before = tokens(subject.postgres)
    subject.transact(subject.entry(3), exactly_once=False)
    assert tokens(subject.postgres) == before


def test_a_run_that_failed_leaves_no_token(subject: OnPostgres) -> None:
    before = tokens(subject.postgres)

    def refuse() -> None:
        raise exc.OperationalError("SELECT 1", {}, ConnectionResetError("reset"), connection_invalidated=True)

    assert subject.transact(subject.entry(4, refuse)) == 2
    assert (subject.count(4), tokens(subject.postgres)) == (1, before + 1)


def test_sessions(make: Callable[..., OnPostgres]) -> None:
    subject = make()
    maker = orm.sessionmaker(subject.engine)

    def work(session: orm.Session, k: int) -> str:
        session.execute(INSERT, {"k": k})
        return type(session).__name__

    assert rdb.run_transaction(maker, work, 5, exactly_once=True) == "Session"
    assert rdb.run_transaction(lambda: orm.Session(subject.engine), work, k=5, exactly_once=True) == "Session"
    assert subject.count(5) == 2

    async def main() -> None:
        other = make("asyncpg")
        before = tokens(subject.postgres)

        async def work(session: Any) -> None:
            await session.execute(INSERT, {"k": 6})

        await rdb.run_transaction_async(async_sessionmaker(other.engine), work, exactly_once=True)
        assert tokens(subject.postgres) == before + 1
        await other.engine.dispose()

    asyncio.run(main())
    assert subject.count(6) == 1


# -- a COMMIT in doubt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOST)
def test_a_commit_in_doubt_is_settled(
    subject: OnPostgres, resilientdb_proxy: Proxy, fault: contextlib.ExitStack, how: str
) -> None:
    lose, is_committed = LOST[how]
    number = 100 + list(LOST).index(how)
    before = tokens(subject.postgres)
    with rdb.deadline(2.0):
        run = subject.transact(subject.entry(number, lambda: fault.enter_context(lose(resilientdb_proxy))))
    assert (run, subject.runs) == ((1, 1) if is_committed else (2, 2))
    fault.close()  # whatever is still under way is delivered now
    settle(subject.postgres)
    assert (subject.count(number), tokens(subject.postgres)) == (1, before + 1)
    assert subject.transact(subject.entry(number + 50)) == 1, "the engine goes on"


TRIGGERS = {
    "dies": "PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5);",
    "naps": "PERFORM pg_sleep(1);",
}


@pytest.fixture(scope="module", autouse=True)
def triggers(postgres: Postgres) -> Iterator[None]:
    """A row in a table of that name makes COMMIT do that."""
    committing.triggers_at_commit(postgres, TRIGGERS)
    yield
    postgres.query(f"DROP TABLE {', '.join(TRIGGERS)} CASCADE")


def test_a_backend_that_dies_while_committing(subject: OnPostgres) -> None:
    runs: list[int] = []

    def body(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 200})
        if len(runs) == 1:
            connection.execute(sa.text("INSERT INTO dies VALUES (1)"))
        return len(runs)

    assert subject.transact(body) == 2
    assert subject.count(200) == 1


def test_a_commit_that_is_still_at_work_is_waited_for(
    subject: OnPostgres, resilientdb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    runs: list[int] = []

    def body(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 201})
        connection.execute(sa.text("INSERT INTO naps VALUES (1)"))
        fault.enter_context(cut_soon(resilientdb_proxy))
        return len(runs)

    assert subject.transact(body) == 1
    assert (len(runs), subject.count(201)) == (1, 1)


def test_at_the_end_of_the_time_the_key_is_handed_over(
    subject: OnPostgres, resilientdb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    """A COMMIT that waits for its standby is neither cancelled nor ended: the caller is told that nobody knows, and
    may ask later."""
    postgres = subject.postgres
    with server_setting(postgres, "synchronous_standby_names", "nobody"):
        seen: list[Event] = []
        rdb.control(subject.engine).on_event(seen.append)
        with rdb.deadline(1.5), pytest.raises(rdb.CommitOutcomeUnknown) as caught:
            subject.transact(subject.entry(202))
        assert subject.runs == 1
        settled = seen[-1]
        assert isinstance(settled, CommitSettled)
        assert (settled.outcome, settled.key) == ("unknown", caught.value.key)
        key = caught.value.key
        assert isinstance(key, uuid.UUID)
        assert str(key) in str(caught.value)
        waiting = postgres.query("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")[0][0]
        assert waiting >= 1, "it was left alone"
        assert subject.count(202) == 0, "and nobody has seen it"
        with rdb.deadline(0.5):
            assert subject.resolve(key) == "unknown"
    assert subject.resolve(key) == "committed"
    settle(postgres)
    assert subject.count(202) == 1


def test_serializable_transactions_are_settled_too(
    subject: OnPostgres, resilientdb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    for number, lose in ((210, faults.reply_lost), (211, faults.commit_lost)):
        subject.detour = resilientdb_proxy.listen_port
        subject.dispose()
        subject.transact(
            subject.entry(number, lambda lose=lose: fault.enter_context(lose(resilientdb_proxy))),  # type: ignore[misc]
            isolation_level="SERIALIZABLE",
        )
        fault.close()
        assert subject.count(number) == 1


def test_an_error_of_the_function_when_it_runs_again_is_its_own(
    make: Callable[..., OnPostgres], resilientdb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    subject = make()
    runs: list[int] = []

    def body(connection: sa.Connection) -> None:
        runs.append(1)
        connection.execute(INSERT, {"k": 220})
        if len(runs) == 2:
            raise KeyError("mine")
        fault.enter_context(faults.commit_lost(resilientdb_proxy))

    with pytest.raises(KeyError):
        subject.transact(body)
    assert subject.count(220) == 0


def test_a_doubt_that_nobody_can_settle_is_seen_too(
    make: Callable[..., OnPostgres], resilientdb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    subject = make()
    control = rdb.control(subject.engine)
    seen: list[Event] = []
    control.on_event(seen.append)
    with subject.engine.connect() as connection:
        connection.execute(INSERT, {"k": 221})
        fault.enter_context(faults.reply_lost(resilientdb_proxy))
        with pytest.raises(rdb.CommitOutcomeUnknown):
            connection.commit()
    assert [type(one) for one in seen] == [CommitInDoubt]
    snapshot = control.snapshot()
    assert (snapshot.commits_in_doubt, snapshot.commits_settled) == (1, {})


def test_anothers_commit_in_doubt_is_not_ours(make: Callable[..., OnPostgres]) -> None:
    subject = make()
    runs: list[int] = []

    def body(_connection: sa.Connection) -> None:
        runs.append(1)
        raise rdb.CommitOutcomeUnknown("of some other transaction")

    with pytest.raises(rdb.CommitOutcomeUnknown) as caught:
        subject.transact(body)
    assert (runs, caught.value.key) == ([1], None)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg-async"])
def test_a_cancelled_commit_is_left_to_the_server(make: Callable[..., OnPostgres], driver: str) -> None:
    """Not cancelled there, too: it is committed a second after its task has ended."""
    subject = make(driver)

    async def nap(connection: Any) -> None:
        await connection.execute(INSERT, {"k": 230})
        await connection.execute(sa.text("INSERT INTO naps VALUES (1)"))

    async def main() -> BaseException:
        began = time.monotonic()
        task = asyncio.create_task(rdb.run_transaction_async(subject.engine, nap, exactly_once=True))
        await asyncio.sleep(0.4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert time.monotonic() - began < 0.9, "the caller is let go at once"
        return caught.value

    error = subject.wait(main())
    notes = " ".join(error.__notes__)
    key = uuid.UUID(notes.split("UUID('")[1].split("'")[0])
    assert subject.resolve(key) == "committed"
    assert subject.count(230) == 1


INTERRUPTED = """
import os, signal, sys, threading, time
import psycopg, sqlalchemy as sa
import resilientdb as rdb

url, plain = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
engine = rdb.create_engine(url, connect_args={"application_name": "interrupted"})
engine.connect().close()
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'interrupted'"

def interrupt():
    with psycopg.connect(plain, autocommit=True) as watcher:
        while not watcher.execute(WAITING).fetchone():
            time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    rdb.run_transaction(
        engine, lambda c: c.execute(sa.text("INSERT INTO entry VALUES (231)")), exactly_once=True
    )
except KeyboardInterrupt as error:
    print(*error.__notes__)
else:
    print("COMMIT came back")
"""


def test_ctrl_c_does_not_cancel_a_commit(make: Callable[..., OnPostgres]) -> None:
    """psycopg would cancel it: committed without its standby, and visible."""
    subject = make()
    postgres = subject.postgres
    with server_setting(postgres, "synchronous_standby_names", "nobody"):
        arguments = [sys.executable, "-c", INTERRUPTED, postgres.url("psycopg"), postgres.url("")]
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True)
        assert "COMMIT was sent and its reply was not awaited" in ended.stdout
        assert subject.count(231) == 0, "it still waits, and nobody has seen it"
    key = uuid.UUID(ended.stdout.split("UUID('")[1].split("'")[0])
    assert subject.resolve(key) == "committed"
    assert subject.count(231) == 1


def test_asyncpgs_own_timeout_does_not_cancel_a_commit(make: Callable[..., OnPostgres]) -> None:
    subject = make("asyncpg", connect_args={"command_timeout": 0.3})
    runs: list[int] = []

    def nap(connection: sa.Connection) -> None:
        runs.append(1)
        connection.execute(INSERT, {"k": 240})
        connection.execute(sa.text("INSERT INTO naps VALUES (1)"))

    with pytest.raises(rdb.CommitOutcomeUnknown):
        subject.transact(nap, exactly_once=False)
    settle(subject.postgres)
    assert subject.count(240) == 1, "the server was left to finish it"
    subject.transact(nap)
    assert (len(runs), subject.count(240)) == (2, 2)


def test_a_doubt_and_its_end_are_seen(
    make: Callable[..., OnPostgres], resilientdb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    committing.assert_a_doubt_and_its_end_are_seen(make, resilientdb_proxy, fault)


# -- asking later ---------------------------------------------------------------------------------------------------


def test_resolve_and_purge(subject: OnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres = subject.postgres
    postgres.query("DELETE FROM resilientdb_token")
    subject.transact(subject.entry(300))
    (key,) = postgres.query("SELECT id FROM resilientdb_token")[0]
    assert subject.resolve(key) == "committed"
    assert subject.resolve(key) == "committed"
    never = uuid.UUID(int=key.int ^ 1)
    assert subject.resolve(never) == "aborted"
    assert subject.resolve(never) == "aborted", "to ask leaves no mark"

    assert subject.purge() == 0
    assert subject.resolve(key) == "committed"
    for _ in range(4):
        subject.transact(lambda _: None)
    later = time.time() + 120
    monkeypatch.setattr(outcome_module, "wall", lambda: later)
    assert subject.purge(older_than=60, batch=2) == 5
    assert subject.resolve(key) == "unknown"
    assert subject.resolve(never) == "unknown"
    with pytest.raises(rdb.ConfigurationError, match="60 seconds"):
        subject.purge(older_than=1)


# -- what it needs --------------------------------------------------------------------------------------------------


def test_without_its_table(subject: OnPostgres) -> None:
    with pytest.raises(rdb.ConfigurationError, match=r"resilientdb\.install"):
        subject.transact(subject.entry(400), exactly_once=rdb.TokenTable("elsewhere"))
    assert (subject.runs, subject.count(400)) == (0, 0)
    with pytest.raises(rdb.ConfigurationError, match=r"nowhere\.elsewhere"):
        subject.transact(subject.entry(400), exactly_once=rdb.TokenTable("elsewhere", schema="nowhere"))


def test_its_table_may_be_anywhere(make: Callable[..., OnPostgres]) -> None:
    subject = make()
    table = rdb.TokenTable('odd "name"', schema="Odd")
    subject.postgres.query('CREATE SCHEMA "Odd"')
    together = [
        threading.Thread(target=rdb.install, args=(subject.engine,), kwargs={"table": table})
        for _ in range(2)
    ]
    for thread in together:
        thread.start()
    rdb.install(subject.engine, table=table)
    for thread in together:
        thread.join()
    subject.transact(subject.entry(410), exactly_once=table)
    ((key,),) = subject.postgres.query('SELECT id FROM "Odd"."odd ""name"""')
    assert rdb.resolve(subject.engine, key, table=table) == "committed"
    subject.postgres.query('DROP SCHEMA "Odd" CASCADE')


def test_a_migration_makes_the_same_table(make: Callable[..., OnPostgres]) -> None:
    subject = make()
    metadata = sa.MetaData()
    rdb.TokenTable("by_migration").to_metadata(metadata)
    metadata.create_all(subject.engine)
    assert subject.transact(subject.entry(411), exactly_once=rdb.TokenTable("by_migration")) == 1
    assert "CREATE TABLE IF NOT EXISTS by_migration" in rdb.TokenTable("by_migration").ddl(
        subject.engine.dialect
    )
    subject.postgres.query("DROP TABLE by_migration")


def test_what_it_cannot_do_is_said(subject: OnPostgres, make: Callable[..., OnPostgres]) -> None:
    with pytest.raises(rdb.ConfigurationError, match="read_only"):
        subject.transact(subject.entry(420), read_only=True)
    autocommit = make(subject.driver, isolation_level="AUTOCOMMIT")
    with pytest.raises(rdb.ConfigurationError, match="AUTOCOMMIT"):
        autocommit.transact(autocommit.entry(420))
    assert subject.count(420) == 0
    with pytest.raises(rdb.ConfigurationError, match="postgresql"):
        rdb.run_transaction(rdb.create_engine("sqlite://"), lambda _: None, exactly_once=True)


def test_begin_and_token_are_one_message(subject: OnPostgres) -> None:
    """psycopg2 sends its BEGIN alone; the others send nothing more than without a token."""
    postgres = subject.postgres
    subject.transact(lambda _: None)  # connects
    with server_setting(postgres, "log_statement", "all"):
        subject.transact(lambda connection: connection.execute(sa.text("SELECT 4711")))
    lines = [line for line in postgres.log_tail(40).splitlines() if "resilientdb_token (id, n)" in line]
    assert lines
    assert ("BEGIN" in lines[-1]) is (subject.driver != "psycopg2")
