"""The handle on a guarded engine: what it is doing, and what an operator may tell it to do."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

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
    from resilientdb.stats import EngineState, Snapshot

__all__ = ["Control", "cluster_of", "control"]


def control(engine: Engine | AsyncEngine) -> Control:
    """The control handle of an engine made by this library; ``ConfigurationError`` for any other."""
    return Control(cluster_of(engine))


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
    """Cheap to make; all methods may be called from any thread."""

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

    def validate(self, timeout: float = 5.0) -> None:
        """Check the configuration against the real servers; blocks for up to ``timeout`` seconds a node.

        Raises ``ConfigurationError`` that lists every node that cannot be reached, refuses the login or is not
        what it was configured to be, with the option that says so and the remedy. For start-up; in asyncio call
        it before the loop runs, or with ``asyncio.to_thread``.
        """
        validate(self._cluster, timeout)
