"""A pool's connections are looked after here, in the background: opened, asked, retired, missed.

What is due is ``policy.lifecycle``'s to decide; when, is the keeper's, one thread for all pools. What takes time is
done aside, in a thread of its own or, for an asynchronous driver, in a task of the pool's loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import traceback
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import greenlet_spawn
from resilientdb.engine.holders import describe_holder
from resilientdb.engine.ping import answers
from resilientdb.events import ConnectionLeaked
from resilientdb.policy.lifecycle import Orders, Upkeep
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.keeper import keeper

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.config import Lifecycle
    from resilientdb.engine.pool import QueueDoor
    from resilientdb.engine.slots import Slots

__all__ = ["PoolUpkeep"]

logger = logging.getLogger("resilientdb")

_OPEN_AGAIN = 1.0
"""Seconds until a pool looks again whether its node can be connected to, while the circuit says no."""


class PoolUpkeep:
    """One pool's. ``tend`` is called by the keeper alone; everything else by whoever uses the pool."""

    def __init__(self, pool: QueueDoor, slots: Slots, life: Lifecycle) -> None:
        self._pool = pool
        self._slots = slots
        self._life = life
        # A database in this process has no sessions to be lost, and may end with its last connection.
        self._upkeep = Upkeep(life, random.Random().random) if pool.cluster.has_server else None
        self._is_watching_line = False
        self._is_looking = False
        self._rests_until: float | None = None
        self._opening = 0

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
            record.stack = tuple(traceback.format_list(traceback.extract_stack()[:-1]))

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
                self._report(record)
        return again if again is not None or not self._is_looking else threshold

    def _report(self, record: Any) -> None:
        self._pool.node.tally.leaks += 1
        for holder in self._pool.holders((record,)):
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
            slots.idle.copy(), slots.dozing.copy(), slots.total, self._opening, now
        )
        slots.put_to_sleep(orders.doze)
        again = orders.next_look
        if orders.open and self._pool.node.breaker.permit is None:
            again = _OPEN_AGAIN if again is None else min(again, _OPEN_AGAIN)
        else:
            for _ in range(orders.open):
                self._opening += 1
                self._aside(self._open_one)
        if orders.retire or orders.ping:
            self._aside(lambda: self._carry_out(orders))
        if again is not None:
            self._is_looking = True
        return again

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
                alive = answers(
                    pool.cluster.dialect,
                    pool.cluster.driver,
                    record.dbapi_connection,
                    self._life.validation_timeout,
                )
                if not alive:
                    pool.node.tally.count_retired("keepalive")
                    record.invalidate()
            finally:
                self._slots.give_back(record)

    def _open_one(self) -> None:
        try:
            self._pool.open_in_background()
        finally:
            self._opening -= 1
            keeper.nudge(self)

    def _aside(self, work: Callable[[], None]) -> None:
        """Have ``work`` done without waiting for it; its errors are logged."""
        loop = getattr(self._pool, "loop", None)
        if not self._pool.cluster.dialect.is_async:
            threading.Thread(target=_logged, args=(work,), name="resilientdb-upkeep", daemon=True).start()
        elif loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_spawn, work)


_tasks: set[asyncio.Task[Any]] = set()
"""Strong references: a loop keeps only weak ones to its tasks."""


def _spawn(work: Callable[[], None]) -> None:
    task = asyncio.ensure_future(greenlet_spawn(_logged, work))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        logger.warning("looking after a pool's connections failed", exc_info=True)
