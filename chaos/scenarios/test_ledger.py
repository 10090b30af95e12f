"""The ledger: numbered entries, written by many at once while everything fails in turn.

Each entry is one transaction. Guarded, it is ``run_transaction(exactly_once=True)``; bare, what many programs do: on
an error, try again. Nothing in the table prevents doubles. What a caller was told is held against what is there.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import resilientdb as rdb
from chaos.bodies import Ledger, echo
from chaos.invariants import eventually, own_answers
from chaos.workloads import Call, Load, Work, once
from resilientdb.testing import History, check_ledger
from resilientdb.testing.checkers import Outcome

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    import pytest
    from sqlalchemy import Connection

    from chaos.conftest import Run
    from resilientdb.testing import Postgres, Proxy
    from resilientdb.testing.toxics import Stream, ToxicType
    from resilientdb.testing.toxiproxy import ToxiproxyServer

_CALLERS = 8
_FIRST = 5
_RETRY = rdb.RetryPolicy(
    attempts=10,
    timeout=4.0,
    wait_when_open=True,
    backoff=rdb.Backoff(initial=0.02, maximum=0.2),
    budget=rdb.RetryBudget(floor=10_000),
)


def outcome(call: Call, *, guarded: bool) -> Outcome:
    """Guarded, only one error leaves anything open: every other says that the entry is not there."""
    if call.ok:
        return Outcome.OK
    return Outcome.FAIL if guarded and not isinstance(call.error, rdb.CommitOutcomeUnknown) else Outcome.INFO


def test_ledger(
    run: Run, pytestconfig: pytest.Config, doomed: Postgres, resilientdb_toxiproxy: ToxiproxyServer
) -> None:
    """Cuts, silence, late delivery, lost replies and requests, killed backends, crashes: what is acknowledged is
    there exactly once, what is refused is not there, and what is unknown can be asked about."""
    given = pytestconfig.getoption("--chaos-ledger")
    entries = given or run.profile.entries
    seconds = None if given else run.profile.ledger
    ledger = Ledger(doomed, f"of {run.driver} {run.guarded}")
    if run.guarded:
        maker = rdb.create_engine(doomed.url("psycopg"))
        rdb.install(maker)
        maker.dispose()

    def body(connection: Connection, number: int) -> int:
        ledger.insert(connection, number)
        return echo(connection, number)

    work = Work(body=body, exactly_once=True, tries=4, deadline=5.0)
    history = History()
    resilience = rdb.Resilience(retry=_RETRY) if run.guarded else None
    with (
        resilientdb_toxiproxy.proxy(doomed.address) as proxy,
        run.stack(doomed, port=proxy.listen_port, resilience=resilience) as stack,
    ):
        began = time.monotonic()
        works = _until(work, entries, seconds)
        with (
            _Faults(run.rng, doomed, proxy, stack.application) as strikes,
            Load(stack, works, in_flight=_CALLERS, patience=max(60.0, entries / 20)) as load,
        ):
            load.join()
        spent = time.monotonic() - began
        calls = load.calls
        for call in calls:
            history.complete(history.invoke(call.number), outcome(call, guarded=run.guarded), call.error)
        eventually(lambda: once(stack, Work(body=echo)).ok_share == 1, "the stack serves again", timeout=10.0)
        rows = [row[0] for row in ledger.rows(doomed)]
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
        )
        assert strikes.count, "nothing was in the way"
        if not run.guarded:
            assert report.duplicated, "this can fail: to try again writes twice"
            return
        own_answers(calls)
        report.raise_for_violations()
        assert calls.ok, "nothing was written"
        engine = rdb.create_engine(doomed.url("psycopg"))
        present = set(rows)
        for call in calls.where(lambda call: isinstance(call.error, rdb.CommitOutcomeUnknown)):
            key = getattr(call.error, "key", None)
            assert key is not None
            assert rdb.resolve(engine, key) == ("committed" if call.number in present else "aborted")
        engine.dispose()


def _until(work: Work, entries: int, seconds: float | None) -> Iterator[Work]:
    began = time.monotonic()
    for _ in range(entries):
        if seconds is not None and time.monotonic() - began > seconds:
            return
        yield work


class _Faults:
    """One fault after another, with a pause between them, in a thread; drawn from ``rng``."""

    def __init__(self, rng: random.Random, server: Postgres, proxy: Proxy, application: str) -> None:
        self._rng = rng
        self._server = server
        self._proxy = proxy
        self._application = application
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
            (3, self._terminate),
            (1, self._restart),
        ]
        strikes, weights = [strike for _, strike in kinds], [weight for weight, _ in kinds]
        try:
            while not self._stop.wait(self._rng.uniform(0.05, 0.25)):
                # First, some of what makes doubles of naive retries, so that no run is without it.
                if self.count < _FIRST:
                    self._toxic("limit_data", "downstream", 0.03, toxicity=1.0, bytes=0)
                else:
                    self._rng.choices(strikes, weights)[0]()
                self.count += 1
        except Exception as error:  # noqa: BLE001 - raised where it is seen
            self._failure = error

    def _toxic(
        self,
        kind: ToxicType,
        stream: Stream,
        seconds: float,
        *,
        toxicity: float | None = None,
        **attributes: int,
    ) -> None:
        toxicity = toxicity or self._rng.choice([0.3, 0.6, 1.0])
        with self._proxy.toxic(kind, stream=stream, toxicity=toxicity, name=None, **attributes):
            self._stop.wait(seconds)

    def _terminate(self) -> None:
        self._server.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s "
            "AND xact_start IS NOT NULL ORDER BY md5(pid::text || %s) LIMIT 2",
            [self._application, str(self._rng.random())],
        )

    def _restart(self) -> None:
        self._server.restart(self._rng.choice(["fast", "immediate"]))
