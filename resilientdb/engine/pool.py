"""``QueuePool`` with the library's admission: bounded, first come first served, handed on directly.

SQLAlchemy's own queue is unbounded (300 threads park), unfair (a thread that returns a connection and takes
another wins over everybody who waits) and deaf (when a connect fails, nobody who waits hears of the free slot).
Here a slot passes from hand to hand; the classes stay real ``QueuePool``s, because programs ask.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import math
import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util.queue import Empty

from resilientdb.engine import refusals
from resilientdb.engine.compat import await_only, checkout, greenlet_spawn, running_loop, task_in
from resilientdb.engine.door import Door, Record
from resilientdb.engine.holders import describe_holder, holders
from resilientdb.engine.opening import Opening, was_shared
from resilientdb.engine.ping import answers
from resilientdb.engine.retrying import remember_beginning
from resilientdb.engine.shared import SharedSlots, limiter, task_or_flow
from resilientdb.engine.slots import Slots
from resilientdb.engine.upkeep import PoolUpkeep, in_upkeep
from resilientdb.errors import ConfigurationError, PoolSaturated, ResilienceError
from resilientdb.policy.breaker import Permit
from resilientdb.policy.saturation import Admission, Lane, Refusal
from resilientdb.runtime.bounded import run_in_task, run_in_thread
from resilientdb.runtime.callers import current_flow
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import (
    CRITICALITIES,
    Criticality,
    Deadline,
    current_criticality,
    current_deadline,
    current_record,
)
from resilientdb.runtime.waiters import TaskWaiter, ThreadWaiter, Waiter
from resilientdb.stats import PoolStats

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Sequence

    from sqlalchemy.pool import PoolProxiedConnection

    from resilientdb.stats import Holder, NodeStats

__all__ = ["AsyncQueueDoor", "IdleConnections", "QueueDoor", "guarded"]

_NOT_OURS = Permit(probe=False, issued_at=0.0)
"""The permit of a connection that came along in a fork: no breaker's, so that it never returns by the fast way."""


class IdleConnections:
    """The connections nobody holds, in the shape in which ``QueuePool`` and its users expect ``pool._pool``."""

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self.queue: deque[Any] = collections.deque()

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

    A healthy checkout and a healthy checkin take no lock (``Slots`` says how that can be), and each line of
    ``_do_get`` and ``_do_return_conn`` is paid for by every request: both go the long way as soon as there is
    anything out of the ordinary to be done.
    """

    _queue_class: Any = IdleConnections
    _whoami: Callable[[], Any] = staticmethod(current_flow)
    """Who is to hold the connection: a thread's flow of work, or a task. Raises if it may hold none of ours."""

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float | None = 30.0,
        use_lifo: bool = False,
        **options: Any,
    ) -> None:
        # QueuePool's constructor sets the limit already; the rest comes with the cluster's options.
        self._admission: Admission[Waiter] = Admission(limit=None, max_waiting=None)
        self._disposed = False
        self._moment: tuple[float, str, NodeStats] | None = None
        super().__init__(
            creator,
            pool_size=pool_size,
            max_overflow=max_overflow,
            timeout=timeout,
            use_lifo=use_lifo,
            **options,
        )
        self._tally = self.node.tally
        queue, life = self.cluster.resilience.queue, self.cluster.resilience.lifecycle
        self._admission = Admission(
            limit=self._admission.limit,
            max_waiting=queue.max_waiting,
            target=queue.target,
            interval=math.inf if self.cluster.patient else queue.interval,
            shares=(queue.sheddable_plus_share, queue.sheddable_share),
        )
        if 0 < pool_size < life.min_size:
            raise ConfigurationError(
                f"lifecycle.min_size must be at most pool_size ({pool_size}), the connections that a pool keeps; got "
                f"{life.min_size}",
                key="lifecycle.min_size",
                value=life.min_size,
            )
        self._idle: deque[Any] = self._pool.queue  # type: ignore[attr-defined]
        self._slots = self._make_slots(
            queue.limiter,
            keep=pool_size or sys.maxsize,
            idle=self._idle,
            newest_first=use_lifo,
            make=self._make_record,
            close=Record.close,
            refuse=self._refuse,
            tally=self._tally,
            doubtful=life.validate_idle == 0,
        )
        self._next_idle = self._slots.next_idle
        self._upkeep = PoolUpkeep(self, self._slots, life)
        self.opening = Opening(self, self._slots, self._upkeep, self._invoke_creator)
        self._invoke_creator = self.opening.create  # type: ignore[assignment]
        self._is_thorough = (
            life.max_uses is not None
            or life.leak_threshold is not None
            or life.validate_idle == 0
            or queue.limiter is not None
        )
        """Whether every checkout and checkin has more to do than the short way can."""
        if self._is_thorough:
            self._do_get = self._get_thoroughly  # type: ignore[method-assign]

    def _make_slots(self, shared: str | None, **options: Any) -> Slots:
        if shared is None:
            return Slots(admission=self._admission, **options)
        queue = self.cluster.resilience.queue
        limit = limiter(shared, self.node.name, self._admission, queue, patient=self.cluster.patient)
        self._admission = limit.admission
        if not self._dialect.is_async:
            self._whoami = task_or_flow
        return SharedSlots(limit, **options)

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
        return self._slots.total + self._slots.lost() - self._pool.maxsize

    @_overflow.setter
    def _overflow(self, value: int) -> None:
        """QueuePool sets its own count when made and disposed; ours is never anything but what there is."""

    def checkedin(self) -> int:
        return self._slots.idle_count + self._slots.lost()

    def checkedout(self) -> int:
        return self._slots.total - self._slots.idle_count

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
            self.connect_failed(error, permit)
            if not self.cluster.may_retry(error):
                raise
            first = error
        return self.cluster.retry_acquisition(self.checkout_once, first, self._pause, self.node.name)

    def checkout_once(self) -> PoolProxiedConnection:
        permit = self._breaker.permit
        try:
            return checkout(self)
        except Exception as error:
            self.connect_failed(error, permit)
            raise

    def _do_get(self) -> Any:
        # Attributes that hold a function are read first and called then: a method call would look for them twice.
        permit, whoami, next_idle = self._breaker.permit, self._whoami, self._next_idle
        me = whoami()
        if permit is None:
            return self._get_as_probe(me)
        try:
            record = next_idle()
        except IndexError:
            record = None  # what goes wrong from here on did not do so while handling this
        if record is None:
            return self._get_slowly(me, permit)
        if self._invalidate_time > record.starttime and current_deadline() is not None:
            return self._get_slowly(me, permit, record)
        record.permit = permit
        record.since = monotonic()
        record.holder = me
        self._tally.checkouts += 1
        if current_record() is not None:
            self._note_checkout(record)
        return record

    def _get_as_probe(self, me: Any) -> Any:
        """The circuit is not closed: a probe's outcome is settled here."""
        permit = self._ask()
        try:
            record = self._get_slowly(me, permit)
            if permit.probe:
                self._reopen(record)
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
            remember_beginning(error, record.since)
            record.permit = record.notes = None
            record.invalidate(error)
            self._slots.give_back(record)
            raise

    def _get_thoroughly(self) -> Any:
        """``_do_get`` where every checkout goes the long way."""
        permit, me = self._breaker.permit, self._whoami()
        return self._get_as_probe(me) if permit is None else self._get_slowly(me, permit)

    def _get_slowly(self, me: Any, permit: Permit, record: Any = None) -> Any:
        """``record``: an idle one that has been taken already; None: take a slot, or wait for one."""
        began = monotonic()
        try:
            return self._take_or_wait(me, permit, record)
        except Exception as error:
            remember_beginning(error, began)
            raise

    def _take_or_wait(self, me: Any, permit: Permit, record: Any) -> Any:
        deadline = current_deadline()
        if deadline is not None and deadline.remaining() <= 0:
            if record is not None:
                self._slots.give_back(record)
            raise refusals.deadline_exceeded(self, deadline)
        if record is None:
            record = self._slots.try_take()
        if record is None:
            record = self._wait_in_line(me, deadline)
        if not self._is_fit(record, deadline):
            if self._breaker.permit is not permit and not permit.probe:
                # The circuit has opened while this caller waited, or asked a connection that does not answer.
                self._slots.give_back(record)
                raise self._breaker.refusal()
            self.opening.open(record, deadline)
        record.permit = permit
        record.since = monotonic()
        record.holder = me
        self._tally.checkouts += 1
        self._note_checkout(record)
        if self._is_thorough:
            self._upkeep.checked_out(record)
        self._upkeep.used()
        return record

    def _most_seconds_to_wait(self) -> float:
        timeout: float | None = self._timeout
        most = super()._most_seconds_to_wait()
        return most if timeout is None else min(most, timeout)

    def _wait_in_line(self, me: Any, deadline: Deadline | None) -> Any:
        """Wait for a slot; returns it with its record. Raises when there is none for this caller."""
        waiter = self._make_waiter()
        lane = _LANES[current_criticality()]
        left = None if deadline is None else deadline.remaining()
        if not self.cluster.patient:
            # An explicit pool_timeout is waited for, whatever comes of it: another thread may give back what this one
            # holds.
            waiter.holds = len(self._slots.mine(me))
        patience: float | None = self._timeout
        if left is not None:
            patience = left if patience is None else min(patience, left)
        woken = True
        try:
            answer = self._slots.join(waiter, lane, left)
            if answer is None:
                self._upkeep.line_formed()
                woken = waiter.park(patience)
        except BaseException:
            if not self._slots.leave(waiter) and waiter.refusal is None:
                self._slots.take_back(waiter)
            raise
        if isinstance(answer, Refusal):
            raise refusals.nested(self) if answer is Refusal.DEADLOCK else self._refuse(waiter, answer)
        if answer is not None:
            return answer
        waited = monotonic() - waiter.since
        self._tally.wait.add(waited)
        notes = current_record()
        if notes is not None:
            notes.waits += 1
            notes.wait_time += waited
        if not woken and self._slots.leave(waiter):
            self._tally.timeouts += 1
            if deadline is not None and deadline.remaining() <= 0:
                raise refusals.deadline_exceeded(self, deadline, waited)
            raise refusals.timed_out(self, waited)
        if waiter.refusal is not None:
            raise waiter.refusal()
        if waiter.granted is None:
            # Who was about to give it something was interrupted.
            raise refusals.timed_out(self, waited)
        return waiter.granted

    def _make_waiter(self) -> Waiter:
        return ThreadWaiter()

    def _refuse(self, waiter: Waiter, why: Refusal) -> PoolSaturated:
        return refusals.saturated(self, why, waiter)

    # -- opening -------------------------------------------------------------------------------------------

    def _make_record(self) -> Record:
        return Record(self, connect=False)

    def run_bounded(
        self, work: Callable[[], Any], seconds: float, adopt: Callable[[Any, BaseException | None], None]
    ) -> Any:
        """Do ``work`` where the caller need not wait for it any longer; see ``runtime.bounded``."""
        return run_in_thread(work, seconds, adopt)

    def warm(self, connections: int) -> None:
        self._upkeep.may_open = False
        try:
            # More than it keeps would be closed at once, and missed again.
            while self._slots.total < min(connections, self._slots.keep) and self.opening.open_one():
                pass
        finally:
            self._upkeep.may_open = True

    def connect_failed(self, error: BaseException, permit: Permit | None) -> None:
        if not was_shared(error):  # counted by whom it happened to
            super().connect_failed(error, permit)

    def _is_fit(self, record: Any, deadline: Deadline | None) -> bool:
        """Whether its connection can be handed out as it is. (SQLAlchemy replaces an invalidated one, too, but
        without an eye on the deadline.)"""
        if record.dbapi_connection is None:
            return False
        if deadline is not None and record._is_hard_or_soft_invalidated():  # noqa: SLF001
            return False
        return not record.dozed or self._is_awake(record)

    def _is_awake(self, record: Any) -> bool:
        """Whether a connection that nobody has used for a while still answers. Its slot stays the caller's."""
        record.dozed = False
        if self._pre_ping:
            return True  # SQLAlchemy asks anyway
        try:
            alive = answers(self.cluster.dialect, record.dbapi_connection)
        except BaseException as error:
            record.invalidate(error)
            self._slots.give_back(record)
            raise
        if not alive:
            self._tally.count_retired("validation")
            record.invalidate()
        return alive

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        self._tally.closed += 1
        super()._close_connection(connection, terminate=terminate)

    # -- back ----------------------------------------------------------------------------------------------

    def _do_return_conn(self, record: Any) -> None:
        idle, slots, tally = self._idle, self._slots, self._tally
        breaker = self._breaker
        admission: Any = self._admission  # looked at twice, and it may change in between
        if not tally.checkouts % _HOLD_SAMPLE:
            tally.hold.add(monotonic() - record.since)
        if record.permit is breaker.permit and not record.owes and record.dbapi_connection is not None:
            breaker.answered += 1
            record.holder = None  # a task that has ended need not be kept
            if admission.waiting or len(idle) >= slots.keep:
                slots.give_back(record)
                return
            idle.append(record)
            if admission.waiting or len(idle) > slots.keep:
                slots.rebalance()
            return
        try:
            self._conclude(record)
        finally:
            slots.give_back(record)

    def _conclude(self, record: Any) -> None:
        if record.dbapi_connection is None:
            self._tally.count_retired("invalidated")
            if record.permit is not None:
                # Lost without an error that told why (pre-ping, a listener, invalidate()): no evidence.
                self._breaker.release(record.permit)
                record.permit = None
        super()._conclude(record)

    def reclaim(self, record: Any) -> None:
        connection = record.dbapi_connection
        if connection is not None and not self._dialect.is_async:
            with contextlib.suppress(Exception):
                self._close_connection(connection)
        self._slots.reclaim(record.token)

    def dismiss_waiting(self, refusal: Callable[[], ResilienceError]) -> None:
        self._slots.dismiss(refusal)

    def dispose(self) -> None:
        self._disposed = True
        self.node.rest()
        self._slots.close_idle("disposed")
        self.logger.info("Pool disposed. %s", self.status())

    def retire(self) -> None:
        # Connections that are still out come back here, where nobody will ask for them: close them then.
        if self._disposed:
            self._slots.keep = 0
            self._slots.close_idle("disposed")  # came back since dispose()

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
        admission, idle = self._admission, self._slots.idle_count
        return (
            f"{self._slots.total - idle} active, {idle} idle, {admission.waiting} waiting; limit of size "
            f"{self._pool.maxsize} overflow {self._max_overflow}, at most {admission.max_waiting} waiting"
            f"{self._slots.note()}"
        )

    def expected_wait(self) -> float | None:
        """Seconds after which somebody who comes now could expect a connection; None if nothing is known."""
        return self._slots.section.run(self._admission.expected_wait, Lane.SHEDDABLE, monotonic())

    def holders(self, records: Sequence[Any] | None = None) -> list[Holder]:
        out = self._slots.out() if records is None else records
        return holders(out, self.node.name)

    def mine(self) -> list[Holder]:
        """What the caller itself holds."""
        held = self._slots.mine(self._whoami())
        return [holder for record in held for holder in record._pool.holders((record,))]  # noqa: SLF001

    def moment(self) -> tuple[str, NodeStats]:
        """Who has held connections longest, in words, and the node's counts; not made anew for each of a crowd that
        is refused."""
        now = monotonic()
        if self._moment is None or not 0 <= now - self._moment[0] <= _STALE:
            words = ", ".join(map(describe_holder, self.holders()[:_MOST_HOLDERS]))
            self._moment = now, words, self.node.stats()
        return self._moment[1:]

    @property
    def saturated(self) -> bool:
        most = self._admission.max_waiting
        return most is not None and 0 < most <= 2 * self._admission.waiting

    @property
    def load(self) -> int:
        return self.checkedout() + self._slots.waiting

    @property
    def activity(self) -> int:
        return self._tally.checkouts

    def after_fork(self) -> None:
        for record in self._slots.out():
            record.permit = _NOT_OURS
        self._slots.after_fork()
        self._upkeep.after_fork()

    def stats(self) -> PoolStats:
        admission, tally, total = self._admission, self._tally, self._slots.total
        # Without the lock: one that is just being moved may be counted twice.
        idle = min(self._slots.idle_count, total)
        return PoolStats(
            total=total,
            active=total - idle,
            idle=idle,
            waiting=admission.waiting,
            limit=admission.limit,
            max_waiting=admission.max_waiting,
            checkouts=tally.checkouts,
            waited=tally.waited,
            timeouts=tally.timeouts,
            rejected=sum(tally.refused.values()),
            opened=tally.opened,
            closed=tally.closed,
            waiting_by_criticality={
                lane.name.lower(): depth for lane, depth in zip(Lane, admission.depths(), strict=True)
            },
            refused={why.value: times for why, times in tally.refused.items()},
            retired=dict(tally.retired),
            connect_failures=tally.connect_failures,
            leaks=tally.leaks,
            wait=tally.wait.snapshot(),
            hold=tally.hold.snapshot(),
            create=tally.create.snapshot(),
        )


_LANES: dict[Criticality, Lane] = {level: Lane[level.upper()] for level in CRITICALITIES}

_MOST_HOLDERS = 3
"""How many of those who hold connections a refusal names."""
_STALE = 0.05
"""Seconds for which these words and counts will do."""

_HOLD_SAMPLE = 7
"""One checkout in so many is timed: a prime, so that no rhythm of the program's hides half of its work."""

_NOWHERE: Any = object()
"""The home of a pool for tasks that has no connections yet."""


class AsyncQueueDoor(QueueDoor, AsyncAdaptedQueuePool):
    """The pool of one node, for tasks of an event loop. Runs inside SQLAlchemy's greenlets."""

    _home: Any = _NOWHERE
    """The event loop that its connections belong to."""

    def _whoami(self) -> Any:
        loop = running_loop()
        if loop is not self._home:
            self._move_to(loop)
        return task_in(loop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that its connections belong to; None while it has had none."""
        return None if self._home is _NOWHERE else self._home

    def _move_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """The caller runs in another event loop than before."""
        if loop is None:
            raise MissingGreenlet("an AsyncEngine's connections are to be had in an event loop only")
        if self.loop is not None and self._slots.total:
            raise ConfigurationError(
                f"the connections of {self.node.name} belong to another event loop"
                f"{', which has been closed' if self.loop.is_closed() else ''}: an AsyncEngine serves one loop at a "
                "time; make one engine a loop, or await engine.dispose() at the end of the first loop",
                key="engine",
            )
        self._home = loop

    def _conclude(self, record: Any) -> None:
        if record.dbapi_connection is None and running_loop() is not self._home:
            # Forgotten, and collected in another thread, where SQLAlchemy looks at the record once more after this:
            # it must not find it in use again, and check it in a second time.
            record.opened_at = 0.0
        super()._conclude(record)

    def retire(self) -> None:
        super().retire()
        if self._disposed and self.loop is not None and self.loop is running_loop():
            with contextlib.suppress(MissingGreenlet):  # disposed of without being awaited
                await_only(self._upkeep.finish())

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        if not in_upkeep():
            super()._close_connection(connection, terminate=terminate)
            return
        # As SQLAlchemy's, which would report the cancellation of this task as an error: a loop that is about to end
        # cancels whatever runs in it.
        self._tally.closed += 1
        try:
            (self._dialect.do_terminate if terminate else self._dialect.do_close)(connection)
        except Exception:
            self.logger.exception("Exception closing connection %r", connection)

    def _make_waiter(self) -> Waiter:
        return TaskWaiter(asyncio.get_running_loop(), await_only)

    def run_bounded(
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
