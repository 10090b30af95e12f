"""The hard fault: the server says nothing. Only whoever keeps the time himself is quick here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from chaos.bodies import echo
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
from chaos.workloads import Load, Work
from resilientdb.testing import faults

if TYPE_CHECKING:
    from chaos.conftest import Run
    from resilientdb.testing import Postgres, Proxy

_DEADLINE = 0.5


@pytest.mark.parametrize("deadline", [_DEADLINE, None], ids=["deadline", "no-deadline"])
@pytest.mark.parametrize("how", ["hang", "pause"])
def test_silence(
    run: Run, how: str, deadline: float | None, resilientdb_postgres: Postgres, resilientdb_proxy: Proxy
) -> None:
    """The circuit opens within 1.25 s and refuses at once from there on; no deadline is missed before.

    Without a deadline, at most as many callers are stuck as there are connections. ``pause`` delivers all it
    held back when it ends: nobody may get an answer that was meant for another.
    """
    profile = run.profile
    if deadline is None and not run.guarded:
        pytest.skip("the same as with one: plain SQLAlchemy has no deadlines")
    block = faults.hang if how == "hang" else faults.pause
    with run.stack(resilientdb_postgres, port=resilientdb_proxy.listen_port) as stack:
        with Load(stack, Work(body=echo, deadline=deadline), rate=profile.rate) as load:
            time.sleep(profile.warmup)
            with block(resilientdb_proxy) as fault:
                time.sleep(profile.silence)
                ended_at = time.monotonic()
            healed_at = time.monotonic()
            time.sleep(profile.recovery if run.guarded else 0.2)
        calls = load.calls
        during = calls.due(fault.started_at, ended_at)
        # Who has only just come is on its way in or out.
        stuck = calls.due(fault.started_at, ended_at - EPSILON).under_way(ended_at)
        opened_at = stack.moved_to("open", fault.started_at)
        shown = opened_at - fault.started_at if opened_at is not None else None
        run.record(
            f"slowest {during.slowest:.2f} s, {stuck} stuck"
            + (f", open after {shown:.2f} s" if shown is not None else ""),
            during,
            stuck=stuck,
            opened_after=shown,
        )
        own_answers(calls)
        assert calls.where(lambda call: call.ended < fault.started_at).ok_share == 1, (
            "not well before the fault"
        )
        fault_was_felt(during, longer_than=EPSILON)
        if not run.guarded:
            assert stuck > stack.limit, f"only {stuck} callers were stuck in a silent server"
            return
        known_errors(calls)
        assert opened_at is not None, "the circuit stayed closed"
        assert shown is not None
        assert shown <= DETECTION, f"open only after {shown:.3f} s"
        fast(during.due(opened_at), run.observer)
        if deadline is not None:
            within_deadline(calls)
        assert stuck <= stack.limit, f"{stuck} callers are stuck"
        first, last = recovered(calls, healed_at, run.observer)
        run.result.numbers |= {"first_ok": round(first, 3), "last_failure": round(last, 3)}
