"""psycopg, for tasks that are cancelled: they are to end at once.

psycopg itself sends a cancel and waits for its effect, each for up to five seconds: in silence, a task's own timeout
of one second ends after eleven.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
from functools import partial
from typing import Any, Final

from resilientdb.engine.compat import undisturbed
from resilientdb.runtime.cancel_request import drive
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.watchdog import GRACE, aside

__all__ = ["connect"]

_ACTIVE: Final = 1
"""Of libpq's PGTransactionStatusType: a command has been sent and not been answered."""


@functools.cache
def connect() -> Any:
    """``connect`` of such a connection, for ``async_creator_fn``; None where psycopg is not as expected."""
    try:
        psycopg: Any = importlib.import_module("psycopg")
        wait_async = importlib.import_module("psycopg.waiting").wait_async
        default = inspect.signature(psycopg.AsyncConnection.wait).parameters["interval"].default

        class AsyncConnection(psycopg.AsyncConnection):  # type: ignore[misc]
            async def wait(self, gen: Any, interval: float = default, **options: Any) -> Any:
                try:
                    return await wait_async(gen, self.pgconn.socket, interval=interval, **options)
                except asyncio.CancelledError:
                    if self.pgconn.transaction_status == _ACTIVE:
                        await undisturbed(self._end(gen, interval))
                    raise

            async def _end(self, gen: Any, interval: float) -> None:
                try:
                    cancel = partial(drive, self.pgconn.cancel_conn())
                    # Elsewhere, so that the server hears of it, too, if that takes longer than we wait.
                    asking = aside(cancel, monotonic() + 1.0, lambda: None)
                    async with asyncio.timeout(GRACE):
                        with contextlib.suppress(psycopg.errors.QueryCanceled):
                            await wait_async(gen, self.pgconn.socket, interval=interval)
                        if asking is not None:
                            await asyncio.wrap_future(asking)
                except Exception:  # noqa: BLE001 - it does not answer
                    self.pgconn.finish()

    except (ImportError, AttributeError, KeyError):
        return None
    return AsyncConnection.connect
