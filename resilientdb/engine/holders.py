"""Who holds a pool's connections: to be named in errors, and to tell whether a caller waits for itself."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from resilientdb.runtime.callers import current_caller
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_record
from resilientdb.stats import Holder

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Sequence

__all__ = ["describe_holder", "holders", "mine"]


def mine(out: Iterable[Any], me: Any) -> list[Any]:
    """Of the records that are out, those that the very thread or task ``me`` holds in this flow of work.

    Both are asked for: a connection may be passed on to another thread and its first thread serve somebody else by
    now (a framework's thread pool), and a task started by this one has its flow of work but is free to go on.
    """
    caller, notes = current_caller(), current_record()
    return [
        record
        for record in out
        if record.holder == me
        and (
            (caller is not None and record.caller is caller) or (notes is not None and record.notes is notes)
        )
    ]


def holders(out: Sequence[Any], node: str, *, is_async: bool) -> list[Holder]:
    """Those who hold the records ``out``, longest first."""
    now = monotonic()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = [
        Holder(
            node=node,
            seconds=now - record.since,
            route=notes.route if (notes := record.notes) is not None else None,
            thread=None if is_async else names.get(record.holder),
            task=_task_name(record.holder) if is_async else None,
            stack=record.stack,
        )
        for record in out
    ]
    return sorted(found, key=lambda holder: -holder.seconds)


def describe_holder(holder: Holder) -> str:
    """«2.31 s by GET /orders (thread worker-3)»"""
    who = holder.thread or holder.task
    kind = "thread" if holder.thread else "task"
    by = f"{kind} {who}" if who else "somebody unknown"
    return f"{holder.seconds:.2f} s by {f'{holder.route} ({by})' if holder.route else by}"


def _task_name(holder: asyncio.Task[Any] | None) -> str | None:
    return None if holder is None else holder.get_name()
