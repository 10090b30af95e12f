"""The server is gone: connections are refused, or accepted and closed. Both must cost callers nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from chaos.bodies import echo
from chaos.invariants import EPSILON, fast, fault_was_felt, known_errors, own_answers, recovered
from chaos.workloads import Load, Work
from resilientdb.testing import Postgres, Proxy, ToxiproxyServer, faults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from chaos.conftest import Run
    from resilientdb.testing.faults import ActiveFault


@pytest.fixture
def doomed_proxy(resilientdb_toxiproxy: ToxiproxyServer, doomed: Postgres) -> Iterator[Proxy]:
    with resilientdb_toxiproxy.proxy(doomed.address) as proxy:
        yield proxy


@pytest.mark.parametrize("how", ["refused", "accepted and closed"])
def test_outage(run: Run, how: str, doomed: Postgres, doomed_proxy: Proxy) -> None:
    """Fail-fast: once the circuit is open every request ends within 50 ms, and the server is left alone."""
    profile = run.profile

    def outage() -> AbstractContextManager[ActiveFault]:
        return faults.down(doomed_proxy) if how == "refused" else faults.dead(doomed, proxy=doomed_proxy)

    with run.stack(doomed, port=doomed_proxy.listen_port) as stack:
        with Load(stack, Work(body=echo, deadline=1.0), rate=profile.rate) as load:
            time.sleep(profile.warmup)
            broken_at = time.monotonic()
            with outage() as fault:
                time.sleep(profile.outage)
                ended_at = time.monotonic()
            healed_at = time.monotonic()
            time.sleep(profile.recovery if run.guarded else 0.2)
        calls = load.calls
        during = calls.due(fault.started_at, ended_at)
        opened_at = stack.moved_to("open", broken_at)
        attempts = sum(broken_at <= at < ended_at for at in stack.connects)
        shown = opened_at - broken_at if opened_at is not None else None
        run.record(
            f"{during.ok_share:4.0%} ok, p99 {during.quantile(0.99) * 1000:.0f} ms, {attempts} connects"
            + (f", open after {shown * 1000:.0f} ms" if shown is not None else ""),
            during,
            connects=attempts,
            opened_after=shown,
        )
        own_answers(calls)
        assert calls.where(lambda call: call.ended < broken_at).ok_share == 1, "not well before the fault"
        fault_was_felt(during, longer_than=EPSILON)
        if not run.guarded:
            return
        known_errors(calls)
        assert opened_at is not None, "the circuit stayed closed"
        assert opened_at - broken_at <= 0.5, f"open only after {opened_at - broken_at:.3f} s"
        fast(during.due(opened_at), run.observer)
        # From the open circuit on only the prober asks, four times a second, twice if its connection was lost.
        asked = sum(opened_at <= at < ended_at for at in stack.connects)
        assert asked <= 8 * (ended_at - opened_at) + stack.limit + 2, f"{asked} attempts on a dead server"
        first, last = recovered(calls, healed_at, run.observer)
        run.result.numbers |= {"first_ok": round(first, 3), "last_failure": round(last, 3)}
