"""What a server is sent inside ``read_only()``: by its own log, statement for statement, on every driver."""

from __future__ import annotations

import asyncio
import contextvars
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import resilientdb as rdb
from resilientdb.engine import reading
from resilientdb.engine.drivers import driver_of
from resilientdb.engine.reading import is_plain_read
from resilientdb.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing import Postgres

DRIVERS = ["psycopg", "psycopg2", "psycopg_async", "asyncpg"]
ASYNC = {"psycopg_async", "asyncpg"}

metadata = sa.MetaData()
item = sa.Table("item", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
ONE = sa.select(item.c.n).where(item.c.id == 1)


class Base(orm.DeclarativeBase):
    metadata = metadata


class Item(Base):
    __table__ = item
    id: orm.Mapped[int]
    n: orm.Mapped[int]


# -- a guarded engine over one connection, and what the server logged of it -------------------------------------


@pytest.fixture(scope="module")
def logged(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    """The server, with a database that logs every statement."""
    server = resilientdb_postgres
    server.query("CREATE DATABASE reading")
    server.query("ALTER DATABASE reading SET log_statement = 'all'")
    for statement in (
        "CREATE TABLE item (id int PRIMARY KEY, n int)",
        "CREATE SEQUENCE counter",
        """CREATE FUNCTION put(int) RETURNS int LANGUAGE sql AS 'INSERT INTO item VALUES ($1, 0) RETURNING id'""",
    ):
        server.query(statement, database="reading")
    yield server
    server.query("DROP DATABASE reading WITH (FORCE)")


class Subject:
    """One engine of one driver. Blocks are given as plain functions, also for asynchronous drivers."""

    def __init__(self, server: Postgres, driver: str, *, plain: bool = False, **options: Any) -> None:
        self.server = server
        self.driver = driver
        self.runner = asyncio.Runner() if driver in ASYNC else None
        url = server.url(driver, database="reading")
        options = {"pool_size": 1, "max_overflow": 0, **options}
        make: Any
        if self.runner is not None:
            make = create_async_engine if plain else rdb.create_async_engine
        else:
            make = sa.create_engine if plain else rdb.create_engine
        self.engine = make(url, **options)
        self.sync: sa.Engine = getattr(self.engine, "sync_engine", self.engine)
        with rdb.read_only():
            self.begin_log()

    def begin_log(self) -> None:
        """From here on ``sent()`` is about the connection that the pool has now."""
        self.pid = self.block(lambda connection: connection.scalar(sa.text("SELECT pg_backend_pid()")))
        self.sent_until = self.server.log.stat().st_size

    def block(self, work: Callable[[sa.Connection], Any], **options: Any) -> Any:
        """``with engine.connect() as connection: return work(connection)``."""
        if self.runner is None:
            with self.engine.connect() as connection:
                return work(connection.execution_options(**options))

        async def run() -> Any:
            async with self.engine.connect() as connection:
                return await connection.run_sync(lambda sync: work(sync.execution_options(**options)))

        return self.runner.run(run(), context=contextvars.copy_context())

    def session(self, work: Callable[[orm.Session], Any]) -> Any:
        if self.runner is None:
            with orm.Session(self.engine) as session:
                return work(session)

        async def run() -> Any:
            async with AsyncSession(self.engine) as session:
                return await session.run_sync(work)

        return self.runner.run(run(), context=contextvars.copy_context())

    def sent(self) -> list[str]:
        """What the server got over the connection since the last call: the first word of each statement."""
        with self.server.log.open(encoding="utf-8") as log:
            log.seek(self.sent_until)
            text = log.read()
        self.sent_until += len(text.encode())
        found = re.findall(rf"^.*\[{self.pid}\] LOG:  (?:statement|execute [^:]*): (.*)$", text, re.MULTILINE)
        return [re.split(r"[\s;]", statement)[0] for statement in found]

    def dbapi(self, connection: sa.Connection) -> Any:
        return connection.connection.dbapi_connection

    def close(self) -> None:
        if self.runner is None:
            self.engine.dispose()
        else:
            self.runner.run(self.engine.dispose())
            self.runner.close()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(logged: Postgres, driver: str) -> Iterator[Callable[..., Subject]]:
    made: list[Subject] = []

    def make(**options: Any) -> Subject:
        made.append(Subject(logged, driver, **options))
        return made[-1]

    logged.query("TRUNCATE item", database="reading")
    logged.query("INSERT INTO item VALUES (1, 10), (2, 20)", database="reading")
    yield make
    for subject in made:
        subject.close()


@pytest.fixture
def subject(make: Callable[..., Subject]) -> Subject:
    return make()


def read(connection: sa.Connection) -> Any:
    return connection.execute(ONE).scalar_one()


def write(connection: sa.Connection) -> Any:
    return connection.execute(item.insert().values(id=9, n=90))


# -- one round trip ---------------------------------------------------------------------------------------------


def test_a_read_goes_alone(subject: Subject) -> None:
    with rdb.read_only():
        assert subject.block(read) == 10
        assert subject.sent() == ["SELECT"]
        subject.block(lambda connection: [read(connection), connection.scalar(sa.text("SELECT 1"))])
        assert subject.sent() == ["SELECT", "SELECT"]
        assert subject.block(lambda connection: connection.exec_driver_sql("SHOW server_version").scalar())
        assert subject.sent() == ["SHOW"]
        subject.block(lambda connection: connection.execute(sa.union_all(ONE, ONE)).all())
        assert subject.sent() == ["SELECT"]


def test_elsewhere_nothing_is_left_out(subject: Subject) -> None:
    subject.block(read)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]
    with rdb.read_only():
        subject.block(read)
    subject.block(read)
    assert subject.sent() == ["SELECT", "BEGIN", "SELECT", "ROLLBACK"]


def test_a_connection_that_was_not_used_is_not_reset(subject: Subject) -> None:
    subject.block(lambda connection: None)
    assert subject.sent() == []


@pytest.mark.parametrize(
    "statement",
    [
        ONE.with_for_update(),
        ONE.with_for_update(read=True),
        ONE.suffix_with("FOR UPDATE"),
        sa.select(sa.func.nextval("counter")),
        sa.select(sa.func.put(7)),
        sa.select(sa.func.pg_advisory_xact_lock(1)),
        sa.select(sa.func.set_config("statement_timeout", "1s", True)),
        sa.select(sa.func.pg_notify("channel", "")),
        sa.select(item.insert().values(id=7, n=7).returning(item.c.id).cte()),
        sa.text("SELECT n FROM item FOR UPDATE"),
        sa.text("SELECT put(7)"),
        sa.text("WITH one AS (SELECT 1) SELECT * FROM one"),
        sa.text("TABLE item"),
        sa.text("SET LOCAL statement_timeout = '1s'"),
        sa.text("EXPLAIN SELECT 1"),
        item.update().values(n=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"], indirect=True)
def test_what_is_not_certain_to_be_a_read_keeps_its_transaction(subject: Subject, statement: Any) -> None:
    with rdb.read_only():
        subject.block(lambda connection: connection.execute(statement))
    sent = subject.sent()
    assert (sent[0], len(sent), sent[-1]) == ("BEGIN", 3, "ROLLBACK")


def test_from_the_first_other_statement_on_the_block_is_a_transaction(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        read(connection)
        write(connection)
        read(connection)

    with rdb.read_only():
        subject.block(work)
        assert subject.sent() == ["SELECT", "BEGIN", "INSERT", "SELECT", "ROLLBACK"]

        def work_and_commit(connection: sa.Connection) -> None:
            work(connection)
            connection.commit()
            read(connection)

        subject.block(work_and_commit)
        assert subject.sent() == ["SELECT", "BEGIN", "INSERT", "SELECT", "COMMIT", "SELECT"]
    assert subject.server.query("SELECT count(*) FROM item WHERE id = 9", database="reading") == [(1,)]


def test_a_transaction_that_was_begun_outside_stays_one(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        read(connection)
        with rdb.read_only():
            read(connection)

    subject.block(work)
    assert subject.sent() == ["BEGIN", "SELECT", "SELECT", "ROLLBACK"]


def test_many_parameter_sets_and_server_side_cursors_have_a_transaction(subject: Subject) -> None:
    with rdb.read_only():
        subject.block(lambda connection: connection.execute(ONE).all(), stream_results=True)
        sent = subject.sent()
        assert (sent[0], sent[-1]) == ("BEGIN", "ROLLBACK")
        subject.block(lambda connection: connection.execute(sa.text("SELECT :n"), [{"n": "1"}, {"n": "2"}]))
        assert subject.sent()[0] == "BEGIN"


def test_the_text_that_is_sent_is_judged(subject: Subject) -> None:
    """After the listeners have had their way with it."""

    def lock(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> Any:
        return statement + " FOR UPDATE", parameters

    sa.event.listen(subject.sync, "before_cursor_execute", lock, retval=True)
    with rdb.read_only():
        subject.block(read)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


def test_the_same_text_may_be_sure_as_a_construct_only(subject: Subject) -> None:
    one = sa.select(sa.literal_column("1").label("n")).cte("one")
    construct = sa.select(one.c.n)
    text = str(construct.compile(subject.sync))
    with rdb.read_only():
        subject.block(lambda connection: connection.execute(construct).all())
        assert subject.sent() == ["WITH"]
        subject.block(lambda connection: connection.exec_driver_sql(text).all())
        assert subject.sent() == ["BEGIN", "WITH", "ROLLBACK"]


# -- SQLAlchemy sees what it always saw -------------------------------------------------------------------------


def events_of(subject: Subject, work: Callable[[sa.Connection], Any]) -> list[str]:
    happened: list[str] = []
    for name in ("begin", "commit", "rollback", "savepoint", "rollback_savepoint", "before_cursor_execute"):
        sa.event.listen(subject.sync, name, lambda *_, name=name: happened.append(name))
    for name in ("checkout", "reset", "checkin"):
        sa.event.listen(subject.sync.pool, name, lambda *_, name=name: happened.append(name))
    with rdb.read_only():
        subject.block(work)
    return happened


def commits(connection: sa.Connection) -> None:
    assert not connection.in_transaction()
    read(connection)
    assert connection.in_transaction()
    connection.commit()
    assert not connection.in_transaction()
    read(connection)
    connection.rollback()
    assert not connection.in_transaction()
    with connection.begin():
        read(connection)
    read(connection)


def nests(connection: sa.Connection) -> None:
    read(connection)
    with connection.begin_nested():
        read(connection)
        assert connection.in_nested_transaction()


@pytest.mark.parametrize(
    ("work", "sent"),
    [
        (commits, ["SELECT"] * 4),
        (nests, ["SELECT", "BEGIN", "SAVEPOINT", "SELECT", "RELEASE", "ROLLBACK"]),
    ],
)
def test_its_transactions_and_events_are_the_same(
    make: Callable[..., Subject], work: Callable[[sa.Connection], Any], sent: list[str]
) -> None:
    guarded, plain = make(), make(plain=True)
    assert events_of(guarded, work) == events_of(plain, work)
    assert guarded.sent() == sent


def test_both_halves_of_a_two_phase_transaction_are_one(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        transaction = connection.begin_twophase(uuid.uuid4().hex)
        read(connection)
        transaction.rollback()

    with rdb.read_only():
        subject.block(work)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


def test_a_listener_may_still_execute_the_statement_itself(subject: Subject) -> None:
    def instead(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
        cursor.execute(statement.replace("SELECT", "SELECT 100 +"), parameters)
        return True

    sa.event.listen(subject.sync, "do_execute", instead)
    with rdb.read_only():
        assert subject.block(read) == 110


def test_no_params(subject: Subject) -> None:
    with rdb.read_only():
        subject.block(lambda connection: connection.execute(sa.select(item)).all(), no_parameters=True)
    assert subject.sent() == ["SELECT"]


def test_a_session_reads_alone_and_commits_nothing(subject: Subject) -> None:
    def work(session: orm.Session) -> None:
        found = session.get_one(Item, 1)
        assert session.scalars(sa.select(Item).order_by(Item.id)).all()[0] is found
        session.commit()
        assert found.n == 10  # expired, so loaded again

    with rdb.read_only():
        subject.session(work)
    assert subject.sent() == ["SELECT"] * 3


def test_a_whole_transaction_reads_alone(subject: Subject) -> None:
    if subject.runner is not None:

        async def one(connection: Any) -> Any:
            return await connection.scalar(ONE)

        found = subject.runner.run(rdb.run_transaction_async(subject.engine, one, read_only=True))
    else:
        found = rdb.run_transaction(subject.engine, read, read_only=True)
    assert found == 10
    assert subject.sent() == ["SELECT"]


@pytest.mark.parametrize("reset", ["rollback", "commit", None])
def test_whatever_the_pool_does_on_return(make: Callable[..., Subject], reset: Any) -> None:
    subject = make(pool_reset_on_return=reset)
    with rdb.read_only():
        subject.block(read)
    assert subject.sent() == ["SELECT"]


def test_a_transaction_that_was_ended_by_a_text_is_still_reset(subject: Subject) -> None:
    """To the server it is over, but drivers keep accounts of their own: the next one has to begin, and to end."""

    def work(connection: sa.Connection) -> None:
        write(connection)
        connection.exec_driver_sql("ROLLBACK")

    subject.block(work)
    subject.sent()
    subject.block(write)
    assert subject.sent() == ["BEGIN", "INSERT", "ROLLBACK"]
    with rdb.read_only():
        subject.block(work)
        subject.sent()
        subject.block(read)
        assert subject.sent() == ["SELECT"]


def test_a_very_long_statement_is_not_worth_a_look(subject: Subject) -> None:
    with rdb.read_only():
        subject.block(lambda connection: connection.execute(sa.text("SELECT '" + "x" * 10_000 + "'")))
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


# -- isolation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_level_that_was_asked_for_is_given(make: Callable[..., Subject], level: str) -> None:
    subject = make(isolation_level=level)
    with rdb.read_only():
        subject.block(read)
        assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]
    subject = make()
    with rdb.read_only():
        subject.block(read, isolation_level=level)
        assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("option", ["postgresql_readonly", "postgresql_deferrable"])
def test_an_option_of_the_transaction_is_given(subject: Subject, option: str) -> None:
    with rdb.read_only():
        subject.block(read, **{option: True})
        assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]
        subject.block(read)
        # psycopg2 would need a round trip to leave out the next BEGIN, once an option was set on the connection.
        assert subject.sent() == (
            ["BEGIN", "SELECT", "ROLLBACK"] if subject.driver == "psycopg2" else ["SELECT"]
        )


def test_autocommit_stays_autocommit(make: Callable[..., Subject]) -> None:
    subject = make(isolation_level="AUTOCOMMIT")
    with rdb.read_only():
        subject.block(lambda connection: [read(connection), write(connection)])
    assert subject.sent() == ["SELECT", "INSERT"]
    assert subject.server.query("SELECT count(*) FROM item WHERE id = 9", database="reading") == [(1,)]


@pytest.mark.parametrize("where", ["database", "connect_args"])
def test_a_default_of_the_servers_is_respected(make: Callable[..., Subject], driver: str, where: str) -> None:
    options: dict[str, Any] = {}
    server = make().server
    try:
        if where == "database":
            server.query("ALTER DATABASE reading SET default_transaction_isolation = 'repeatable read'")
        elif driver == "asyncpg":
            options = {"server_settings": {"default_transaction_isolation": "repeatable read"}}
        else:
            options = {"options": "-c default_transaction_isolation=repeatable\\ read"}
        subject = make(connect_args=options)
        with rdb.read_only():
            subject.block(read)
        assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]
    finally:
        server.query("ALTER DATABASE reading RESET default_transaction_isolation")


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"], indirect=True)
def test_a_level_of_one_node_alone_is_respected(make: Callable[..., Subject], driver: str) -> None:
    """SQLAlchemy asks for the default level on its first connection only; later ones may lead to other nodes."""
    subject = make()

    @sa.event.listens_for(subject.sync, "do_connect")
    def another(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        if driver == "asyncpg":
            parameters["server_settings"] = {"default_transaction_isolation": "serializable"}
        else:
            parameters["options"] = "-c default-transaction-isolation=serializable"

    with rdb.read_only():
        subject.block(lambda connection: connection.invalidate())
        subject.begin_log()
        subject.block(read)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("driver", ["asyncpg"], indirect=True)
def test_without_prepared_statements_asyncpg_has_its_transaction(make: Callable[..., Subject]) -> None:
    subject = make(connect_args={"prepared_statement_cache_size": 0})
    with rdb.read_only():
        subject.block(read)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


# -- failures ---------------------------------------------------------------------------------------------------

FAILING = sa.text("SELECT 1 / (n - 10) FROM item WHERE id = 1")


def test_after_an_error_the_connection_is_as_good_as_before(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        with pytest.raises(exc.DBAPIError, match="division by zero"):
            connection.execute(FAILING)
        assert connection.in_transaction()
        assert read(connection) == 10
        connection.rollback()
        assert read(connection) == 10

    with rdb.read_only():
        subject.block(work)
        assert subject.sent() == ["SELECT"] * 3
    assert subject.block(read) == 10
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"], "it was left as it was found"


def test_in_an_aborted_transaction_nothing_is_left_out(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        write(connection)
        with pytest.raises(exc.DBAPIError, match="division by zero"):
            connection.execute(FAILING)
        with pytest.raises(exc.DBAPIError, match="transaction is aborted"):
            read(connection)
        connection.rollback()
        assert read(connection) == 10

    with rdb.read_only():
        subject.block(work)


def test_a_connection_lost_during_a_read_is_replaced(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        subject.server.query("SELECT pg_terminate_backend(%s, 5000)", [subject.pid])
        with pytest.raises(exc.DBAPIError) as caught:
            read(connection)
        assert caught.value.connection_invalidated

    with rdb.read_only():
        subject.block(work)
        assert subject.block(read) == 10


def test_a_commit_after_reads_is_never_in_doubt(subject: Subject) -> None:
    """There is nothing to lose with the connection; without this it is ``CommitOutcomeUnknown``."""

    def work(connection: sa.Connection) -> None:
        read(connection)
        subject.server.query("SELECT pg_terminate_backend(%s, 5000)", [subject.pid])
        connection.commit()

    with rdb.read_only():
        subject.block(work)


def test_a_deadline_ends_a_read(subject: Subject) -> None:
    with rdb.read_only():
        with rdb.deadline(0.3), pytest.raises(DeadlineExceeded):
            subject.block(lambda connection: connection.execute(sa.select(sa.func.pg_sleep(30))))
        assert subject.sent() == ["SELECT"]
        subject.begin_log()
        assert subject.block(read) == 10
        assert subject.sent() == ["SELECT"]
    subject.block(read)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


def test_a_commit_of_nothing_is_not_late(subject: Subject) -> None:
    def work(connection: sa.Connection) -> None:
        with rdb.deadline(30) as limit:
            read(connection)
            assert limit is not None
            limit.expires_at = 0.0
            connection.commit()
            with pytest.raises(DeadlineExceeded):
                read(connection)

    with rdb.read_only():
        subject.block(work)


@pytest.mark.parametrize("driver", sorted(ASYNC), indirect=True)
def test_a_cancelled_read_leaves_nothing_behind(subject: Subject) -> None:
    async def cancelled() -> None:
        with rdb.read_only():
            async with asyncio.timeout(0.2), subject.engine.connect() as connection:
                await connection.execute(sa.select(sa.func.pg_sleep(30)))

    assert subject.runner is not None
    with pytest.raises(TimeoutError):
        subject.runner.run(cancelled())
    subject.begin_log()
    subject.block(read)
    assert subject.sent() == ["BEGIN", "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async"], indirect=True)
def test_a_table_may_change_under_a_prepared_read(subject: Subject) -> None:
    """In transactions that are rolled back psycopg prepares nothing; alone it does, and would fail for ever."""
    server = subject.server
    everything = sa.text("SELECT * FROM item WHERE id = 1")
    with rdb.read_only():
        for _ in range(8):
            subject.block(lambda connection: connection.execute(everything).one())
        server.query("ALTER TABLE item ADD COLUMN more int DEFAULT 5", database="reading")
        try:
            assert subject.block(lambda connection: connection.execute(everything).one()) == (1, 10, 5)
            subject.sent()
            subject.block(lambda connection: connection.execute(everything).one())
            assert subject.sent() == ["SELECT"]
        finally:
            server.query("ALTER TABLE item DROP COLUMN more", database="reading")


def raw(server: Postgres, driver: str) -> Any:
    """A driver's connection, as SQLAlchemy keeps it, in no pool."""
    dialect = sa.make_url(server.url(driver)).get_dialect()()
    dialect.dbapi = type(dialect).import_dbapi()
    return dialect, dialect.connect(host=server.host, port=server.port, user=server.superuser)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"], indirect=True)
def test_idle_means_that_the_driver_has_nothing_in_hand_either(logged: Postgres, driver: str) -> None:
    dialect, connection = raw(logged, driver)
    facts = driver_of(dialect)
    assert facts.is_idle(connection)
    assert facts.may_withhold_begin(connection, "READ COMMITTED")
    assert not facts.may_withhold_begin(connection, "REPEATABLE READ")
    assert not facts.may_withhold_begin(connection, None)
    connection.tpc_begin(connection.xid(1, "a", "b"))
    connection.cursor().execute("ROLLBACK")
    assert connection.info.transaction_status == 0
    assert not facts.is_idle(connection)
    assert not facts.may_withhold_begin(connection, "READ COMMITTED")
    connection.close()


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_a_pipeline_is_not_idle(logged: Postgres, driver: str) -> None:
    dialect, connection = raw(logged, driver)
    with connection.pipeline():
        assert not driver_of(dialect).is_idle(connection)
    connection.close()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"], indirect=True)
def test_of_a_closed_connection_nothing_is_known(logged: Postgres, driver: str) -> None:
    dialect, connection = raw(logged, driver)
    facts = driver_of(dialect)
    connection.close()
    assert not facts.is_idle(connection)
    assert not facts.may_withhold_begin(connection, "READ COMMITTED")
    facts.allow_begin(connection)


def test_a_replica_is_read_alone(logged: Postgres, resilientdb_standby: Postgres) -> None:
    resilientdb_standby.wait_caught_up(logged)
    engine = rdb.create_engine(
        logged.url("psycopg", database="reading"), replicas=[resilientdb_standby.address], pool_size=1
    )
    where = sa.text("SELECT pg_is_in_recovery(), pg_backend_pid()")
    with rdb.read_only():
        with engine.connect() as connection:
            in_recovery, pid = connection.execute(where).one()
        with engine.connect() as connection:
            connection.execute(ONE).all()
    engine.dispose()
    assert in_recovery
    log = resilientdb_standby.log.read_text(encoding="utf-8")
    sent = re.findall(rf"\[{pid}\] LOG:  (?:statement|execute [^:]*): (\w+)", log)
    assert sent[-2:] == ["SELECT", "SELECT"]


def test_other_databases_are_left_alone() -> None:
    engine = rdb.create_engine("sqlite://")
    assert "connect" not in vars(engine.dialect), "it is for PostgreSQL"
    with rdb.read_only(), engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async"], indirect=True)
@pytest.mark.parametrize("behind_its_back", [b"DEALLOCATE ALL", b"PREPARE _pg3_0 AS SELECT 1"])
def test_a_session_may_be_exchanged_under_a_prepared_read(subject: Subject, behind_its_back: bytes) -> None:
    """As a pooler in transaction mode does it: what was prepared is not there, or something else is."""

    def exchange(connection: sa.Connection) -> None:
        dbapi = connection.connection.driver_connection
        assert dbapi is not None
        dbapi.pgconn.exec_(behind_its_back)

    with rdb.read_only():
        for turn in range(16):
            if turn == (3 if b"PREPARE" in behind_its_back else 8):
                subject.block(exchange)
                subject.sent()
            assert subject.block(read) == 10
    assert "DEALLOCATE" in subject.sent()


# -- what differs, and what does not ----------------------------------------------------------------------------

NOW = sa.select(sa.func.now())


def test_each_read_has_its_own_now(subject: Subject) -> None:
    def differ(connection: sa.Connection) -> bool:
        return bool(connection.scalar(NOW) != connection.scalar(NOW))

    assert not subject.block(differ)
    with rdb.read_only():
        assert subject.block(differ)
        assert not subject.block(differ, isolation_level="REPEATABLE READ")


def test_a_function_that_writes_is_rolled_back_unless_committed(subject: Subject) -> None:
    put = sa.select(sa.func.put(7))
    there = "SELECT count(*) FROM item WHERE id = 7"
    with rdb.read_only():
        subject.block(lambda connection: [read(connection), connection.execute(put)])
        assert subject.server.query(there, database="reading") == [(0,)]

        def keep(connection: sa.Connection) -> None:
            connection.execute(put)
            connection.commit()

        subject.block(keep)
        assert subject.server.query(there, database="reading") == [(1,)]


def test_locks_and_settings_of_a_transaction_last_as_long_as_it(subject: Subject) -> None:
    def work(connection: sa.Connection) -> tuple[Any, Any]:
        connection.execute(sa.text("SELECT set_config('my.tenant', 'a', true), pg_advisory_xact_lock(1)"))
        held = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
        tenant = connection.scalar(sa.text("SELECT current_setting('my.tenant', true)"))
        return tenant, connection.scalar(held)

    with rdb.read_only():
        assert subject.block(work) == ("a", 1)


# -- what is a plain read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "select 1",
        "  \n(SELECT 1) UNION (SELECT 2)",
        "VALUES (1, 'a'), (2, 'b')",
        "SHOW TRANSACTION ISOLATION LEVEL",
        "SELECT item.id AS item_id FROM item WHERE item.id = %(id_1)s::INTEGER AND (n > $1 OR n IN (1, 2))",
        "SELECT last_update, is_deleted, information FROM format WHERE mixed_into IS NULL",
        "SELECT count(*) FILTER (WHERE n > 1), sum(n) OVER (PARTITION BY id ORDER BY n) FROM item",
        "SELECT pg_catalog.count(*), CAST(n AS VARCHAR(20)), n::NUMERIC(10, 2) FROM item AS anon_1 (id, n)",
        "SELECT a.n FROM (SELECT n FROM item) AS a JOIN item ON (a.n = item.n) WHERE EXISTS (SELECT 1)",
        "SELECT now(), CURRENT_TIMESTAMP(3), extract(year FROM x), coalesce(lower ( n ), '') FROM item",
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY n) FROM item",
        "SELECT x AS MATERIALIZED FROM jsonb_to_recordset('[]') AS t(x int)",
    ],
)
def test_a_plain_read(statement: str) -> None:
    assert is_plain_read(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "",
        "INSERT INTO item VALUES (1, 1)",
        "SELECTED",
        "SELECT 1; DELETE FROM item",
        "SELECT 1;",
        "SELECT n INTO other FROM item",
        "SELECT 1INTO other",
        'SELECT 1 INTO"other"',
        "SELECT n FROM item FOR UPDATE",
        "SELECT n FROM item FOR NO KEY UPDATE",
        "SELECT n FROM item\nfor\tshare",
        "SELECT n FROM item LIMIT 1FOR UPDATE",
        "SELECT n FROM item LIMIT $1FOR KEY SHARE",
        "SELECT n FROM item FOR/**/UPDATE",
        "SELECT n FROM item FOR--\nUPDATE",
        "WITH gone AS (DELETE FROM item RETURNING id) SELECT * FROM gone",
        "SELECT nextval('counter')",
        "SELECT put(1)",
        "SELECT put (1)",
        'SELECT "put"(1)',
        'SELECT "count" (1)',
        "SELECT public.count(1)",
        "SELECT public . count(1)",
        "SELECT écount(1)",
        "SELECT count\xa0(1)",
        "SELECT (SELECT (put(1)))",
        "SELECT * FROM put(1) AS t(x)",
        "SELECT over(1)",
        "SELECT 1 OPERATOR(public.+) 2",
        "SELECT $$ as $$put(1)",
        "SELECT U&'x'/**/put(1)",
        "EXPLAIN ANALYZE DELETE FROM item",
    ],
)
@pytest.mark.parametrize("is_select", [False, True])
def test_not_certainly_a_plain_read(statement: str, is_select: bool) -> None:
    assert not is_plain_read(statement, is_select=is_select)


def test_common_table_expressions_are_read_by_constructs_only() -> None:
    reads = "WITH RECURSIVE one AS NOT MATERIALIZED (SELECT 1 AS n) SELECT n FROM one"
    assert is_plain_read(reads, is_select=True)
    assert not is_plain_read(reads)
    assert not is_plain_read("SELECT (WITH one AS (SELECT 1) SELECT * FROM one)")
    for writes in (
        "INSERT INTO item VALUES (1, 1)",
        "UPDATE item SET n = 1",
        "DELETE FROM item",
        "MERGE INTO item",
    ):
        assert not is_plain_read(f"WITH x AS ({writes} RETURNING *) SELECT * FROM x", is_select=True)


VOLATILE = {
    *("clock_timestamp", "gen_random_uuid", "random", "pg_sleep"),
    *("pg_database_size", "pg_indexes_size", "pg_relation_size", "pg_table_size", "pg_total_relation_size"),
    *(
        "pg_is_in_recovery",
        "pg_last_wal_receive_lsn",
        "pg_last_wal_replay_lsn",
        "pg_last_xact_replay_timestamp",
    ),
}
"""Give another answer each time, and write nothing."""


def test_the_harmless_functions_are_harmless_by_the_servers_own_account(
    resilientdb_postgres: Postgres,
) -> None:
    functions = dict(
        resilientdb_postgres.query(
            "SELECT proname::text, bool_or(provolatile = 'v') FROM pg_proc "
            "WHERE pronamespace = 'pg_catalog'::regnamespace GROUP BY 1"
        )
    )
    keywords = {
        word: kind == "U"
        for word, kind in resilientdb_postgres.query("SELECT word, catcode::text FROM pg_get_keywords()")
    }
    harmless = reading._HARMLESS
    assert {name for name in harmless if functions.get(name)} == VOLATILE
    # A word that is no function must be one that the user's function cannot have for a name, or nearly: these few are
    # only ever followed by a parenthesis where no expression may begin.
    words = {name for name in harmless if name not in functions}
    assert words <= set(keywords)
    assert {name for name in words if keywords[name]} == {"by", "cube", "materialized", "rollup", "varying"}
    # They write nothing, but belong to the transaction.
    assert (
        harmless & {"txid_current", "pg_current_xact_id", "pg_current_snapshot", "txid_current_snapshot"}
        == set()
    )
