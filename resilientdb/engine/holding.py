"""Holds statements to the deadline in force, and to what becomes of their task.

Before a statement is sent its connection gets an appointment with the watchdog; when the statement has ended,
whatever was sent to cancel it is waited for, so that nothing arrives later than the caller's next statement, or at
somebody else's. A task that is cancelled is not kept waiting by its driver, and its connection is kept where the
server still answers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from resilientdb.engine.cancelling import Canceller
from resilientdb.engine.compat import await_only, record_of_context
from resilientdb.errors import DeadlineExceeded
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.watchdog import GRACE, Asking, Watch, aside, watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.cluster import Cluster
    from resilientdb.runtime.context import Deadline

__all__ = ["Holding", "was_cancelled"]


class Holding:
    """The appointments of one engine's connections."""

    def __init__(self, cluster: Cluster, *, is_async: bool) -> None:
        self._driver = cluster.driver
        self._is_async = is_async
        self._canceller = Canceller(cluster, is_async=is_async)

    def execute(self, deadline: Deadline, execute: Callable[..., None], *arguments: Any) -> None:
        """``execute(*arguments)``, the dialect's, with the statement second and its context last; ends at the
        deadline. Raises ``DeadlineExceeded`` if that has passed, or if the server cancelled the statement and the
        driver does not say so."""
        statement, context = arguments[1], arguments[-1]
        record = record_of_context(context)
        if deadline.remaining() <= 0 and record is not None and _is_rollback(statement):
            self.hold_rollback(deadline, record)
            execute(*arguments)
            return
        _refuse_after(deadline, "a statement was sent")
        watch = None if record is None else self._appoint(record, deadline, deadline.expires_at)
        if watch is None:
            execute(*arguments)
            return
        watch.begin(partial(self._canceller.ask, record, statement, context))
        try:
            execute(*arguments)
        except BaseException as error:
            asking = watch.finished()
            if asking is not None:
                self._wait_for(asking, watch)
                if self._driver.was_cancelled(error):
                    _mark(error)
                elif self._driver.cancels_silently:
                    watch.cut()
            raise
        asking = watch.finished()
        if asking is not None:
            self._wait_for(asking, watch)
            if self._driver.cancels_silently:
                # It may have ended by itself, just before: nobody can tell, and its time is over.
                watch.cut()
                raise DeadlineExceeded(f"the deadline of {deadline.seconds:g} s ended during a statement")

    def hold_commit(self, deadline: Deadline, record: Any) -> None:
        """Have the watchdog end a COMMIT that is about to be sent; refuse to send it after the deadline.

        It is cut when a statement that was cancelled would be, since it cannot be cancelled, and most are answered
        by then: each that is not is in doubt.
        """
        _refuse_after(deadline, "COMMIT was sent; nothing is committed")
        if record is not None:
            self._appoint(record, deadline, deadline.expires_at + GRACE)

    def hold_rollback(self, deadline: Deadline, record: Any) -> None:
        """Have the watchdog end a rollback at the deadline, or if that has passed already, soon."""
        self._appoint(record, deadline, max(deadline.expires_at, monotonic() + _ROLLBACK_GRACE))

    def _appoint(self, record: Any, deadline: Deadline, at: float) -> Watch | None:
        watch = self.watch_of(record)
        if watch is not None and watch.at != at:
            watch.still_wanted = deadline.is_in_force
            watchdog.appoint(watch, at)
        return watch

    def watch_of(self, record: Any) -> Watch | None:
        """The record's appointment with the watchdog, made if it has none; None: there is no socket to be cut."""
        watch: Watch | None = getattr(record, "watch", None)
        if watch is None:
            connection = record.dbapi_connection
            fd = self._driver.socket_fd(connection)
            if fd is None:
                return None
            record.watch = watch = Watch(fd, is_busy=partial(self._driver.is_busy, connection))
            record.owes = True
        return watch

    def cut(self, record: Any) -> None:
        """Cut the connection now; whoever waits for it finds it lost."""
        watch = self.watch_of(record)
        if watch is not None:
            watch.cut()

    def saved(self, error: BaseException, record: Any, statement: Any, context: Any) -> bool:
        """Something ended a statement that is no failure of it: whether it was a cancellation of the task, and the
        connection can be kept. It is lost if not.

        Only a statement's: after a ROLLBACK that was cancelled, SQLAlchemy believes it done.
        """
        if not self._is_async or not isinstance(error, asyncio.CancelledError):
            return False
        ask = self._canceller.ask(record, statement, context)
        if statement is not None and self._driver.settle(record.dbapi_connection, GRACE):
            return True
        self.cut(record)
        if ask is not None:
            # The driver may not have asked the server to stop, or not have had the time.
            aside(ask, monotonic() + GRACE, _nothing)
        return False

    def _wait_for(self, asking: Asking[None], watch: Watch) -> None:
        if asking.done():
            return
        try:
            left = max(0.0, watch.until - monotonic())
            if self._is_async:
                await_only(_done(asking, left))
            else:
                concurrent.futures.wait((asking,), left)
        finally:
            if not asking.done():
                watch.cut()


def _refuse_after(deadline: Deadline, what: str) -> None:
    if deadline.remaining() <= 0:
        raise DeadlineExceeded(f"the deadline of {deadline.seconds:g} s ended before {what}")


_ROLLBACK_GRACE: Final = 0.1
"""Seconds a rollback may take when the deadline has passed already: it is sent to a connection that answered just
now, and saves that connection."""


def _is_rollback(statement: Any) -> bool:
    """Also to a savepoint, whose block is often inside the deadline's."""
    return isinstance(statement, str) and _ROLLBACK.match(statement) is not None


_ROLLBACK: Final = re.compile(r"\s*ROLLBACK(?!\s+PREPARED)\b", re.IGNORECASE)

_MARK: Final = "_resilientdb_cancelled"


def was_cancelled(error: BaseException) -> bool:
    """Whether it was the library that had the statement cancelled."""
    return getattr(error, _MARK, False)


def _mark(error: BaseException) -> None:
    try:
        setattr(error, _MARK, True)
    except AttributeError:
        error.add_note("cancelled at its deadline")


async def _done(asking: Asking[None], seconds: float) -> None:
    await asyncio.wait({asyncio.wrap_future(asking)}, timeout=seconds)


def _nothing() -> None:
    """There is no connection to be cut."""
