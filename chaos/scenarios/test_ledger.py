"""The ledger: numbered entries, written by many at once while everything fails in turn.

Each entry is one transaction. Guarded, it is ``run_transaction(exactly_once=True)``; bare, what many programs do: on
an error, try again. Nothing in the table prevents doubles. What a caller was told is held against what is there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from typing import TYPE_CHECKING

import pytest

import resilientdb as rdb
from chaos.bodies import Ledger, echo
from chaos.drivers import STACKS
from chaos.invariants import eventually, own_answers
from chaos.strikes import Strikes
from chaos.workloads import Call, Load, Work, once
from resilientdb.testing import History, check_ledger
from resilientdb.testing.checkers import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from chaos.conftest import Run
    from chaos.drivers import Stack
    from chaos.pair import Pair
    from resilientdb.testing import Postgres, Proxy
    from resilientdb.testing.toxiproxy import ToxiproxyServer

_CALLERS = 8
_DEAD = 30.0
"""Seconds without anybody at work after which there is no hope: no fault lasts for two."""
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


@pytest.mark.parametrize("driver", list(STACKS))
def test_ledger(
    run: Run, pytestconfig: pytest.Config, pairs: Pair, resilientdb_toxiproxy: ToxiproxyServer
) -> None:
    """Cuts, silence, late delivery, lost replies and requests, killed backends, crashes, promotions: what is
    acknowledged is there exactly once, what is refused is not there, and what is unknown can be asked about."""
    in_all = pytestconfig.getoption("--chaos-ledger")
    entries = in_all // len(STACKS) if in_all else run.profile.entries
    ledger = Ledger(pairs.primary, f"of {run.driver} {run.guarded}")
    if run.guarded:
        maker = rdb.create_engine(pairs.primary.url("psycopg"))
        rdb.install(maker)
        maker.dispose()

    began = at_work = time.monotonic()

    def body(connection: Connection, number: int) -> int:
        nonlocal at_work
        at_work = time.monotonic()
        ledger.insert(connection, number)
        return echo(connection, number)

    def works() -> Iterator[Work]:
        """So many, and more until each kind of fault was there. Plain SQLAlchemy need not go on for so long; and
        where nobody gets a connection any more, nobody will."""
        for number in itertools.count():
            now = time.monotonic()
            enough = number >= entries and strikes.complete.is_set()
            if enough or now - began > limit or now - at_work > _DEAD:
                return
            yield work

    work = Work(body=body, exactly_once=True, tries=4, deadline=5.0)
    limit = math.inf if run.guarded else run.profile.ledger or math.inf
    history = History()
    with contextlib.ExitStack() as blocks:
        servers = [pairs.primary, pairs.standby]
        proxies = {
            server: blocks.enter_context(resilientdb_toxiproxy.proxy(server.address)) for server in servers
        }
        stack = blocks.enter_context(_stack(run, servers, [proxies[server] for server in servers], pairs))
        began = at_work = time.monotonic()
        with Strikes(run.rng, pairs, proxies, stack.application) as strikes:
            with Load(stack, works(), in_flight=_CALLERS, patience=60.0) as load:
                load.join()
            spent = time.monotonic() - began
        calls = load.calls
        for call in calls:
            history.complete(history.invoke(call.number), outcome(call, guarded=run.guarded), call.error)
        eventually(
            lambda: not _open(pairs.primary, stack.application),
            "no transaction is open any more",
            timeout=10.0,
        )
        rows = [row[0] for row in ledger.rows(pairs.primary)]
        report = check_ledger(history, rows)
        run.record(
            f"{len(calls)} entries, {len(calls) / spent:.0f}/s, {strikes.counts.total()} faults "
            f"({strikes.counts['promotion']} promotions); {len(report.duplicated)} twice, {len(report.lost)} lost, "
            f"{report.unknown} unknown",
            calls,
            seconds=spent,
            twice=len(report.duplicated),
            lost=len(report.lost),
            unknown=report.unknown,
            refused=report.failed,
            **{f"faults: {name}": count for name, count in sorted(strikes.counts.items())},
        )
        assert strikes.counts, "nothing was in the way"
        eventually(
            lambda: once(stack, Work(body=echo)).ok_share == 1,
            f"the stack serves again: {calls[-1].error!r}, {stack.snapshot() if run.guarded else ''}",
            timeout=10.0,
        )
        if not run.guarded:
            assert report.duplicated, "this can fail: to try again writes twice"
            return
        assert not strikes.missing
        own_answers(calls)
        report.raise_for_violations()
        assert calls.ok, "nothing was written"
        engine = rdb.create_engine(pairs.primary.url("psycopg"))
        present = set(rows)
        for call in calls.where(lambda call: isinstance(call.error, rdb.CommitOutcomeUnknown)):
            key = getattr(call.error, "key", None)
            assert key is not None
            assert rdb.resolve(engine, key) == ("committed" if call.number in present else "aborted")
        engine.dispose()


def _stack(
    run: Run, servers: list[Postgres], proxies: list[Proxy], pairs: Pair
) -> contextlib.AbstractContextManager[Stack]:
    """Guarded, it knows its replica. Bare, its driver looks for the server that takes writes, as well as it can."""
    hosts = "&".join(f"host={proxy.address}" for proxy in proxies)
    return run.stack(
        servers[0],
        port=proxies[0].listen_port,
        replicas=[proxy.address for proxy in proxies[1:]],
        hosts=None if run.guarded else f"{hosts}&target_session_attrs=read-write",
        resilience=rdb.Resilience(retry=_RETRY) if run.guarded else None,
        ends_on=lambda: pairs.primary,
    )


def _open(server: Postgres, application: str) -> int:
    """Transactions that are neither committed nor rolled back; of those who are gone, too."""
    rows = server.query(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND xact_start IS NOT NULL",
        [application],
    )
    return int(rows[0][0])
