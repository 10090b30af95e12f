"""The ledger without a table of tokens: see ``test_ledger``. The server's processes crash as well, one at a time, so
that it recovers without a new start; and what nobody can know is said to be unknown."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import resilientdb as rdb
from chaos.bodies import Ledger, echo
from chaos.invariants import eventually, own_answers
from chaos.scenarios.test_ledger import _CALLERS, _RETRY, _Faults, _until, outcome
from chaos.workloads import Load, Work, once
from resilientdb.testing import History, check_ledger

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from chaos.conftest import Run
    from resilientdb.testing import Postgres
    from resilientdb.testing.toxiproxy import ToxiproxyServer


class _Crashes(_Faults):
    def _terminate(self) -> None:
        if self._rng.random() < 0.5:
            self._server.crash("backend")
        else:
            super()._terminate()


@pytest.mark.parametrize("variant", ["guarded"], indirect=True)
def test_ledger_without_a_table(
    run: Run, pytestconfig: pytest.Config, doomed: Postgres, resilientdb_toxiproxy: ToxiproxyServer
) -> None:
    """What is acknowledged is there exactly once, what is refused is not there, and what is unknown is not there
    twice; only another life of the server, or too little time, makes it unknown."""
    given = pytestconfig.getoption("--chaos-ledger")
    entries = given or run.profile.entries
    seconds = None if given else run.profile.ledger
    ledger = Ledger(doomed, f"without a table of {run.driver}")

    def body(connection: Connection, number: int) -> int:
        ledger.insert(connection, number)
        return echo(connection, number)

    work = Work(body=body, exactly_once="guarded", deadline=5.0)
    history = History()
    with (
        resilientdb_toxiproxy.proxy(doomed.address) as proxy,
        run.stack(doomed, port=proxy.listen_port, resilience=rdb.Resilience(retry=_RETRY)) as stack,
    ):
        began = time.monotonic()
        with (
            _Crashes(run.rng, doomed, proxy, stack.application) as strikes,
            Load(
                stack, _until(work, entries, seconds), in_flight=_CALLERS, patience=max(60.0, entries / 20)
            ) as load,
        ):
            load.join()
        spent = time.monotonic() - began
        calls = load.calls
        for call in calls:
            history.complete(history.invoke(call.number), outcome(call, guarded=True), call.error)
        eventually(lambda: once(stack, Work(body=echo)).ok_share == 1, "the stack serves again", timeout=10.0)
        report = check_ledger(history, [row[0] for row in ledger.rows(doomed)])
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
        own_answers(calls)
        report.raise_for_violations()
        assert calls.ok, "nothing was written"
        for call in calls.where(lambda call: isinstance(call.error, rdb.CommitOutcomeUnknown)):
            assert getattr(call.error, "key", None) is None, "nobody can ask later"
