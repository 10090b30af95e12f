"""Ten times more callers than can be served: those that are served are served in time, and it ends when it ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import resilientdb as rdb
from chaos.bodies import sleep
from chaos.invariants import EPSILON, fast, known_errors, own_answers
from chaos.workloads import Calls, Load, Work

if TYPE_CHECKING:
    from chaos.conftest import Run
    from resilientdb.testing import Postgres

_POOL = 5
_SERVICE = 0.05
_DEADLINE = 1.0
_AT_THE_DOOR = {"pool-saturated", "pool-would-be-late"}
"""Refusals on arrival. Whoever was let in and is sent away from the line later hears of it by its deadline."""
_BACKLOG = 250
"""Callers at once, then arrivals are dropped: so much patience has any server, and a bare run has an end."""


def test_overload(run: Run, resilientdb_postgres: Postgres) -> None:
    """Open-loop arrivals at ten times the capacity: nearly all of it is still served within the deadline."""
    profile = run.profile
    work = Work(body=sleep(_SERVICE), deadline=_DEADLINE)
    with run.stack(resilientdb_postgres, pool_size=_POOL) as stack:
        capacity = _capacity(run, stack_load=Load(stack, [work] * 60, in_flight=_POOL))
        with Load(stack, work, rate=10 * capacity, in_flight=_BACKLOG) as load:
            begun = time.monotonic()
            time.sleep(profile.overload)
            ended = time.monotonic()
        # Half the capacity, from the moment the crowd has gone: how long until all is as before?
        with Load(stack, work, rate=capacity / 2) as after:
            time.sleep(profile.recovery)
        calls = load.calls
        good = _in_time(calls.where(lambda call: begun <= call.ended < ended))
        goodput = len(good) / (ended - begun) / capacity
        gone_at = ended
        late = calls.where(lambda call: call.ended > ended + EPSILON)
        run.record(
            f"goodput {goodput:4.0%} of {capacity:.0f}/s, p50 of the served {calls.ok.quantile(0.5):.2f} s, "
            f"{max(calls[-1].ended, *(c.ended for c in calls)) - ended:.1f} s to drain",
            calls,
            capacity=capacity,
            goodput=goodput,
            dropped=load.dropped,
            p99_served=calls.ok.quantile(0.99),
            at_the_door=len(_refused(calls, _AT_THE_DOOR)),
            p99_at_the_door=_refused(calls, _AT_THE_DOOR).quantile(0.99),
            p99_refused=calls.failed.quantile(0.99),
            left_over=len(late),
        )
        own_answers(calls)
        if not run.guarded:
            assert goodput < profile.goodput or calls.quantile(0.9) > _DEADLINE, "the crowd was no burden"
            return
        known_errors(calls)
        assert goodput >= profile.goodput, (
            f"{goodput:.0%} of the capacity was served in time: {dict(calls.errors())}"
        )
        assert load.dropped == 0, f"{load.dropped} callers found no room to be refused in"
        fast(_refused(calls, _AT_THE_DOOR), run.observer)
        sent_away = calls.failed.where(lambda call: call.seconds > _DEADLINE + EPSILON)
        assert not sent_away, f"{len(sent_away)} were told after their deadline"
        calm = after.calls.due(gone_at + 1.0)
        assert calm
        assert not calm.failed, dict(calm.errors())
        fast(calm, run.observer, _SERVICE + EPSILON)


def _capacity(run: Run, stack_load: Load) -> float:
    """Calls a second when every connection is always in use and nobody waits."""
    begun = time.monotonic()
    with stack_load:
        pass
    assert stack_load.calls.ok_share == 1, run
    return len(stack_load.calls) / (time.monotonic() - begun)


def _refused(calls: Calls, reasons: set[str]) -> Calls:
    """Timed from when their threads came to run: starting a thousand threads a second is not the library's work."""
    refused = calls.where(
        lambda call: isinstance(call.error, rdb.PoolSaturated) and call.error.reason in reasons
    )
    return Calls(replace(call, due=call.began) for call in refused)


def _in_time(calls: Calls) -> Calls:
    return calls.ok.where(lambda call: call.seconds <= _DEADLINE)
