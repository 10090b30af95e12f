"""What the prober asks a node: connect, «are you a primary?», within a bounded time.

A probe is made with the engine's own dialect and connect arguments (so it needs the same name resolution, TLS and
password as everybody), on a connection outside the pool. For an asynchronous driver the prober's thread has an
event loop of its own: a blocked application loop does not make its database look dead.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import greenlet_spawn
from resilientdb.policy.faults import Fault, Phase, classify
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.watchdog import Watch, watchdog

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from resilientdb.engine.drivers import Driver
    from resilientdb.engine.node import Node

__all__ = ["NodeProbe"]

_LINGER = 10.0
"""Seconds without a checkout after which a node is no longer looked after."""

_NO_EVIDENCE = frozenset({Fault.CONFIGURATION, Fault.APPLICATION, Fault.OVERLOAD, Fault.LOCAL_REJECTION})
"""What a probe may meet that says nothing about the node's callers: a full server refuses the prober, too, and
serves those who are connected."""


class NodeProbe:
    """One node's examination; used by its prober's thread alone. Holds the node weakly."""

    def __init__(self, node: weakref.ref[Node], driver: Driver, timeout: float, *, is_async: bool) -> None:
        self._node = node
        self._driver = driver
        self._timeout = timeout
        self._is_async = is_async
        self._connection: Any = None
        self._runner: asyncio.Runner | None = None
        self.failed_at_once = False
        self._seen = -1
        self._used_until = 0.0
        self._answered: int | None = None
        """What the breaker's counter of that name said at the last examination."""

    def examine(self) -> bool:
        again, self.failed_at_once = self.failed_at_once, False
        node = self._node()
        if node is None or not self._is_used(node):
            return False
        asked_at = monotonic()
        answered = node.breaker.answered
        before = answered if self._answered is None else self._answered
        self._answered = answered
        fresh = self._connection is None
        try:
            try:
                role = self._run(self._ask, node)
            except Exception as error:
                self._discard()
                # The server may have closed an idle connection; only a new one that fails, or silence, is news.
                if fresh or monotonic() - asked_at >= self._timeout:
                    raise
                del error
                role = self._run(self._ask, node)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was seen
            self._discard()
            if classify(error, Phase.CONNECT) not in _NO_EVIDENCE:
                # A reset or a refusal takes no time, in which nobody could be served. So it is compared with the
                # time before: one connection that is cut is no dead node. And it has to be so twice, a moment apart:
                # failures that come at once harm nobody meanwhile, but an open circuit would refuse everybody.
                self.failed_at_once = monotonic() - asked_at < self._timeout
                if not self.failed_at_once:
                    node.breaker.prober_failed(error, answered)
                elif again:
                    node.breaker.prober_failed(error, before)
            return True
        node.saw_role(role)
        node.breaker.prober_succeeded()
        return True

    def run(self, errand: Callable[[Any], None]) -> None:
        node = self._node()
        if node is not None:
            self._run(self._within_limit, node, errand)

    def close(self) -> None:
        self._discard()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _is_used(self, node: Node) -> bool:
        """Whether the engine has callers, had some lately, or the node is being waited for to come back."""
        now = monotonic()
        activity = node.cluster.activity
        if activity != self._seen or node.cluster.busy:
            self._seen = activity
            self._used_until = now + _LINGER
        return now < self._used_until or not node.available

    def _ask(self, node: Node) -> Any:
        return self._within_limit(node, self._ask_role)

    def _within_limit(self, node: Node, work: Callable[[Any], Any]) -> Any:
        """``work`` with the connection, opened if there is none."""
        fresh = self._connection is None
        if fresh:
            self._connection = node.open_raw(self._timeout)
        fd = self._driver.socket_fd(self._connection)
        watch = Watch(fd) if fd is not None else None
        if watch is not None:
            watchdog.appoint(watch, monotonic() + self._timeout)
        try:
            if fresh:
                # One statement, one round trip, and no transaction left behind.
                with contextlib.suppress(NotImplementedError):
                    node.cluster.dialect.set_isolation_level(self._connection, "AUTOCOMMIT")
            return work(self._connection)
        except Exception as error:
            if watch is not None and watch.end():
                # What the driver saw is our own cut; what happened is silence.
                raise TimeoutError(f"no answer within {self._timeout:g} s") from error
            raise
        finally:
            if watch is not None:
                watch.end()

    def _ask_role(self, connection: Any) -> Any:
        cursor = connection.cursor()
        try:
            cursor.execute(self._driver.role_query)
            return self._driver.read_role(cursor.fetchone())
        finally:
            cursor.close()

    def _discard(self) -> None:
        """End the connection, without asking the server where that can be had; also once the node is forgotten."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                self._run(getattr(connection, "terminate", connection.close))

    def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call ``work``, where it may await if the driver is asynchronous."""
        if not self._is_async:
            return work(*args)
        if self._runner is None:
            self._runner = asyncio.Runner()

        async def spawned() -> Any:
            return await greenlet_spawn(work, *args)

        return self._runner.run(spawned())
