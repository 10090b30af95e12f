"""All that an engine knows beyond its pool: the nodes, which is primary, the retry budget, who listens.

A cluster of one is the common case. It outlives the pools: ``Engine.dispose()`` hands it to the next pool.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from resilientdb.config import Resilience
from resilientdb.engine import retrying
from resilientdb.engine.drivers import driver_of
from resilientdb.engine.node import Node
from resilientdb.errors import NoPrimaryAvailable, NoReplicaAvailable, ResilienceError
from resilientdb.events import (
    AcquisitionRetried,
    CommitInDoubt,
    CommitSettled,
    Event,
    PrimaryChanged,
    RetryBudgetExhausted,
    TransactionRetried,
)
from resilientdb.policy.budget import Budget
from resilientdb.policy.faults import Phase, classify, describe
from resilientdb.policy.routing import engine_state, next_primary, order_for_read
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.emitter import Emitter
from resilientdb.stats import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.engine.door import Door
    from resilientdb.stats import CommitOutcome, EngineState, PoolStats, Role

__all__ = ["Cluster"]

T = TypeVar("T")


class Cluster:
    """Shared by the pools of one engine. ``_lock`` guards ``primary``, the budget and the counts (re-entrant: a
    finalizer may ask for a snapshot in the middle of it); listeners are called outside it, in order."""

    def __init__(self, resilience: Resilience, dialect: Any, nodes: Sequence[tuple[str, Role, Any]]) -> None:
        """``nodes``: (name, role as configured, connector or None), the primary first."""
        self.resilience = resilience
        self.dialect: Dialect = dialect
        self.driver = driver_of(dialect)
        self._lock = threading.RLock()
        self._budget = Budget(resilience.retry.budget)
        self._emitter = Emitter()
        self._listeners: list[Callable[[Event], object]] = []
        self._rng = random.Random()
        self._retries = 0
        self._in_doubt = 0
        self._settled: Counter[str] = Counter()
        self._popped: dict[str, PoolStats] = {}
        """What was told when the counts were popped last."""
        self.is_curious = False
        """Whether a circuit may be waiting for the first answer of a call that it has let through."""
        self.patient = False
        """Whether callers wait as long as they said (an explicit ``pool_timeout``), overload or not."""
        self.draining_since: float | None = None
        """When it was told to take no new work; for good."""
        self.has_server = self.driver.has_server
        """Whether there are sessions to be lost: not for a database in this process."""
        self.nodes = [
            Node(self, name=name, role=role, connector=connector) for name, role, connector in nodes
        ]
        self.primary: Node | None = self.nodes[0]
        self._wakes = 0
        self.front: Door | None = None
        """The pool that chooses among the nodes' pools, where there are several."""
        _clusters.add(self)

    @classmethod
    def standalone(cls, dialect: Any) -> Cluster:
        """For a pool that was made without an engine."""
        return cls(Resilience(), dialect, [("pool", "unknown", None)])

    # -- routing -------------------------------------------------------------------------------------------

    def for_write(self) -> Node:
        """The node that takes writes; raises ``NoPrimaryAvailable`` when none is known to."""
        primary = self.primary
        if primary is None:
            self.wake()
            raise self.no_primary(", ".join(f"{node.name} is {node.role}" for node in self.nodes))
        return primary

    def no_primary(self, why: str) -> NoPrimaryAvailable:
        return NoPrimaryAvailable(f"no node takes writes: {why}", retry_after=self._retry_after())

    def for_read(self) -> list[Node]:
        """The nodes to ask for a read, best first; raises ``NoReplicaAvailable`` when there are none."""
        order = order_for_read(
            self.nodes,
            self.primary,
            self._rng,
            fallback_to_primary=self.resilience.routing.fallback_to_primary,
        )
        if not order:
            self.wake()
            raise self.no_replica("there is no replica, and the primary may not be used instead")
        return order

    def no_replica(self, why: str) -> NoReplicaAvailable:
        return NoReplicaAvailable(f"no node serves this read: {why}", retry_after=self._retry_after())

    def role_changed(self, node: Node, old: Role) -> None:
        with self._lock:
            before = self.primary
            self.primary = after = next_primary(node, old, before)
        if before is not after:
            self.emit(PrimaryChanged(old=before.name if before else None, new=after.name if after else None))

    # -- retries -------------------------------------------------------------------------------------------

    def may_retry(self, error: BaseException) -> bool:
        """Whether a failed acquisition is worth another attempt."""
        if isinstance(error, ResilienceError):
            return self.waits_out(error)
        return self.resilience.retry.attempts > 1 and classify(error, Phase.CONNECT).retry_connect

    def waits_out(self, refusal: ResilienceError) -> bool:
        """Whether a refusal is to be waited out, because nobody waits for the answer."""
        retry = self.resilience.retry
        return retry.wait_when_open and retry.attempts > 1 and isinstance(refusal, retrying.REFUSALS)

    def retry_acquisition(
        self,
        attempt: Callable[[], T],
        first: Exception,
        pause: Callable[[float], None],
        node: str,
        *,
        began: float | None = None,
    ) -> T:
        """``began``: when the first attempt did; None: as remembered with its error, or just now."""

        def announce(number: int, delay: float, error: BaseException) -> None:
            self.emit(AcquisitionRetried(node=node, attempt=number, delay=delay, error=describe(error)))

        return retrying.loop(
            attempt,
            first,
            self.resilience.retry,
            pause,
            began=began,
            is_retryable=self.may_retry,
            spend=self.spend_retry,
            announce=announce,
        )

    def spend_retry(self, error: BaseException) -> bool:
        """Take one retry out of the budget; False (said once) when there is none left."""
        if isinstance(error, retrying.REFUSALS):
            return True  # nothing was sent, so there is nothing to ration
        with self._lock:
            was_exhausted = self._budget.exhausted
            granted = self._budget.try_spend(monotonic(), self._rate())
            self._retries += granted
        if not granted and not was_exhausted:
            self.emit(RetryBudgetExhausted(error=describe(error)))
        return granted

    def announce_transaction_retry(self, number: int, delay: float, error: BaseException) -> None:
        node = retrying.node_of(error)
        self.emit(TransactionRetried(node=node, attempt=number, delay=delay, error=describe(error)))

    # -- COMMITs in doubt ----------------------------------------------------------------------------------

    def commit_in_doubt(self, node: str, error: BaseException) -> None:
        with self._lock:
            self._in_doubt += 1
        self.emit(CommitInDoubt(node=node, error=describe(error)))

    def commit_settled(self, key: UUID, outcome: CommitOutcome, attempts: int, seconds: float) -> None:
        with self._lock:
            self._settled[outcome] += 1
        self.emit(CommitSettled(key=key, outcome=outcome, attempts=attempts, seconds=seconds))

    # -- the probers ---------------------------------------------------------------------------------------

    @property
    def activity(self) -> int:
        """Grows with every checkout from any node, and with every one that was refused for want of a node."""
        return self._wakes + sum(node.pool.activity for node in self.nodes if node.pool is not None)

    @property
    def busy(self) -> bool:
        """Whether anybody holds or waits for a connection of any node."""
        return any(node.load for node in self.nodes)

    def wake(self) -> None:
        """The engine is used: have every node looked after, also one that serves nobody yet. It may be promoted."""
        self._wakes += 1
        for node in self.nodes:
            node.start_prober()

    # -- after a fork ---------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In the child: threads did not come along, and locks may be held by threads that do not exist."""
        self._lock = threading.RLock()
        self._emitter = Emitter()
        for node in self.nodes:
            node.after_fork()

    # -- listeners and what can be seen ---------------------------------------------------------------------

    def listen(self, listener: Callable[[Event], object]) -> None:
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            self._emitter.post(functools.partial(listener, event))
        self._emitter.deliver()

    def state(self) -> EngineState:
        if self.draining_since is not None:
            return "draining"
        primary = self.primary
        saturated = primary is not None and primary.pool is not None and primary.pool.saturated
        return engine_state(self.nodes, primary, saturated=saturated)

    def snapshot(self) -> Snapshot:
        stats = tuple(node.stats() for node in self.nodes)
        primary = self.primary
        state = self.state()
        now = monotonic()
        with self._lock:
            left, retries = self._budget.left(now, self._rate()), self._retries
            in_doubt, settled = self._in_doubt, dict(self._settled)
        return Snapshot(
            state=state,
            retry_after=None if state == "healthy" else self._retry_after(),
            primary=primary.name if primary is not None else None,
            nodes=stats,
            retries=retries,
            retry_budget=left,
            commits_in_doubt=in_doubt,
            commits_settled=settled,
        )

    def pool_stats(self) -> dict[str, PoolStats]:
        """Of each node's pool that keeps counts."""
        known = ((node.name, node.pool.stats()) for node in self.nodes if node.pool is not None)
        return {name: stats for name, stats in known if stats is not None}

    def pop_stats(self) -> dict[str, PoolStats]:
        """As ``pool_stats``, since this was called last."""
        with self._lock:
            now = self.pool_stats()
            before, self._popped = self._popped, now
        return {name: stats.since(before[name]) if name in before else stats for name, stats in now.items()}

    def _rate(self) -> float:
        """Successful calls a second, on all nodes."""
        return sum(node.breaker.rate for node in self.nodes)

    def _retry_after(self) -> float | None:
        waits = [after for node in self.nodes if (after := node.breaker.retry_after) is not None]
        return min(waits) if waits else None


_clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()


def _after_fork() -> None:
    for cluster in _clusters:
        cluster.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
