"""``QueuePool`` with the library's admission: bounded, first come first served, handed on directly.

SQLAlchemy's own queue is unbounded (300 threads park), unfair (a thread that returns a connection and takes
another wins over everybody who waits) and deaf (when a connect fails, nobody who waits hears of the free slot).
Here a slot passes from hand to hand; the classes stay real ``QueuePool``s, because programs ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util.queue import Empty

from resilientdb.engine import refusals
from resilientdb.engine.compat import await_only, checkout, greenlet_spawn
from resilientdb.engine.door import Door
from resilientdb.errors import PoolSaturated, ResilienceError
from resilientdb.policy.breaker import Permit
from resilientdb.policy.saturation import Admission, Lane, Refusal
from resilientdb.runtime.bounded import LeftBehind, run_in_task, run_in_thread
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import Deadline, current_criticality, current_deadline, current_record
from resilientdb.runtime.waiters import TaskWaiter, ThreadWaiter, Waiter
from resilientdb.stats import PoolStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from resilientdb.engine.node import Node

__all__ = ["AsyncQueueDoor", "IdleConnections", "QueueDoor", "guarded"]


_NOT_OURS = Permit(probe=False, issued_at=0.0)
"""The permit of a connection that came along in a fork: no breaker's, so that it never returns by the fast way."""


class IdleConnections:
    """The connections nobody holds, in the shape in which ``QueuePool`` and its users expect ``pool._pool``."""

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self.queue: deque[Any] = deque()

    def qsize(self) -> int:
        return len(self.queue)

    def empty(self) -> bool:
        return not self.queue

    def full(self) -> bool:
        return 0 < self.maxsize <= len(self.queue)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: ARG002
        try:
            return self.queue.pop() if self.use_lifo else self.queue.popleft()
        except IndexError:
            raise Empty from None


class QueueDoor(Door, QueuePool):
    """The pool of one node, for threads.

    A healthy checkout takes an idle connection and a healthy checkin puts one back, each one atomic operation on
    ``_idle`` and no lock. What needs more than that (opening, waiting, handing on, closing) is decided under
    ``_guard``. No wake-up is lost between the two: whoever joins the line looks at ``_idle`` again afterwards,
    whoever puts a connection back looks at the line again afterwards, and one of them sees the other.

    ``_guard`` guards ``_admission`` and ``_shells``. It is re-entrant and comes with a busy flag, because a
    garbage collection inside it may give a forgotten connection back in this very thread: such a return is put
    aside (``_late``) and done when the section ends. Nothing of the user's runs, nothing waits and nothing is
    sent under it.
    """

    _queue_class: Any = IdleConnections

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float | None = 30.0,
        use_lifo: bool = False,
        **options: Any,
    ) -> None:
        self._guard = threading.RLock()
        self._busy = False
        self._late: deque[Any] = deque()
        # QueuePool's constructor sets the limit already; the rest comes with the cluster's options.
        self._admission: Admission[Waiter] = Admission(limit=None, max_waiting=None)
        self._shells: list[Any] = []
        """Records whose connection was lost: what the user keeps in ``record_info`` outlives it."""
        self._records: weakref.WeakSet[Any] = weakref.WeakSet()
        """All that were made and still exist; a fork makes them the parent's."""
        self._parents: list[Any] = []
        self._disposed = False
        node: Node | None = options.get("resilientdb_node")
        before = node.pool if node is not None else None
        super().__init__(
            creator,
            pool_size=pool_size,
            max_overflow=max_overflow,
            timeout=timeout,
            use_lifo=use_lifo,
            **options,
        )
        queue = self.cluster.resilience.queue
        self._admission = Admission(
            limit=self._admission.limit,
            max_waiting=queue.max_waiting,
            target=queue.target,
            interval=math.inf if self.cluster.patient else queue.interval,
        )
        # Counts go on where the pool that this one replaces has stopped.
        counted = before.stats() if before is not None else None
        self._checkouts = counted.checkouts if counted else 0
        self._admission.waited = counted.waited if counted else 0
        self._timeouts = counted.timeouts if counted else 0
        self._rejected = counted.rejected if counted else 0
        self._opened = counted.opened if counted else 0
        self._closed = counted.closed if counted else 0
        self._open_physical: Callable[[Any], Any] = self._invoke_creator
        self._invoke_creator = self._counted  # type: ignore[assignment]
        self._idle: deque[Any] = self._pool.queue  # type: ignore[attr-defined]
        self._next: Callable[[], Any] = self._idle.pop if use_lifo else self._idle.popleft
        self._keep = pool_size or sys.maxsize
        """Most idle connections; 0 once another pool has taken this one's place."""

    # -- QueuePool's bookkeeping, kept truthful ------------------------------------------------------------

    @property
    def _max_overflow(self) -> int:
        limit = self._admission.limit
        return -1 if limit is None else limit - self._pool.maxsize

    @_max_overflow.setter
    def _max_overflow(self, overflow: int) -> None:
        size = self._pool.maxsize
        self._admission.limit = None if overflow == -1 or size == 0 else size + overflow

    @property
    def _overflow(self) -> int:
        return self._admission.total + self._lost() - self._pool.maxsize

    @_overflow.setter
    def _overflow(self, value: int) -> None:
        """QueuePool sets its own count when made and disposed; ours is never anything but what there is."""

    def checkedin(self) -> int:
        return len(self._idle) + self._lost()

    def checkedout(self) -> int:
        return self._admission.total - len(self._idle)

    def _lost(self) -> int:
        """Records without a connection that ``QueuePool`` would count as in the pool, up to its size."""
        return max(0, min(len(self._shells), self._keep - len(self._idle)))

    # -- out -----------------------------------------------------------------------------------------------

    def connect(self) -> PoolProxiedConnection:
        permit = self._breaker.permit
        try:
            return checkout(self)
        except ResilienceError as refusal:
            # Our own: nothing was asked of the node, so there is nothing to classify and nothing to settle.
            if not self.cluster.waits_out(refusal):
                raise
            first: Exception = refusal
        except Exception as error:
            self._connect_failed(error, permit)
            if not self.cluster.may_retry(error):
                raise
            first = error
        return self.cluster.retry_acquisition(self.checkout_once, first, self._pause, self.node.name)

    def checkout_once(self) -> PoolProxiedConnection:
        permit = self._breaker.permit
        try:
            return checkout(self)
        except Exception as error:
            self._connect_failed(error, permit)
            raise

    def _do_get(self) -> Any:
        permit = self._breaker.permit
        if permit is not None:
            try:
                record: Any = self._next()
            except IndexError:
                pass
            else:
                if self._invalidate_time > record.starttime and current_deadline() is not None:
                    return self._get_slowly(permit, record)
                record.permit = permit
                self._checkouts += 1
                if current_record() is not None:
                    self._note_checkout(record)
                return record
            return self._get_slowly(permit)
        permit = self._ask()
        try:
            record = self._get_slowly(permit)
            if permit.probe:
                self._reopen(record)  # a probe's outcome is settled here
        except BaseException as error:
            if permit.probe:
                self._settle(permit, error)
            raise
        return record

    def _reopen(self, record: Any) -> None:
        """Open the record's connection, if it is not. Its slot goes back if that fails."""
        try:
            record.get_connection()
        except BaseException as error:
            record.permit = record.notes = None
            record.invalidate(error)
            self._give_back(record)
            raise

    def _get_slowly(self, permit: Permit, record: Any = None) -> Any:
        """``record``: an idle one that has been taken already; None: take a slot, or wait for one."""
        deadline = current_deadline()
        if deadline is not None and deadline.remaining() <= 0:
            if record is not None:
                self._give_back(record)
            raise refusals.deadline_exceeded(self, deadline)
        if record is None:
            record = self._take_slot(deadline)
        if record is None or (deadline is not None and record._is_hard_or_soft_invalidated()):  # noqa: SLF001
            record = self._connected(record, deadline)
        record.permit = permit
        self._checkouts += 1
        self._note_checkout(record)
        return record

    def _take_slot(self, deadline: Deadline | None) -> Any:
        """A slot: with its record, connected or not, or None for a new one. Waits in line if it must."""
        waiter = self._make_waiter()
        left = None if deadline is None else deadline.remaining()
        self._enter()
        try:
            record = self._take_idle()
            if record is not None:
                return record
            if self._admission.try_take():
                return self._take_shell()
            lane = Lane[current_criticality().upper()]
            answer = self._admission.join(waiter, lane, waiter.since, left)
            if isinstance(answer, Refusal):
                self._rejected += 1
            else:
                self._match()
                self._send_away(() if answer is None else (answer,), Refusal.DISPLACED)
        finally:
            self._leave()
        if isinstance(answer, Refusal):
            raise refusals.saturated(self, answer)
        return self._wait(waiter, deadline)

    def _take_shell(self) -> Any:
        """A record whose connection was lost, for a new slot; None: make one."""
        if not self._shells:
            return None
        record = self._shells.pop()
        record.owns_slot = True
        return record

    def _take_idle(self) -> Any:
        """An idle record, or None: another thread, which needs no lock for it, may take the last at any moment."""
        try:
            return self._next()
        except IndexError:
            return None

    def _wait(self, waiter: Waiter, deadline: Deadline | None) -> Any:
        """Wait in line; returns what came with the slot: a record, or None. Raises when there is none."""
        patience: float | None = self._timeout
        if deadline is not None:
            left = deadline.remaining()
            patience = left if patience is None else min(patience, left)
        try:
            woken = waiter.park(patience)
        except BaseException:
            if not self._step_out(waiter) and waiter.refusal is None:
                self._give_back(waiter.granted)
            raise
        finally:
            waited = monotonic() - waiter.since
            notes = current_record()
            if notes is not None:
                notes.waits += 1
                notes.wait_time += waited
        if not woken and self._step_out(waiter):
            self._timeouts += 1
            if deadline is not None and deadline.remaining() <= 0:
                raise refusals.deadline_exceeded(self, deadline, waited)
            raise refusals.timed_out(self, waited)
        if waiter.refusal is not None:
            raise waiter.refusal()
        return waiter.granted

    def _step_out(self, waiter: Waiter) -> bool:
        """Leave the line; False when a slot (or a refusal) was given in the meantime."""
        self._enter()
        try:
            return self._admission.leave(waiter)
        finally:
            self._leave()

    def _connected(self, record: Any, deadline: Deadline | None) -> Any:
        """A record with a live connection, for the slot held. The slot goes back if that fails."""
        try:
            if deadline is None:
                return self._create_connection()
            return self._connect_elsewhere(record, deadline)
        except LeftBehind as left:
            interruption = left.__cause__  # the slot is the business of whoever adopts
        except BaseException:
            self._give_back(record)
            raise
        raise interruption or refusals.deadline_exceeded(self, deadline)

    def _connect_elsewhere(self, record: Any, deadline: Deadline) -> Any:
        """Connect where the caller need not wait for it longer than its deadline."""

        permit = self._breaker.permit

        def open_one() -> Any:
            if record is None:
                return self._create_connection()
            record.get_connection()
            return record

        def adopt(opened: Any, error: BaseException | None) -> None:
            if error is not None:
                self._connect_failed(error, permit)
            self._give_back(record if opened is None else opened)

        return self._run_bounded(open_one, deadline.remaining(), adopt)

    def _run_bounded(
        self, work: Callable[[], Any], seconds: float, adopt: Callable[[Any, BaseException | None], None]
    ) -> Any:
        return run_in_thread(work, seconds, adopt)

    def _make_waiter(self) -> Waiter:
        return ThreadWaiter()

    def _create_connection(self) -> ConnectionPoolEntry:
        record = super()._create_connection()
        self._records.add(record)
        record.owns_slot = True  # type: ignore[attr-defined]
        return record

    def _counted(self, record: Any) -> Any:
        """The pool's creator: every physical connection is opened here."""
        connection = self._open_physical(record)
        self._opened += 1
        return connection

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        self._closed += 1
        super()._close_connection(connection, terminate=terminate)

    # -- back ----------------------------------------------------------------------------------------------

    def _do_return_conn(self, record: Any) -> None:
        idle = self._idle
        breaker = self._breaker
        admission: Any = self._admission  # looked at twice, and it may change in between
        if (
            record.permit is breaker.permit
            and record.watch is None
            and record.notes is None
            and record.dbapi_connection is not None
            and not admission.waiting
            and len(idle) < self._keep
        ):
            breaker.answered += 1
            idle.append(record)
            if admission.waiting or len(idle) > self._keep:
                self._rebalance()
            return
        try:
            self._conclude(record)
        finally:
            self._give_back(record)

    def _conclude(self, record: Any) -> None:
        if record.dbapi_connection is None and record.permit is not None:
            # Lost without an error that told why (pre-ping, a listener, invalidate()): no evidence.
            self._breaker.release(record.permit)
            record.permit = None
        super()._conclude(record)

    def _give_back(self, record: Any) -> None:
        """Hand a slot on, with its connection if there is one (None, or a record without: to be opened)."""
        if record is not None and record.inherited:
            self._parents.append(record)
            return
        while True:
            if self._is_inside():
                self._late.append(record)
                return
            waiter: Waiter | None = None
            surplus = False
            now = monotonic()
            self._enter()
            try:
                self._send_away(self._admission.overdue(now), Refusal.SHED)
                if record is None or record.dbapi_connection is None:
                    waiter = self._admission.vacate(now)
                    if waiter is None and record is not None:
                        record.owns_slot = False
                        self._shells.append(record)
                else:
                    # A pool that has been replaced keeps none, not for those who still wait either.
                    waiter = self._admission.next_in_line(now) if self._keep else None
                    surplus = waiter is None and len(self._idle) >= self._keep
                    if waiter is None and not surplus:
                        self._idle.append(record)
                if waiter is not None:
                    waiter.granted = record
            finally:
                self._leave()
            if surplus:
                self._discard(record)
                return
            if waiter is None or waiter.wake():
                return

    def _discard(self, record: Any) -> None:
        """Close a connection that nobody holds, then give its slot back, whatever a listener makes of it."""
        # In this order, so that the server never sees more than the limit.
        record.owns_slot = False
        try:
            record.close()
        finally:
            self._give_back(None)

    def _match(self) -> None:
        """Inside the section: give idle connections to those who wait, where both came to be at once."""
        while self._admission.waiting and (record := self._take_idle()) is not None:
            waiter = self._admission.next_in_line(monotonic())
            if waiter is None:
                self._idle.append(record)
                return
            waiter.granted = record
            if not waiter.wake():
                self._idle.append(record)

    def _rebalance(self) -> None:
        """After two threads acted at once: nobody waits beside an idle connection, none is kept too many."""
        if self._is_inside():
            return  # whoever is inside looks again when leaving
        surplus = None
        self._enter()
        try:
            self._match()
            if len(self._idle) > self._keep:
                surplus = self._take_idle()
        finally:
            self._leave()
        if surplus is not None:
            self._give_back(surplus)

    def reclaim(self, record: Any) -> None:
        connection = record.dbapi_connection
        if connection is not None and not self._dialect.is_async:
            with contextlib.suppress(Exception):
                self._close_connection(connection)
        self._give_back(None)

    def dismiss_waiting(self, refusal: Callable[[], ResilienceError]) -> None:
        """Send everybody in line away with an error of their own."""
        self._enter()
        try:
            for waiter in self._admission.dismiss():
                waiter.refusal = refusal
                waiter.wake()
        finally:
            self._leave()

    def _send_away(self, waiters: Iterable[Waiter], why: Refusal) -> None:
        """Inside the section: tell those who were taken out of the line that they will not be served."""
        for waiter in waiters:
            self._rejected += 1
            waiter.refusal = functools.partial(self._refuse, waiter, why)
            waiter.wake()

    def _refuse(self, waiter: Waiter, why: Refusal) -> PoolSaturated:
        return refusals.saturated(self, why, monotonic() - waiter.since)

    def dispose(self) -> None:
        self._disposed = True
        self.node.rest()
        self._close_idle()
        self.logger.info("Pool disposed. %s", self.status())

    def _close_idle(self) -> None:
        while (record := self._take_idle()) is not None:
            self._discard(record)
        self._shells.clear()

    def retire(self) -> None:
        # Connections that are still out come back here, where nobody will ask for them: close them then.
        if self._disposed:
            self._keep = 0
            self._close_idle()  # came back since dispose()

    def _arguments(self) -> dict[str, Any]:
        return {
            **super()._arguments(),
            "pool_size": self._pool.maxsize,
            "max_overflow": self._max_overflow,
            "timeout": self._timeout,
            "use_lifo": self._pool.use_lifo,
        }

    # -- what can be seen ----------------------------------------------------------------------------------

    @property
    def most_overflow(self) -> int:
        """``max_overflow``; -1 = unlimited."""
        return self._max_overflow

    def counts(self) -> str:
        admission, idle = self._admission, len(self._idle)
        return (
            f"{admission.total - idle} active, {idle} idle, {admission.waiting} waiting; limit of size "
            f"{self._pool.maxsize} overflow {self._max_overflow}, at most {admission.max_waiting} waiting"
        )

    def expected_wait(self) -> float | None:
        """Seconds after which somebody who comes now could expect a connection; None if nothing is known."""
        with self._guard:
            return self._admission.expected_wait(Lane.SHEDDABLE, monotonic())

    @property
    def saturated(self) -> bool:
        most = self._admission.max_waiting
        return most is not None and 0 < most <= 2 * self._admission.waiting

    @property
    def load(self) -> int:
        return self.checkedout() + self._admission.waiting

    @property
    def activity(self) -> int:
        return self._checkouts

    def after_fork(self) -> None:
        self._guard = threading.RLock()
        self._busy = False
        self._admission.dismiss()  # their threads exist in the parent only
        self._late.clear()
        # Kept without a word to the server, also those that are still out here: it would be the parent's
        # connection that hears it.
        for record in self._records:
            record.inherited = True
            record.owns_slot = False
            record.permit = _NOT_OURS
        self._parents.extend(self._idle)
        self._idle.clear()
        self._shells.clear()
        self._admission.total = 0

    def stats(self) -> PoolStats:
        idle, admission = len(self._idle), self._admission
        total = max(idle, admission.total)
        return PoolStats(
            total=total,
            active=total - idle,
            idle=idle,
            waiting=admission.waiting,
            limit=admission.limit,
            max_waiting=admission.max_waiting,
            checkouts=self._checkouts,
            waited=admission.waited,
            timeouts=self._timeouts,
            rejected=self._rejected,
            opened=self._opened,
            closed=self._closed,
        )

    # -- the guarded section -------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._guard.acquire()
        if self._busy:
            self._guard.release()
            raise PoolSaturated("a finalizer cannot use the pool while the pool is handing out a connection")
        self._busy = True

    def _leave(self) -> None:
        self._busy = False
        self._guard.release()
        while self._late:
            try:
                record = self._late.popleft()
            except IndexError:
                return
            self._give_back(record)

    def _is_inside(self) -> bool:
        """Whether this very thread is inside the section (a finalizer runs in the middle of it)."""
        with self._guard:
            return self._busy


class AsyncQueueDoor(QueueDoor, AsyncAdaptedQueuePool):
    """The pool of one node, for tasks of an event loop. Runs inside SQLAlchemy's greenlets."""

    def _make_waiter(self) -> Waiter:
        return TaskWaiter(asyncio.get_running_loop(), await_only)

    def _run_bounded(
        self, work: Callable[[], Any], seconds: float, adopt: Callable[[Any, BaseException | None], None]
    ) -> Any:
        return run_in_task(work, seconds, adopt, spawn=greenlet_spawn, suspend=await_only)


@functools.cache
def guarded(pool_class: Any) -> Any:
    """The class to use for ``pool_class``: itself, behind the door.

    SQLAlchemy's two queue pools are replaced by ours; any other class keeps its own way of keeping connections.
    """
    if issubclass(pool_class, Door):
        return pool_class
    if pool_class is QueuePool:
        return QueueDoor
    if pool_class is AsyncAdaptedQueuePool:
        return AsyncQueueDoor
    return type(f"Guarded{pool_class.__name__}", (Door, pool_class), {"__doc__": pool_class.__doc__})
