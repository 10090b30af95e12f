"""Graceful end of an engine: no new work, time for what has begun, then everything is closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.errors import PoolDraining
from resilientdb.events import DrainBegun
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.door import Door

__all__ = ["begin", "finish", "may_finish", "pauses", "refusal"]

_LOOK_EVERY = 0.02
"""Seconds between two looks at whether everything has come back."""


def begin(cluster: Cluster) -> None:
    """From now on only work that has begun already gets connections. Again: no effect."""
    if cluster.draining_since is not None:
        return
    cluster.draining_since = monotonic()
    front = cluster.front or cluster.nodes[0].pool
    if front is not None:
        front.begin_draining()
    cluster.emit(DrainBegun())


def may_finish(cluster: Cluster) -> bool:
    """Whether the caller is work that had begun before: a request that came earlier, or one that holds a connection
    and needs another to be done with it."""
    notes = current_record()
    if notes is not None and cluster.draining_since is not None and notes.began < cluster.draining_since:
        return True
    return any(pool.mine() for pool in _pools(cluster))


def refusal() -> PoolDraining:
    return PoolDraining("the engine is draining: it takes no new work, because its process is about to end")


def pauses(cluster: Cluster, timeout: float) -> Iterator[float]:
    """How long to pause before looking again, for as long as connections are out and ``timeout`` seconds allow."""
    ends = monotonic() + timeout
    while _is_busy(cluster) and (left := ends - monotonic()) > 0:
        yield min(_LOOK_EVERY, left)


def finish(cluster: Cluster) -> bool:
    """Send away who still waits, close what is idle, and what is still out when it comes back. True when nothing
    was out any more."""
    done = not _is_busy(cluster)
    for pool in _pools(cluster):
        pool.dismiss_waiting(refusal)
        pool.dispose()
        pool.retire()
    return done


def _is_busy(cluster: Cluster) -> bool:
    return any(pool.load for pool in _pools(cluster))


def _pools(cluster: Cluster) -> list[Door]:
    """The pools of all nodes, also those that have been replaced but not yet forgotten: somebody has a connection."""
    inner = [pool for node in cluster.nodes for pool in (node.pool, *node.former) if pool is not None]
    return [pool for pool in inner if pool is not cluster.front]
