"""Transactions whose COMMIT is in doubt: who runs them, what is done to their line, and what is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy import event

import resilientdb as rdb
from resilientdb.events import CommitInDoubt, CommitSettled, Event
from resilientdb.testing import faults
from tests.engine.provoking import ASYNC

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from resilientdb.testing import MariaDB, Postgres, Proxy

QUICK = rdb.Resilience(
    retry=rdb.RetryPolicy(
        attempts=4,
        timeout=8.0,
        backoff=rdb.Backoff(initial=0.01, maximum=0.05),
        budget=rdb.RetryBudget(floor=10_000),
    ),
    breaker=rdb.BreakerPolicy(probe_interval=None, minimum_calls=1000),
)
PATIENT = rdb.Resilience(
    retry=rdb.RetryPolicy(timeout=30.0, backoff=rdb.Backoff(initial=0.05, maximum=0.2)), deadline=None
)

INSERT = sa.text("INSERT INTO entry (k) VALUES (:k)")


# -- who runs them --------------------------------------------------------------------------------------------------


class Subject:
    """One engine on one driver, sync or async, used from one thread."""

    def __init__(
        self, driver: str, server: Postgres | MariaDB, *, port: int | None = None, **options: Any
    ) -> None:
        self.driver = driver
        is_async = driver in ASYNC or driver.endswith("-async")
        create: Any = rdb.create_async_engine if is_async else rdb.create_engine
        self.engine: Any = create(server.url(driver.removesuffix("-async"), port=port), **options)
        self.runner = asyncio.Runner() if is_async else None

    def transact(self, body: Callable[[sa.Connection], Any], **options: Any) -> Any:
        if self.runner is None:
            return rdb.run_transaction(self.engine, body, **options)
        return self.wait(
            rdb.run_transaction_async(self.engine, lambda connection: connection.run_sync(body), **options)
        )

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        assert self.runner is not None
        # In the caller's own context, with the deadline that it has set.
        return self.runner.run(work, context=contextvars.copy_context())

    def dispose(self) -> None:
        if self.runner is None:
            self.engine.dispose()
        else:
            self.wait(self.engine.dispose())

    def close(self) -> None:
        self.dispose()
        if self.runner is not None:
            self.runner.close()


class InDoubt(Subject):
    """Its first connection goes through the proxy, the others to the server itself: what holds up a COMMIT does not
    hold up those who want to know what became of it."""

    def __init__(self, driver: str, server: Postgres | MariaDB, proxy: Proxy, **options: Any) -> None:
        super().__init__(driver, server, **{"resilience": QUICK, "pool_size": 3, **options})
        self.runs = 0
        self.detour: int | None = proxy.listen_port

        @event.listens_for(getattr(self.engine, "sync_engine", self.engine), "do_connect")
        def lead(_dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
            if self.detour is not None:
                parameters["port"], self.detour = self.detour, None

    def transact(self, body: Callable[[sa.Connection], Any], **options: Any) -> Any:
        return super().transact(body, **{"exactly_once": True, **options})

    def resolve(self, key: uuid.UUID) -> str:
        if self.runner is None:
            return rdb.resolve(self.engine, key)
        return str(self.wait(rdb.resolve_async(self.engine, key)))

    def purge(self, **options: Any) -> int:
        if self.runner is None:
            return rdb.purge(self.engine, **options)
        return int(self.wait(rdb.purge_async(self.engine, **options)))

    def entry(self, k: int, first: Callable[[], object] = lambda: None) -> Callable[[sa.Connection], int]:
        """Writes ``k``, then, in its first run, does that; returns which run it was."""
        self.runs = 0

        def body(connection: sa.Connection) -> int:
            self.runs += 1
            connection.execute(INSERT, {"k": k})
            if self.runs == 1:
                first()
            return self.runs

        return body


class OnPostgres(InDoubt):
    def __init__(self, driver: str, postgres: Postgres, proxy: Proxy, **options: Any) -> None:
        super().__init__(driver, postgres, proxy, **options)
        self.postgres = postgres

    def count(self, k: int) -> int:
        return int(self.postgres.query("SELECT count(*) FROM entry WHERE k = %s", [k])[0][0])


S = TypeVar("S", bound=Subject)


@contextlib.contextmanager
def subjects(kind: Callable[..., S]) -> Iterator[Callable[..., S]]:
    """Makes them, and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> S:
            made = kind(*arguments, **options)
            stack.callback(made.close)
            return made

        yield make


# -- what is done to the line ---------------------------------------------------------------------------------------


@pytest.fixture
def fault() -> Iterator[contextlib.ExitStack]:
    """Holds what a run breaks, until the end of the test or ``close()``."""
    with contextlib.ExitStack() as stack:
        yield stack


def truncated(proxy: Proxy) -> contextlib.AbstractContextManager[object]:
    return faults._toxics("truncated", proxy, "limit_data", {"bytes": 3}, streams=("upstream",))


def silence(proxy: Proxy, stream: Any) -> contextlib.AbstractContextManager[object]:
    return faults._toxics("silence", proxy, "timeout", {"timeout": 0}, streams=(stream,))


LOST: dict[str, tuple[Callable[[Proxy], Any], bool]] = {
    "reply lost": (faults.reply_lost, True),
    "COMMIT lost": (faults.commit_lost, False),
    "COMMIT truncated": (truncated, False),
    "reply never comes": (lambda proxy: silence(proxy, "downstream"), True),
    "COMMIT never arrives": (lambda proxy: silence(proxy, "upstream"), False),
    "COMMIT comes late": (lambda proxy: faults.pause(proxy, streams=("upstream",)), False),
}
"""What is done to the line, and whether the first run is committed."""


@contextlib.contextmanager
def cut_soon(proxy: Proxy) -> Iterator[None]:
    """After COMMIT was sent, and long before its reply."""
    timer = threading.Timer(0.2, proxy.disable)
    timer.start()
    yield
    timer.join()
    proxy.enable()


# -- what is done to the server -------------------------------------------------------------------------------------


def triggers_at_commit(server: Postgres, actions: Mapping[str, str], *, rights: str = "") -> None:
    """For each name a table; a row in it makes COMMIT do that."""
    for name, action in actions.items():
        server.query(f"CREATE TABLE {name} (k int)")
        server.query(
            f"CREATE FUNCTION {name}() RETURNS trigger {rights} LANGUAGE plpgsql "
            f"AS $$ BEGIN {action} RETURN NULL; END $$"
        )
        server.query(
            f"CREATE CONSTRAINT TRIGGER {name} AFTER INSERT ON {name} DEFERRABLE INITIALLY DEFERRED "
            f"FOR EACH ROW EXECUTE FUNCTION {name}()"
        )


@contextlib.contextmanager
def server_setting(postgres: Postgres, name: str, value: str) -> Iterator[None]:
    """For the length of the block; sessions know of it from its beginning."""
    postgres.query(f"ALTER SYSTEM SET {name} = '{value}'")
    postgres.reload()
    try:
        until(lambda: postgres.query(f"SHOW {name}")[0][0] == value, f"{name} is {value}")
        yield
    finally:
        postgres.query(f"ALTER SYSTEM RESET {name}")
        postgres.reload()


def run_over_a_failover(
    first: Postgres | MariaDB,
    second: Postgres | MariaDB,
    driver: str,
    proxy: Proxy,
    fail_over: Callable[[], object],
    *,
    is_committed: bool,
) -> int:
    """A transaction with the first server, through the proxy, that writes 1; ``fail_over()`` is called as its first
    run commits, whose COMMIT does not get there, or, ``is_committed``, whose reply does not come back. Returns which
    run was the one that was committed; it is the last."""
    runs: list[int] = []
    failing_over = threading.Thread(target=fail_over)

    def body(connection: sa.Connection) -> int:
        runs.append(1)
        connection.execute(INSERT, {"k": 1})
        if len(runs) == 1:
            # From now on nothing comes back from the first primary, or nothing gets there.
            stream: Any = "downstream" if is_committed else "upstream"
            proxy.add_toxic("limit_data", stream=stream, bytes=0)
            failing_over.start()
        return len(runs)

    with subjects(Subject) as make:
        subject = make(driver, first, port=proxy.listen_port, replicas=[second.address], resilience=PATIENT)
        run = int(subject.transact(body, exactly_once=True))
    failing_over.join()
    assert run == len(runs)
    return run


# -- what is waited for ---------------------------------------------------------------------------------------------


def until(condition: Callable[[], object], what: str) -> None:
    """A server reaches a state that it has to be asked for."""
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, f"never: {what}"
        time.sleep(0.01)


def settle(postgres: Postgres) -> None:
    """Wait until no transaction is open any more."""
    open_ones = (
        "SELECT 1 FROM pg_stat_activity WHERE xact_start IS NOT NULL AND backend_type = 'client backend' "
        "AND pid <> pg_backend_pid()"
    )
    until(lambda: not postgres.query(open_ones), "no transaction is open")


# -- what is promised of every server -------------------------------------------------------------------------------


def assert_a_doubt_and_its_end_are_seen(
    make: Callable[[], InDoubt], proxy: Proxy, fault: contextlib.ExitStack
) -> None:
    for number, lose, outcome in (
        (180, faults.reply_lost, "committed"),
        (181, faults.commit_lost, "aborted"),
    ):
        subject = make()
        seen: list[Event] = []
        control = rdb.control(subject.engine)
        control.on_event(seen.append)
        break_line = functools.partial(lambda lose: fault.enter_context(lose(proxy)), lose)
        subject.transact(subject.entry(number, break_line))
        fault.close()
        doubt, settled = seen
        assert isinstance(doubt, CommitInDoubt)
        assert doubt.node == control.snapshot().nodes[0].name
        assert doubt.error
        assert isinstance(settled, CommitSettled)
        assert (settled.outcome, settled.attempts >= 1, settled.seconds > 0) == (outcome, True, True)
        assert settled.key is not None
        assert subject.resolve(settled.key) == "committed", "by now, in any case"
        snapshot = control.snapshot()
        assert (snapshot.commits_in_doubt, snapshot.commits_settled) == (1, {outcome: 1})
