"""Around each statement: held to the deadline before, and what its answer says of the node after.

The first answer is what a call shows that was let through to see whether the node works, or while the circuit is slow
to start. It is told at once: a caller may hold its connection for long after, and would keep others out who could use
theirs. Statements are timed where the breaker asks for it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import record_of_context
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_deadline, innermost_deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from resilientdb.engine.cluster import Cluster

__all__ = ["attach"]


def attach(engine: Engine, cluster: Cluster, hold: Callable[..., None]) -> None:
    """Put the library around the statements of a finished engine. ``hold(deadline, execute, *arguments)`` executes,
    and sees to it that this ends at the deadline, or refuses to.

    Around all else that stands in front of the driver: a statement has been answered when the caller has its answer.
    One that fails has other ways to say so, and is not slow, whatever it took.
    """
    slow_after = cluster.resilience.breaker.slow_call_duration
    dialect = engine.dialect
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        execute = getattr(dialect, name)
        if slow_after is not None:
            execute = _timed(execute, slow_after)
        setattr(dialect, name, _surrounded(execute, cluster, hold))


def _surrounded(
    execute: Callable[..., None], cluster: Cluster, hold: Callable[..., None]
) -> Callable[..., None]:
    # Whichever of the three it is, the execution context comes last.
    @functools.wraps(execute)
    def surrounded(*arguments: Any) -> None:
        deadline = None if innermost_deadline() is None else current_deadline()
        if deadline is None:
            execute(*arguments)
        else:
            hold(deadline, execute, *arguments)
        if cluster.is_curious:
            _was_answered(cluster, record_of_context(arguments[-1]))

    return surrounded


def _timed(execute: Callable[..., None], slow_after: float) -> Callable[..., None]:
    @functools.wraps(execute)
    def timed(*arguments: Any) -> None:
        record = record_of_context(arguments[-1])
        permit = getattr(record, "permit", None)
        began = monotonic()
        execute(*arguments)
        if permit is not None and monotonic() - began > slow_after:
            # The outcome of this checkout is told with it.
            record.permit = None
            record.node.breaker.record_slow(permit)

    return timed


def _was_answered(cluster: Cluster, record: Any) -> None:
    permit = getattr(record, "permit", None)
    if permit is not None and permit.probe:
        record.permit = record.node.breaker.record_answer(permit)
    else:
        # Whoever asks a circuit for leave makes the cluster curious again.
        cluster.is_curious = any(node.breaker.permit is None for node in cluster.nodes)
