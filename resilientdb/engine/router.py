"""The pool of an engine with replicas: chooses a node for each checkout, and lets that node's pool do the rest.

One pool a node, because SQLAlchemy invalidates pool by pool: a dead replica must not cost the primary its
connections. All of them share one set of event listeners, so a listener on the engine fires once a connection.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool

from resilientdb.engine.door import Door
from resilientdb.engine.pool import AsyncQueueDoor, QueueDoor, guarded
from resilientdb.errors import CircuitOpen, PoolSaturated
from resilientdb.policy.faults import Phase, classify
from resilientdb.runtime.context import is_read_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.pool import PoolProxiedConnection

    from resilientdb.errors import ResilienceError

__all__ = ["AsyncQueueRouter", "QueueRouter", "Router", "routed"]


class Router(Door):
    """In front of several doors. Keeps no connection of its own."""

    door_class: Any
    """The pool class of each node."""

    def __init__(self, creator: Any, *args: Any, **options: Any) -> None:
        super().__init__(creator, *args, **options)
        self.cluster.front = self
        self._doors: dict[str, Any] = {}
        for node in self.cluster.nodes:
            door: Any = self.door_class(
                creator, *args, resilientdb_cluster=self.cluster, resilientdb_node=node, **self._options
            )
            door.dispatch = self.dispatch
            self._doors[node.name] = door

    def checkout_once(self) -> PoolProxiedConnection:
        if is_read_only():
            return self._read()
        node = self.cluster.for_write()
        try:
            return self._doors[node.name].checkout_once()  # type: ignore[no-any-return]
        except CircuitOpen as error:
            refusal = error
        raise self.cluster.no_primary(str(refusal)) from refusal.__cause__

    def _read(self) -> PoolProxiedConnection:
        *others, last = self.cluster.for_read()
        for node in others:
            if not node.breaker.has_room:
                continue
            try:
                return self._doors[node.name].checkout_once()  # type: ignore[no-any-return]
            except (CircuitOpen, PoolSaturated):
                continue
            except Exception as error:
                if not classify(error, Phase.CONNECT).retry_connect:
                    raise
        try:
            return self._doors[last.name].checkout_once()  # type: ignore[no-any-return]
        except CircuitOpen as error:
            refusal = error
        raise self.cluster.no_replica(str(refusal)) from refusal.__cause__

    def _invalidate(
        self,
        connection: Any,
        exception: BaseException | None = None,
        _checkin: bool = True,
    ) -> None:
        # The engine asks its pool; the generation to stamp is that of the pool the connection came from.
        door = getattr(connection, "_pool", None)
        Pool._invalidate(door if isinstance(door, Door) else self, connection, exception, _checkin)  # noqa: SLF001

    def dispose(self) -> None:
        for door in self._doors.values():
            door.dispose()

    def retire(self) -> None:
        for door in self._doors.values():
            door.retire()
            door.node.former.add(door)

    def status(self) -> str:
        return "; ".join(f"{name}: {door.status()}" for name, door in self._doors.items())

    def after_fork(self) -> None:
        """Each door hears of it from its node."""

    def dismiss_waiting(self, refusal: Callable[[], ResilienceError]) -> None:
        """Nobody waits here."""


class QueueRouter(Router, QueuePool):
    """Counts are those of all nodes together."""

    door_class = QueueDoor

    def size(self) -> int:
        return sum(door.size() for door in self._doors.values())

    def checkedin(self) -> int:
        return sum(door.checkedin() for door in self._doors.values())

    def checkedout(self) -> int:
        return sum(door.checkedout() for door in self._doors.values())

    def overflow(self) -> int:
        return sum(door.overflow() for door in self._doors.values())


class AsyncQueueRouter(QueueRouter, AsyncAdaptedQueuePool):
    door_class = AsyncQueueDoor


@functools.cache
def routed(pool_class: Any) -> Any:
    """The class to use for ``pool_class`` when there are several nodes."""
    if issubclass(pool_class, Router):
        return pool_class
    if pool_class is QueuePool:
        return QueueRouter
    if pool_class is AsyncAdaptedQueuePool:
        return AsyncQueueRouter
    return type(f"Routed{pool_class.__name__}", (Router, pool_class), {"door_class": guarded(pool_class)})
