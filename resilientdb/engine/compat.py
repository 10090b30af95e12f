"""SQLAlchemy's private places that the library relies on, all of them, behind names of our own.

Each exists with the same meaning in 2.0.40 and 2.1; a test of each runs on both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = [
    "ConnectionRecord",
    "await_only",
    "checkout",
    "greenlet_spawn",
    "record_of",
    "record_of_connection",
]

ConnectionRecord = _ConnectionRecord

checkout = _ConnectionFairy._checkout  # noqa: SLF001
"""All that ``Pool.connect`` does."""


def record_of(checked_out: Any) -> Any:
    """The pool's record behind what ``pool.connect()`` returned; None once detached or given back."""
    return getattr(checked_out, "_connection_record", None)


def record_of_connection(connection: Connection | None) -> Any:
    """The pool's record behind an open ``Connection``; None once invalidated or closed."""
    return record_of(getattr(connection, "_dbapi_connection", None))
