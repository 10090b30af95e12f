"""Asks a server to cancel the statement that a connection waits for, by another connection.

PostgreSQL has a message of its own for that (``runtime.cancel_request``); MySQL and MariaDB take ``KILL QUERY`` from
any session of the same user. A cancel that arrives late would hit what comes next: so sending one returns only when
nothing can arrive any more, and ``Holding`` sees to it that nothing comes next before that.

A COMMIT is never cancelled: a server that waits for its standby would call it done without the standby, and report
success.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.sql.expression import SelectBase

from resilientdb.engine.compat import greenlet_spawn
from resilientdb.engine.reading import is_plain_read
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.watchdog import Watch, watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.driver import Cancel
    from resilientdb.engine.node import Node

__all__ = ["Canceller", "kill_query"]

_LEISURE: Final = 1.0
"""Seconds that a cancel may take longer than anybody waits for it."""


class Canceller:
    """How the statements of one engine are cancelled."""

    def __init__(self, cluster: Cluster, *, is_async: bool) -> None:
        self._driver = cluster.driver
        self._first = cluster.nodes[0]
        self._is_async = is_async

    def ask(self, record: Any, statement: Any, context: Any) -> Callable[[float], None] | None:
        """What cancels ``statement``, which is under way on the record's connection; None: it is to be cut.

        Called from another thread, and does not wait.
        """
        # SQLAlchemy's StaticPool makes plain records of its own.
        connection, node = record.dbapi_connection, getattr(record, "node", self._first)
        if connection is None or _commits(statement):
            return None
        try:
            if self._driver.commits_alone(connection) and not _only_reads(statement, context):
                return None
            cancel = self._driver.cancel(connection)
        except Exception:  # noqa: BLE001 - it has just lost its server
            return None
        return None if cancel is None else partial(self._send, node, cancel)

    def _send(self, node: Node, cancel: Cancel, until: float) -> None:
        # What comes too late for the connection, which is cut meanwhile, still gives the server its time back.
        limit = until + _LEISURE
        cancel(limit, partial(self._elsewhere, node, limit))

    def _elsewhere(self, node: Node, until: float, work: Callable[[Any], None]) -> None:
        """Do ``work`` with another connection to the node: the prober's, which is open, or one of our own."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def errand(connection: Any) -> None:
            try:
                work(connection)
            except BaseException as error:
                done.set_exception(error)
                raise
            done.set_result(None)

        def with_our_own() -> None:
            connection = node.open_raw(max(0.001, until - monotonic()))
            fd = self._driver.socket_fd(connection)
            watch = None if fd is None else Watch(fd)
            try:
                if watch is not None:
                    watchdog.appoint(watch, until)
                work(connection)
            finally:
                if watch is not None:
                    watch.end()
                getattr(connection, "terminate", connection.close)()

        async def in_a_loop() -> None:
            async with asyncio.timeout(max(0.0, until - monotonic())):
                await greenlet_spawn(with_our_own)

        if node.send(errand):
            done.result(max(0.0, until - monotonic()))
        elif self._is_async:
            if node.connector is None:
                raise ConnectionError("a creator of the user's own may belong to the application's loop")
            asyncio.run(in_a_loop())
        else:
            with_our_own()


def _commits(statement: Any) -> bool:
    """Whether a statement may be, or contain, a COMMIT."""
    return (
        not isinstance(statement, str)
        or len(statement) > _TOO_LONG_TO_SEARCH
        or _COMMIT.search(statement) is not None
    )


_TOO_LONG_TO_SEARCH: Final = 1_000_000
_COMMIT: Final = re.compile(
    r"(?:^|;)(?:\s|/\*.*?\*/|--[^\n]*\n)*+(?:commit|end|prepare\s+transaction|xa)\b",
    re.IGNORECASE | re.DOTALL,
)
"""Also in the middle of a text of several statements. PREPARE TRANSACTION and XA are halves of a two-phase COMMIT,
and wait for a standby as it does."""


def _only_reads(statement: str, context: Any) -> bool:
    compiled = getattr(context, "compiled", None)
    is_select = compiled is not None and isinstance(compiled.statement, SelectBase)
    return is_plain_read(statement, is_select=is_select)


def kill_query(
    session: int, port: int | None, _until: float, elsewhere: Callable[[Callable[[Any], None]], None]
) -> None:
    """End what ``session`` does, if the server that answers ``elsewhere`` is the one that has it: behind a balancer
    it may be another, where the number is somebody else's. ``port``: our end of the session's TCP connection."""

    def kill(connection: Any) -> None:
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT host FROM information_schema.processlist WHERE id = %s", (session,))
            row = cursor.fetchone()
            if row is None or (port is not None and not str(row[0]).endswith(f":{port}")):
                raise ConnectionError("the session is not to be found")
            cursor.execute("KILL QUERY %s", (session,))
        finally:
            cursor.close()

    elsewhere(kill)
