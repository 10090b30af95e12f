"""The door: every connection a program gets from its engine is handed out here.

``Door.connect`` is SQLAlchemy's ``Pool.connect``, the one choke point that ``Engine.connect``, ``begin``,
``raw_connection``, ``Session``, ``inspect``, ``AsyncEngine`` and re-validation all pass. In it, in this order: the
node's breaker gives a permit, the pool a connection (``QueueDoor``: after its queue gave a slot); a failure is
settled with the breaker and, where that is safe, the acquisition is tried again. On the way back the permit's
outcome is recorded.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import Pool

from resilientdb.engine import drain
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.compat import ConnectionRecord, await_only, record_of
from resilientdb.engine.stacks import in_words
from resilientdb.policy.faults import Phase, classify
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_deadline, current_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from resilientdb.engine.node import Node
    from resilientdb.engine.stacks import Place
    from resilientdb.errors import ResilienceError
    from resilientdb.policy.breaker import Permit
    from resilientdb.runtime.context import RequestRecord
    from resilientdb.runtime.watchdog import Watch
    from resilientdb.stats import Holder, PoolStats

__all__ = ["Door", "Record"]

_PATIENCE = 0.5
"""Seconds for which a caller waits until the slow start lets it through."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.004, 0.05
"""Seconds, at most, until it asks again."""


class Record(ConnectionRecord):
    """SQLAlchemy's record of one pooled connection, with what the present checkout owes."""

    permit: Permit | None = None
    """The permit of this checkout; None once its outcome has been told."""
    owes = False
    """Whether more is to be done at its checkin than to put it back: all that follows, and retirement."""
    watch: Watch | None = None
    """The appointment of this checkout with the watchdog."""
    notes: RequestRecord | None = None
    """The record of the request that this checkout belongs to, if it keeps one."""

    since = 0.0
    """When the last checkout began."""
    holder: Any = None
    """Whom it was handed to: a thread's flow of work, or a task; None once it is back."""
    place: Place = []  # noqa: RUF012 - never changed, only replaced
    """Where it was checked out; kept only where leaks are looked for."""
    reported = False
    """Whether the present checkout has been reported as a leak."""

    opened_at = 0.0
    retire_at = math.inf
    """When its connection is to be closed, on the monotonic clock."""
    uses_left: float = math.inf
    """Checkouts until its connection is to be closed."""
    dozed = False
    """Whether it has been idle for so long that it must be asked whether it lives."""
    seen_since = -1.0
    idle_from = 0.0
    """What ``policy.lifecycle`` remembers of its last look."""

    inherited = False
    """Whether its connection is that of the process which this one was forked from."""
    token: object = None
    """What stands for the slot that goes with it, in its pool's books: these must not lose their record."""
    owns_slot = False
    """Whether a slot of its pool's goes with it: it is then given back even if the record is just forgotten."""

    def __init__(self, pool: Door, connect: bool = True) -> None:
        self.node = pool.node
        self._pool = pool
        super().__init__(pool, connect)

    @property
    def stack(self) -> tuple[str, ...]:
        """Where it was checked out, in words, innermost last; empty where leaks are not looked for."""
        return in_words(self.place)

    def __del__(self) -> None:
        # A thread was interrupted between being handed this record and holding on to it: no code of ours runs
        # then, and none could cover every instruction in between.
        if self.owns_slot:
            self.owns_slot = False
            self._pool.reclaim(self)

    def checkin(self, _fairy_was_created: bool = True) -> None:
        """As SQLAlchemy's, but a finalizer or a ``checkin`` listener that raises does not cost the slot."""
        if self.fairy_ref is None:
            super().checkin(_fairy_was_created)
            return
        self.fairy_ref = None
        connection = self.dbapi_connection
        try:
            while self.finalize_callback:
                finalizer = self.finalize_callback.pop()
                if connection is not None:
                    finalizer(connection)
            if self._pool.dispatch.checkin:
                self._pool.dispatch.checkin(connection, self)
        except BaseException as error:
            try:
                self.invalidate(error)  # its user, who sees the error, may believe that it still has it
            finally:
                self._pool._do_return_conn(self)  # noqa: SLF001
            raise
        self._pool._do_return_conn(self)  # noqa: SLF001


class Door(Pool):
    """The guard in front of any pool class: permit before, outcome after, retry of the acquisition."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # To the logger that a program turns on to see its pool at work ("sqlalchemy.pool" and below).
        plain = next(base for base in cls.__mro__ if issubclass(base, Pool) and not issubclass(base, Door))
        cls._sqla_logger_namespace = f"{plain.__module__}.{plain.__qualname__}"

    _sqla_logger_namespace: str

    def __init__(
        self,
        creator: Any,
        *args: Any,
        resilientdb_cluster: Cluster | None = None,
        resilientdb_node: Node | None = None,
        **options: Any,
    ) -> None:
        super().__init__(creator, *args, **options)
        self._options = options
        self.cluster = resilientdb_cluster or Cluster.standalone(self._dialect)
        self.node = resilientdb_node or self.cluster.nodes[0]
        self._breaker = self.node.breaker
        self._plain_connect = super().connect
        self._out: dict[int, Any] = {}
        """The records in somebody's hands, by ``id``; each access is one operation. A pool with slots keeps a list
        of its own."""
        self._asking: set[object] = set()
        """Who waits for leave to call."""
        self.node.pool = self
        if self.node.connector is not None:
            self._invoke_creator = self.node.connector  # type: ignore[assignment]
        if self.cluster.draining_since is not None:
            self.begin_draining()

    def connect(self) -> PoolProxiedConnection:
        began = monotonic()
        try:
            return self.checkout_once()
        except Exception as error:
            if not self.cluster.may_retry(error):
                raise
            first = error
        # Outside the except block, so that what happens from here on does not drag the first error along.
        return self.cluster.retry_acquisition(
            self.checkout_once, first, self._pause, self.node.name, began=began
        )

    def begin_draining(self) -> None:
        """Take no new work. In place of the method, so that nobody pays for it who is not draining."""
        self.connect = self._connect_if_begun  # type: ignore[method-assign]

    def _connect_if_begun(self) -> PoolProxiedConnection:
        if not drain.may_finish(self.cluster):
            raise drain.refusal()
        return type(self).connect(self)

    def checkout_once(self) -> PoolProxiedConnection:
        """One attempt: a permit, a connection, the failure settled."""
        permit = self._breaker.permit
        if permit is None:
            permit = self._ask()
        try:
            checked_out = self._plain_connect()
        except BaseException as error:
            self._settle(permit, error)
            raise
        record = record_of(checked_out)
        record.permit = permit
        self._out[id(record)] = record
        self._note_checkout(record)
        return checked_out

    def _ask(self) -> Permit:
        """A permit from a circuit that is not closed: a probe's, or a refusal."""
        self.cluster.is_curious = True
        self.cluster.wake()
        permit = self._breaker.try_acquire()
        if permit is None and self._breaker.starts_slowly:
            permit = self._ask_again()
        if permit is None:
            raise self._breaker.refusal()
        return permit

    def _ask_again(self) -> Permit | None:
        """The slow start lets nobody else through for the moment. If the node is well it is over in a few round
        trips, and who waits for that need not be sent away; None: it took too long."""
        most = self.cluster.resilience.queue.max_waiting
        if most is not None and len(self._asking) >= most:
            return None
        began = monotonic()
        until = began + min(_PATIENCE, self._most_seconds_to_wait())
        pause, me = _FIRST_PAUSE, object()
        self._asking.add(me)
        try:
            while self._breaker.starts_slowly:
                left = until - monotonic()
                if left <= 0:
                    return None
                self._pause(min(left, pause * (1 + random.random()) / 2))
                pause = min(2 * pause, _LONGEST_PAUSE)
                permit = self._breaker.try_acquire()
                if permit is not None:
                    return permit
        finally:
            self._asking.discard(me)
            notes = current_record()
            if notes is not None:
                notes.waits += 1
                notes.wait_time += monotonic() - began
        return self._breaker.try_acquire()

    def _most_seconds_to_wait(self) -> float:
        """How long the caller would wait for a connection."""
        deadline = current_deadline()
        return math.inf if deadline is None else deadline.remaining()

    def _settle(self, permit: Permit, error: BaseException) -> None:
        """The acquisition failed: tell the breaker what that shows."""
        if classify(error, Phase.CONNECT).is_node_failure:
            self._breaker.record_failure(permit, error)
            self.node.suspect()
        else:
            self._breaker.release(permit)

    def connect_failed(self, error: BaseException, permit: Permit | None) -> None:
        """A connect under the closed circuit's ``permit`` failed: tell the breaker, if it is the node's fault."""
        if permit is not None and classify(error, Phase.CONNECT).is_node_failure:
            self._breaker.record_failure(permit, error)
            self.node.suspect()

    def _create_connection(self) -> ConnectionPoolEntry:
        self.cluster.wake()
        return Record(self)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._out.pop(id(record), None)
        try:
            self._conclude(record)
        finally:
            super()._do_return_conn(record)

    def _note_checkout(self, record: Any) -> None:
        """Write the checkout into the request's record, where there is one."""
        notes = current_record()
        if notes is not None:
            notes.connections += 1
            record.notes = notes
            record.owes = True
            record.since = monotonic()

    def _conclude(self, record: Any) -> None:
        """The checkout is over: end its appointment, record its outcome."""
        record.owes = False
        record.holder = None
        notes: RequestRecord | None = getattr(record, "notes", None)
        if notes is not None:
            record.notes = None
            notes.hold_time += monotonic() - record.since
        watch: Watch | None = getattr(record, "watch", None)
        if watch is not None:
            record.watch = None
            if watch.end():
                # Cut by the watchdog at the last moment: whatever the caller saw, this connection is broken.
                record.invalidate()
        permit: Permit | None = getattr(record, "permit", None)
        if permit is not None:
            record.permit = None
            self._breaker.record_success(permit)

    def _pause(self, seconds: float) -> None:
        if self._dialect.is_async:
            await_only(asyncio.sleep(seconds))
        else:
            time.sleep(seconds)

    def recreate(self) -> Any:
        self.logger.info("Pool recreating")
        self.retire()
        self.node.former.add(self)
        return type(self)(
            self._creator,
            resilientdb_cluster=self.cluster,
            resilientdb_node=self.node,
            **self._arguments(),
        )

    def retire(self) -> None:
        """Another pool takes this one's place."""

    def _arguments(self) -> dict[str, Any]:
        """What to make this pool's successor with."""
        return {**self._options, "_dispatch": self.dispatch}

    def dispose(self) -> None:
        self.node.rest()
        super().dispose()

    def holders(self) -> list[Holder]:
        """Who holds its connections, longest first; nobody where nobody keeps a list."""
        return []

    def mine(self) -> list[Holder]:
        """What the caller itself holds."""
        return []

    def warm(self, connections: int) -> None:
        """Open connections until there are so many, one after the other; raises as connecting does. A pool class of
        the user's own opens its connections when it likes to."""

    def open_raw(self) -> Any:
        """A driver connection that belongs to no pool."""
        return self._invoke_creator(None)  # type: ignore[arg-type]

    def stats(self) -> PoolStats | None:
        """None: a pool class of the user's own keeps no counts."""
        return None

    @property
    def saturated(self) -> bool:
        """Whether at least half of the places to wait are taken."""
        return False

    @property
    def load(self) -> int:
        """How many callers hold a connection or wait for one."""
        return len(self._out)

    @property
    def activity(self) -> int:
        """Grows with every checkout; constant where nobody counts."""
        return 0

    def reclaim(self, record: Record) -> None:
        """A record with a slot was forgotten; only a pool with slots has such."""

    def after_fork(self) -> None:
        """In the child: the connections are the parent's."""

    def distrust(self) -> None:
        """The node was dead or silent: connections opened before are not to be believed any more."""
        self._invalidate_time = (
            time.time()
        )  # SQLAlchemy's own mark, compared with its records' wall-clock start

    def dismiss_waiting(self, refusal: Callable[[], ResilienceError]) -> None:
        """Send everybody in line away with an error; nobody waits at a pool without a queue."""
