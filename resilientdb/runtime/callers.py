"""Whose work is this? One object for each flow of work, to tell whether a caller waits for itself."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["Caller", "current_caller", "introduce"]


class Caller:
    """One flow of work of one thread or task: what it does in one context. Compared by identity.

    A thread alone would not do: threads of a pool serve one request after another, each in a context of its own. Nor
    would a context: it is copied into threads and tasks, and with it what it says of its original.
    """

    __slots__ = ("me",)

    def __init__(self, me: object) -> None:
        self.me = me
        """The thread (its ident) or the task that introduced itself."""


_caller: ContextVar[Caller | None] = ContextVar("resilientdb_caller", default=None)

current_caller = _caller.get
"""Whose work this is; None while nobody has asked."""


def introduce(me: object) -> Caller:
    """Make the flow of work in hand known, from here on, as that of ``me``."""
    caller = Caller(me)
    _caller.set(caller)
    return caller
