"""What a caller does with its connection; for every driver the same."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any, Self

import psycopg
from sqlalchemy import text

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy import Connection

    from chaos.workloads import Body
    from resilientdb.testing import Postgres

__all__ = ["Gate", "Ledger", "echo", "sleep"]

_ECHO = text("SELECT CAST(:token AS integer)")
_keys = itertools.count(4_000_001)


def echo(connection: Connection, number: int) -> int:
    """Ask for the call's own number: another answer is another caller's."""
    return int(connection.execute(_ECHO, {"token": number}).scalar_one())


def sleep(seconds: float) -> Body:
    """A query that takes so long; returns the call's number."""
    slow = text("SELECT CAST(:token AS integer) FROM pg_sleep(:seconds)")

    def body(connection: Connection, number: int) -> int:
        return int(connection.execute(slow, {"token": number, "seconds": seconds}).scalar_one())

    return body


class Ledger:
    """A table of its own in which each transaction leaves its number; nothing there prevents doubles."""

    def __init__(self, postgres: Postgres, name: str) -> None:
        self.table = "ledger_" + "".join(letter if letter.isalnum() else "_" for letter in name)
        self._insert = text(f"INSERT INTO {self.table} (k) VALUES (:k)")
        postgres.query(f"DROP TABLE IF EXISTS {self.table}")
        postgres.query(f"CREATE TABLE {self.table} (k integer NOT NULL)")

    def insert(self, connection: Connection, number: int) -> None:
        connection.execute(self._insert, {"k": number})

    def rows(self, postgres: Postgres) -> list[tuple[Any, ...]]:
        """What is there, asked directly."""
        return postgres.query(f"SELECT k FROM {self.table}")


class Gate:
    """Callers go in and hold their connections until it opens; how many are inside can be known exactly.

    A lock on the server, taken on a connection of its own: it works for threads and tasks alike.
    """

    def __init__(self, postgres: Postgres) -> None:
        self._key = next(_keys)
        self._connection = psycopg.connect(postgres.url(""), autocommit=True)
        self._say = text("SELECT 1")
        self._wait = text("SELECT pg_advisory_xact_lock_shared(:key)")

    def body(self, connection: Connection, number: int) -> int:
        """Hold the connection until the gate opens; having seen that it works, as those do who hold one for long."""
        connection.execute(self._say)
        connection.execute(self._wait, {"key": self._key})
        return number

    def inside(self) -> int:
        """How many wait at the gate, each with a connection."""
        row = self._connection.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted",
            [self._key],
        ).fetchone()
        return int(row[0]) if row else 0

    def wait_for(self, callers: int, *, timeout: float = 3.0) -> None:
        """Return when so many are inside; ``AssertionError`` if they do not come."""
        until = time.monotonic() + timeout
        while (inside := self.inside()) < callers:
            assert time.monotonic() < until, (
                f"{inside} of {callers} callers got a connection in {timeout:g} s"
            )
            time.sleep(0.005)

    def open(self) -> None:
        """Let them go, and all who come later."""
        self._connection.execute("SELECT pg_advisory_unlock_all()")

    def __enter__(self) -> Self:
        self._connection.execute("SELECT pg_advisory_lock(%s)", [self._key])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(psycopg.Error):
            self.open()
        self._connection.close()
