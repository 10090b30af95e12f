"""The ledger on MariaDB: see ``test_ledger``. Sessions are killed with KILL, the server crashes by SIGKILL."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

import resilientdb as rdb
from chaos.drivers import TaskStack, ThreadStack
from chaos.invariants import eventually, own_answers
from chaos.workloads import Call, Load, Work, once
from resilientdb.testing import History, check_ledger
from resilientdb.testing.checkers import Outcome
from resilientdb.testing.mariadb import MariaDB

if TYPE_CHECKING:
    import contextlib
    import random
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

    from chaos.conftest import Run
    from chaos.drivers import Stack
    from resilientdb.testing import Proxy
    from resilientdb.testing.toxics import Stream, ToxicType
    from resilientdb.testing.toxiproxy import ToxiproxyServer

_CALLERS = 8
_AMBUSHES = 2
_RETRY = rdb.RetryPolicy(
    attempts=10,
    timeout=4.0,
    wait_when_open=True,
    backoff=rdb.Backoff(initial=0.02, maximum=0.2),
    budget=rdb.RetryBudget(floor=10_000),
)
_BREAKER = rdb.BreakerPolicy(reset_timeout=0.3, max_reset_timeout=0.3)
"""Quickly back: all of this looks like a server that is best left alone, and entries are to be written."""
_INSERT = text("INSERT INTO ledger (k) VALUES (:k)")
_ECHO = text("SELECT :k + 0")


class _PyMySQL(ThreadStack):
    driver = scheme = "pymysql"

    def _named(self, application: str) -> dict[str, Any]:
        return {"program_name": application}


class _AioMySQL(TaskStack):
    driver = scheme = "aiomysql"

    def _named(self, application: str) -> dict[str, Any]:
        return {"program_name": application}


class _AsyncMy(TaskStack):
    driver = scheme = "asyncmy"

    def _named(self, application: str) -> dict[str, Any]:
        return {"program_name": application}


_STACKS: dict[str, type[Stack]] = {stack.driver: stack for stack in (_PyMySQL, _AioMySQL, _AsyncMy)}


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def doomed_mariadb(resilientdb_mariadb: MariaDB) -> Iterator[MariaDB]:
    """A server that may crash: what it has acknowledged is in the kernel's hands by then. (The other one is asked for
    so that a machine without MariaDB skips.)"""
    settings = {"innodb_flush_log_at_trx_commit": "2"}
    with MariaDB(name="doomed", binaries=resilientdb_mariadb.binaries, settings=settings) as server:
        yield server


def echo(connection: Connection, number: int) -> int:
    return int(connection.execute(_ECHO, {"k": number}).scalar_one())


def outcome(call: Call, *, guarded: bool) -> Outcome:
    """Guarded, only one error leaves anything open: every other says that the entry is not there."""
    if call.ok:
        return Outcome.OK
    return Outcome.FAIL if guarded and not isinstance(call.error, rdb.CommitOutcomeUnknown) else Outcome.INFO


@pytest.mark.parametrize(
    ("driver", "variant"),
    [("pymysql", "bare"), ("pymysql", "guarded"), ("aiomysql", "guarded"), ("asyncmy", "guarded")],
    indirect=True,
)
def test_ledger_mysql(
    run: Run,
    pytestconfig: pytest.Config,
    doomed_mariadb: MariaDB,
    resilientdb_toxiproxy: ToxiproxyServer,
) -> None:
    """Cuts, silence, late delivery, lost replies and requests, killed sessions, crashes: what is acknowledged is
    there exactly once, what is refused is not there, and what is unknown can be asked about."""
    server = doomed_mariadb
    given = pytestconfig.getoption("--chaos-ledger")
    entries = given or run.profile.entries
    seconds = None if given else run.profile.ledger
    server.query("CREATE OR REPLACE TABLE ledger (k integer NOT NULL) ENGINE=InnoDB", database="app")
    asker = rdb.create_engine(server.url())
    rdb.install(asker)
    history = History()
    with resilientdb_toxiproxy.proxy(server.address) as proxy:
        ambush = _Ambush(server, proxy)

        def write(connection: Connection, number: int) -> int:
            """Enter the number; nothing in the table prevents doubles."""
            connection.execute(_INSERT, {"k": number})
            answer = echo(connection, number)
            ambush.lay(number)
            return answer

        work = Work(body=write, exactly_once=True, tries=4, deadline=5.0)
        kind = _STACKS[run.driver]
        own: dict[str, Any] = (
            {"resilience": rdb.Resilience(retry=_RETRY, breaker=_BREAKER)} if run.guarded else {}
        )
        stack = kind(server.url(kind.scheme, port=proxy.listen_port), guarded=run.guarded, **own)
        try:
            began = time.monotonic()
            works = _until(work, entries, seconds, ambush.over)
            with (
                _Faults(run.rng, server, proxy, ambush.over) as strikes,
                Load(stack, works, in_flight=_CALLERS, patience=max(60.0, entries / 20)) as load,
            ):
                load.join()
            spent = time.monotonic() - began
            calls = load.calls
            eventually(
                lambda: once(stack, Work(body=echo)).ok_share == 1, "the stack serves again", timeout=10.0
            )
            eventually(lambda: stack.checked_out == 0, "every connection is back")
            in_doubt = stack.snapshot() if run.guarded else None
        finally:
            stack.close()
    for call in calls:
        history.complete(history.invoke(call.number), outcome(call, guarded=run.guarded), call.error)
    rows = [row[0] for row in server.query("SELECT k FROM ledger", database="app")]
    report = check_ledger(history, rows)
    run.record(
        f"{len(calls)} entries, {len(calls) / spent:.0f}/s, {strikes.count} faults; "
        f"{len(report.duplicated)} twice, {len(report.lost)} lost, {report.unknown} unknown",
        calls,
        faults=strikes.count,
        twice=len(report.duplicated),
        lost=len(report.lost),
        unknown=report.unknown,
        refused=report.failed,
        doubts=in_doubt.commits_in_doubt if in_doubt else 0,
    )
    assert ambush.over.is_set(), "nothing was in the way"
    if run.guarded:
        own_answers(calls)
        report.raise_for_violations()
        assert calls.ok, "nothing was written"
        assert in_doubt is not None
        assert in_doubt.commits_in_doubt, "no COMMIT was hit"
        present = set(rows)
        for call in calls.where(lambda call: isinstance(call.error, rdb.CommitOutcomeUnknown)):
            key = getattr(call.error, "key", None)
            assert key is not None
            assert rdb.resolve(asker, key) == ("committed" if call.number in present else "aborted")
    else:
        assert report.duplicated, "this can fail: to try again writes twice"
    asker.dispose()


def _until(work: Work, entries: int, seconds: float | None, over: threading.Event) -> Iterator[Work]:
    """So many, or for so long after the ambushes are ``over``."""
    began = time.monotonic()
    since: float | None = None
    for _ in range(entries):
        now = time.monotonic()
        if since is None and (over.is_set() or now - began > 30):
            since = now
        if seconds is not None and since is not None and now - since > seconds:
            return
        yield work


class _Ambush:
    """Loses the replies to the COMMITs of some entries, so that no run is without, however slow the machine."""

    def __init__(self, server: MariaDB, proxy: Proxy) -> None:
        self._server = server
        self._proxy = proxy
        self._left = _AMBUSHES
        self._one_at_a_time = threading.Lock()
        self.over = threading.Event()

    def lay(self, number: int) -> None:
        """The entry's COMMIT comes next."""
        if not self._left or not self._one_at_a_time.acquire(blocking=False):
            return
        self._left -= 1
        toxic = self._proxy.toxic("limit_data", stream="downstream", name=None, bytes=0)
        toxic.__enter__()
        threading.Thread(target=self._lift, args=(number, toxic), daemon=True).start()

    def _lift(self, number: int, toxic: contextlib.AbstractContextManager[object]) -> None:
        """Let replies pass again once the entry is committed."""
        until = time.monotonic() + 5
        question = f"SELECT 1 FROM ledger WHERE k = {number}"
        while time.monotonic() < until and not self._server.query(question, database="app"):
            time.sleep(0.005)
        time.sleep(0.05)
        toxic.__exit__(None, None, None)
        if not self._left:
            self.over.set()
        self._one_at_a_time.release()


class _Faults:
    """One fault after another, with a pause between them, in a thread; drawn from ``rng``. Begins after ``start``."""

    def __init__(self, rng: random.Random, server: MariaDB, proxy: Proxy, start: threading.Event) -> None:
        self._start = start
        self._rng = rng
        self._server = server
        self._proxy = proxy
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._go, name="chaos-faults", daemon=True)
        self.count = 0

    def __enter__(self) -> _Faults:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _go(self) -> None:
        kinds: list[tuple[int, Callable[[], object]]] = [
            (3, lambda: self._toxic("limit_data", "downstream", 0.03, bytes=0)),  # replies lost
            (3, lambda: self._toxic("limit_data", "upstream", 0.03, bytes=0)),  # requests lost
            (1, lambda: self._toxic("limit_data", "upstream", 0.03, bytes=3)),  # requests truncated
            (2, lambda: self._toxic("reset_peer", "downstream", 0.02, timeout=0)),
            (2, lambda: self._toxic("timeout", "downstream", 0.15, timeout=0)),  # silence, then a cut
            (2, lambda: self._toxic("timeout", "upstream", 0.15, timeout=0)),
            (2, lambda: self._toxic("bandwidth", "upstream", 0.2, rate=0)),  # late delivery
            (2, lambda: self._toxic("bandwidth", "downstream", 0.2, rate=0)),
            (3, self._kill),
            (1, lambda: self._server.restart("immediate")),
        ]
        strikes, weights = [strike for _, strike in kinds], [weight for weight, _ in kinds]
        try:
            self._start.wait(30)
            while not self._stop.wait(self._rng.uniform(0.05, 0.25)):
                self._rng.choices(strikes, weights)[0]()
                self.count += 1
        except Exception as error:  # noqa: BLE001 - raised where it is seen
            self._failure = error

    def _toxic(self, kind: ToxicType, stream: Stream, seconds: float, **attributes: int) -> None:
        toxicity = self._rng.choice([0.3, 0.6, 1.0])
        with self._proxy.toxic(kind, stream=stream, toxicity=toxicity, name=None, **attributes):
            self._stop.wait(seconds)

    def _kill(self) -> None:
        """Some of those that are in a transaction."""
        sessions = self._server.query(
            "SELECT p.id FROM information_schema.processlist p JOIN information_schema.innodb_trx t "
            "ON t.trx_mysql_thread_id = p.id WHERE p.user = 'app'"
        )
        for (session,) in self._rng.sample(sessions, min(2, len(sessions))):
            # It may have gone by now.
            self._server.query(
                f"BEGIN NOT ATOMIC DECLARE CONTINUE HANDLER FOR 1094 BEGIN END; KILL {session}; END"
            )
