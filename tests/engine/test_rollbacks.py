"""A deadlock that the program catches, on MariaDB: the server has rolled everything back, and the caller is told."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

import resilientdb as rdb
from resilientdb.testing.mariadb import MariaDB
from tests.engine import committing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INSERT = sa.text("INSERT INTO done (k) VALUES (:k)")
TOUCH = "UPDATE two SET n = n + 1 WHERE k = {}"


class Subject(committing.Subject):
    def __init__(self, server: MariaDB, driver: str, **options: Any) -> None:
        super().__init__(driver, server, **options)
        self.server = server

    def begin(self, body: Callable[[sa.Connection], Any]) -> Any:
        """``body`` in ``engine.begin()``."""
        if self.runner is None:
            with self.engine.begin() as connection:
                return body(connection)

        async def main() -> Any:
            async with self.engine.begin() as connection:
                return await connection.run_sync(body)

        return self.runner.run(main())

    def done(self) -> list[int]:
        return [k for (k,) in self.server.query("SELECT k FROM done ORDER BY k", database="app")]


@pytest.fixture(scope="module")
def strict() -> Iterator[MariaDB]:
    """A server that rolls back as often as it can."""
    settings = {"innodb_rollback_on_timeout": "on", "innodb_snapshot_isolation": "on"}
    with MariaDB(name="strict", settings=settings) as server:
        yield server


@pytest.fixture
def make() -> Iterator[Callable[..., Subject]]:

    def subject(server: MariaDB, driver: str = "pymysql", **options: Any) -> Subject:
        for name, columns in (("two", "k int PRIMARY KEY, n int"), ("done", "k int")):
            server.query(f"CREATE OR REPLACE TABLE {name} ({columns}) ENGINE=InnoDB", database="app")
        server.query("INSERT INTO two VALUES (1, 0), (2, 0)", database="app")
        return Subject(server, driver, **options)

    with committing.subjects(subject) as make:
        yield make


@pytest.fixture(params=["pymysql", "aiomysql", "asyncmy"])
def subject(
    request: pytest.FixtureRequest, make: Callable[..., Subject], resilientdb_mariadb: MariaDB
) -> Subject:
    return make(resilientdb_mariadb, request.param)


@contextlib.contextmanager
def other(server: MariaDB) -> Iterator[pymysql.Connection[Any]]:
    """Somebody else's transaction."""
    connection = pymysql.connect(host=server.host, port=server.port, user="app", database="app")
    try:
        yield connection
    finally:
        connection.close()


def deadlock(server: MariaDB, connection: sa.Connection) -> None:
    """Raises the server's 1213: the other one has more to lose."""
    with other(server) as heavy:
        cursor = heavy.cursor()
        cursor.execute("INSERT INTO done VALUES (-1), (-1), (-1), (-1), (-1), (-1), (-1), (-1), (-1)")
        cursor.execute(TOUCH.format(2))
        connection.exec_driver_sql(TOUCH.format(1))
        waiter = threading.Thread(target=cursor.execute, args=[TOUCH.format(1)])
        waiter.start()
        try:
            until = time.monotonic() + 5
            while not server.query(
                "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
            ):
                assert time.monotonic() < until, "nobody waits"
                time.sleep(0.005)
            connection.exec_driver_sql(TOUCH.format(2))
        finally:
            waiter.join()


def number(error: BaseException) -> int:
    original: Any = getattr(error, "orig", None)
    return int(original.args[0])


def swallow(work: Callable[[], object]) -> int:
    """Catches the database's error, as a careless program does; returns its number."""
    try:
        work()
    except sa.exc.DBAPIError as error:
        return number(error)
    raise AssertionError("nothing went wrong")


# -- deadlocks ------------------------------------------------------------------------------------------------------


def test_half_a_transaction_is_not_committed(subject: Subject) -> None:
    def careless(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})
        assert swallow(lambda: deadlock(subject.server, connection)) == 1213
        connection.execute(INSERT, {"k": 2})

    with pytest.raises(rdb.TransactionAborted, match=r"1213.*rolled all of it back") as caught:
        subject.begin(careless)
    assert caught.value.retryable
    assert subject.done() == []
    subject.begin(lambda connection: connection.execute(INSERT, {"k": 3}))
    assert subject.done() == [3], "it is over with that transaction"


def test_a_whole_transaction_runs_again(subject: Subject) -> None:
    runs: list[int] = []

    def careless(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 1})
        if len(runs) == 1:
            swallow(lambda: deadlock(subject.server, connection))
        connection.execute(INSERT, {"k": 2})
        return len(runs)

    assert subject.transact(careless) == 2
    assert subject.done() == [1, 2]


def test_a_rollback_ends_it(subject: Subject) -> None:
    def careful(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})
        swallow(lambda: deadlock(subject.server, connection))
        connection.rollback()
        connection.execute(INSERT, {"k": 2})
        connection.commit()

    if subject.runner is None:
        with subject.engine.connect() as connection:
            careful(connection)
    else:

        async def main() -> None:
            async with subject.engine.connect() as connection:
                await connection.run_sync(careful)

        subject.runner.run(main())
    assert subject.done() == [2]


def test_the_next_user_of_the_connection_has_nothing_to_do_with_it(
    make: Callable[..., Subject], resilientdb_mariadb: MariaDB
) -> None:
    subject = make(resilientdb_mariadb, pool_size=1, max_overflow=0)
    with subject.engine.connect() as connection:
        connection.execute(INSERT, {"k": 1})
        swallow(lambda: deadlock(subject.server, connection))
    subject.begin(lambda connection: connection.execute(INSERT, {"k": 2}))
    with subject.engine.connect() as connection:
        swallow(lambda: deadlock(subject.server, connection))
        connection.invalidate()
    subject.begin(lambda connection: connection.execute(INSERT, {"k": 3}))
    assert subject.done() == [2, 3]


# -- savepoints -----------------------------------------------------------------------------------------------------


def test_the_error_in_a_savepoint_is_the_one_that_is_seen(subject: Subject) -> None:
    """The server says of the savepoint that there is none. That would not be run again."""
    runs: list[int] = []

    def nested(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 1})
        with connection.begin_nested():
            if len(runs) == 1:
                deadlock(subject.server, connection)
        return len(runs)

    with pytest.raises(sa.exc.DBAPIError) as caught:
        subject.begin(nested)
    assert number(caught.value) == 1213
    runs.clear()
    assert subject.transact(nested) == 2
    assert subject.done() == [1]


def test_a_savepoint_does_not_save_it(subject: Subject) -> None:
    def careless(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})

        def nested() -> None:
            with connection.begin_nested():
                deadlock(subject.server, connection)

        assert swallow(nested) == 1213
        connection.execute(INSERT, {"k": 2})

    with pytest.raises(rdb.TransactionAborted):
        subject.begin(careless)
    assert subject.done() == []


def test_nor_can_it_be_released(make: Callable[..., Subject], resilientdb_mariadb: MariaDB) -> None:
    subject = make(resilientdb_mariadb)

    def careless(session: orm.Session) -> None:
        session.execute(INSERT, {"k": 1})
        with session.begin_nested():
            swallow(lambda: deadlock(subject.server, session.connection()))

    with pytest.raises(rdb.TransactionAborted), orm.Session(subject.engine) as session, session.begin():
        careless(session)
    assert subject.done() == []


# -- what is not rolled back, or not always -------------------------------------------------------------------------


def impatient(server: MariaDB, connection: sa.Connection, *, nested: bool = False) -> int:
    """Does not wait for a row that somebody else has; returns the error's number."""

    def touch() -> None:
        with connection.begin_nested() if nested else contextlib.nullcontext():
            connection.exec_driver_sql(TOUCH.format(1))

    with other(server) as holder:
        holder.cursor().execute(TOUCH.format(1))
        connection.exec_driver_sql("SET innodb_lock_wait_timeout = 0")
        return swallow(touch)


def test_after_other_errors_it_goes_on(subject: Subject) -> None:
    def careful(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})
        assert swallow(lambda: connection.exec_driver_sql("INSERT INTO two VALUES (2, 2)")) == 1062
        assert impatient(subject.server, connection) == 1205
        assert impatient(subject.server, connection, nested=True) == 1205
        connection.execute(INSERT, {"k": 2})

    subject.begin(careful)
    assert subject.done() == [1, 2]


@pytest.mark.parametrize("driver", ["pymysql", "aiomysql", "asyncmy"])
def test_a_server_may_be_set_up_to_roll_back_after_a_timeout(
    make: Callable[..., Subject], strict: MariaDB, driver: str
) -> None:
    subject = make(strict, driver)

    def careless(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})
        assert impatient(strict, connection) == 1205
        connection.execute(INSERT, {"k": 2})

    with pytest.raises(rdb.TransactionAborted, match="1205"):
        subject.begin(careless)

    def nested(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})
        assert impatient(strict, connection, nested=True) == 1205
        connection.execute(INSERT, {"k": 2})

    with pytest.raises(rdb.TransactionAborted, match="1205"):
        subject.begin(nested)
    assert subject.done() == []


def test_a_row_that_has_changed_since_it_was_read(make: Callable[..., Subject], strict: MariaDB) -> None:
    subject = make(strict)

    def careless(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 1})
        connection.exec_driver_sql("SELECT * FROM two").all()
        strict.query(TOUCH.format(1), database="app")
        assert swallow(lambda: connection.exec_driver_sql(TOUCH.format(1))) == 1020
        connection.execute(INSERT, {"k": 2})

    with pytest.raises(rdb.TransactionAborted, match="1020"):
        subject.begin(careless)
    assert subject.done() == []


def test_in_autocommit_there_is_nothing_to_roll_back(
    make: Callable[..., Subject], resilientdb_mariadb: MariaDB
) -> None:
    """A deadlock of a single statement, with somebody who wants its two rows in the other order."""
    subject = make(resilientdb_mariadb, isolation_level="AUTOCOMMIT")
    server = subject.server
    # It has changed the first row when it wants the second.
    server.query(
        "CREATE OR REPLACE TRIGGER t BEFORE UPDATE ON two FOR EACH ROW DO SLEEP(0.2)", database="app"
    )
    with subject.engine.connect() as connection:
        connection.execute(INSERT, {"k": 1})
        with other(server) as heavy:
            cursor = heavy.cursor()
            cursor.execute("INSERT INTO done VALUES (-1), (-1), (-1), (-1), (-1), (-1), (-1), (-1), (-1)")
            cursor.execute("SELECT n FROM two WHERE k = 2 FOR UPDATE")
            timer = threading.Timer(0.3, cursor.execute, ["SELECT n FROM two WHERE k = 1 FOR UPDATE"])
            timer.start()
            number = swallow(lambda: connection.exec_driver_sql("UPDATE two SET n = n + 1"))
            timer.join()
        assert number == 1213
        connection.execute(INSERT, {"k": 2})
        connection.commit()
    assert subject.done() == [1, 2]
