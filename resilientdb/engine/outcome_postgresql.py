"""The table of tokens in PostgreSQL's words; see ``outcome``.

Each transaction also holds an advisory lock of the key's number, so that the server process that still has it open
can be found, behind a pooler too.
"""

# ruff: noqa: S608 - what is put into statements is hexadecimal, a number, or a name that was quoted

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from resilientdb.policy.faults import sqlstate_of
from resilientdb.policy.outcome import Holder, lock_number

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.engine.outcome import TokenTable

__all__ = ["PostgreSQL", "impatient"]


class PostgreSQL:
    """An ``outcome.Language``."""

    def install(self, table: TokenTable, dialect: Dialect) -> list[str]:
        # IF NOT EXISTS alone is not safe against another that creates it in this moment.
        return ["SELECT pg_advisory_xact_lock(7283473652)", table.ddl(dialect)]

    def literal(self, key: uuid.UUID) -> str:
        return f"uuid '{key.hex}'"

    def write(self, table: str, key: uuid.UUID) -> str:
        # One statement, and the cheapest that takes the lock before it writes.
        lock = f"CASE WHEN pg_advisory_xact_lock({lock_number(key)}) IS NULL THEN 0 ELSE 0 END"
        return f"INSERT INTO {table} (id, n) VALUES ({self.literal(key)}, {lock})"

    def claim(self, connection: Connection, table: str, key: uuid.UUID, wait: float) -> bool:
        say = connection.exec_driver_sql
        with impatient(connection, wait):
            say(f"SELECT 1 FROM pg_advisory_xact_lock({lock_number(key)})")
            n = say(
                f"INSERT INTO {table} AS token (id) VALUES ({self.literal(key)}) "
                "ON CONFLICT (id) DO UPDATE SET n = token.n + 1 RETURNING n"
            ).scalar_one()
        return bool(n == 0)

    def holder(self, connection: Connection, _table: str, key: uuid.UUID) -> Holder | None:
        number = lock_number(key) & (1 << 64) - 1
        row = connection.exec_driver_sql(
            "SELECT a.pid, a.state, a.wait_event FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
            f"WHERE l.locktype = 'advisory' AND l.classid = '{number >> 32}'::oid "
            f"AND l.objid = '{number & 0xFFFFFFFF}'::oid AND l.objsubid = 1 AND l.granted "
            "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            "AND a.pid <> pg_backend_pid() LIMIT 1"
        ).one_or_none()
        return None if row is None else Holder(row[0], row[1], row[2])

    def terminate(self, connection: Connection, holder: Holder) -> None:
        connection.exec_driver_sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = {holder.pid} "
            "AND usename = session_user AND xact_start IS NOT NULL "
            "AND wait_event IS DISTINCT FROM 'SyncRep'"
        )

    def remember_purge(self, table: str, horizon: uuid.UUID, milliseconds: int) -> str:
        return (
            f"INSERT INTO {table} AS token (id, n) VALUES ({self.literal(horizon)}, {milliseconds}) "
            "ON CONFLICT (id) DO UPDATE SET n = greatest(token.n, excluded.n)"
        )

    def delete_some(
        self, connection: Connection, table: str, after: uuid.UUID, before: uuid.UUID, batch: int
    ) -> int:
        return connection.exec_driver_sql(
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE id > {self.literal(after)} "
            f"AND id < {self.literal(before)} ORDER BY id LIMIT {batch} FOR UPDATE SKIP LOCKED)"
        ).rowcount

    def is_still_open(self, error: BaseException) -> bool:
        # By our timeout, or a shorter one that the role has for every statement.
        return sqlstate_of(error) in {"55P03", "57014"}

    def lacks_table(self, error: BaseException) -> bool:
        return sqlstate_of(error) in {"42P01", "3F000"}


@contextlib.contextmanager
def impatient(connection: Connection, wait: float) -> Iterator[None]:
    """Statements wait for locks for so long at most. After a failure the transaction is good for nothing else."""
    say = connection.exec_driver_sql
    before = say("SELECT current_setting('lock_timeout')").scalar_one()
    say(f"SET LOCAL lock_timeout = {max(1, int(wait * 1000))}")
    yield
    # What follows may be the function, which knows nothing of our haste.
    say(f"SET LOCAL lock_timeout = '{before}'")
