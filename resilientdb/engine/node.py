"""One database server, as this process knows it: its breaker, its role, how to connect to it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from resilientdb.engine.probe import NodeProbe
from resilientdb.engine.tally import Tally
from resilientdb.events import CircuitStateChanged, CircuitWouldChange, RoleChanged
from resilientdb.policy.breaker import CLOSED, OPEN
from resilientdb.policy.faults import describe
from resilientdb.runtime.breaker import CircuitBreaker
from resilientdb.runtime.prober import Prober
from resilientdb.runtime.shared_breakers import shared_breaker
from resilientdb.stats import NodeStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.config import BreakerPolicy
    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.connector import Connector
    from resilientdb.engine.door import Door
    from resilientdb.policy.breaker import Transition
    from resilientdb.stats import PoolStats, Role

__all__ = ["Node"]


class Node:
    """Outlives the pools: ``Engine.dispose()`` replaces the pool, the node goes on and knows what it knew.

    ``role`` is what the prober last saw, at first what the configuration says. ``pool`` is the pool in use.
    """

    def __init__(self, cluster: Cluster, *, name: str, role: Role, connector: Connector | None) -> None:
        self.cluster = cluster
        self.name = name
        self.role: Role = role
        self.connector = connector
        """Opens driver connections to this node; None: the user's own ``creator`` does."""
        self.pool: Door | None = None
        self.former: weakref.WeakSet[Door] = weakref.WeakSet()
        """Pools that ``pool`` has replaced and whose connections may still be out."""
        self.tally = Tally()
        policy = cluster.resilience.breaker
        # An asynchronous creator of the user's own may belong to the application's loop; the prober has another.
        foreign = connector is None and cluster.dialect.is_async
        askable = cluster.driver.role_query is not None and not foreign
        probed = policy.enabled and policy.probe_interval is not None and askable
        self.breaker = self._make_breaker(policy, probed=probed)
        self._prober: Prober | None = None
        if probed and policy.probe_interval is not None:
            # The prober's thread must not keep a forgotten engine alive, by the cluster neither.
            myself, driver, is_async = weakref.ref(self), cluster.driver, bool(cluster.dialect.is_async)
            self._prober = Prober(
                name,
                policy.probe_interval,
                lambda: NodeProbe(myself, driver, policy.probe_timeout, is_async=is_async),
            )
            weakref.finalize(self, self._prober.stop).atexit = False

    def _make_breaker(self, policy: BreakerPolicy, *, probed: bool) -> CircuitBreaker:
        if policy.shared is None:
            return CircuitBreaker(policy, name=self.name, probed=probed, on_move=self._on_move)
        breaker = shared_breaker(policy.shared, policy, name=self.name, probed=probed)
        # It may outlive this engine, and must not keep it alive; nor must this engine's end be what keeps it.
        myself, theirs = weakref.ref(self), weakref.ref(breaker)

        def on_move(transition: Transition) -> None:
            node = myself()
            if node is not None:
                node._on_move(transition)  # noqa: SLF001 - ourselves

        def leave() -> None:
            shared = theirs()
            if shared is not None:
                shared.unsubscribe(on_move)

        breaker.subscribe(on_move)
        weakref.finalize(self, leave).atexit = False
        return breaker

    def open_raw(self, timeout: float) -> Any:
        """A driver connection that belongs to no pool, opened within about ``timeout`` seconds."""
        if self.connector is not None:
            return self.connector.open(None, timeout)
        if self.pool is None:
            raise RuntimeError(f"{self.name} has no pool yet")
        return self.pool.open_raw()

    @property
    def available(self) -> bool:
        """Whether its circuit is closed, be it that it lets only a few calls through for the time being: who asks
        wants to know where to send them."""
        return self.breaker.current_state == CLOSED

    @property
    def load(self) -> int:
        """Callers that hold one of its connections or wait for one."""
        return self.pool.load if self.pool is not None else 0

    def start_prober(self) -> None:
        if self._prober is not None:
            self._prober.start()

    def rest(self) -> None:
        """The engine is disposed: close the prober's connection too (waits a moment for that)."""
        if self._prober is not None:
            self._prober.stop(timeout=0.5)

    def send(self, errand: Callable[[Any], None]) -> bool:
        """Have ``errand`` called soon with the prober's connection, in its thread; False if there is no prober."""
        return self._prober is not None and self._prober.send(errand)

    def suspect(self) -> None:
        """A caller has seen something that the prober should look at now."""
        if self._prober is not None:
            self._prober.hurry()

    def saw_role(self, role: Role) -> None:
        """The prober got an answer that tells the node's role."""
        old, self.role = self.role, role
        if old != role:
            if old != "unknown":
                self.cluster.emit(RoleChanged(node=self.name, old=old, new=role))
            self.cluster.role_changed(self, old)
        elif role == "primary" and self.cluster.primary is None:
            # Its time as a replica was too short, or the line too bad, for anybody to have seen it.
            self.cluster.role_changed(self, old)

    def after_fork(self) -> None:
        if self._prober is not None:
            self._prober.after_fork()
        self.breaker.after_fork()
        if self.pool is not None:
            self.pool.after_fork()

    def stats(self) -> NodeStats:
        breaker = self.breaker
        pool_stats: PoolStats | None = self.pool.stats() if self.pool is not None else None
        return NodeStats(
            name=self.name,
            role=self.role,
            breaker=breaker.current_state,
            retry_after=breaker.retry_after,
            pool=pool_stats,
            last_error=describe(breaker.last_error) if breaker.last_error is not None else None,
        )

    def _on_move(self, transition: Transition) -> None:
        if transition.would_be:
            self.cluster.emit(
                CircuitWouldChange(
                    node=self.name, old=transition.old, new=transition.new, cause=transition.cause
                )
            )
            return
        # First what callers depend on: a listener may take its time.
        if transition.new == OPEN:
            self.suspect()
            if self.pool is not None:
                self.pool.distrust()
                self.pool.dismiss_waiting(self.breaker.refusal)
        self.cluster.emit(
            CircuitStateChanged(
                node=self.name, old=transition.old, new=transition.new, cause=transition.cause
            )
        )
