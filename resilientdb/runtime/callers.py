"""Whose work is this? One object for each flow of work, to tell whether a caller waits for itself."""

from __future__ import annotations

from contextvars import ContextVar
from threading import get_ident

__all__ = ["Flow", "current_flow"]


class Flow:
    """One flow of work of one thread: what it does in one context. Compared by identity.

    A thread alone would not do: threads of a pool serve one request after another, each in a context of its own. Nor
    would a context: it is copied into other threads, and with it what it says of its original. (A task needs no such
    thing: it is one flow of work itself.)
    """

    __slots__ = ("thread",)

    def __init__(self, thread: int) -> None:
        self.thread = thread
        """Its ident."""


_flow: ContextVar[Flow | None] = ContextVar("resilientdb_flow", default=None)
_known = _flow.get


def current_flow() -> Flow:
    """The flow of work in hand: the same object as long as it is the same thread in the same context."""
    thread = get_ident()
    flow = _known()
    if flow is None or flow.thread != thread:
        flow = Flow(thread)
        _flow.set(flow)
    return flow
