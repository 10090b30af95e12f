"""The server works, but slowly, or loses a connection now and then: no reason to give it up, or to beat it."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from chaos.bodies import Ledger, echo
from chaos.invariants import fault_was_felt, known_errors, own_answers
from chaos.workloads import Load, Work
from resilientdb.testing import History, check_ledger, faults
from resilientdb.testing.checkers import Outcome

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from chaos.conftest import Run
    from resilientdb.testing import Postgres, Proxy

_LATENCY = 0.15


def test_latency(run: Run, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy) -> None:
    """Every round trip takes 150 ± 100 ms longer: all callers are served, and the circuit never opens."""
    profile = run.profile
    with run.stack(resilientdb_postgres, port=resilientdb_proxy.listen_port, pool_size=10) as stack:
        with Load(stack, Work(body=echo), rate=8) as load:
            time.sleep(profile.warmup)
            with faults.latency(resilientdb_proxy, _LATENCY, jitter=0.1) as fault:
                time.sleep(profile.slow)
                ended_at = time.monotonic()
            time.sleep(0.3)
        calls = load.calls
        during = calls.due(fault.started_at, ended_at)
        run.record(
            f"{during.ok_share:4.0%} ok, p50 {during.quantile(0.5):.2f} s, {len(stack.transitions)} circuit moves",
            during,
            circuit_moves=len(stack.transitions),
        )
        own_answers(calls)
        fault_was_felt(during, longer_than=_LATENCY - 0.1)
        assert calls.ok_share == 1, dict(calls.errors())
        assert not stack.transitions, f"a slow server was given up: {stack.transitions}"


def test_cold_start_in_latency(run: Run, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy) -> None:
    """As above, and no connection is open yet: logging in over a slow link is no failure either."""
    profile = run.profile
    with (
        faults.latency(resilientdb_proxy, _LATENCY, jitter=0.1) as fault,
        run.stack(resilientdb_postgres, port=resilientdb_proxy.listen_port, pool_size=10) as stack,
    ):
        with Load(stack, Work(body=echo), rate=8) as load:
            time.sleep(profile.slow)
        calls = load.calls
        fault.check()
        run.record(
            f"{calls.ok_share:4.0%} ok, p50 {calls.quantile(0.5):.2f} s, {len(stack.transitions)} circuit moves",
            calls,
            circuit_moves=len(stack.transitions),
        )
        own_answers(calls)
        fault_was_felt(calls, longer_than=_LATENCY - 0.1)
        assert calls.ok_share == 1, dict(calls.errors())
        assert not stack.transitions, f"a slow server was given up: {stack.transitions}"


def test_reset_storm(run: Run, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy) -> None:
    """Again and again, three connections of ten are reset: whole transactions are retried within the budget.

    What reaches the server is bounded by what is asked of it, every acknowledged entry is there once.
    """
    profile = run.profile
    ledger = Ledger(resilientdb_postgres, "storm")
    history = History()
    runs = itertools.count()

    def entry(connection: Connection, number: int) -> int:
        next(runs)
        ledger.insert(connection, number)
        return number

    with run.stack(resilientdb_postgres, port=resilientdb_proxy.listen_port) as stack:
        with Load(stack, Work(body=entry, whole=True, deadline=2.0), rate=profile.rate) as load:
            time.sleep(profile.warmup)
            began_at = time.monotonic()
            while time.monotonic() < began_at + profile.outage:
                # Each block draws anew which connections it hits.
                with faults.reset(resilientdb_proxy, toxicity=0.3):
                    time.sleep(0.05)
                time.sleep(0.1)
            ended_at = time.monotonic()
            time.sleep(0.5)
        calls = load.calls
        attempts = next(runs)
        for call in calls:
            history.complete(history.invoke(call.number), Outcome.OK if call.ok else Outcome.INFO, call.error)
        during = calls.due(began_at, ended_at)
        extra = attempts - len(calls)
        run.record(
            f"{during.ok_share:4.0%} ok, {attempts} runs for {len(calls)} transactions",
            during,
            runs=attempts,
            connects=len(stack.connects),
        )
        report = check_ledger(history, ledger.rows(resilientdb_postgres))
        report.raise_for_violations()
        if not run.guarded:
            assert calls.failed, "no connection was reset in use"
            return
        known_errors(calls)
        budget = stack.snapshot()
        options = stack.control.resilience.retry.budget
        allowed = options.floor + options.ratio * attempts
        assert budget.retries > 0, "no transaction was hit"
        assert budget.retries <= allowed, f"{budget.retries} retries, the budget allows {allowed:.0f}"
        assert extra <= budget.retries, f"{extra} runs more than transactions, {budget.retries} retries"
