"""Whose work is this? One object for each flow of work, to tell whether a caller waits for itself."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["Caller", "current_caller", "introduce"]


class Caller:
    """One flow of work: everything that runs in one context, and in copies of it. Compared by identity.

    A thread alone would not do: threads of a pool serve one request after another, each in a context of its own.
    """

    __slots__ = ()


_caller: ContextVar[Caller | None] = ContextVar("resilientdb_caller", default=None)

current_caller = _caller.get
"""Whose work this is; None while nobody has asked."""


def introduce() -> Caller:
    """Make the flow of work in hand known, from here on."""
    caller = Caller()
    _caller.set(caller)
    return caller
