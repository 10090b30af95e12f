"""The connections of one node's pool: which are idle, which are out, and who gets the next one.

The decisions are ``policy.saturation``'s; here they meet the connections. What is decided under the lock is done
after it: callers are woken, connections closed, errors made. Nothing of the user's runs in the section.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import TYPE_CHECKING, Any

from resilientdb.engine.holders import mine
from resilientdb.policy.lifecycle import Retirement
from resilientdb.policy.saturation import Admission, Lane, Refusal
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.section import Reentered, Section

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterable

    from resilientdb.engine.door import Record
    from resilientdb.engine.tally import Tally
    from resilientdb.runtime.waiters import Waiter

__all__ = ["Slots"]

logger = logging.getLogger("resilientdb")


class Slots:
    """The slots of one pool with their records.

    A healthy checkout takes from ``idle`` and a healthy checkin puts back there, each one atomic operation and no
    lock. What needs more than that (opening, waiting, handing on, closing) is decided in ``section``, which guards
    ``admission``, ``dozing`` and the shells. No wake-up is lost between the two: whoever joins the line looks at
    ``idle`` again afterwards, whoever puts a connection back looks at the line again afterwards, and one of them
    sees the other.
    """

    def __init__(
        self,
        *,
        admission: Admission[Waiter],
        keep: int,
        idle: deque[Any],
        newest_first: bool,
        make: Callable[[], Record],
        close: Callable[[Record], None],
        refuse: Callable[[Waiter, Refusal], BaseException],
        tally: Tally,
        doubtful: bool = False,
    ) -> None:
        """``make``: a record without a connection. ``close``: close a record's connection. ``refuse``: the error
        of a waiter that is sent away, made when it has left the line. ``doubtful``: each idle connection is to be
        asked whether it lives before it is used."""
        self.section = Section(self._mend)
        self.admission = admission
        self.idle = idle
        """Connections nobody holds, fit for use."""
        self.dozing: list[Any] = []
        """Idle connections that nobody has used for so long that they must be asked whether they live."""
        self.next_idle: Callable[[], Any] = idle.pop if newest_first else idle.popleft
        self.keep = keep
        """Most idle connections; 0 once another pool has taken this one's place."""
        self.records: dict[int, weakref.ref[Record]] = {}
        """All records with a slot that exist; looked at without the lock, by way of a copy."""
        self._tally = tally
        self._doubtful = doubtful
        self._make = make
        self._close = close
        self._refuse = refuse
        self._tokens: set[object] = set()
        """One for each slot: what there is to count, should the count be wrong."""
        self._shells: list[Any] = []
        """Records whose connection was lost: what the user keeps in ``record_info`` outlives it."""
        self._cold: list[Any] = []
        """Records whose connection could not be opened, resting."""
        self._parents: list[Any] = []
        """Records of the process that this one was forked from, kept so that nobody tells their server."""

    def _mend(self) -> None:
        """An asynchronous exception has ended a decision half-way: slots are those that there are tokens of."""
        self.admission.recount(len(self._tokens))

    # -- out -----------------------------------------------------------------------------------------------

    def try_take(self) -> Any:
        """A record, for a slot that is now the caller's; its connection may be None: to be opened. None: there is
        no slot left; or somebody waits for one, and ``join`` will know."""
        return None if self.admission.waiting else self.section.run(self._take)

    def join(self, waiter: Waiter, lane: Lane, remaining: float | None) -> Any:
        """As ``try_take``, but where there is no slot left the caller stands in line (None), or may not (a
        ``Refusal``)."""
        return self.section.run(self._take_or_join, waiter, lane, remaining)

    def leave(self, waiter: Waiter) -> bool:
        """Leave the line; False when a slot (or a refusal) was given in the meantime."""
        return self.section.run(self._leave, waiter)

    def _leave(self, waiter: Waiter) -> bool:
        return self.admission.leave(waiter, monotonic())

    def _take(self) -> Any:
        record = self._nearest()
        if record is None and self.admission.try_take():
            record = self._bare()
        return record

    def _nearest(self) -> Any:
        """An idle record, rather one that is known to be alive; None: there is none."""
        record = self._take_idle()
        return record if record is not None or not self.dozing else self.dozing.pop()

    def _bare(self) -> Any:
        """A record without a connection, for a slot that has none."""
        record = self._shells.pop() if self._shells else self._make()
        record.owns_slot = True
        record.token = object()
        self._tokens.add(record.token)
        key = id(record)
        self.records[key] = weakref.ref(record, lambda _gone: self.records.pop(key, None))
        return record

    def _take_or_join(self, waiter: Waiter, lane: Lane, remaining: float | None) -> Any:
        record = self._take()
        if record is None and self._lacks_record():
            self._find_lost()
            record = self._take()
        if record is not None:
            return record
        waiter.at = self
        answer = self.admission.join(waiter, lane, waiter.since, remaining)
        if answer is Refusal.DEADLOCK and self.idle:
            # Somebody else has just given back what the caller, or one of those in line, was thought to hold.
            self._match()
            return self._take_or_join(waiter, lane, remaining)
        if isinstance(answer, Refusal):
            self._tally.refused[answer] += 1
            return answer
        self._tally.waited += 1
        if answer is not None:
            self._send_away((answer,), Refusal.DISPLACED)
        self._match()
        return None

    def _take_idle(self) -> Any:
        """An idle record, or None: another thread, which needs no lock for it, may take the last at any moment."""
        if not self.idle:
            return None
        try:
            return self.next_idle()
        except IndexError:
            return None

    # -- back ----------------------------------------------------------------------------------------------

    def give_back(self, record: Any) -> None:
        """Hand a slot on, with its connection if there is one."""
        if record.inherited:
            self._parents.append(record)
            return
        try:
            end = self.section.run(self._settle, record)
        except Reentered:
            self.section.afterwards(functools.partial(self._give_back_late, record))
            return
        if end is not None:
            self.discard(record, end)

    def reclaim(self, token: object) -> None:
        """A slot's record was forgotten, whatever became of its connection."""
        if self.section.is_inside():
            self.section.afterwards(functools.partial(self.reclaim, token))
        else:
            self.section.run(self._settle_without_record, token)

    def _settle_without_record(self, token: object) -> None:
        if token in self._tokens:  # it may have been missed and found already
            self._tokens.discard(token)
            self._settle(None)

    def _lacks_record(self) -> bool:
        """Whether there are more slots than records: an asynchronous exception that arrives in a finalizer is
        swallowed there, and with it what the finalizer was about to say."""
        return len(self._tokens) + len(self._shells) > len(self.records)

    def _find_lost(self) -> None:
        """Hand on the slots whose record exists no longer, though nobody has said so."""
        records = [reference() for reference in list(self.records.values())]
        alive = {record.token for record in records if record is not None}
        for token in self._tokens - alive:
            self._settle_without_record(token)

    def _give_back_late(self, record: Any) -> None:
        try:
            self.give_back(record)
        except Exception:
            logger.exception("a connection that was forgotten could not be closed")

    def _settle(self, record: Any) -> str | None:
        """Hand the slot on; or say why its connection must be closed first. None: its record exists no longer."""
        admission = self.admission
        now = monotonic()
        lost = record is None or record.dbapi_connection is None
        if not lost:
            why = self._end_of(record, now)
            if why is not None:
                return why
        if lost and record is not None:
            self._tokens.discard(record.token)  # first the book, then the count: see _mend
        shed, waiter = admission.serve(now, lost=lost)
        self._send_away(shed, Refusal.SHED)
        if waiter is not None:
            self._grant(waiter, record if record is not None else self._bare())
        elif lost:
            self._put_away(record)
        elif self.idle_count >= self.keep:
            return "surplus"
        else:
            self._put_by(record)
        return None

    def _put_by(self, record: Any) -> None:
        """Nobody waits for it: it is idle now."""
        if self._doubtful:
            record.dozed = True
            self.dozing.append(record)
        else:
            self.idle.append(record)

    def _end_of(self, record: Record, now: float) -> str | None:
        """Why a connection that works is to be closed rather than kept or handed on."""
        if record.retire_at <= now:
            return Retirement.AGE.value
        if record.uses_left <= 0:
            return Retirement.USES.value
        # A pool that has been replaced keeps none, not for those who still wait either.
        return None if self.keep else "disposed"

    def _put_away(self, record: Any) -> None:
        """Keep a record that has lost its connection, and with it what its user has put into it."""
        if record is not None:
            record.owns_slot = False
            self._tokens.discard(record.token)
            if record.opened_at:
                self._shells.append(record)

    def discard(self, record: Any, why: str) -> None:
        """Close a connection that nobody holds, then give its slot back, whatever a listener makes of it."""
        # In this order, so that the server never sees more than the limit.
        self._tally.count_retired(why)
        try:
            self._close(record)
        finally:
            record.dbapi_connection = None
            record.opened_at = 0.0  # and the record ends with it
            self.give_back(record)

    def open_slot(self) -> Any:
        """A new slot, to be opened for nobody in particular; None: there is none left, or somebody waits for it."""
        return self.section.run(self._open_slot)

    def _open_slot(self) -> Any:
        return self._bare() if not self.admission.waiting and self.admission.try_take() else None

    def rebalance(self) -> None:
        """After two threads acted at once: nobody waits beside an idle connection, none is kept too many."""
        if self.section.is_inside():
            return  # whoever is inside looks again when leaving
        surplus = self.section.run(self._rebalance)
        if surplus is not None:
            self.give_back(surplus)

    def _rebalance(self) -> Any:
        self._match()
        return self._take_idle() if self.idle_count > self.keep else None

    def _match(self) -> None:
        """Give idle connections to those who wait, where both came to be at once."""
        while self.admission.waiting and (record := self._take_idle()) is not None:
            shed, waiter = self.admission.serve(monotonic())
            self._send_away(shed, Refusal.SHED)
            if waiter is None:
                self.idle.append(record)
                return
            self._grant(waiter, record)

    def _grant(self, waiter: Waiter, record: Any) -> None:
        record.owns_slot = True
        self._tokens.add(record.token)
        waiter.granted = record
        self.section.afterwards(functools.partial(self._wake, waiter))

    def _wake(self, waiter: Waiter) -> None:
        if not waiter.wake():
            self.take_back(waiter)  # its event loop exists no longer

    def take_back(self, waiter: Waiter) -> None:
        """A waiter that was served is not there any more: what it was given is somebody else's. Once, whoever finds
        out first."""
        granted = self.section.run(_ungrant, waiter)
        if granted is not None:
            self.give_back(granted)

    # -- when connecting fails -----------------------------------------------------------------------------

    def connect_failed(self, record: Any, outcome: Callable[[], BaseException]) -> bool:
        """The connection for ``record``'s slot could not be opened.

        The next in line would only meet the same. While others hold connections, it waits for one of those, and
        the slot rests: True; ``thaw`` is to be called after a pause. If nobody does, nothing will ever come back:
        all who wait are told ``outcome`` now.
        """
        return self.section.run(self._connect_failed, record, outcome)

    def _connect_failed(self, record: Any, outcome: Callable[[], BaseException]) -> bool:
        admission = self.admission
        if admission.waiting and admission.total > len(self._cold) + 1:
            self._cold.append(record)
            return True
        self._dismiss(outcome)
        self._settle(record)
        return False

    def thaw(self) -> None:
        """Those whose slots rested may try again."""
        while (record := self.section.run(self._take_cold)) is not None:
            self.give_back(record)

    def _take_cold(self) -> Any:
        return self._cold.pop() if self._cold else None

    # -- the line ------------------------------------------------------------------------------------------

    def dismiss(self, outcome: Callable[[], BaseException]) -> None:
        """Send everybody in line away with an error of their own."""
        self.section.run(self._dismiss, outcome)

    def _dismiss(self, outcome: Callable[[], BaseException]) -> None:
        for waiter in self.admission.dismiss():
            self._tell(waiter, outcome)

    def shed_stalled(self) -> float | None:
        """Look after a line that does not move; seconds until it should be looked at again, None: nobody waits."""
        return self.section.run(self._shed_stalled)

    def _shed_stalled(self) -> float | None:
        now = monotonic()
        self._send_away(self.admission.stalled(now), Refusal.SHED)
        return self.admission.next_stall(now)

    def _send_away(self, waiters: Iterable[Waiter], why: Refusal) -> None:
        """Tell those who were taken out of the line that they will not be served."""
        for waiter in waiters:
            theirs = waiter.at
            theirs._tally.refused[why] += 1  # noqa: SLF001
            self._tell(waiter, functools.partial(theirs._refuse, waiter, why))  # noqa: SLF001

    def _tell(self, waiter: Waiter, outcome: Callable[[], BaseException]) -> None:
        waiter.refusal = outcome
        self.section.afterwards(waiter.wake)

    # -- what lies idle ------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Connections: open, being opened, or lost and held on to by their users."""
        return self.admission.total

    @property
    def waiting(self) -> int:
        """Callers of this pool in line."""
        return self.admission.waiting

    def note(self) -> str:
        """What else there is to be said about the counts."""
        return ""

    @property
    def idle_count(self) -> int:
        return len(self.idle) + len(self.dozing)

    def lost(self) -> int:
        """Records without a connection that ``QueuePool`` would count as in the pool, up to its size."""
        return max(0, min(len(self._shells), self.keep - self.idle_count))

    def put_to_sleep(self, records: Iterable[Any]) -> None:
        """Have idle records validated before they are used, those of them that are idle still."""
        self.section.run(self._put_to_sleep, records)

    def _put_to_sleep(self, records: Iterable[Any]) -> None:
        for record in records:
            if not self.admission.waiting and self._remove_idle(record):
                record.dozed = True
                self.dozing.append(record)

    def withdraw(self, record: Any) -> bool:
        """Take this very record, if it is idle; it is then the caller's, with its slot."""
        return self.section.run(self._withdraw, record)

    def _withdraw(self, record: Any) -> bool:
        if record in self.dozing:
            self.dozing.remove(record)
            return True
        return self._remove_idle(record)

    def _remove_idle(self, record: Any) -> bool:
        try:
            self.idle.remove(record)
        except ValueError:
            return False  # taken in the meantime
        return True

    def close_idle(self, why: str) -> None:
        while (record := self.section.run(self._take_any_idle)) is not None:
            self.discard(record, why)
        self.section.run(self._shells.clear)

    def _take_any_idle(self) -> Any:
        return self._nearest()

    def out(self) -> list[Any]:
        """The records that are in somebody's hands."""
        # A list: a tuple is allocated when the iteration has begun, and a collection in between may change the dict.
        records = [reference() for reference in list(self.records.values())]
        return [record for record in records if record is not None and record.fairy_ref is not None]

    def mine(self, me: Any) -> list[Any]:
        """The records that the caller itself holds, of those that count against the same limit."""
        return mine(self.out(), me)

    def after_fork(self) -> None:
        """In the child: the connections are the parent's, and so are the threads that waited."""
        self.section = Section(self._mend)
        self.admission.dismiss()
        # Kept without a word to the server, also those that are still out here: it would be the parent's
        # connection that hears it.
        for record in [reference() for reference in list(self.records.values())]:
            if record is not None:
                record.inherited = True
                record.owns_slot = False
        self._parents += [*self.idle, *self.dozing]
        self.idle.clear()
        self.dozing.clear()
        self._shells.clear()
        self._cold.clear()
        self.records.clear()
        self._tokens.clear()
        self.admission.total = 0


def _ungrant(waiter: Waiter) -> Any:
    granted, waiter.granted = waiter.granted, None
    return granted
