"""Whether a node answers, but too slowly: statements are timed, where the breaker asks for it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import record_of_connection
from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from resilientdb.engine.cluster import Cluster

__all__ = ["attach"]


def attach(engine: Engine, cluster: Cluster) -> None:
    """Time the engine's statements, if ``breaker.slow_call_duration`` says what is slow; else they cost nothing more.

    Around all else that stands in front of the driver: a statement has been answered when the caller has its answer.
    One that fails is not slow, whatever it took: the failure says more.
    """
    slow_after = cluster.resilience.breaker.slow_call_duration
    if slow_after is None:
        return
    dialect = engine.dialect
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, _timed(getattr(dialect, name), slow_after))


def _timed(execute: Callable[..., None], slow_after: float) -> Callable[..., None]:
    @functools.wraps(execute)
    def timed(*arguments: Any) -> None:
        began = monotonic()
        execute(*arguments)
        if monotonic() - began > slow_after:
            _was_slow(arguments[-1])

    return timed


def _was_slow(context: Any) -> None:
    """Tell the breaker now, rather than at the checkin: the outcome of this checkout is told with it."""
    record = record_of_connection(getattr(context, "root_connection", None))
    permit = getattr(record, "permit", None)
    if permit is not None:
        record.permit = None
        record.node.breaker.record_slow(permit)
