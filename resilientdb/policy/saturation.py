"""Who may hold one of a node's connections, who waits, and who is next.

A **slot** is the place of one connection: open, being opened, or lost and to be opened again. There are at most
``limit`` of them. A caller who finds no idle connection takes a new slot; who finds none left waits in line, and
what is given back goes to the first in line directly (no newcomer can take it in between, as happens with a
condition variable): a slot with its connection, or, where the connection was lost, the slot alone. A slot that
has lost its connection and that nobody waits for ceases to be.

The line is bounded by number; the bound in time is kept by the waiter itself, who leaves when it is over.
Leaving and being served exclude each other: ``leave`` answers whether the waiter was still in line, and a
waiter who was served a moment before must take or return what it was given. So no slot is ever lost and none
is given twice, whoever times out or is cancelled when.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

__all__ = ["Admission", "Waiting"]


class Waiting(Protocol):
    """Somebody in line."""


W = TypeVar("W", bound=Waiting)


class Admission(Generic[W]):
    """The slots of one node. Not thread-safe: every method requires the owner's lock. All O(1)."""

    __slots__ = ("limit", "line", "max_waiting", "total", "waited")

    def __init__(self, *, limit: int | None, max_waiting: int | None) -> None:
        self.limit = limit
        """Most slots at once; None = unlimited."""
        self.max_waiting = max_waiting
        """Most waiters at once; None = unlimited, 0 = nobody waits."""
        self.total = 0
        """Slots in existence."""
        self.waited = 0
        """How many have joined the line so far."""
        self.line: OrderedDict[W, None] = OrderedDict()
        """Who waits, first come first. To be changed by the methods only."""

    @property
    def waiting(self) -> int:
        return len(self.line)

    def try_take(self) -> bool:
        """Make a slot for the caller; False when there may be no more."""
        if self.limit is not None and self.total >= self.limit:
            return False
        self.total += 1
        return True

    def join(self, waiter: W) -> bool:
        """Stand in line; False when the line is full."""
        if self.max_waiting is not None and len(self.line) >= self.max_waiting:
            return False
        self.line[waiter] = None
        self.waited += 1
        return True

    def leave(self, waiter: W) -> bool:
        """Leave the line; False when the waiter has been served already (it then holds a slot)."""
        try:
            del self.line[waiter]
        except KeyError:
            return False
        return True

    def next_in_line(self) -> W | None:
        """Take the first out of the line, to be given a slot with its connection; None when nobody waits."""
        return self.line.popitem(last=False)[0] if self.line else None

    def vacate(self) -> W | None:
        """A slot has lost its connection: it goes to the waiter returned, or ceases to be.

        Above a ``limit`` that was lowered, slots are not handed on.
        """
        if self.line and (self.limit is None or self.total <= self.limit):
            return self.line.popitem(last=False)[0]
        self.total -= 1
        return None

    def dismiss(self) -> list[W]:
        """Empty the line; those returned hold no slot."""
        dismissed = list(self.line)
        self.line.clear()
        return dismissed
