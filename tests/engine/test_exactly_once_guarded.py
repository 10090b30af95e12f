"""``exactly_once="guarded"``: no table, and never wrong; where a number's meaning is lost, it says so.

Everything here runs as a role without rights on anything but the tests' own tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, orm

import resilientdb as rdb
from resilientdb.events import CommitSettled, Event
from resilientdb.testing import Postgres, faults
from resilientdb.testing.errors import ServiceFailed
from tests.engine import committing
from tests.engine.committing import INSERT, LOST, PATIENT, cut_soon, server_setting, settle
from tests.engine.test_exactly_once import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing import Proxy
    from resilientdb.testing.toxiproxy import ToxiproxyServer


class Unprivileged(Postgres):
    """Leads engines to itself as a role that may do little; ``query`` is the superuser's."""

    def url(self, *arguments: Any, **options: Any) -> str:
        return super().url(*arguments, **options).replace("postgres@", "app@")


class Subject(committing.OnPostgres):
    def transact(self, body: Callable[[sa.Connection], Any], **options: Any) -> Any:
        return super().transact(body, **{"exactly_once": "guarded", **options})


fault = committing.fault

TRIGGERS = {
    "dies": "COPY (SELECT 1) TO PROGRAM 'kill -9 $PPID'; PERFORM pg_sleep(5);",
    "naps": "PERFORM pg_sleep(1);",
    "dozes": "PERFORM pg_sleep(20);",
}
"""A row in a table of that name makes COMMIT do that."""


def prepare(server: Postgres) -> None:
    server.query("CREATE ROLE app LOGIN")
    server.query("CREATE TABLE entry (k int)")
    committing.triggers_at_commit(server, TRIGGERS, rights="SECURITY DEFINER")
    server.query(f"GRANT SELECT, INSERT ON entry, {', '.join(TRIGGERS)} TO app")


@pytest.fixture(scope="module")
def postgres(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    with Unprivileged(name="guarded", binaries=resilientdb_postgres.binaries) as server:
        prepare(server)
        yield server


@pytest.fixture
def proxy(postgres: Postgres, resilientdb_toxiproxy: ToxiproxyServer) -> Iterator[Proxy]:
    with resilientdb_toxiproxy.proxy(postgres.address) as proxy:
        yield proxy


@pytest.fixture
def make(postgres: Postgres, proxy: Proxy) -> Iterator[Callable[..., Subject]]:
    postgres.query("TRUNCATE entry")

    def subject(driver: str = "psycopg", **options: Any) -> Subject:
        return Subject(driver, postgres, proxy, **options)

    with committing.subjects(subject) as make:
        yield make


@pytest.fixture(params=DRIVERS)
def subject(request: pytest.FixtureRequest, make: Callable[..., Subject]) -> Subject:
    return make(request.param)


def settled(subject: Subject) -> list[Event]:
    """What is said of COMMITs in doubt from now on."""
    seen: list[Event] = []
    rdb.control(subject.engine).on_event(
        lambda event: seen.append(event) if isinstance(event, CommitSettled) else None
    )
    return seen


def outcomes(seen: list[Event]) -> list[str]:
    return [event.outcome for event in seen if isinstance(event, CommitSettled)]


# -- a COMMIT in doubt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOST)
def test_a_commit_in_doubt_is_settled(
    subject: Subject, proxy: Proxy, fault: contextlib.ExitStack, how: str
) -> None:
    lose, is_committed = LOST[how]
    number = 100 + list(LOST).index(how)
    seen = settled(subject)
    with rdb.deadline(2.0):
        run = subject.transact(subject.entry(number, lambda: fault.enter_context(lose(proxy))))
    assert (run, subject.runs) == ((1, 1) if is_committed else (2, 2))
    assert outcomes(seen) == ["committed" if is_committed else "aborted"]
    fault.close()  # whatever is still under way is delivered now
    settle(subject.postgres)
    assert subject.count(number) == 1
    assert subject.transact(subject.entry(number + 50)) == 1, "the engine goes on"
    tables = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relname LIKE 'resilientdb%'"
    assert subject.postgres.query(tables) == [(0,)]


def test_one_loss_after_another(subject: Subject, proxy: Proxy, fault: contextlib.ExitStack) -> None:
    """The transaction that has asked, and runs the function, may be asked about as well."""
    losses = [faults.commit_lost, faults.commit_lost, faults.reply_lost]
    runs: list[int] = []

    def body(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 200})
        fault.enter_context(losses[len(runs) - 1](proxy))
        subject.detour = proxy.listen_port if len(runs) < len(losses) else None
        return len(runs)

    plain = getattr(subject.engine, "sync_engine", subject.engine)
    event.listen(plain, "do_connect", lambda *_: fault.close(), insert=True)
    assert subject.transact(body) == 3
    assert subject.count(200) == 1


def test_a_commit_that_is_still_at_work_is_waited_for(
    subject: Subject, proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    runs: list[int] = []

    def body(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 201})
        connection.execute(sa.text("INSERT INTO naps VALUES (1)"))
        fault.enter_context(cut_soon(proxy))
        return len(runs)

    assert subject.transact(body) == 1
    assert (len(runs), subject.count(201)) == (1, 1)


@pytest.mark.parametrize("exactly_once", [True, "guarded"])
def test_a_role_that_is_allowed_short_statements_only(
    make: Callable[..., Subject],
    postgres: Postgres,
    proxy: Proxy,
    fault: contextlib.ExitStack,
    exactly_once: Any,
) -> None:
    """Its statement that waits is ended before it has waited long: that says as much."""
    postgres.query("ALTER ROLE app SET statement_timeout = '60ms'")
    if exactly_once is True:
        postgres.query(rdb.TokenTable().ddl(make().engine.dialect))
        postgres.query("GRANT ALL ON resilientdb_token TO app")
    try:
        lose, _ = LOST["COMMIT comes late"]
        subject = make()
        seen = settled(subject)
        with rdb.deadline(3.0):
            run = subject.transact(
                subject.entry(204, lambda: fault.enter_context(lose(proxy))), exactly_once=exactly_once
            )
        assert (run, subject.count(204)) == (2, 1)
        assert [event.attempts for event in seen if isinstance(event, CommitSettled)] <= [3]
    finally:
        postgres.query("ALTER ROLE app RESET statement_timeout")
        postgres.query("DROP TABLE IF EXISTS resilientdb_token")


@pytest.fixture
def lonely(postgres: Postgres) -> Iterator[Callable[[], object]]:
    """From the call on, every COMMIT waits for a standby that is not there."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(server_setting(postgres, "synchronous_standby_names", "nobody"))
    settle(postgres)


WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def test_one_that_waits_for_its_standby_is_left_alone(subject: Subject, lonely: Callable[[], object]) -> None:
    seen = settled(subject)
    with rdb.deadline(1.5), pytest.raises(rdb.CommitOutcomeUnknown) as caught:
        subject.transact(subject.entry(202, lonely))
    assert (subject.runs, outcomes(seen)) == (1, ["unknown"])
    assert caught.value.key is None, "there is nothing that could be asked later by it"
    assert len(subject.postgres.query(WAITING)) == 1
    assert subject.count(202) == 0, "and nobody has seen it"


def test_what_no_standby_has_is_not_called_committed(
    subject: Subject, proxy: Proxy, lonely: Callable[[], object]
) -> None:
    """A COMMIT that somebody stopped waiting for the standby is visible, and gone after a failover."""
    postgres = subject.postgres

    def lose() -> None:
        lonely()
        threading.Thread(target=give_up).start()

    def give_up() -> None:
        while not (waiting := postgres.query(WAITING)):
            time.sleep(0.01)
        proxy.disable()
        postgres.query("SELECT pg_cancel_backend(%s)", [waiting[0][0]])

    with rdb.deadline(2.0), pytest.raises(rdb.CommitOutcomeUnknown):
        subject.transact(subject.entry(203, lose))
    proxy.enable()
    assert (subject.runs, subject.count(203)) == (1, 1)


def test_serializable(make: Callable[..., Subject], proxy: Proxy, fault: contextlib.ExitStack) -> None:
    for driver in ("psycopg2", "asyncpg"):
        subject = make(driver)
        for number, lose in ((210, faults.reply_lost), (211, faults.commit_lost)):
            subject.detour = proxy.listen_port
            subject.dispose()
            subject.transact(
                subject.entry(number, lambda lose=lose: fault.enter_context(lose(proxy))),  # type: ignore[misc]
                isolation_level="SERIALIZABLE",
            )
            fault.close()
    assert (subject.count(210), subject.count(211)) == (2, 2)


def test_a_session_and_a_decorated_function(
    make: Callable[..., Subject], proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    subject = make()
    runs: list[int] = []

    @rdb.transactional(orm.sessionmaker(subject.engine), exactly_once="guarded")
    def work(session: orm.Session, k: int) -> int:
        runs.append(1)
        session.execute(INSERT, {"k": k})
        if len(runs) == 1:
            fault.enter_context(faults.commit_lost(proxy))
        return len(runs)

    assert work(k=220) == 2
    assert subject.count(220) == 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg-async"])
def test_a_cancelled_commit(make: Callable[..., Subject], driver: str) -> None:
    subject = make(driver)

    async def nap(connection: Any) -> None:
        await connection.execute(INSERT, {"k": 221})
        await connection.execute(sa.text("INSERT INTO naps VALUES (1)"))

    async def main() -> BaseException:
        task = asyncio.create_task(rdb.run_transaction_async(subject.engine, nap, exactly_once="guarded"))
        await asyncio.to_thread(wait_for_sleeper, subject.postgres)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        return caught.value

    notes = " ".join(subject.wait(main()).__notes__)
    assert "it may have been committed or not" in notes
    assert "resolve" not in notes
    settle(subject.postgres)
    assert subject.count(221) == 1, "the server was left to finish it"


def wait_for_sleeper(postgres: Postgres) -> None:
    while not postgres.query("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
        time.sleep(0.01)


# -- another life of the server -------------------------------------------------------------------------------------


def in_doubt(subject: Subject, table: str, k: int, then: Callable[[], None]) -> tuple[str, int]:
    """One transaction whose COMMIT does what ``table`` makes it do, and ``then()``; what the caller is told, and the
    transaction's number."""
    runs: list[int] = []

    def body(connection: sa.Connection) -> None:
        runs.append(int(connection.execute(sa.text("SELECT pg_current_xact_id()::text")).scalar_one()))
        connection.execute(INSERT, {"k": k})
        connection.execute(sa.text(f"INSERT INTO {table} VALUES (1)"))
        threading.Thread(target=then).start()

    with rdb.deadline(20.0), pytest.raises(rdb.CommitOutcomeUnknown) as caught:
        subject.transact(body)
    assert len(runs) == 1, "nothing is done twice"
    return str(caught.value), runs[0]


def test_after_a_crash_of_one_server_process_nobody_knows(subject: Subject) -> None:
    """Nothing but the reset statistics shows that the server has recovered, and its numbers are given out anew."""
    postgres = subject.postgres
    for k in range(300, 305):
        began = time.monotonic()
        said, number = in_doubt(subject, "dies", k, lambda: None)
        assert time.monotonic() - began < 10, "at once, as soon as there is a server to be asked"
        assert "has recovered from a crash since" in said
        postgres.wait_ready()
        assert subject.count(k) == 0
        # The question without the guard: what it is asked about is somebody else's by then.
        for _ in range(30):
            postgres.query("INSERT INTO naps SELECT 1 WHERE pg_current_xact_id() IS NULL")
        if postgres.query("SELECT pg_xact_status(%s::text::xid8)", [str(number)]) == [("committed",)]:
            return
    pytest.fail("no number was given out twice, so that the guard was not needed")


@pytest.mark.parametrize("how", ["killed", "restarted"])
def test_after_a_new_start_nobody_knows(subject: Subject, how: str) -> None:
    postgres = subject.postgres

    def start_anew() -> None:
        wait_for_sleeper(postgres)
        if how == "killed":
            assert postgres.pid is not None
            os.kill(postgres.pid, signal.SIGKILL)
            while postgres.running:
                time.sleep(0.01)
        postgres.stop("immediate" if how == "killed" else "fast")
        start(postgres)

    said, _ = in_doubt(subject, "dozes", 310, start_anew)
    assert "was started anew since" in said
    start(postgres)
    assert subject.count(310) == 0


def start(postgres: Postgres) -> None:
    """The processes of a server that was killed need a moment to notice, and keep its memory until then."""
    give_up = time.monotonic() + 20
    while True:
        try:
            postgres.start()
        except ServiceFailed:
            assert time.monotonic() < give_up
            time.sleep(0.1)
        else:
            return


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_after_a_failover_nobody_knows(
    postgres: Postgres, resilientdb_toxiproxy: ToxiproxyServer, driver: str
) -> None:
    """The COMMIT's record never gets to the standby, which gives the transaction's number to others."""
    numbers: list[int] = []
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Unprivileged(name="first", binaries=postgres.binaries))
        prepare(first)
        replication = stack.enter_context(resilientdb_toxiproxy.proxy(first.address))
        via = ("127.0.0.1", replication.listen_port)
        second = stack.enter_context(Unprivileged.standby(first, name="second", via=via))
        second.wait_caught_up(first)
        proxy = stack.enter_context(resilientdb_toxiproxy.proxy(first.address))
        replication.disable()
        for _ in range(10):  # so that it is not our own question that gets the number
            first.query("SELECT pg_current_xact_id()")

        def fail_over() -> None:
            while not first.query("SELECT 1 FROM entry"):
                time.sleep(0.01)
            first.crash()
            faults.promote(second)

        failing_over = threading.Thread(target=fail_over)

        def body(connection: sa.Connection) -> None:
            numbers.append(int(connection.execute(sa.text("SELECT pg_current_xact_id()::text")).scalar_one()))
            connection.execute(INSERT, {"k": 1})
            proxy.add_toxic("limit_data", stream="downstream", bytes=0)
            failing_over.start()

        make = stack.enter_context(committing.subjects(committing.Subject))
        subject = make(driver, first, port=proxy.listen_port, replicas=[second.address], resilience=PATIENT)
        with pytest.raises(rdb.CommitOutcomeUnknown, match="a standby was promoted since"):
            subject.transact(body, exactly_once="guarded")
        failing_over.join()
        assert len(numbers) == 1
        assert second.query("SELECT count(*) FROM entry") == [(0,)]
        # The question without the guard.
        while int(second.query("SELECT pg_current_xact_id()::text")[0][0]) <= numbers[0]:
            pass
        status = second.query("SELECT pg_xact_status(%s::text::xid8)", [str(numbers[0])])
        assert status == [("committed",)], "somebody else's"


def test_statistics_that_are_reset_look_like_a_crash(make: Callable[..., Subject]) -> None:
    """Nobody could tell the two apart."""
    subject = make()
    postgres = subject.postgres
    reset = "SELECT pg_stat_reset_shared('bgwriter')"

    def body(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 320})
        connection.execute(sa.text("INSERT INTO naps VALUES (1)"))
        postgres.query(reset)
        threading.Thread(target=terminate_sleepers, args=(postgres,)).start()

    with pytest.raises(rdb.CommitOutcomeUnknown, match="its statistics were reset"):
        subject.transact(body)
    assert subject.count(320) == 0


def terminate_sleepers(postgres: Postgres) -> None:
    while not postgres.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    ):
        time.sleep(0.01)


# -- what it needs --------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_said(subject: Subject, make: Callable[..., Subject]) -> None:
    with pytest.raises(rdb.ConfigurationError, match="read_only"):
        subject.transact(subject.entry(400), read_only=True)
    autocommit = make(subject.driver, isolation_level="AUTOCOMMIT")
    with pytest.raises(rdb.ConfigurationError, match="AUTOCOMMIT"):
        autocommit.transact(autocommit.entry(400))
    with pytest.raises(rdb.ConfigurationError, match="'gaurded'"):
        subject.transact(subject.entry(400), exactly_once="gaurded")
    assert (subject.runs, subject.count(400)) == (0, 0)


def test_it_is_for_postgresql() -> None:
    engine = rdb.create_engine("sqlite://")
    with pytest.raises(rdb.ConfigurationError, match="for postgresql; this is sqlite"):
        rdb.run_transaction(engine, lambda _: None, exactly_once="guarded")
    engine.dispose()


def test_a_function_that_the_role_may_not_call(subject: Subject) -> None:
    revoked = "EXECUTE ON FUNCTION pg_walfile_name(pg_lsn)"
    subject.postgres.query(f"REVOKE {revoked} FROM PUBLIC")
    try:
        with pytest.raises(rdb.ConfigurationError, match=r"42501.*exactly_once=True"):
            subject.transact(subject.entry(410))
        assert (subject.runs, subject.count(410)) == (0, 0)
    finally:
        subject.postgres.query(f"GRANT {revoked} TO PUBLIC")
    assert subject.transact(subject.entry(411)) == 1


def test_what_is_sent(subject: Subject) -> None:
    """One statement, in BEGIN's message; asyncpg drops rows that come that way, and psycopg2 sends BEGIN alone."""
    postgres = subject.postgres
    subject.transact(lambda _: None)  # connects
    with server_setting(postgres, "log_statement", "all"):
        subject.transact(lambda connection: connection.execute(sa.text("SELECT 4711")))
    log = postgres.log_tail(60)
    log = log[log.rindex("SHOW log_statement") : log.rindex("SELECT 4711")]
    lines = re.findall(r"(?:statement|execute [^:]*): (.*)", log)
    about = [line for line in lines if "pg_advisory_xact_lock" in line or "pg_current_xact_id" in line]
    assert len(about) == (2 if subject.driver == "asyncpg" else 1)
    assert ("BEGIN" in about[0]) is (subject.driver != "psycopg2")
