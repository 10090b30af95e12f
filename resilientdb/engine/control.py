"""The handle on a guarded engine: what it is doing, and what an operator may tell it to do."""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import Engine

from resilientdb.engine import drain
from resilientdb.engine.compat import as_connecting, greenlet_spawn
from resilientdb.engine.door import Door
from resilientdb.engine.validation import validate
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.config import Resilience
    from resilientdb.engine.cluster import Cluster
    from resilientdb.events import Event
    from resilientdb.runtime.breaker import CircuitBreaker
    from resilientdb.stats import EngineState, Holder, PoolStats, Snapshot

__all__ = ["AsyncEngineControl", "Control", "EngineControl", "cluster_of", "control"]


@overload
def control(engine: Engine) -> EngineControl: ...
@overload
def control(engine: AsyncEngine) -> AsyncEngineControl: ...
def control(engine: Engine | AsyncEngine) -> Control:
    """The control handle of an engine made by this library; ``ConfigurationError`` for any other."""
    cluster = cluster_of(engine)
    return EngineControl(cluster) if isinstance(engine, Engine) else AsyncEngineControl(cluster)


def cluster_of(engine: Engine | AsyncEngine) -> Cluster:
    """What stands behind a guarded engine; ``ConfigurationError`` for any other."""
    plain: Any = getattr(engine, "sync_engine", engine)
    pool = getattr(plain, "pool", None)
    if isinstance(plain, Engine) and plain in _disabled:
        return _disabled[plain]
    if not isinstance(plain, Engine) or not isinstance(pool, Door):
        raise ConfigurationError(
            f"{type(engine).__name__} {getattr(plain, 'url', '')!r} was not made by resilientdb: create it with "
            "resilientdb.create_engine() or resilientdb.create_async_engine(), or add plugin=resilientdb to its URL",
            key="engine",
        )
    return pool.cluster


_disabled: weakref.WeakKeyDictionary[Engine, Cluster] = weakref.WeakKeyDictionary()


def remember_disabled(engine: Engine, cluster: Cluster) -> None:
    """``enabled=False``: an application's middleware and start-up code go on working with the plain engine."""
    _disabled[engine] = cluster


class Control:
    """The handle on a guarded engine of either kind. Cheap to make; all methods may be called from any thread."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.is_async = cluster.dialect.is_async

    @property
    def resilience(self) -> Resilience:
        """The options in force."""
        return self._cluster.resilience

    @property
    def state(self) -> EngineState:
        """What the engine can serve now. Cheaper than a snapshot: for every request."""
        return self._cluster.state()

    def snapshot(self) -> Snapshot:
        """The engine as it is now. No I/O."""
        return self._cluster.snapshot()

    def get_stats(self) -> dict[str, PoolStats]:
        """Each node's pool by the node's name, counted since the engine was made. No I/O.

        A pool class of the user's own keeps no counts, and is left out.
        """
        return self._cluster.pool_stats()

    def pop_stats(self) -> dict[str, PoolStats]:
        """As ``get_stats()``, but counted since anybody last popped this engine's: nothing is told twice, and
        nothing is lost. For one reporter that adds up what it is told; gauges are as they are now."""
        return self._cluster.pop_stats()

    def holders(self) -> list[Holder]:
        """Who has a connection now, of any node, the longest first. No I/O."""
        pools = [node.pool for node in self._cluster.nodes if node.pool is not None]
        held = [holder for pool in pools for holder in pool.holders()]
        return sorted(held, key=lambda holder: holder.seconds, reverse=True)

    def breaker(self, node: str | None = None) -> CircuitBreaker:
        """A node's circuit breaker, a ``pybreaker.CircuitBreaker``; None = the primary's (or the only one)."""
        nodes = {known.name: known for known in self._cluster.nodes}
        if node is None:
            return (self._cluster.primary or self._cluster.nodes[0]).breaker
        if node not in nodes:
            raise ConfigurationError(
                f"no node {node!r}; the nodes are {', '.join(nodes)}", key="node", value=node
            )
        return nodes[node].breaker

    def on_event(self, listener: Callable[[Event], object]) -> None:
        """Call ``listener`` with every event (``resilientdb.events``), outside all locks, in order."""
        self._cluster.listen(listener)

    def validate(self, timeout: float = 5.0, *, processes: int | None = 1) -> None:
        """Check the configuration against the real servers; blocks for up to ``timeout`` seconds a node.

        Raises ``ConfigurationError`` that lists every node that cannot be reached, refuses the login or is not
        what it was configured to be, with the option that says so and the remedy. A PostgreSQL must be 13 or
        newer, and have room for the full pools of ``processes`` processes like this one; None leaves sizes
        alone, and so does a pooler in front of the server. Nothing is checked with ``enabled=False``.

        For start-up; in asyncio call it before the loop runs, or with ``asyncio.to_thread``.
        """
        validate(self._cluster, timeout, processes)


class EngineControl(Control):
    """The handle on an ``Engine``."""

    def warm(self, connections: int | None = None) -> None:
        """Open connections until each node's pool has so many, ``pool_size`` at most; None = ``lifecycle.min_size``.
        For start-up: raises as connecting does."""
        with as_connecting(self._cluster.dialect):
            for pool, most in _cold(self._cluster, connections):
                pool.warm(most)

    def drain(self, timeout: float = 30.0) -> bool:
        """The process is about to end: take no new work, wait for what has begun, close everything.

        From now on ``PoolDraining`` is what new work is told; requests that began before, and callers that hold a
        connection, still get what they need. After ``timeout`` seconds at most, who still waits is sent away, idle
        connections are closed, and those still out as they come back. True when none was out any more. For good: an
        engine that has drained stays so.
        """
        drain.begin(self._cluster)
        for pause in drain.pauses(self._cluster, timeout):
            time.sleep(pause)
        return drain.finish(self._cluster)


class AsyncEngineControl(Control):
    """The handle on an ``AsyncEngine``: what takes time is awaited, in the engine's loop."""

    async def warm(self, connections: int | None = None) -> None:
        """As ``EngineControl.warm``."""
        with as_connecting(self._cluster.dialect):
            for pool, most in _cold(self._cluster, connections):
                await greenlet_spawn(pool.warm, most)

    async def drain(self, timeout: float = 30.0) -> bool:  # noqa: ASYNC109 - as the other's
        """As ``EngineControl.drain``."""
        drain.begin(self._cluster)
        for pause in drain.pauses(self._cluster, timeout):
            await asyncio.sleep(pause)
        return await greenlet_spawn(drain.finish, self._cluster)


def _cold(cluster: Cluster, connections: int | None) -> list[tuple[Door, int]]:
    most = cluster.resilience.lifecycle.min_size if connections is None else connections
    if most < 0:
        raise ConfigurationError(
            f"connections must be 0 or more; got {most}", key="connections", value=connections
        )
    if cluster.draining_since is not None:
        raise drain.refusal()
    return [(node.pool, most) for node in cluster.nodes if node.pool is not None]
