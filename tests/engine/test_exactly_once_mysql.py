"""``exactly_once=True`` on MariaDB, with each of MySQL's drivers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

import resilientdb as rdb
from resilientdb.engine import outcome as outcome_module
from resilientdb.testing import faults
from resilientdb.testing.mariadb import MariaDB
from tests.engine import committing
from tests.engine.committing import INSERT, LOST, cut_soon, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing import Proxy

DRIVERS = ["pymysql", "aiomysql", "asyncmy"]


fault = committing.fault


class Subject(committing.InDoubt):
    def __init__(self, driver: str, server: MariaDB, proxy: Proxy, **options: Any) -> None:
        super().__init__(driver, server, proxy, **options)
        self.server = server

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return self.server.query(sql, database="app")

    def count(self, k: int) -> int:
        return int(self.query(f"SELECT count(*) FROM entry WHERE k = {k}")[0][0])

    @property
    def tokens(self) -> int:
        return int(self.query("SELECT count(*) FROM resilientdb_token")[0][0])

    def settle(self) -> None:
        """Wait until no transaction is open any more."""
        open_ones = "SELECT 1 FROM information_schema.innodb_trx"
        until(lambda: not self.query(open_ones), "no transaction is open")


@pytest.fixture(scope="module")
def server(resilientdb_mariadb: MariaDB) -> Iterator[MariaDB]:
    resilientdb_mariadb.query("CREATE TABLE entry (k int) ENGINE=InnoDB", database="app")
    engine = rdb.create_engine(resilientdb_mariadb.url())
    rdb.install(engine)
    rdb.install(engine)
    engine.dispose()
    yield resilientdb_mariadb
    resilientdb_mariadb.query("DROP TABLE entry, resilientdb_token", database="app")


@pytest.fixture
def make(server: MariaDB, resilientdb_mariadb_proxy: Proxy) -> Iterator[Callable[..., Subject]]:
    server.query("DELETE FROM entry", database="app")

    def subject(driver: str = "pymysql", *, server: MariaDB = server, **options: Any) -> Subject:
        return Subject(driver, server, resilientdb_mariadb_proxy, **options)

    with committing.subjects(subject) as make:
        yield make


@pytest.fixture(params=DRIVERS)
def subject(request: pytest.FixtureRequest, make: Callable[..., Subject]) -> Subject:
    return make(request.param)


# -- the ordinary course --------------------------------------------------------------------------------------------


def test_the_token_is_committed_with_the_work_or_not_at_all(subject: Subject) -> None:
    before = subject.tokens
    assert subject.transact(subject.entry(1)) == 1
    assert (subject.count(1), subject.tokens) == (1, before + 1)

    def fail(connection: sa.Connection) -> None:
        connection.execute(INSERT, {"k": 2})
        raise KeyError("mine")

    with pytest.raises(KeyError):
        subject.transact(fail)
    assert (subject.count(2), subject.tokens) == (0, before + 1)


def test_the_token_is_the_only_statement_more(subject: Subject) -> None:
    seen: list[str] = []
    plain = getattr(subject.engine, "sync_engine", subject.engine)
    subject.transact(lambda _: None)  # connects

    @event.listens_for(plain, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    subject.transact(subject.entry(3))
    assert [statement.split(" (")[0] for statement in seen] == [
        "INSERT INTO resilientdb_token",
        "INSERT INTO entry",
    ]


# -- a COMMIT in doubt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOST)
def test_a_commit_in_doubt_is_settled(
    subject: Subject, resilientdb_mariadb_proxy: Proxy, fault: contextlib.ExitStack, how: str
) -> None:
    lose, is_committed = LOST[how]
    number = 100 + list(LOST).index(how)
    before = subject.tokens
    with rdb.deadline(2.0):
        run = subject.transact(
            subject.entry(number, lambda: fault.enter_context(lose(resilientdb_mariadb_proxy)))
        )
    assert (run, subject.runs) == ((1, 1) if is_committed else (2, 2))
    fault.close()  # whatever is still under way is delivered now
    subject.settle()
    assert (subject.count(number), subject.tokens) == (1, before + 1)
    assert subject.transact(subject.entry(number + 50)) == 1, "the engine goes on"


@pytest.mark.parametrize("isolation", ["SERIALIZABLE", "READ COMMITTED"])
def test_in_every_isolation_level(
    make: Callable[..., Subject],
    resilientdb_mariadb_proxy: Proxy,
    fault: contextlib.ExitStack,
    isolation: str,
) -> None:
    for number, lose in ((210, faults.reply_lost), (211, faults.commit_lost)):
        subject = make()
        subject.transact(
            subject.entry(number, lambda lose=lose: fault.enter_context(lose(resilientdb_mariadb_proxy))),  # type: ignore[misc]
            isolation_level=isolation,
        )
        fault.close()
        assert subject.count(number) == 1
        assert subject.server.query("SELECT @@global.innodb_lock_wait_timeout")[0][0] == 50
        with subject.engine.connect() as connection:
            waits = connection.exec_driver_sql("SELECT @@innodb_lock_wait_timeout").scalar_one()
        assert waits == 50, "the next user of the connection knows nothing of the haste"


def test_a_server_process_that_is_killed_while_committing(subject: Subject) -> None:
    def kill() -> None:
        """As an administrator does, between the last statement and COMMIT."""
        for (number,) in subject.query("SELECT trx_mysql_thread_id FROM information_schema.innodb_trx"):
            subject.query(f"KILL {number}")

    assert subject.transact(subject.entry(200, kill)) == 2
    assert subject.count(200) == 1


@pytest.fixture
def semi_sync(server: MariaDB) -> Iterator[None]:
    """Each COMMIT waits for a replica, which there is none of; before anybody can see what it commits."""
    old = server.query("SELECT @@global.rpl_semi_sync_master_wait_point")[0][0]
    server.query("SET GLOBAL rpl_semi_sync_master_wait_point = 'AFTER_SYNC'")
    server.query("SET GLOBAL rpl_semi_sync_master_timeout = 60000")
    yield
    server.query("SET GLOBAL rpl_semi_sync_master_enabled = 0")
    server.query(f"SET GLOBAL rpl_semi_sync_master_wait_point = '{old}'")


@pytest.mark.usefixtures("semi_sync")
def test_a_commit_that_waits_for_its_replica_is_left_alone(subject: Subject) -> None:
    server = subject.server
    body = subject.entry(202, lambda: server.query("SET GLOBAL rpl_semi_sync_master_enabled = 1"))
    with rdb.deadline(1.5), pytest.raises(rdb.CommitOutcomeUnknown) as caught:
        subject.transact(body)
    assert subject.runs == 1
    key = caught.value.key
    assert isinstance(key, uuid.UUID)
    waiting = "SELECT count(*) FROM information_schema.processlist WHERE state LIKE '%semi-sync%'"
    assert server.query(waiting)[0][0] >= 1, "it was left alone"
    assert subject.count(202) == 0, "and nobody has seen it"
    with rdb.deadline(0.5):
        assert subject.resolve(key) == "unknown"
    server.query("SET GLOBAL rpl_semi_sync_master_enabled = 0")
    assert subject.resolve(key) == "committed"
    subject.settle()
    assert subject.count(202) == 1


@pytest.mark.usefixtures("semi_sync")
def test_a_commit_that_is_still_at_work_is_waited_for(
    subject: Subject, resilientdb_mariadb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    server = subject.server

    def first() -> None:
        server.query("SET GLOBAL rpl_semi_sync_master_enabled = 1")
        fault.enter_context(cut_soon(resilientdb_mariadb_proxy))
        timer = threading.Timer(1.0, server.query, ["SET GLOBAL rpl_semi_sync_master_enabled = 0"])
        timer.start()
        fault.callback(timer.join)

    assert subject.transact(subject.entry(201, first)) == 1
    assert (subject.runs, subject.count(201)) == (1, 1)


@pytest.mark.usefixtures("semi_sync")
@pytest.mark.parametrize("driver", ["aiomysql", "asyncmy"])
def test_a_cancelled_commit_is_left_to_the_server(make: Callable[..., Subject], driver: str) -> None:
    subject = make(driver)
    server = subject.server

    async def work(connection: Any) -> None:
        await connection.execute(INSERT, {"k": 230})
        server.query("SET GLOBAL rpl_semi_sync_master_enabled = 1")

    async def main() -> BaseException:
        task = asyncio.create_task(rdb.run_transaction_async(subject.engine, work, exactly_once=True))
        waiting = "SELECT 1 FROM information_schema.processlist WHERE state LIKE '%semi-sync%'"
        while not server.query(waiting):  # noqa: ASYNC110 - a state of another process
            await asyncio.sleep(0.01)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert time.monotonic() - began < 2, "the caller is let go at once"
        return caught.value

    notes = " ".join(subject.wait(main()).__notes__)
    assert subject.count(230) == 0, "it still waits, and nobody has seen it"
    server.query("SET GLOBAL rpl_semi_sync_master_enabled = 0")
    assert subject.resolve(uuid.UUID(notes.split("UUID('")[1].split("'")[0])) == "committed"
    subject.settle()
    assert subject.count(230) == 1


def test_after_a_crash(make: Callable[..., Subject]) -> None:
    """The server dies between the last statement and COMMIT, and is back a moment later."""
    with MariaDB(name="crash", settings={"innodb_flush_log_at_trx_commit": "1"}) as server:
        server.query("CREATE TABLE entry (k int) ENGINE=InnoDB", database="app")
        subject = make(server=server)
        # Its first connection leads to the other server, where nobody knows this table.
        with contextlib.suppress(sa.exc.DBAPIError):
            subject.transact(lambda connection: connection.exec_driver_sql("SELECT 1 FROM nowhere"))
        subject.engine.dispose()
        rdb.install(subject.engine)
        assert subject.transact(subject.entry(250, lambda: server.restart("immediate"))) == 2
        assert subject.count(250) == 1


def test_a_doubt_and_its_end_are_seen(
    make: Callable[..., Subject], resilientdb_mariadb_proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    committing.assert_a_doubt_and_its_end_are_seen(make, resilientdb_mariadb_proxy, fault)


# -- asking later ---------------------------------------------------------------------------------------------------


def test_resolve_and_purge(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    subject.query("DELETE FROM resilientdb_token")
    subject.transact(subject.entry(300))
    key = uuid.UUID(bytes=subject.query("SELECT id FROM resilientdb_token")[0][0])
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


def test_a_purge_does_not_wait_for_who_is_at_work(
    make: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make()
    subject.query("DELETE FROM resilientdb_token")
    subject.transact(lambda _: None)
    now = time.time()

    def purge_meanwhile(_: sa.Connection) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(outcome_module, "wall", lambda: now + 60)
            with rdb.deadline(2.0):
                return rdb.purge(subject.engine, older_than=60)

    time.sleep(0.002)
    now = time.time()
    assert subject.transact(purge_meanwhile) == 1


def test_two_who_ask_at_once(make: Callable[..., Subject]) -> None:
    """While the function runs again in the transaction that has asked, another may ask for the same key. It must not
    take the mark of the first for a session's number."""
    subject = make()
    key = uuid.uuid4()
    language = outcome_module.language_of(subject.engine.dialect)
    with subject.engine.connect() as one, subject.engine.connect() as other:
        session = one.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one()
        one.rollback()
        assert language.claim(one, "resilientdb_token", key, 1.0)
        holder = language.holder(other, "resilientdb_token", key)
        assert holder is not None
        assert (holder.pid, holder.state, holder.wait_event) == (session, "idle in transaction", None)
        with pytest.raises(sa.exc.DBAPIError) as caught:
            language.claim(other, "resilientdb_token", key, 0.1)
        assert language.is_still_open(caught.value)
        other.rollback()
        one.commit()
        assert not language.claim(one, "resilientdb_token", key, 1.0)
        assert language.holder(other, "resilientdb_token", key) is None, "the row has no session's number now"
        one.commit()


# -- what it needs --------------------------------------------------------------------------------------------------


def test_without_its_table(subject: Subject) -> None:
    with pytest.raises(rdb.ConfigurationError, match=r"resilientdb\.install"):
        subject.transact(subject.entry(400), exactly_once=rdb.TokenTable("elsewhere"))
    assert (subject.runs, subject.count(400)) == (0, 0)
    subject.query("GRANT ALL ON nowhere.* TO app@'%'")
    with pytest.raises(rdb.ConfigurationError, match=r"nowhere\.elsewhere"):
        subject.transact(subject.entry(400), exactly_once=rdb.TokenTable("elsewhere", schema="nowhere"))


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_its_table_may_be_anywhere(make: Callable[..., Subject], dialect: str) -> None:
    subject = make()
    subject.query("CREATE DATABASE `Odd`")
    subject.query("GRANT ALL ON Odd.* TO app@'%'")
    table = rdb.TokenTable("odd `name`", schema="Odd")
    engine = rdb.create_engine(subject.server.url().replace("mysql+", f"{dialect}+"))
    try:
        rdb.install(engine, table=table)
        rdb.run_transaction(engine, lambda _: None, exactly_once=table)
        ((raw,),) = subject.query("SELECT id FROM Odd.`odd ``name```")
        assert rdb.resolve(engine, uuid.UUID(bytes=raw), table=table) == "committed"
        ((kind,),) = subject.query("SELECT engine FROM information_schema.tables WHERE table_schema = 'Odd'")
        assert kind == "InnoDB"
    finally:
        engine.dispose()
        subject.query("DROP DATABASE `Odd`")


def test_a_migration_makes_the_same_table(make: Callable[..., Subject]) -> None:
    subject = make()
    metadata = sa.MetaData()
    rdb.TokenTable("by_migration").to_metadata(metadata)
    metadata.create_all(subject.engine)
    assert subject.transact(subject.entry(411), exactly_once=rdb.TokenTable("by_migration")) == 1
    subject.query("DROP TABLE by_migration")


def test_autocommit_is_refused(subject: Subject, make: Callable[..., Subject]) -> None:
    autocommit = make(subject.driver, isolation_level="AUTOCOMMIT")
    with pytest.raises(rdb.ConfigurationError, match="AUTOCOMMIT"):
        autocommit.transact(autocommit.entry(420))
    assert subject.count(420) == 0
