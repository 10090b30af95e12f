"""One limit over several engines of a process: a limiter that an Engine and an AsyncEngine share, by name.

Each engine keeps connections of its own, as it must. What they share is how many may be *in use* at once at a node,
and the line in front of them: what one gives back, the next in line may have, in whichever engine it waits. It is
given a connection of its own engine: idle, or to be opened. So no thread ever waits for an event loop, and no
loop for a thread: a waiter in one is woken by the other, and that is all they have to do with each other.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from resilientdb.engine.slots import Slots
from resilientdb.errors import ConfigurationError
from resilientdb.policy.saturation import Admission, Refusal
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.section import Section

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.policy.saturation import Lane
    from resilientdb.runtime.waiters import Waiter

__all__ = ["Limiter", "SharedSlots", "limiter"]


class Limiter:
    """What the pools of one node share. Its slots are not connections but the right to use one."""

    def __init__(self, name: str, admission: Admission[Waiter]) -> None:
        self.name = name
        self.admission = admission
        self.section = Section()
        self._process = os.getpid()

    def after_fork(self) -> None:
        """In the child; each of the pools says so, and the first of them is heard."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self.section = Section()
            self.admission.dismiss()
            self.admission.total = 0


_limiters: weakref.WeakValueDictionary[tuple[str, str], Limiter] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def limiter(name: str, node: str, admission: Admission[Waiter]) -> Limiter:
    """The limiter of that name for a node, with ``admission`` if it is new. Lives as long as a pool that uses it.

    Raises ``ConfigurationError`` when another engine has given it another size.
    """
    with _lock:
        known = _limiters.get((name, node))
        if known is None:
            known = _limiters[name, node] = Limiter(name, admission)
    theirs, ours = known.admission, admission
    if (theirs.limit, theirs.max_waiting) != (ours.limit, ours.max_waiting):
        raise ConfigurationError(
            f"engines that share the limiter {name!r} must agree about its size at {node}: at most {theirs.limit} "
            f"connections (pool_size + max_overflow) and {theirs.max_waiting} waiting (queue.max_waiting) in one, "
            f"{ours.limit} and {ours.max_waiting} in the other",
            key="queue.limiter",
            value=name,
        )
    return known


class SharedSlots(Slots):
    """The connections of one pool, of which only so many are in use as the limiter lets it have."""

    def __init__(self, limiter: Limiter, **options: Any) -> None:
        super().__init__(admission=limiter.admission, **options)
        self._limiter = limiter
        self.section = limiter.section
        self._in_use = 0
        self._waiters: set[Waiter] = set()
        """Those of this pool who stand in the common line."""

    @property
    def total(self) -> int:
        return self._in_use + self.idle_count

    def _take(self) -> Any:
        if not self.admission.try_take():
            return None
        return self._use_one()

    def _use_one(self) -> Any:
        """A record for a slot that is this pool's now."""
        self._in_use += 1
        record = self._nearest()
        return record if record is not None else self._bare()

    def _take_or_join(self, waiter: Waiter, lane: Lane, remaining: float | None) -> Any:
        answer = super()._take_or_join(waiter, lane, remaining)
        if answer is None:
            self._waiters.add(waiter)
        return answer

    def _leave(self, waiter: Waiter) -> bool:
        self._waiters.discard(waiter)
        return super()._leave(waiter)

    def _settle(self, record: Any) -> str | None:
        now = monotonic()
        lost = record is None or record.dbapi_connection is None
        if not lost:
            why = self._end_of(record, now)
            if why is not None:
                return why
        self._in_use -= 1
        if lost:
            self._put_away(record)
        else:
            self.idle.append(record)
        shed, waiter = self.admission.serve(now, lost=True)
        self._send_away(shed, Refusal.SHED)
        if waiter is not None:
            theirs = waiter.at
            theirs._grant(waiter, theirs._use_one())  # noqa: SLF001 - of the same class, in the same section
        if not lost and self.idle_count > self.keep and self._remove_idle(record):
            self._take_over()
            return "surplus"
        return None

    def _take_over(self) -> None:
        """An idle connection is about to be closed: it is in use meanwhile, whatever the limit."""
        self._in_use += 1
        self.admission.total += 1

    def _withdraw(self, record: Any) -> bool:
        taken = super()._withdraw(record)
        if taken:
            self._take_over()
        return taken

    def _take_any_idle(self) -> Any:
        record = super()._take_any_idle()
        if record is not None:
            self._take_over()
        return record

    def _open_slot(self) -> Any:
        limit = self.admission.limit
        if self.admission.waiting or (limit is not None and self.total >= limit):
            return None
        if not self.admission.try_take():
            return None
        self._in_use += 1
        return self._bare()

    def _grant(self, waiter: Waiter, record: Any) -> None:
        self._waiters.discard(waiter)
        super()._grant(waiter, record)

    def _tell(self, waiter: Waiter, outcome: Callable[[], BaseException]) -> None:
        waiter.at._waiters.discard(waiter)  # noqa: SLF001
        super()._tell(waiter, outcome)

    def _match(self) -> None:
        """An idle connection is no slot here."""

    def _dismiss(self, outcome: Callable[[], BaseException]) -> None:
        # Those of this pool only: what happened to its node's circuit is not the other engine's.
        for waiter in tuple(self._waiters):
            if self.admission.leave(waiter):
                self._tell(waiter, outcome)

    def after_fork(self) -> None:
        super().after_fork()
        self._limiter.after_fork()
        self.section = self._limiter.section
        self._in_use = 0
        self._waiters.clear()
