"""Opening a pool's connections: for a caller, within its deadline; for nobody in particular, ahead of the callers.

Counted and timed here, all of them. When it fails, those who wait for the same must not each find it out for
themselves.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from resilientdb.engine import refusals
from resilientdb.errors import ResilienceError
from resilientdb.runtime.bounded import LeftBehind
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.engine.slots import Slots
    from resilientdb.engine.upkeep import PoolUpkeep
    from resilientdb.runtime.context import Deadline

__all__ = ["Opening", "was_shared"]


class Opening:
    """One pool's. ``physical`` makes a driver connection for a record, as ``Pool._invoke_creator`` does."""

    def __init__(
        self, pool: QueueDoor, slots: Slots, upkeep: PoolUpkeep, physical: Callable[[Any], Any]
    ) -> None:
        self._pool = pool
        self._slots = slots
        self._upkeep = upkeep
        self._tally = pool.node.tally
        self.physical = physical

    def create(self, record: Any) -> Any:
        """The pool's creator: every physical connection is opened here."""
        began = monotonic()
        connection = self.physical(record)
        self._tally.opened += 1
        if record is not None:
            now = monotonic()
            self._tally.create.add(now - began)
            self._upkeep.opened(record, now)
        return connection

    def open(self, record: Any, deadline: Deadline | None) -> None:
        """Open the connection of the slot held. The slot goes back if that fails."""
        try:
            self._pool.cluster.wake()
            if deadline is None:
                record.get_connection()
            else:
                self._open_elsewhere(record, deadline)
        except LeftBehind as left:
            # The slot is the business of whoever adopts.
            raise left.__cause__ or refusals.deadline_exceeded(self._pool, deadline) from None
        except Exception as error:
            self._failed(record, error)
            raise
        except BaseException:
            self._slots.give_back(record)
            raise

    def _open_elsewhere(self, record: Any, deadline: Deadline) -> None:
        """Connect where the caller need not wait for it longer than its deadline."""
        permit = self._pool.node.breaker.permit

        def adopt(_opened: Any, error: BaseException | None) -> None:
            if isinstance(error, Exception):
                self._pool.connect_failed(error, permit)
                self._failed(record, error)
            else:
                self._slots.give_back(record)

        self._pool.run_bounded(record.get_connection, deadline.remaining(), adopt)

    def open_one(self) -> bool:
        """Open one more connection for nobody in particular; False when there may be no more. Raises as connecting
        does."""
        record = self._slots.open_slot()
        if record is None:
            return False
        self.open(record, current_deadline())
        self._slots.give_back(record)
        return True

    def open_in_background(self) -> bool:
        """As ``open_one``; a failure is told to the breaker, and to nobody else. False: nothing was tried."""
        permit = self._pool.node.breaker.permit
        try:
            return self.open_one()
        except Exception as error:  # noqa: BLE001 - nobody is there to hear it
            self._pool.connect_failed(error, permit)
            return True

    def _failed(self, record: Any, error: Exception) -> None:
        if isinstance(error, ResilienceError):
            # The deadline of whoever connected, and of nobody else.
            self._slots.give_back(record)
            return
        self._tally.connect_failures += 1
        self._upkeep.open_failed()
        if self._slots.connect_failed(record, functools.partial(_same_failure, error)):
            self._upkeep.rest()


_SHARED = "_resilientdb_shared"
"""Marks a failure that is told to a caller to whom it did not happen itself."""


def was_shared(error: BaseException) -> bool:
    """Whether a failure to connect happened to another caller, and has been told to the breaker by it."""
    return getattr(error, _SHARED, False)


def _same_failure(error: Exception) -> Exception:
    """The failure as told to somebody who waited for the same: an object of its own, for its own traceback."""
    try:
        told = copy.copy(error)
        setattr(told, _SHARED, True)
    except Exception:  # noqa: BLE001 - a class whose objects cannot be copied or marked
        return error
    told.__cause__ = error
    return told
