"""A deadline, or a task's cancellation, reaches the server: what it did for the caller ends there too, and where it
answers the connection stays; where it does not, the caller leaves in time all the same. On every driver."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.engine.cancelling import _commits, kill_query
from resilientdb.engine.driver import Driver
from resilientdb.testing import Postgres, ServiceUnavailable, faults
from tests.engine.conftest import until
from tests.engine.provoking import ASYNC

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from resilientdb.testing.mariadb import MariaDB
    from resilientdb.testing.toxiproxy import Proxy, ToxiproxyServer

POSTGRESQL = ["psycopg", "psycopg2", "psycopg_async", "asyncpg"]
MYSQL = ["pymysql", "aiomysql", "asyncmy"]
LATE = 0.1
"""Seconds after its time by which a call must have ended, in the best of three: machines have pauses."""
SECONDS = 0.4


class App:
    """An engine with one connection, sync or async, one way to use both, and a look at its server from outside."""

    def __init__(
        self, server: Postgres | MariaDB, driver: str, port: int | None = None, option: str = ""
    ) -> None:
        self.server = server
        self.is_postgresql = driver in POSTGRESQL
        self.loop = asyncio.new_event_loop() if driver in ASYNC else None
        make: Any = rdb.create_async_engine if self.loop else rdb.create_engine
        url = (server.url(driver) if port is None else server.url(driver, port=port)) + option
        # A prober that sees the silence would have the circuit refuse the next call.
        patient = rdb.BreakerPolicy(minimum_calls=1_000_000, enabled=port is None)
        self.engine: Any = make(url, pool_size=1, max_overflow=0, resilience=rdb.Resilience(breaker=patient))
        self.control: Any = rdb.control(self.engine)
        self.slow = "SELECT pg_sleep(30)" if self.is_postgresql else "SELECT sleep(30)"
        self.session = self.ask_session()

    def ask_session(self) -> int:
        return int(self.run("SELECT pg_backend_pid()" if self.is_postgresql else "SELECT connection_id()"))

    def run(self, sql: str, parameters: Any = None, **options: Any) -> Any:
        """One statement in a transaction of its own."""

        def work(connection: sa.Connection) -> Any:
            result = connection.exec_driver_sql(sql, parameters)
            return result.scalar() if result.returns_rows else None

        return self.transact(work, **options)

    def transact(self, work: Callable[[sa.Connection], Any], **options: Any) -> Any:
        if self.loop is not None:
            return self.loop.run_until_complete(self.transact_async(work, **options))
        with self.engine.execution_options(**options).begin() as connection:
            return work(connection)

    async def transact_async(self, work: Callable[[sa.Connection], Any], **options: Any) -> Any:
        async with self.engine.execution_options(**options).begin() as connection:
            return await connection.run_sync(work)

    async def run_async(self, sql: str) -> None:
        await self.transact_async(lambda connection: connection.exec_driver_sql(sql))

    def is_working(self) -> bool:
        """Whether the server still works for the connection that this began with."""
        asked = (
            f"SELECT count(*) FROM pg_stat_activity WHERE pid = {self.session} AND state = 'active'"
            if self.is_postgresql
            else f"SELECT count(*) FROM information_schema.processlist WHERE id = {self.session} AND info <> ''"
        )
        return bool(self.server.query(asked)[0][0])

    def stats(self) -> Any:
        return self.engine.pool.stats()

    def close(self) -> None:
        if self.loop is None:
            self.engine.dispose()
            return
        self.loop.run_until_complete(self.engine.dispose())
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()


def server_of(driver: str, request: pytest.FixtureRequest) -> Any:
    kind = "postgres" if driver in POSTGRESQL else "mariadb"
    return request.getfixturevalue(f"resilientdb_{kind}")


@pytest.fixture(params=POSTGRESQL + MYSQL)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def app(driver: str, request: pytest.FixtureRequest) -> Iterator[App]:
    one = App(server_of(driver, request), driver)
    yield one
    one.close()


@pytest.fixture
def proxied(
    driver: str, request: pytest.FixtureRequest, resilientdb_toxiproxy: ToxiproxyServer
) -> Iterator[tuple[App, Proxy]]:
    server = server_of(driver, request)
    with resilientdb_toxiproxy.proxy(server.address) as proxy:
        one = App(server, driver, proxy.listen_port)
        yield one, proxy
        one.close()


def only(*drivers: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("driver", drivers, indirect=True)


def late_by(call: Callable[[], object], seconds: float) -> float:
    """Seconds after its deadline at which ``call`` ended with it."""
    began = time.monotonic()
    with pytest.raises(rdb.DeadlineExceeded), rdb.deadline(seconds):
        call()
    return time.monotonic() - began - seconds


def late_by_cancelled(app: App, seconds: float) -> float:
    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await app.run_async(app.slow)
        return time.monotonic() - began - seconds

    assert app.loop is not None
    return app.loop.run_until_complete(main())


def assert_stays(app: App, call: Callable[[], object]) -> None:
    """After ``call`` the server has stopped, and the connection is the same; in one of five at least, since a busy
    machine may not get a word through in 0.06 s."""
    for _ in range(5):
        app.session = app.ask_session()
        call()
        until(lambda: not app.is_working(), "the server has stopped")
        if app.ask_session() == app.session:
            assert (app.stats().active, app.stats().idle) == (0, 1)
            return
    pytest.fail("the connection was lost each time")


# -- the server answers ---------------------------------------------------------------------------------------------


def test_cancelled_at_the_server_and_the_connection_stays(app: App) -> None:
    late = [late_by(lambda: app.run(app.slow), SECONDS) for _ in range(3)]
    assert min(late) < LATE
    assert_stays(app, lambda: late_by(lambda: app.run(app.slow), SECONDS))


@pytest.mark.parametrize("inside", [False, True], ids=["deadline around", "deadline inside"])
def test_a_savepoint_survives(app: App, *, inside: bool) -> None:
    """The caller sets less time for a part of a transaction, and goes on without that part."""

    def work(connection: sa.Connection) -> tuple[int, int]:
        asked = "SELECT pg_backend_pid()" if app.is_postgresql else "SELECT connection_id()"
        before = connection.exec_driver_sql(asked).scalar_one()
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(rdb.DeadlineExceeded))
            if inside:
                stack.enter_context(connection.begin_nested())
            stack.enter_context(rdb.deadline(0.2))
            if not inside:
                stack.enter_context(connection.begin_nested())
            connection.exec_driver_sql(app.slow)
        return before, connection.exec_driver_sql(asked).scalar_one()

    went_on: list[bool] = []

    def in_time() -> None:
        with contextlib.suppress(rdb.DeadlineExceeded, sa.exc.SQLAlchemyError), rdb.deadline(20):
            before, after = app.transact(work)
            went_on.append(before == after)

    assert_stays(app, in_time)
    assert went_on == [True]


def test_many_rows_at_once(app: App) -> None:
    sleep = "pg_sleep" if app.is_postgresql else "sleep"
    sign = "$1::float8" if "asyncpg" in str(app.engine.url) else "%s"
    sql = f"{'SELECT' if app.is_postgresql else 'DO'} {sleep}({sign})"
    rows = [(10.0,)] * 3
    assert min(late_by(lambda: app.run(sql, rows), SECONDS) for _ in range(3)) < LATE
    if app.is_postgresql:  # MySQL's drivers may call it a success: then it is not known what it is
        assert_stays(app, lambda: late_by(lambda: app.run(sql, rows), SECONDS))
    until(lambda: not app.is_working(), "the server has stopped")


@only("psycopg", "psycopg2")
def test_a_connection_that_waits_for_nothing_is_not_lost(app: App) -> None:
    def work(connection: sa.Connection) -> None:
        with rdb.deadline(0.1):
            connection.exec_driver_sql("SELECT 1")
            time.sleep(0.3)
            with pytest.raises(rdb.DeadlineExceeded):
                connection.exec_driver_sql("SELECT 1")
        connection.exec_driver_sql("SELECT 1")

    app.transact(work)
    assert app.ask_session() == app.session


# -- what must not be cancelled --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "COMMIT",
        " commit",
        "/* a comment */ -- and another\n COMMIT AND CHAIN",
        "END",
        "INSERT INTO t VALUES (1); COMMIT",
        "PREPARE TRANSACTION 'x'",
        "COMMIT PREPARED 'x'",
        "XA COMMIT 'x'",
        None,
    ],
)
def test_what_commits(statement: Any) -> None:
    assert _commits(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT CASE WHEN a THEN 1 END FROM t",
        "SELECT 'x' AS committed",
        "INSERT INTO commits VALUES (1)",
        "PREPARE q AS SELECT 1",
        "ROLLBACK",
        "/* COMMIT */ SELECT 1",
        "; /*" * 1000,
    ],
)
def test_what_does_not_commit(statement: str) -> None:
    assert not _commits(statement)


@only(*POSTGRESQL)
def test_a_commit_is_cut_and_not_cancelled(app: App) -> None:
    app.run("CREATE TABLE IF NOT EXISTS slow_commit (n int)")
    app.run("TRUNCATE slow_commit")
    app.run(
        "CREATE OR REPLACE FUNCTION nap() RETURNS trigger AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END' "
        "LANGUAGE plpgsql"
    )
    app.run("CREATE OR REPLACE TRIGGER nap AFTER INSERT ON slow_commit FOR EACH ROW EXECUTE FUNCTION nap()")
    app.run("DROP TRIGGER nap ON slow_commit")
    app.run(
        "CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON slow_commit DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION nap()"
    )
    began = time.monotonic()
    with pytest.raises(rdb.CommitOutcomeUnknown), rdb.deadline(SECONDS):
        app.run("INSERT INTO slow_commit VALUES (1)")
    assert time.monotonic() - began < 0.9
    until(lambda: app.server.query("SELECT count(*) FROM slow_commit")[0][0] == 1, "committed")
    app.run("DROP TABLE slow_commit")


@only(*POSTGRESQL)
def test_a_statement_that_commits_by_itself_is_cut(app: App) -> None:
    """Its end may be a COMMIT that waits for a standby: cancelled, the server would report success."""
    app.run("CREATE TABLE IF NOT EXISTS alone (n int)")
    app.run("TRUNCATE alone")
    with pytest.raises(rdb.DeadlineExceeded), rdb.deadline(SECONDS):
        app.run("INSERT INTO alone SELECT 1 FROM pg_sleep(1)", isolation_level="AUTOCOMMIT")
    until(lambda: app.server.query("SELECT count(*) FROM alone")[0][0] == 1, "committed")
    assert app.ask_session() != app.session
    app.run("DROP TABLE alone")


@only(*POSTGRESQL)
@pytest.mark.parametrize("how", ["AUTOCOMMIT", "read_only"])
def test_a_read_that_goes_alone_is_cancelled(app: App, how: str) -> None:
    def read() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(rdb.DeadlineExceeded))
            stack.enter_context(rdb.deadline(SECONDS))
            options = {"isolation_level": how} if how == "AUTOCOMMIT" else {}
            if not options:
                stack.enter_context(rdb.read_only())
            app.run("SELECT 1, pg_sleep(30)", **options)

    assert_stays(app, read)


# -- late cancels ----------------------------------------------------------------------------------------------------


def test_a_late_cancel_hits_nobody(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent when the statement has ended by itself: whatever comes next waits for it."""
    kind: Any = type(app.engine.dialect and app.control._cluster.driver)
    make, sent = kind.cancel, []

    def slow_to_send(self: Driver, connection: object) -> Any:
        cancel = make(self, connection)
        assert cancel is not None

        def send(*arguments: Any) -> None:
            time.sleep(0.03)
            cancel(*arguments)
            sent.append(time.monotonic())

        return send

    monkeypatch.setattr(kind, "cancel", slow_to_send)
    nap = "SELECT pg_sleep(0.21)" if app.is_postgresql else "SELECT sleep(0.21)"
    after = "SELECT pg_sleep(0.1)" if app.is_postgresql else "SELECT sleep(0.1)"

    def work(connection: sa.Connection) -> None:
        with rdb.deadline(0.2):
            connection.exec_driver_sql(
                nap
            )  # MySQL's drivers cannot tell whether it was interrupted, and say it was
        # The same connection, with no deadline in force.
        connection.exec_driver_sql(after)

    for _ in range(3):
        with contextlib.suppress(rdb.DeadlineExceeded):
            app.transact(work)
        app.run(after)
    assert sent, "no cancel was late"


def test_a_cancel_that_is_not_answered_costs_the_connection(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows when it will arrive: the caller has its answer in time, and the connection is not used again."""
    kind: Any = type(app.control._cluster.driver)
    let_go = threading.Event()
    monkeypatch.setattr(kind, "cancel", lambda *_: lambda *_: let_go.wait(10))
    nap = "SELECT pg_sleep(0.21)" if app.is_postgresql else "SELECT sleep(0.21)"
    began = time.monotonic()
    with contextlib.suppress(rdb.DeadlineExceeded), rdb.deadline(0.2):
        app.run(nap)
    assert time.monotonic() - began < 1

    def work(connection: sa.Connection) -> None:
        with rdb.deadline(0.2):
            connection.exec_driver_sql(nap)
        connection.exec_driver_sql("SELECT 1")

    with pytest.raises(rdb.DeadlineExceeded, match="ended during a statement"):
        app.transact(work)
    monkeypatch.undo()
    assert app.ask_session() != app.session
    let_go.set()


@only("psycopg", "asyncpg", "pymysql")
def test_on_the_edge(app: App) -> None:
    """Statements that end at about their deadline, or whose COMMIT does: the next one is always well."""
    nap = "SELECT pg_sleep(0.05)" if app.is_postgresql else "SELECT sleep(0.05)"
    exceeded = 0
    for number in range(40):
        try:
            with rdb.deadline(0.046 + 0.0003 * number):
                app.run(nap)
        except (rdb.DeadlineExceeded, rdb.CommitOutcomeUnknown):
            exceeded += 1
        assert app.run("SELECT 1") == 1
    assert exceeded


@only(*MYSQL)
def test_a_session_of_that_number_that_is_another_s_is_left_alone(app: App) -> None:
    """Behind a balancer, the server that is asked may not be the one that has it: then the port is not the same."""
    node = app.control._cluster.nodes[0]
    outcome: list[object] = []

    def elsewhere(work: Callable[[Any], None]) -> None:
        done = threading.Event()

        def errand(connection: Any) -> None:
            try:
                work(connection)
            except BaseException as error:  # noqa: BLE001 - what it is for
                outcome.append(error)
            done.set()

        assert node.send(errand)
        assert done.wait(10)

    killer = threading.Timer(0.2, kill_query, (app.session, 1, 0.0, elsewhere))
    killer.start()
    assert app.run("SELECT sleep(0.5)") == 0, "it was not interrupted"
    killer.join()
    assert [type(one) for one in outcome] == [ConnectionError]


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Postgres]:
    """A PostgreSQL that takes TLS."""
    try:
        server = Postgres(name="tls", major=15)
    except ServiceUnavailable as missing:
        pytest.skip(str(missing))
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    try:
        server.start()
        key, certificate = server.data / "server.key", server.data / "server.crt"
        made = ["req", "-new", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command = [openssl, *made, "-out", str(certificate), "-keyout", str(key)]
        subprocess.run(command, check=True, capture_output=True)
        owner = server.data.stat()
        for file in (key, certificate):
            os.chown(file, owner.st_uid, owner.st_gid)
            file.chmod(0o600)
        server.configure(ssl="on")
        server.restart()
        yield server
    finally:
        server.close()


@only(*POSTGRESQL)
def test_an_encrypted_connection(driver: str, encrypted: Postgres) -> None:
    option = "?ssl=require" if driver == "asyncpg" else "?sslmode=require"
    app = App(encrypted, driver, option=option)
    assert app.run("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
    assert_stays(app, lambda: late_by(lambda: app.run(app.slow), SECONDS))
    app.close()


# -- the server does not answer --------------------------------------------------------------------------------------


def test_silence(proxied: tuple[App, Proxy]) -> None:
    app, proxy = proxied
    late = []
    for _ in range(3):
        app.run("SELECT 1")
        with faults.hang(proxy):
            late.append(late_by(lambda: app.run(app.slow), SECONDS))
    assert min(late) < LATE
    until(lambda: app.stats().active == 0, "given back")
    assert app.ask_session() != app.session


@contextlib.contextmanager
def stopped(app: App) -> Iterator[None]:
    """The server's processes stand still; its kernel goes on accepting."""
    assert app.server.pid is not None
    pids = [app.server.pid, *([app.session] if app.is_postgresql else [])]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_server_that_stands_still(app: App) -> None:
    late = []
    for _ in range(3):
        app.session = app.ask_session()
        with stopped(app):
            late.append(late_by(lambda: app.run(app.slow), SECONDS))
        time.sleep(0.05)
    assert min(late) < LATE
    assert app.run("SELECT 1") == 1


def test_many_at_once_do_not_wait_for_each_other(
    request: pytest.FixtureRequest, resilientdb_toxiproxy: ToxiproxyServer
) -> None:
    """More than are asked at a time; none of them is late for the others."""
    server: Postgres = request.getfixturevalue("resilientdb_postgres")
    with resilientdb_toxiproxy.proxy(server.address) as proxy:
        patient = rdb.Resilience(breaker=rdb.BreakerPolicy(minimum_calls=1_000_000))
        engine = rdb.create_engine(
            server.url("psycopg", port=proxy.listen_port), pool_size=24, resilience=patient
        )
        late: list[float] = []

        def work(at: threading.Barrier) -> None:
            with engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1")
                at.wait(30)  # all are open
                at.wait(30)  # and nothing is heard any more
                late.append(late_by(lambda: connection.exec_driver_sql("SELECT pg_sleep(30)"), 0.5))

        ready = threading.Barrier(25)
        threads = [threading.Thread(target=work, args=(ready,)) for _ in range(24)]
        for thread in threads:
            thread.start()
        ready.wait(30)
        with faults.hang(proxy):
            ready.wait(30)
            for thread in threads:
                thread.join(10)
        assert len(late) == 24
        assert max(late) < 1
        engine.dispose()


# -- tasks that are cancelled ----------------------------------------------------------------------------------------


@only(*sorted(ASYNC & {*POSTGRESQL}))
def test_a_cancelled_task_leaves_its_connection(app: App) -> None:
    assert min(late_by_cancelled(app, SECONDS) for _ in range(3)) < LATE
    assert_stays(app, lambda: late_by_cancelled(app, SECONDS))


@only(*sorted(ASYNC & {*MYSQL}))
def test_a_cancelled_task_ends_its_statement(app: App) -> None:
    """The connection is lost, as these drivers leave it in the middle of a reply; the server stops all the same."""
    assert late_by_cancelled(app, SECONDS) < 1
    until(lambda: not app.is_working(), "the server has stopped")
    assert app.run("SELECT 1") == 1


@only(*sorted(ASYNC))
def test_a_cancelled_task_in_silence(proxied: tuple[App, Proxy]) -> None:
    app, proxy = proxied
    late = []
    for _ in range(3):
        app.run("SELECT 1")
        with faults.hang(proxy):
            late.append(late_by_cancelled(app, SECONDS))
    assert min(late) < LATE
    assert app.run("SELECT 1") == 1


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@only(*sorted(ASYNC & {*POSTGRESQL}))
def test_ended_at_any_moment_what_follows_is_committed(proxied: tuple[App, Proxy], how: str) -> None:
    """In the middle of BEGIN too, which drivers and their adapters remember each in its own way."""
    app, proxy = proxied
    app.server.query("DROP TABLE IF EXISTS after_an_end")
    app.server.query("CREATE TABLE after_an_end (k integer)")

    async def ended_after(seconds: float) -> None:
        insert = "INSERT INTO after_an_end VALUES (-1)"
        with contextlib.suppress(TimeoutError, rdb.DeadlineExceeded, sa.exc.DBAPIError):
            if how == "cancelled":
                async with asyncio.timeout(seconds):
                    await app.run_async(insert)
            else:
                with rdb.deadline(seconds):
                    await app.run_async(insert)

    assert app.loop is not None
    acknowledged = 0
    with faults.latency(proxy, 0.004):
        for step in range(36):
            app.loop.run_until_complete(ended_after(0.0005 * (step + 1)))
            with contextlib.suppress(sa.exc.DBAPIError):
                app.run(f"INSERT INTO after_an_end VALUES ({step})")
                acknowledged += 1
    assert acknowledged >= 30
    assert app.server.query("SELECT count(*) FROM after_an_end WHERE k >= 0")[0][0] == acknowledged


@only(*sorted(ASYNC & {*POSTGRESQL}))
def test_a_cancellation_that_is_repeated_at_every_turn(app: App) -> None:
    """As anyio's are, which most web frameworks run on."""

    async def main() -> None:
        with anyio.move_on_after(0.2) as scope:
            await app.run_async(app.slow)
        assert scope.cancelled_caught

    assert app.loop is not None
    app.loop.run_until_complete(main())
    until(lambda: not app.is_working(), "the server has stopped")
    assert app.run("SELECT 1") == 1


@only(*sorted(ASYNC))
def test_cancelled_and_its_deadline_over_at_once(app: App) -> None:
    async def main(shift: float) -> None:
        with contextlib.suppress(TimeoutError, rdb.DeadlineExceeded), rdb.deadline(0.1):
            async with asyncio.timeout(0.1 + shift):
                await app.run_async(app.slow)

    assert app.loop is not None
    for number in range(-5, 6):
        app.loop.run_until_complete(main(0.001 * number))
        assert app.run("SELECT 1") == 1


# -- whose deadline it is --------------------------------------------------------------------------------------------


@only("psycopg_async")
def test_a_task_that_outlives_the_request_is_not_bound_by_its_deadline(app: App) -> None:
    async def background() -> Any:
        await asyncio.sleep(0.15)
        return await app.transact_async(
            lambda connection: connection.exec_driver_sql("SELECT 7, pg_sleep(0.1)").scalar()
        )

    async def main() -> Any:
        with rdb.deadline(0.1):
            task: Awaitable[Any] = asyncio.create_task(background())
        return await task

    assert app.loop is not None
    assert app.loop.run_until_complete(main()) == 7


def test_nothing_is_promised_for_an_unknown_driver() -> None:
    driver = Driver("unknown")
    assert driver.cancel(object()) is None
    assert driver.commits_alone(object())
    assert driver.is_busy(object())
    assert not driver.was_cancelled(ValueError())
    assert not driver.settle(object(), 0.0)
