"""SQLAlchemy's private places that the library relies on, all of them, behind names of our own.

Each exists with the same meaning in 2.0.40 and 2.1; a test of each runs on both.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from sqlalchemy.engine.interfaces import Dialect

__all__ = [
    "ConnectionRecord",
    "as_connecting",
    "await_only",
    "checkout",
    "greenlet_spawn",
    "record_of",
    "record_of_connection",
    "record_of_context",
    "running_loop",
    "task_in",
    "undisturbed",
]

ConnectionRecord = _ConnectionRecord

running_loop = asyncio._get_running_loop  # noqa: SLF001
"""The event loop that runs in this thread, or None: ``asyncio.get_running_loop`` without the exception."""

task_in: Any = asyncio.current_task if sys.version_info >= (3, 12) else asyncio.tasks._current_tasks.get  # type: ignore[attr-defined]  # noqa: SLF001
"""The task that runs in this event loop: ``asyncio.current_task``, before it was made fast."""

checkout = _ConnectionFairy._checkout  # noqa: SLF001
"""All that ``Pool.connect`` does."""


async def undisturbed(work: Coroutine[Any, Any, Any]) -> None:
    """Await ``work``, which ends soon, to its end. For a task that is about to pass a cancellation on: others that
    arrive meanwhile (anyio repeats its own at every turn) are the same to it."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    task.result()


@contextlib.contextmanager
def as_connecting(dialect: Dialect) -> Iterator[None]:
    """Raises what ``Engine.connect`` raises when connecting fails with a driver's error, listeners heard."""
    try:
        yield
    except dialect.loaded_dbapi.Error as error:
        Connection._handle_dbapi_exception_noconnection(error, dialect)  # noqa: SLF001


def record_of(checked_out: Any) -> Any:
    """The pool's record behind what ``pool.connect()`` returned; None once detached or given back."""
    return getattr(checked_out, "_connection_record", None)


def record_of_connection(connection: Connection | None) -> Any:
    """The pool's record behind an open ``Connection``; None once invalidated or closed."""
    return record_of(getattr(connection, "_dbapi_connection", None))


def record_of_context(context: Any) -> Any:
    """The pool's record behind an execution context; None without one."""
    return record_of_connection(getattr(context, "root_connection", None))
