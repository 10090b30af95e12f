"""A pool's connections are looked after here, in the background: opened, asked, retired, missed.

What is due is ``policy.lifecycle``'s to decide; when, is the keeper's, one thread for all pools. What takes time is
done aside, in a thread of its own or, for an asynchronous driver, in a task of the pool's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import threading
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import greenlet_spawn, running_loop
from resilientdb.engine.holders import describe_holder
from resilientdb.engine.ping import answers
from resilientdb.engine.stacks import here
from resilientdb.events import ConnectionLeaked
from resilientdb.policy.lifecycle import Orders, Upkeep
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.keeper import keeper

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.config import Lifecycle
    from resilientdb.engine.pool import QueueDoor
    from resilientdb.engine.slots import Slots
    from resilientdb.stats import Holder

__all__ = ["PoolUpkeep", "in_upkeep"]

logger = logging.getLogger("resilientdb")

_OPEN_AGAIN = 1.0
"""Seconds until a pool looks again whether it can open a connection that is missing: the circuit says no, all
slots are taken, the event loop is closed, or there are no threads to be had."""

_LAST_MOMENT = 1.0
"""Most seconds that the disposal of an asynchronous engine waits for what is being done in the background."""


class PoolUpkeep:
    """One pool's. ``tend`` is called by the keeper alone; everything else by whoever uses the pool."""

    def __init__(self, pool: QueueDoor, slots: Slots, life: Lifecycle) -> None:
        self._pool = pool
        self._slots = slots
        self._life = life
        self._upkeep = Upkeep(life, random.Random().random) if pool.cluster.has_server else None
        self.may_open = True
        """False while somebody else opens what is missing."""
        self._is_watching_line = False
        self._is_looking = False
        self._rests_until: float | None = None
        self._opening: list[asyncio.AbstractEventLoop | None] = []
        """For each connection being opened in the background, the loop that does it; None = a thread."""

    def after_fork(self) -> None:
        """In the child: what was arranged and begun, was so in the parent."""
        self._is_watching_line = self._is_looking = False
        self._rests_until = None
        self._opening = []

    # -- told by the pool ----------------------------------------------------------------------------------

    def used(self) -> None:
        """A checkout took more than an idle connection: there is something to look after from now on."""
        if not self._is_looking and (self._upkeep is not None or self._life.leak_threshold is not None):
            self._is_looking = True
            keeper.nudge(self)

    def line_formed(self) -> None:
        """Somebody waits."""
        if not self._is_watching_line:
            self._is_watching_line = True
            keeper.nudge(self, self._pool.cluster.resilience.queue.target)

    def opened(self, record: Any, now: float) -> None:
        """A record has a new connection."""
        record.opened_at = now
        record.dozed = False
        record.uses_left = self._life.max_uses or float("inf")
        if self._upkeep is not None:
            record.retire_at = self._upkeep.retire_at(now)
            self._upkeep.opened()
        # It may lie idle without ever having been checked out, as after ``warm``.
        self.used()

    def open_failed(self) -> None:
        if self._upkeep is not None:
            self._upkeep.open_failed(monotonic())

    def rest(self) -> None:
        """A slot rests, because its connection could not be opened."""
        if self._rests_until is None:
            pause = 0.1 * (0.5 + random.random())
            self._rests_until = monotonic() + pause
            keeper.nudge(self, pause)

    def checked_out(self, record: Any) -> None:
        """In a pool whose checkins, too, go the long way."""
        record.uses_left -= 1
        record.owes = True
        if self._life.leak_threshold is not None:
            record.reported = False
            record.place = here(skip=2)

    # -- called by the keeper ------------------------------------------------------------------------------

    def tend(self, now: float) -> float | None:
        """Do what is due; seconds until more may be, None: not before somebody uses the pool again."""
        again = [self._tend_line(), self._tend_rest(now), self._tend_leaks(now), self._tend_connections(now)]
        waits = [seconds for seconds in again if seconds is not None]
        return min(waits) if waits else None

    def _tend_line(self) -> float | None:
        self._is_watching_line = False
        again = self._slots.shed_stalled()
        self._is_watching_line = again is not None
        return again

    def _tend_rest(self, now: float) -> float | None:
        until = self._rests_until
        if until is None:
            return None
        if now < until:
            return until - now
        self._rests_until = None
        self._slots.thaw()
        return None

    def _tend_leaks(self, now: float) -> float | None:
        threshold = self._life.leak_threshold
        if threshold is None:
            return None
        again: float | None = None
        for record in self._slots.out():
            left = record.since + threshold - now
            if left > 0:
                again = left if again is None else min(again, left)
            elif not record.reported:
                record.reported = True
                self._pool.node.tally.leaks += 1
                # Listeners may take their time, and every pool waits for the keeper.
                _in_thread(functools.partial(self._report, self._pool.holders((record,))))
        return again if again is not None or not self._is_looking else threshold

    def _report(self, found: list[Holder]) -> None:
        for holder in found:
            self._pool.cluster.emit(ConnectionLeaked(holder=holder))
            logger.warning(
                "a connection to %s has been out for %s; checked out at:\n%s",
                holder.node,
                describe_holder(holder),
                "".join(holder.stack),
            )

    def _tend_connections(self, now: float) -> float | None:
        upkeep = self._upkeep
        if upkeep is None or not self._is_looking:
            return None
        slots = self._slots
        if not slots.keep:
            self._is_looking = False
            return None  # another pool has taken this one's place
        for record in slots.out():
            if record.retire_at <= now:
                record.owes = True
        self._is_looking = False  # before the look: who comes after it has to say so
        orders: Orders[Any] = upkeep.look(
            slots.idle.copy(), slots.dozing.copy(), slots.total, self._opening.count(self._loop), now
        )
        slots.put_to_sleep(orders.doze)
        again = orders.next_look
        if orders.open and self._pool.cluster.draining_since is None and not self._begin_to_open(orders.open):
            again = _OPEN_AGAIN if again is None else min(again, _OPEN_AGAIN)
        if orders.retire or orders.ping:
            self._aside(lambda: self._carry_out(orders))
        if again is not None:
            self._is_looking = True
        return again

    @property
    def _loop(self) -> asyncio.AbstractEventLoop | None:
        return getattr(self._pool, "loop", None)

    def _begin_to_open(self, connections: int) -> bool:
        """False: not now."""
        if not self.may_open or self._pool.node.breaker.permit is None:
            return False
        loop = self._loop
        for _ in range(connections):
            # Two connections may have been opened at once: each takes out what stands for it, in one operation.
            self._opening.append(loop)
            if not self._aside(functools.partial(self._open_one, loop)):
                self._opening.remove(loop)
                return False
        return True

    # -- done aside ----------------------------------------------------------------------------------------

    def _carry_out(self, orders: Orders[Any]) -> None:
        for record, why in orders.retire:
            if self._slots.withdraw(record):
                self._slots.discard(record, why.value)
        pool = self._pool
        for record in orders.ping:
            if not self._slots.withdraw(record):
                continue
            try:
                alive = answers(pool.cluster.dialect, record.dbapi_connection)
                record.dozed = False
                if not alive:
                    pool.node.tally.count_retired("keepalive")
                    record.invalidate()
            except BaseException as error:
                record.invalidate(error)  # half asked, it is fit for nobody
                raise
            finally:
                self._slots.give_back(record)

    def _open_one(self, loop: asyncio.AbstractEventLoop | None) -> None:
        pause = _OPEN_AGAIN
        try:
            if self._slots.keep and self._pool.opening.open_in_background():
                pause = 0.0
        finally:
            with contextlib.suppress(ValueError):  # a fork, meanwhile
                self._opening.remove(loop)
            # Whatever came of it, more may be missing; and nobody else may ever look.
            self._is_looking = True
            keeper.nudge(self, pause)

    async def finish(self) -> None:
        """Wait a moment for what is being done in this loop: at the loop's end it would be cancelled half-way, of
        which drivers complain."""
        await asyncio.sleep(0)  # what has been said to the loop, it has begun
        loop = asyncio.get_running_loop()
        running = [task for task, whose in tuple(_tasks.items()) if whose is self and task.get_loop() is loop]
        if running:
            await asyncio.wait(running, timeout=_LAST_MOMENT)

    def _aside(self, work: Callable[[], None]) -> bool:
        """Have ``work`` done without waiting for it; its errors are logged. False: it cannot be done now."""
        if not self._pool.cluster.dialect.is_async:
            return _in_thread(work)
        loop = self._loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(_spawn, self, work)
        except RuntimeError:
            return False  # closed, and its connections are of no use any more
        return loop is not None


_tasks: dict[asyncio.Task[Any], PoolUpkeep] = {}
"""What is being done, and whose it is. Strong references: a loop keeps only weak ones to its tasks."""


def in_upkeep() -> bool:
    """Whether this runs in a task in which connections are looked after, rather than used."""
    return running_loop() is not None and asyncio.current_task() in _tasks


def _spawn(whose: PoolUpkeep, work: Callable[[], None]) -> None:
    task = asyncio.ensure_future(greenlet_spawn(_logged, work))
    _tasks[task] = whose
    task.add_done_callback(_tasks.pop)


def _in_thread(work: Callable[[], None]) -> bool:
    try:
        threading.Thread(target=_logged, args=(work,), name="resilientdb-upkeep", daemon=True).start()
    except RuntimeError:
        return False  # out of threads, or the interpreter is about to exit
    return True


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        logger.warning("looking after a pool's connections failed", exc_info=True)
