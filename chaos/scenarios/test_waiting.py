"""All connections are in use: who waits, how long, what the others are told, and that no slot gets lost."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import resilientdb as rdb
from chaos.bodies import Gate, echo, sleep
from chaos.invariants import fast, known_errors, own_answers
from chaos.workloads import Load, Work

if TYPE_CHECKING:
    from chaos.conftest import Run
    from resilientdb.testing import Postgres

_POOL = 2
_MAX_WAITING = 4
_TIMEOUT = 0.4


def test_bounded_waiting(run: Run, resilientdb_postgres: Postgres) -> None:
    """Of ten who come while both connections are held, four wait, for 0.4 s; six are told so at once."""
    resilience = rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=_MAX_WAITING, timeout=_TIMEOUT))
    comers = 10
    with run.stack(resilientdb_postgres, pool_size=_POOL, resilience=resilience) as stack:
        with (
            Gate(resilientdb_postgres) as gate,
            Load(stack, [Work(body=gate.body)] * _POOL, in_flight=_POOL) as held,
        ):
            gate.wait_for(_POOL)
            with Load(stack, [Work(body=echo)] * comers, in_flight=comers) as load:
                time.sleep(2 * _TIMEOUT)
                waiting = load.under_way
                gate.open()
        calls = load.calls
        errors = calls.errors()
        run.record(
            f"{len(calls.ok)} served, {waiting} wait after {2 * _TIMEOUT:g} s; slowest {calls.slowest:.2f} s",
            calls,
            waiting=waiting,
        )
        own_answers(calls)
        assert held.calls.ok_share == 1
        if not run.guarded:
            assert waiting == comers, "nobody waits for more than a moment"
            return
        assert errors == {"PoolSaturated": comers - _MAX_WAITING, "PoolTimeout": _MAX_WAITING}
        known_errors(calls)
        for call in calls.failed:
            assert isinstance(call.error, rdb.ResilienceError)
            assert f"{_POOL} active, 0 idle" in str(call.error)
            stats = call.error.snapshot
            assert stats is not None, f"{call.error!r} carries no counts"
            assert stats.pool is not None
            assert stats.pool.active == _POOL
            if isinstance(call.error, rdb.PoolSaturated):
                assert stats.pool.waiting == _MAX_WAITING
        fast(calls.where(lambda call: isinstance(call.error, rdb.PoolSaturated)), run.observer)
        timed_out = calls.where(lambda call: isinstance(call.error, rdb.PoolTimeout))
        fast(timed_out, run.observer, _TIMEOUT + 0.05)
        assert min(call.seconds for call in timed_out) >= _TIMEOUT - 0.02
        node = stack.snapshot().nodes[0]
        assert node.pool is not None
        assert (node.pool.rejected, node.pool.timeouts) == (comers - _MAX_WAITING, _MAX_WAITING)
        assert run.observer.most_waiting == _MAX_WAITING


def test_impatient_crowd(run: Run, resilientdb_postgres: Postgres) -> None:
    """Callers give up just as their turn comes, again and again: no slot goes with them, the line keeps moving."""
    works = run.profile.works * 2
    patience = [run.rng.uniform(0.01, 0.08) for _ in range(works)]
    holding = [run.rng.uniform(0.001, 0.012) for _ in range(works)]
    crowd = [Work(body=sleep(hold), deadline=wait) for hold, wait in zip(holding, patience, strict=True)]
    if run.guarded:
        # A task can also be cancelled while it stands in line; threads only have their deadlines.
        crowd = [
            replace(w, cancel_at=run.rng.randrange(1, 4)) if run.rng.random() < 0.2 else w for w in crowd
        ]
    with run.stack(resilientdb_postgres, pool_size=_POOL) as stack:
        with Load(stack, crowd, in_flight=16) as load:
            pass
        calls = load.calls
        run.record(
            f"{len(calls.ok)} of {works} served, slowest {calls.slowest:.3f} s, {len(stack.connects)} connects",
            calls,
            connects=len(stack.connects),
        )
        assert len(calls) == works
        own_answers(calls)
        late = calls.where(lambda call: call.seconds > (call.work.deadline or 0) + 0.02)
        if run.guarded:
            assert calls.failed, "nobody gave up"
            assert calls.ok, "nobody was served"
        else:
            assert late, "everybody was served in time"
