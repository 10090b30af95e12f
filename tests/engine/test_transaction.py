"""Whole transactions: run again when another run may succeed, and never when the first may have been committed."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, orm
from sqlalchemy.ext.asyncio import async_sessionmaker

import resilientdb as rdb
from resilientdb.errors import CommitOutcomeUnknown, DeadlineExceeded
from resilientdb.events import Event, TransactionRetried

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from resilientdb.testing.postgres import Postgres

QUICK = rdb.Resilience(
    retry=rdb.RetryPolicy(
        attempts=4, backoff=rdb.Backoff(initial=0.001, maximum=0.002), budget=rdb.RetryBudget(floor=10_000)
    )
)


def listen(engine: Any) -> list[Event]:
    events: list[Event] = []
    rdb.control(engine).on_event(events.append)
    return events


def retries(events: list[Event]) -> list[int]:
    return [event.attempt for event in events if isinstance(event, TransactionRetried)]


# -- without a server -----------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = rdb.create_engine(f"sqlite:///{tmp_path}/t.db", resilience=QUICK)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    yield engine
    engine.dispose()


def insert(work: Any, number: int, *, fail: BaseException | None = None) -> int:
    work.execute(sa.text("INSERT INTO t VALUES (:n)"), {"n": number})
    if fail is not None:
        raise fail
    return number


def stored(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT n FROM t ORDER BY n")))


def test_it_commits_and_returns_what_the_function_returns(sqlite: sa.Engine) -> None:
    assert rdb.run_transaction(sqlite, insert, 1) == 1
    assert rdb.run_transaction(orm.sessionmaker(sqlite), insert, number=2) == 2
    assert stored(sqlite) == [1, 2]


def test_it_rolls_back_and_raises_the_applications_own_error(sqlite: sa.Engine) -> None:
    events, error = listen(sqlite), KeyError("mine")
    with pytest.raises(KeyError) as caught:
        rdb.run_transaction(sqlite, insert, 1, fail=error)
    assert caught.value is error
    assert (stored(sqlite), retries(events)) == ([], [])


def test_a_unique_violation_is_not_tried_again(sqlite: sa.Engine) -> None:
    events = listen(sqlite)
    rdb.run_transaction(sqlite, insert, 1)
    with pytest.raises(exc.IntegrityError):
        rdb.run_transaction(sqlite, insert, 1)
    assert retries(events) == []


def lost() -> exc.OperationalError:
    return exc.OperationalError("SELECT 1", {}, ConnectionResetError("reset"), connection_invalidated=True)


def test_each_attempt_starts_afresh(sqlite: sa.Engine) -> None:
    events, sessions = listen(sqlite), []

    def work(session: orm.Session) -> int:
        sessions.append(session)
        insert(session, 1)
        if len(sessions) < 3:
            raise lost()
        return len(sessions)

    assert rdb.run_transaction(orm.sessionmaker(sqlite), work) == 3
    assert len({id(session) for session in sessions}) == 3
    assert (stored(sqlite), retries(events)) == ([1], [1, 2])


def test_the_last_real_error_is_raised(sqlite: sa.Engine) -> None:
    errors = [lost() for _ in range(9)]
    made: list[exc.OperationalError] = []

    def work(_connection: sa.Connection) -> None:
        made.append(errors[len(made)])
        raise made[-1]

    with pytest.raises(exc.OperationalError) as caught:
        rdb.run_transaction(sqlite, work)
    assert caught.value is errors[3]
    assert len(made) == 4


def test_a_commit_in_doubt_is_never_tried_again(sqlite: sa.Engine) -> None:
    calls: list[int] = []

    def work(_connection: sa.Connection) -> None:
        calls.append(1)
        raise CommitOutcomeUnknown("the reply was lost")

    with pytest.raises(CommitOutcomeUnknown):
        rdb.run_transaction(sqlite, work)
    assert calls == [1]


def test_read_only_and_the_default_deadline(tmp_path: Path) -> None:
    from resilientdb.runtime.context import current_deadline, is_read_only

    engine = rdb.create_engine(f"sqlite:///{tmp_path}/t.db", resilience=rdb.Resilience(deadline=7.0))

    def look(_connection: sa.Connection) -> tuple[bool, float | None]:
        now = current_deadline()
        return is_read_only(), None if now is None else now.seconds

    assert rdb.run_transaction(engine, look) == (False, 7.0)
    assert rdb.run_transaction(engine, look, read_only=True) == (True, 7.0)
    with rdb.deadline(60):
        assert rdb.run_transaction(engine, look) == (False, 60), "the caller's own counts"
    assert current_deadline() is None
    engine.dispose()


def test_misuse_is_explained(sqlite: sa.Engine, tmp_path: Path) -> None:
    async def coroutine(_connection: object) -> None: ...

    def plain(_connection: object) -> int:
        return 1

    foreign = rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/t.db")
    unguarded = sa.create_engine("sqlite://")
    cases: list[tuple[Any, Any, str]] = [
        (sqlite, coroutine, "use run_transaction_async"),
        (foreign, plain, "use run_transaction_async"),
        (async_sessionmaker(foreign), plain, "use run_transaction_async"),
        (unguarded, plain, "was not made by resilientdb"),
        (orm.sessionmaker(), plain, "sessionmaker with a bind"),
        (orm.sessionmaker(unguarded), plain, "was not made by resilientdb"),
        ("sqlite://", plain, "neither an engine nor a sessionmaker"),
        (None, plain, "neither an engine nor a sessionmaker"),
    ]
    for target, function, remedy in cases:
        with pytest.raises(rdb.ConfigurationError, match=remedy) as caught:
            rdb.run_transaction(target, function)
        assert caught.value.key in {"target", "function", "engine"}
    async_cases: list[tuple[Any, Any, str]] = [
        (sqlite, coroutine, "use run_transaction"),
        (orm.sessionmaker(sqlite), coroutine, "use run_transaction"),
        (foreign, plain, "use run_transaction|async function"),
        (async_sessionmaker(), coroutine, "sessionmaker with a bind"),
    ]
    for target, function, remedy in async_cases:
        with pytest.raises(rdb.ConfigurationError, match=remedy) as caught:
            asyncio.run(rdb.run_transaction_async(target, function))
        assert caught.value.key in {"target", "function"}
    asyncio.run(foreign.dispose())


def test_a_function_that_makes_connections_or_sessions(sqlite: sa.Engine) -> None:
    makers: list[Any] = [
        sqlite.connect,
        functools.partial(sa.Engine.connect, sqlite),
        lambda: orm.Session(sqlite),
        orm.scoped_session(orm.sessionmaker(sqlite)),
    ]
    for number, maker in enumerate(makers):
        runs: list[int] = []

        def work(work: Any, number: int, runs: list[int] = runs) -> int:
            runs.append(1)
            return insert(work, number, fail=lost() if len(runs) == 1 else None)

        assert rdb.run_transaction(maker, work, number) == number
        assert len(runs) == 2
    assert stored(sqlite) == [0, 1, 2, 3]
    pool: Any = sqlite.pool
    assert pool.checkedout() == 0


def test_what_is_in_use_already_cannot_be_retried(sqlite: sa.Engine) -> None:
    with sqlite.connect() as connection, pytest.raises(rdb.ConfigurationError, match="an open Connection"):
        rdb.run_transaction(connection, insert, 1)
    with orm.Session(sqlite) as session:
        with pytest.raises(rdb.ConfigurationError, match="an open Session"):
            rdb.run_transaction(session, insert, 1)
        session.execute(sa.text("SELECT 1"))
        with pytest.raises(rdb.ConfigurationError, match="in a transaction already"):
            rdb.run_transaction(lambda: session, insert, 1)
    assert stored(sqlite) == []


def test_one_inside_another_is_refused(sqlite: sa.Engine, tmp_path: Path) -> None:
    def outer(connection: sa.Connection, engine: sa.Engine, **options: Any) -> int:
        return rdb.run_transaction(engine, lambda _: 1, **options)

    with pytest.raises(rdb.ConfigurationError, match="inside the function of another"):
        rdb.run_transaction(sqlite, outer, sqlite)
    assert rdb.run_transaction(sqlite, lambda c: outer(c, sqlite, read_only=True)) == 1, "a read is harmless"
    other = rdb.create_engine(f"sqlite:///{tmp_path}/other.db")
    assert rdb.run_transaction(sqlite, outer, other) == 1, "of another engine it is"
    other.dispose()
    contexts: list[contextvars.Context] = []
    rdb.run_transaction(sqlite, lambda _: contexts.append(contextvars.copy_context()))
    assert contexts[0].run(rdb.run_transaction, sqlite, insert, 7) == 7, "what outlives it is not inside"


def test_the_decorator(sqlite: sa.Engine, tmp_path: Path) -> None:
    tries: list[int] = []

    @rdb.transactional(sqlite)
    def add(connection: sa.Connection, number: int, *, read_only: str = "") -> str:
        """Adds."""
        tries.append(1)
        insert(connection, number, fail=lost() if len(tries) == 1 else None)
        return read_only

    assert add(1, read_only="its own") == "its own"
    assert (add.__name__, add.__doc__, len(tries), stored(sqlite)) == ("add", "Adds.", 2, [1])
    engine = rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/t.db", resilience=QUICK)

    @rdb.transactional(engine)
    async def add_async(connection: Any, number: int) -> int:
        await connection.execute(sa.text("INSERT INTO t VALUES (:n)"), {"n": number})
        return number

    async def main() -> None:
        assert await add_async(2) == 2
        await engine.dispose()

    assert inspect.iscoroutinefunction(add_async)
    asyncio.run(main())
    assert stored(sqlite) == [1, 2]


# -- on a real server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def admin(resilientdb_postgres: Postgres) -> Iterator[sa.Engine]:
    """Somebody else at the same database; unguarded."""
    engine = sa.create_engine(resilientdb_postgres.url(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("CREATE TABLE IF NOT EXISTS acct (id int PRIMARY KEY, n int NOT NULL)"))
        connection.execute(sa.text("CREATE TABLE IF NOT EXISTS killer (id int)"))
        connection.execute(
            sa.text(
                "CREATE OR REPLACE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); RETURN NULL; END $$"
            )
        )
        connection.execute(
            sa.text(
                "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON killer DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION die()"
            )
        )
    yield engine
    with engine.connect() as connection:
        connection.execute(sa.text("DROP TABLE acct, killer"))
    engine.dispose()


@pytest.fixture
def accounts(admin: sa.Engine) -> sa.Engine:
    with admin.connect() as connection:
        connection.execute(sa.text("DELETE FROM acct"))
        connection.execute(sa.text("INSERT INTO acct VALUES (1, 0), (2, 0)"))
    return admin


def balance(admin: sa.Engine) -> dict[int, int]:
    with admin.connect() as connection:
        return {row.id: row.n for row in connection.execute(sa.text("SELECT id, n FROM acct"))}


@pytest.fixture(params=["psycopg", "psycopg2"])
def engine(request: pytest.FixtureRequest, resilientdb_postgres: Postgres) -> Iterator[sa.Engine]:
    engine = rdb.create_engine(resilientdb_postgres.url(request.param), resilience=QUICK)
    yield engine
    engine.dispose()


def test_a_serialization_failure_is_run_again(engine: sa.Engine, accounts: sa.Engine) -> None:
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    events, attempts = listen(engine), []

    def add_one(connection: sa.Connection) -> None:
        attempts.append(1)
        seen = connection.scalar(sa.text("SELECT n FROM acct WHERE id = 1"))
        if len(attempts) == 1:
            with accounts.connect() as other:
                other.execute(sa.text("UPDATE acct SET n = n + 10 WHERE id = 1"))
        connection.execute(sa.text("UPDATE acct SET n = :n WHERE id = 1"), {"n": (seen or 0) + 1})

    rdb.run_transaction(serializable, add_one)
    assert balance(accounts)[1] == 11, "neither update is lost"
    assert retries(events) == [1]


def test_a_deadlock_is_run_again(engine: sa.Engine, accounts: sa.Engine) -> None:
    events, both_locked = listen(engine), threading.Barrier(2)
    attempts = {1: 0, 2: 0}

    def transfer(connection: sa.Connection, first: int) -> None:
        attempts[first] += 1
        connection.execute(sa.text("SET LOCAL deadlock_timeout = '50ms'"))
        connection.execute(sa.text("UPDATE acct SET n = n - 1 WHERE id = :id"), {"id": first})
        if attempts[first] == 1:
            both_locked.wait(10)
        connection.execute(sa.text("UPDATE acct SET n = n + 1 WHERE id = :id"), {"id": 3 - first})

    other = threading.Thread(target=rdb.run_transaction, args=(engine, transfer, 1))
    other.start()
    rdb.run_transaction(engine, transfer, 2)
    other.join(20)
    assert balance(accounts) == {1: 0, 2: 0}
    # The same two may meet once more, when the first to go on is slow to take what the other has let go.
    assert sum(attempts.values()) - 2 == len(retries(events)) > 0


def test_a_connection_lost_before_commit_is_run_again(engine: sa.Engine, accounts: sa.Engine) -> None:
    events, backends = listen(engine), []

    def add_one(connection: sa.Connection) -> None:
        backends.append(connection.scalar(sa.text("SELECT pg_backend_pid()")))
        connection.execute(sa.text("UPDATE acct SET n = n + 1 WHERE id = 1"))
        if len(backends) == 1:
            with accounts.connect() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": backends[0]})
            connection.execute(sa.text("SELECT 1"))

    rdb.run_transaction(engine, add_one)
    assert balance(accounts)[1] == 1
    assert len(set(backends)) == 2
    assert retries(events) == [1]


def test_a_connection_lost_at_commit_is_not_run_again(engine: sa.Engine, accounts: sa.Engine) -> None:
    events, attempts = listen(engine), []

    def work(connection: sa.Connection) -> None:
        attempts.append(1)
        connection.execute(sa.text("INSERT INTO killer VALUES (1)"))

    with pytest.raises(CommitOutcomeUnknown, match="COMMIT was sent and its reply was lost") as caught:
        rdb.run_transaction(engine, work)
    assert type(caught.value.__cause__).__module__.startswith(engine.driver), "the driver's own error"
    assert (attempts, retries(events)) == ([1], [])
    rdb.run_transaction(engine, lambda connection: connection.execute(sa.text("SELECT 1")))


def test_a_deadline_ends_the_retries(engine: sa.Engine, accounts: sa.Engine) -> None:
    def hang(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT pg_sleep(30)"))

    with rdb.deadline(0.2), pytest.raises(DeadlineExceeded):
        rdb.run_transaction(engine, hang)
    rdb.run_transaction(engine, lambda connection: connection.execute(sa.text("SELECT 1")))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_async_serialization_failure_lost_connection_and_commit_in_doubt(
    resilientdb_postgres: Postgres, accounts: sa.Engine, driver: str
) -> None:
    driver = driver.removesuffix("_async")

    async def main() -> None:
        engine = rdb.create_async_engine(resilientdb_postgres.url(driver), resilience=QUICK)
        events = listen(engine)
        attempts: list[int] = []

        async def add_one(session: Any) -> None:
            connection = await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            attempts.append(await connection.scalar(sa.text("SELECT pg_backend_pid()")))
            seen = await session.scalar(sa.text("SELECT n FROM acct WHERE id = 1"))
            with accounts.connect() as other:
                if len(attempts) == 1:
                    other.execute(sa.text("UPDATE acct SET n = n + 10 WHERE id = 1"))
                if len(attempts) == 2:
                    other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": attempts[-1]})
            await session.execute(sa.text("UPDATE acct SET n = :n WHERE id = 1"), {"n": seen + 1})

        await rdb.run_transaction_async(async_sessionmaker(engine), add_one)
        assert len(attempts) == 3
        assert retries(events) == [1, 2]
        attempts.clear()

        async def die(connection: Any) -> None:
            attempts.append(1)
            await connection.execute(sa.text("INSERT INTO killer VALUES (1)"))

        with pytest.raises(CommitOutcomeUnknown):
            await rdb.run_transaction_async(engine, die)
        assert attempts == [1]
        await engine.dispose()

    asyncio.run(main())
    assert balance(accounts)[1] == 11


SWALLOWED = [("psycopg", False), ("psycopg2", False), ("psycopg", True), ("asyncpg", True)]


@pytest.mark.parametrize(("driver", "is_async"), SWALLOWED)
def test_a_commit_of_an_aborted_transaction_is_a_failure(
    resilientdb_postgres: Postgres, accounts: sa.Engine, driver: str, is_async: bool
) -> None:
    """The server answers ROLLBACK, and the driver says nothing of it."""

    def swallow(connection: sa.Connection) -> None:
        connection.execute(sa.text("UPDATE acct SET n = 5 WHERE id = 1"))
        with contextlib.suppress(exc.DBAPIError):
            connection.execute(sa.text("SELECT 1/0"))

    def usable_afterwards(connection: sa.Connection) -> None:
        swallow(connection)
        with pytest.raises(rdb.TransactionAborted):
            connection.commit()
        connection.rollback()
        assert connection.scalar(sa.text("SELECT 1")) == 1
        connection.commit()

    def spare(connection: sa.Connection) -> None:
        connection.execute(sa.text("UPDATE acct SET n = 6 WHERE id = 1"))
        with contextlib.suppress(exc.DBAPIError), connection.begin_nested():
            connection.execute(sa.text("SELECT 1/0"))

    runs: list[int] = []

    def deadlocked(connection: sa.Connection) -> None:
        runs.append(1)
        if len(runs) == 1:
            with contextlib.suppress(exc.DBAPIError):
                connection.execute(
                    sa.text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'deadlock_detected'; END $$")
                )

    async def main() -> None:
        engine = rdb.create_async_engine(
            resilientdb_postgres.url(driver), resilience=QUICK, pool_size=1, max_overflow=0
        )
        with pytest.raises(rdb.TransactionAborted, match="22012") as caught:
            async with engine.begin() as connection:
                await connection.run_sync(swallow)
        async with engine.connect() as connection:
            await connection.run_sync(usable_afterwards)
        assert not caught.value.retryable
        with pytest.raises(rdb.TransactionAborted):
            await rdb.run_transaction_async(engine, lambda connection: connection.run_sync(swallow))
        await rdb.run_transaction_async(engine, lambda connection: connection.run_sync(deadlocked))
        async with engine.begin() as connection:
            await connection.run_sync(spare)
        await engine.dispose()

    if is_async:
        asyncio.run(main())
    else:
        engine = rdb.create_engine(
            resilientdb_postgres.url(driver), resilience=QUICK, pool_size=1, max_overflow=0
        )
        with pytest.raises(rdb.TransactionAborted, match="22012") as caught, engine.begin() as connection:
            swallow(connection)
        with engine.connect() as connection:
            usable_afterwards(connection)
        assert not caught.value.retryable
        assert balance(accounts)[1] == 0
        with pytest.raises(rdb.TransactionAborted):
            rdb.run_transaction(orm.sessionmaker(engine), lambda session: swallow(session.connection()))
        rdb.run_transaction(engine, deadlocked)
        with engine.begin() as connection:
            spare(connection)
        engine.dispose()
    assert len(runs) == 2, "what another run may mend is run again"
    assert balance(accounts)[1] == 6


LEVEL = sa.text(
    "SELECT current_setting('transaction_isolation') || ' ' || current_setting('transaction_read_only') || ' ' || "
    "current_setting('transaction_deferrable'), nullif(txid_current_if_assigned(), 0)"
)
"""The last function because it is none of those that are called without a transaction."""


def test_isolation_and_read_only(engine: sa.Engine, accounts: sa.Engine) -> None:
    def look(work: Any) -> str:
        return str(work.scalar(LEVEL))

    for target in (engine, orm.sessionmaker(engine)):
        assert rdb.run_transaction(target, look) == "read committed off off"
        assert rdb.run_transaction(target, look, read_only=True) == "read committed on off"
        assert (
            rdb.run_transaction(target, look, isolation_level="SERIALIZABLE", read_only=True)
            == "serializable on on"
        )
        assert (
            rdb.run_transaction(target, look, isolation_level="REPEATABLE READ", read_only=True)
            == "repeatable read on off"
        )
        assert (
            rdb.run_transaction(target, look, isolation_level="REPEATABLE READ") == "repeatable read off off"
        )
        assert rdb.run_transaction(target, look) == "read committed off off", "nothing is left of it"
    with pytest.raises(rdb.ConfigurationError, match="AUTOCOMMIT"):
        rdb.run_transaction(engine, look, isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]


def test_a_write_in_a_read_only_transaction_is_the_functions_mistake(
    engine: sa.Engine, accounts: sa.Engine
) -> None:
    events, attempts, backends = listen(engine), [], set()

    def work(connection: sa.Connection) -> None:
        attempts.append(1)
        backends.add(connection.scalar(sa.text("SELECT pg_backend_pid()")))
        connection.execute(sa.text("UPDATE acct SET n = 1 WHERE id = 1"))

    for _ in range(2):
        with pytest.raises(exc.DBAPIError) as caught:
            rdb.run_transaction(engine, work, read_only=True)
        assert getattr(caught.value.orig, "sqlstate", getattr(caught.value.orig, "pgcode", "")) == "25006"
    assert (len(attempts), len(backends), retries(events)) == (2, 1, [])
    assert balance(accounts)[1] == 0


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_async_isolation_and_read_only(resilientdb_postgres: Postgres, driver: str) -> None:
    async def look(work: Any) -> str:
        return str(await work.scalar(LEVEL))

    async def main() -> None:
        engine = rdb.create_async_engine(resilientdb_postgres.url(driver), resilience=QUICK)
        run = rdb.run_transaction_async
        for target in (engine, async_sessionmaker(engine), engine.connect):
            assert await run(target, look, read_only=True) == "read committed on off"
            assert (
                await run(target, look, isolation_level="SERIALIZABLE", read_only=True)
                == "serializable on on"
            )
            assert await run(target, look) == "read committed off off"
        await engine.dispose()

    asyncio.run(main())


SLOW_COMMIT = [
    "CREATE TEMP TABLE slow (n int)",
    """CREATE FUNCTION pg_temp.nap() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN PERFORM pg_sleep(3); RETURN NULL; END $$""",
    """CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
       FOR EACH ROW EXECUTE FUNCTION pg_temp.nap()""",
    "INSERT INTO slow VALUES (1)",
]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_cancelled_commit_stays_a_cancellation(resilientdb_postgres: Postgres, driver: str) -> None:
    """``asyncio.timeout`` and task groups need their ``CancelledError`` back; that the outcome is unknown is noted
    on it."""

    async def main() -> None:
        engine = rdb.create_async_engine(resilientdb_postgres.url(driver), resilience=QUICK)
        attempts: list[int] = []

        async def work(connection: Any) -> None:
            attempts.append(1)
            for statement in SLOW_COMMIT:
                await connection.execute(sa.text(statement))

        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.3):
                await rdb.run_transaction_async(engine, work)
        assert attempts == [1]
        # The first releases of Python 3.11 raise it in the handler of the cancellation, later ones from it.
        cause = caught.value.__cause__ or caught.value.__context__
        assert isinstance(cause, asyncio.CancelledError)
        assert any("COMMIT" in note for note in cause.__notes__)
        await engine.dispose()

    asyncio.run(main())
