"""One limit over several engines of a process: a limiter that an Engine and an AsyncEngine share, by name.

Each engine keeps connections of its own, as it must. What they share is how many may be *in use* at once at a node,
and the line in front of them: what one gives back, the next in line may have, in whichever engine it waits. It is
given a connection of its own engine: idle, or to be opened. So no thread ever waits for an event loop, and no
loop for a thread: a waiter in one is woken by the other, and that is all they have to do with each other.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import running_loop, task_in
from resilientdb.engine.holders import mine
from resilientdb.engine.slots import Slots
from resilientdb.errors import ConfigurationError
from resilientdb.policy.saturation import Admission, Refusal
from resilientdb.runtime.callers import Flow, current_flow
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.section import Section

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from resilientdb.config import SaturationQueue
    from resilientdb.policy.saturation import Lane
    from resilientdb.runtime.waiters import Waiter

__all__ = ["Limiter", "SharedSlots", "limiter", "task_or_flow"]


class Limiter:
    """What the pools of one node share, guarded by ``section``. Its slots are not connections but the right to use
    one."""

    def __init__(self, name: str, admission: Admission[Waiter], rules: dict[str, object]) -> None:
        self.name = name
        self.admission = admission
        self.rules = rules
        """All else that the line goes by, by the name of the option."""
        self.section = Section(admission.recount)
        self._pools: dict[int, weakref.ref[SharedSlots]] = {}
        self._process = os.getpid()

    def join(self, slots: SharedSlots) -> None:
        pools, key = self._pools, id(slots)
        pools[key] = weakref.ref(slots, lambda _gone: pools.pop(key, None))

    def pools(self) -> list[SharedSlots]:
        """Those in use, and those replaced whose connections are still out."""
        # A list: a tuple is allocated when the iteration has begun, and a collection in between may change the dict.
        pools = (reference() for reference in list(self._pools.values()))
        return [slots for slots in pools if slots is not None]

    def differences(self, admission: Admission[Waiter], rules: dict[str, object]) -> list[str]:
        """What another engine would have otherwise."""
        ours, theirs = _with_size(self.admission, self.rules), _with_size(admission, rules)
        return [
            f"{option} is {ours[option]} in one and {theirs[option]} in the other"
            for option in ours
            if ours[option] != theirs[option]
        ]

    def after_fork(self) -> None:
        """In the child; each of the pools says so, and the first of them is heard."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self.section = Section(self.admission.recount)
            self.admission.dismiss()
            self.admission.total = 0
            for slots in self.pools():
                slots.begin_again()


def _with_size(admission: Admission[Waiter], rules: dict[str, object]) -> dict[str, object]:
    size = {"pool_size + max_overflow": admission.limit, "queue.max_waiting": admission.max_waiting}
    return {**{option: "unlimited" if most is None else most for option, most in size.items()}, **rules}


_limiters: weakref.WeakValueDictionary[tuple[str, str], Limiter] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def limiter(
    name: str, node: str, admission: Admission[Waiter], queue: SaturationQueue, *, patient: bool
) -> Limiter:
    """The limiter of that name for a node, with ``admission`` if it is new. Lives as long as a pool that uses it.

    ``patient``: whether callers wait as long as they said, overload or not. Raises ``ConfigurationError`` when
    another engine has made it by other rules: there is one line, and it goes by one set of them.
    """
    rules: dict[str, object] = {
        "queue.target": queue.target,
        "queue.interval": queue.interval,
        "queue.sheddable_plus_share": queue.sheddable_plus_share,
        "queue.sheddable_share": queue.sheddable_share,
        "an explicit pool_timeout": "given" if patient else "not given",
    }
    known = _known_or_new(name, node, admission, rules)
    if known.differences(admission, rules):
        # The other engine may be one that was dropped, and only not collected yet.
        del known
        gc.collect()
        known = _known_or_new(name, node, admission, rules)
    if differences := known.differences(admission, rules):
        raise ConfigurationError(
            f"engines that share the limiter {name!r} (queue.limiter) have one limit and one line at {node}, and "
            f"must agree about them: {'; '.join(differences)}",
            key="queue.limiter",
            value=name,
        )
    return known


def _known_or_new(name: str, node: str, admission: Admission[Waiter], rules: dict[str, object]) -> Limiter:
    with _lock:
        known = _limiters.get((name, node))
        if known is None:
            known = _limiters[name, node] = Limiter(name, admission, rules)
    return known


def _after_fork() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # it may be held by a thread that does not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def task_or_flow() -> asyncio.Task[Any] | Flow:
    """Who asks a pool of threads: where it is a task that does so, the same as asks an AsyncEngine's pool."""
    loop = running_loop()
    task = None if loop is None else task_in(loop)
    return current_flow() if task is None else task


class SharedSlots(Slots):
    """The connections of one pool, of which only so many are in use as the limiter lets it have.

    Every checkout and every checkin goes through the section, which is the limiter's. An idle record owns no slot;
    a record that is out, being opened, asked or closed does.
    """

    def __init__(self, limiter: Limiter, **options: Any) -> None:
        super().__init__(admission=limiter.admission, **options)
        self._limiter = limiter
        self.section = limiter.section
        self._total = 0
        self._waiters: dict[Waiter, None] = {}
        """Those of this pool who stand in the common line."""
        limiter.join(self)

    @property
    def total(self) -> int:
        return self._total

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def note(self) -> str:
        return f"; {self.admission.total} in use by all who share the limiter {self._limiter.name!r}"

    # -- out -----------------------------------------------------------------------------------------------

    def _take(self) -> Any:
        return self._use_one() if self.admission.try_take() else None

    def _use_one(self) -> Any:
        """A record for a slot that is this pool's now."""
        record = self._nearest()
        if record is None:
            record = self._bare()
            self._total += 1
        record.owns_slot = True
        return record

    def _take_or_join(self, waiter: Waiter, lane: Lane, remaining: float | None) -> Any:
        answer = super()._take_or_join(waiter, lane, remaining)
        if answer is None:
            self._waiters[waiter] = None
        return answer

    def _leave(self, waiter: Waiter) -> bool:
        self._waiters.pop(waiter, None)
        return super()._leave(waiter)

    def _open_slot(self) -> Any:
        limit = self.admission.limit
        if self.admission.waiting or (limit is not None and self._total >= limit):
            return None
        if not self.admission.try_take():
            return None
        self._total += 1
        return self._bare()

    def _lacks_record(self) -> bool:
        return False  # whether a record owns a slot changes with each use: its token does not tell

    def mine(self, me: Any) -> list[Any]:
        """Of all the pools: a task that has a connection of its AsyncEngine and waits for one of the Engine's keeps
        the one it has, and the other way round. A thread that it has started may wait without it."""
        return mine([record for slots in self._limiter.pools() for record in slots.out()], me)

    # -- back ----------------------------------------------------------------------------------------------

    def _settle(self, record: Any) -> str | None:
        now = monotonic()
        lost = record is None or record.dbapi_connection is None
        if lost:
            self._total -= 1
            self._put_away(record)
        else:
            why = self._end_of(record, now)
            if why is not None:
                return why
            record.owns_slot = False
            self._put_by(record)
        # Lost in any case: the next in line takes the slot without this connection, unless they are of one pool.
        shed, waiter = self.admission.serve(now, lost=True)
        self._send_away(shed, Refusal.SHED)
        if waiter is not None:
            theirs = waiter.at
            theirs._grant(waiter, theirs._use_one())  # noqa: SLF001 - of the same class, in the same section
        if not lost and self.idle_count > self.keep and self._withdraw(record):
            return "surplus"
        return None

    def _grant(self, waiter: Waiter, record: Any) -> None:
        self._waiters.pop(waiter, None)
        super()._grant(waiter, record)

    def _match(self) -> None:
        """An idle connection is no slot here."""

    def _rebalance(self) -> Any:
        """Nothing comes back but through ``_settle``, which leaves nobody waiting and none too many."""
        return None

    # -- idle connections that are about to be asked, or closed --------------------------------------------

    def _take_over(self, record: Any) -> None:
        """It is in use meanwhile, whatever the limit: that it is not idle any more cannot wait for a slot."""
        record.owns_slot = True
        self.admission.total += 1

    def _withdraw(self, record: Any) -> bool:
        taken = super()._withdraw(record)
        if taken:
            self._take_over(record)
        return taken

    def _take_any_idle(self) -> Any:
        record = super()._take_any_idle()
        if record is not None:
            self._take_over(record)
        return record

    # -- this pool's alone ---------------------------------------------------------------------------------

    def _connect_failed(self, record: Any, outcome: Callable[[], BaseException]) -> bool:
        # The other engine's connections are of no use to those who wait here, nor is this failure theirs.
        if self._waiters and self._total - self.idle_count > len(self._cold) + 1:
            self._cold.append(record)
            return True
        self._dismiss(outcome)
        self._settle(record)
        return False

    def _tell(self, waiter: Waiter, outcome: Callable[[], BaseException]) -> None:
        waiter.at._waiters.pop(waiter, None)  # noqa: SLF001
        super()._tell(waiter, outcome)

    def _dismiss(self, outcome: Callable[[], BaseException]) -> None:
        # Those of this pool only: what happened to its node's circuit is not the other engine's.
        for waiter in tuple(self._waiters):
            if self.admission.leave(waiter, monotonic()):
                self._tell(waiter, outcome)

    # -- after a fork --------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        super().after_fork()
        self._limiter.after_fork()
        self.section = self._limiter.section

    def begin_again(self) -> None:
        """In the child, once for all pools of the limiter, those replaced included: whom nobody else tells."""
        self.section = self._limiter.section
        self._total = 0
        self._waiters.clear()
        for record in self.out():
            record.inherited = True
            record.owns_slot = False
