"""Who holds a pool's connections: to be named in errors, and to tell whether a caller waits for itself."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from resilientdb.runtime.callers import Flow
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_record
from resilientdb.stats import Holder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["describe_holder", "holders", "mine"]


def mine(out: Iterable[Any], me: Any) -> list[Any]:
    """Of the records that are out, those that ``me`` holds: a task, or a flow of work of a thread.

    What the same thread took for the same request is its own, too, in whatever context: frameworks run each part of
    a request in a fresh copy. Not what it took for others (a framework's thread pool): it may have been passed on.
    Nor what a task has that started this one, or was started by it: that one is free to go on.
    """
    if not isinstance(me, Flow):
        return [record for record in out if record.holder is me and me is not None]
    notes = current_record()
    return [
        record
        for record in out
        if record.holder is me
        or (
            notes is not None
            and record.notes is notes
            and isinstance(record.holder, Flow)
            and record.holder.thread == me.thread
        )
    ]


def holders(out: Sequence[Any], node: str) -> list[Holder]:
    """Those who hold the records ``out``, longest first."""
    now = monotonic()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for record in out:
        holder, notes = record.holder, record.notes
        is_thread = isinstance(holder, Flow)
        found.append(
            Holder(
                node=node,
                seconds=now - record.since,
                route=None if notes is None else notes.route,
                thread=names.get(holder.thread) if is_thread else None,
                task=None if is_thread or holder is None else holder.get_name(),
                stack=record.stack,
            )
        )
    return sorted(found, key=lambda holder: -holder.seconds)


def describe_holder(holder: Holder) -> str:
    """«2.31 s by GET /orders (thread worker-3)»"""
    who = holder.thread or holder.task
    kind = "thread" if holder.thread else "task"
    by = f"{kind} {who}" if who else "somebody unknown"
    return f"{holder.seconds:.2f} s by {f'{holder.route} ({by})' if holder.route else by}"
