"""A primary and its standby: reads go on without the primary, writes follow it to where it is promoted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import resilientdb as rdb
from chaos.bodies import Ledger, echo
from chaos.invariants import (
    DETECTION,
    EPSILON,
    fast,
    fault_was_felt,
    known_errors,
    own_answers,
    recovered,
    within_deadline,
)
from chaos.workloads import Call, Load, Work
from resilientdb.events import PrimaryChanged
from resilientdb.testing import History, check_ledger, faults
from resilientdb.testing.checkers import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from chaos.conftest import Run
    from chaos.pair import Pair
    from resilientdb.testing import Postgres, Proxy

_DEADLINE = 0.5


@pytest.mark.parametrize("how", ["down", "hang"])
def test_reads_without_the_primary(
    run: Run,
    how: str,
    resilientdb_postgres: Postgres,
    resilientdb_standby: Postgres,
    resilientdb_proxy: Proxy,
    resilientdb_standby_proxy: Proxy,
) -> None:
    """The primary is lost: no read fails; writes are refused at once, as ``NoPrimaryAvailable``, then go on."""
    profile = run.profile
    ledger = Ledger(resilientdb_postgres, "reads")
    resilientdb_standby.wait_caught_up(resilientdb_postgres)
    seconds = profile.outage if how == "down" else profile.silence
    block = faults.down if how == "down" else faults.hang
    read = Work(body=echo, read_only=True, deadline=_DEADLINE)
    write = Work(body=_numbered(ledger), commit=True, deadline=_DEADLINE)
    with run.stack(
        resilientdb_postgres,
        port=resilientdb_proxy.listen_port,
        replicas=[resilientdb_standby_proxy.address],
    ) as stack:
        with (
            Load(stack, read, rate=profile.rate) as reads,
            Load(stack, write, rate=profile.rate / 2) as writes,
        ):
            time.sleep(profile.warmup)
            broken_at = time.monotonic()
            with block(resilientdb_proxy):
                time.sleep(seconds)
                ended_at = time.monotonic()
            healed_at = time.monotonic()
            time.sleep(profile.recovery if run.guarded else 0.2)
        read_calls, write_calls = reads.calls.due(broken_at, ended_at), writes.calls.due(broken_at, ended_at)
        opened_at = stack.moved_to("open", broken_at)
        run.record(
            f"reads {read_calls.ok_share:4.0%} ok, slowest {read_calls.slowest:.2f} s; "
            f"writes {write_calls.ok_share:4.0%} ok, slowest {write_calls.slowest:.2f} s",
            read_calls,
            writes=len(write_calls),
            writes_slowest=write_calls.slowest,
        )
        own_answers(reads.calls)
        fault_was_felt(write_calls, longer_than=EPSILON)
        if not run.guarded:
            fault_was_felt(read_calls, longer_than=EPSILON)
            return
        assert not reads.calls.failed, (
            f"reads failed though the replica is well: {dict(reads.calls.errors())}"
        )
        fast(read_calls, run.observer, EPSILON)
        assert opened_at is not None
        assert opened_at - broken_at <= DETECTION
        known_errors(writes.calls)
        within_deadline(writes.calls)
        refused = write_calls.due(opened_at)
        fast(refused, run.observer)
        assert refused.errors() == {"NoPrimaryAvailable": len(refused)}
        recovered(writes.calls, healed_at, run.observer)


def test_reads_without_the_replica(
    run: Run,
    resilientdb_postgres: Postgres,
    resilientdb_standby: Postgres,
    resilientdb_proxy: Proxy,
    resilientdb_standby_proxy: Proxy,
) -> None:
    """The replica is lost: reads fall back to the primary and none fails; when it is back they return to it.

    By ``run_transaction``, because the first read to find its connection cut has asked already: that much only a
    second run can mend.
    """
    profile = run.profile
    if not run.guarded:
        pytest.skip("plain SQLAlchemy knows no replicas")
    read = Work(body=_port, read_only=True, whole=True, deadline=_DEADLINE)
    with run.stack(
        resilientdb_postgres,
        port=resilientdb_proxy.listen_port,
        replicas=[resilientdb_standby_proxy.address],
    ) as stack:
        with Load(stack, read, rate=profile.rate) as reads:
            time.sleep(profile.warmup)
            broken_at = time.monotonic()
            with faults.down(resilientdb_standby_proxy):
                time.sleep(profile.outage)
                ended_at = time.monotonic()
            healed_at = time.monotonic()
            time.sleep(profile.recovery)
        calls, during = reads.calls, reads.calls.due(broken_at, ended_at)
        run.record(f"{during.ok_share:4.0%} ok, slowest {during.slowest:.2f} s", during)
        assert not calls.failed, dict(calls.errors())
        fast(during, run.observer, EPSILON)
        before = {call.value for call in calls.where(lambda call: call.ended < broken_at)}
        assert before == {resilientdb_standby.port}, "reads did not go to the replica in the first place"
        assert {call.value for call in during} == {resilientdb_postgres.port}
        back = {call.value for call in calls.due(healed_at + 1.0)}
        assert back == {resilientdb_standby.port}, "reads did not return to the replica"


@pytest.fixture
def pair(pairs: Pair) -> Iterator[Pair]:
    yield pairs
    pairs.swap()
    pairs.rebuild()


def test_promotion(run: Run, pair: Pair) -> None:
    """The primary crashes, the standby is promoted: writes go on within 1.5 s of that, with no restart.

    What was acknowledged is there; without the library nothing ever goes on.
    """
    profile = run.profile
    old, new = pair.primary, pair.standby
    ledger = Ledger(old, "promotion")
    history = History()
    write = Work(body=_numbered(ledger), commit=True, deadline=_DEADLINE)
    with run.stack(old, replicas=[new.address], ends_on=new if run.guarded else None) as stack:
        with Load(stack, write, rate=profile.rate) as load:
            time.sleep(profile.warmup)
            crashed_at = time.monotonic()
            old.crash()
            time.sleep(0.3)  # somebody, or something, has to notice
            promoting_at = time.monotonic()
            took = faults.promote(new)
            promoted_at = time.monotonic()
            time.sleep(1.5 + profile.recovery)
        calls = load.calls
        for call in calls:
            history.complete(history.invoke(call.number), _outcome(call), call.error)
        first = min((call.ended for call in calls.due(promoting_at).ok), default=None)
        after = first - promoted_at if first is not None else None
        during = calls.due(crashed_at, promoted_at)
        run.record(
            f"promoted in {took:.2f} s, first write "
            + (
                f"{after:.2f} s after that"
                if after is not None
                else f"never in {1.5 + profile.recovery:.1f} s"
            ),
            during,
            promote=took,
            first_ok=after,
        )
        assert len(calls.where(lambda call: call.ended < crashed_at).ok) >= 5
        assert len(during.failed) > 3, "nobody noticed the crash"
        report = check_ledger(history, ledger.rows(new))
        report.raise_for_violations()
        if not run.guarded:
            assert first is None, "plain SQLAlchemy found the new primary"
            return
        known_errors(calls)
        within_deadline(calls)
        assert after is not None, f"no write since: {dict(calls.due(promoted_at).errors())}"
        assert after <= 1.5, f"first write {after:.3f} s after the promotion"
        late = calls.due(promoted_at + 1.5 + 0.5)
        assert late
        assert not late.failed, dict(late.errors())
        changes = [happened for _, happened in stack.events if isinstance(happened, PrimaryChanged)]
        assert changes[-1].new == new.address, changes


def _outcome(call: Call) -> Outcome:
    refused = isinstance(call.error, rdb.ResilienceError) and not isinstance(
        call.error, rdb.CommitOutcomeUnknown
    )
    if refused and not isinstance(call.error, rdb.DeadlineExceeded):
        return Outcome.FAIL  # never sent
    return Outcome.OK if call.ok else Outcome.INFO


def _numbered(ledger: Ledger):  # type: ignore[no-untyped-def]
    def write(connection: Connection, number: int) -> int:
        ledger.insert(connection, number)
        return number

    return write


def _port(connection: Connection, _number: int) -> int:
    return int(connection.exec_driver_sql("SELECT inet_server_port()").scalar_one())
