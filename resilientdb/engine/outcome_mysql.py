"""The table of tokens in the words of MySQL and MariaDB; see ``outcome``.

Who has a transaction open only administrators may ask there. So each token says it itself: until it is committed,
``n`` is the number of the session that has written it, and a READ UNCOMMITTED transaction sees it. What the server's
list of sessions says of this number an account may read if the session is its own.
"""

# ruff: noqa: S608 - what is put into statements is hexadecimal, a number, or a name that was quoted

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import exc

from resilientdb.policy.faults import number_of
from resilientdb.policy.outcome import Holder

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.engine.outcome import TokenTable

__all__ = ["MySQL"]

_LOCK_WAIT_TIMEOUT: Final = 1205
_NO_SUCH_SESSION: Final = 1094
_NOT_OUR_SESSION: Final = 1095
_NO_SUCH_TABLE: Final = 1146
_NO_SUCH_DATABASE: Final = 1049


class MySQL:
    """An ``outcome.Language``."""

    def install(self, table: TokenTable, dialect: Dialect) -> list[str]:
        return [table.ddl(dialect)]

    def literal(self, key: uuid.UUID) -> str:
        return f"x'{key.hex}'"

    def write(self, table: str, key: uuid.UUID) -> str:
        return f"INSERT INTO {table} (id, n) VALUES ({self.literal(key)}, CONNECTION_ID())"

    def claim(self, connection: Connection, table: str, key: uuid.UUID, wait: float) -> bool:
        with _impatient(connection, wait):
            changed = connection.exec_driver_sql(
                f"INSERT INTO {table} (id, n) VALUES ({self.literal(key)}, CONNECTION_ID()) "
                # Another value than before, or it would count as no change; and no session's number.
                "ON DUPLICATE KEY UPDATE n = -1 - ABS(n)"
            ).rowcount
        return changed == 1  # a row that was there counts twice

    def holder(self, connection: Connection, table: str, key: uuid.UUID) -> Holder | None:
        say = connection.exec_driver_sql
        say("ROLLBACK")  # a listener may have begun something, and the level is the next transaction's
        say("SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
        row = say(
            f"SELECT p.id, p.command, p.state FROM {table} t JOIN information_schema.processlist p ON p.id = t.n "
            f"WHERE t.id = {self.literal(key)} AND p.user = SUBSTRING_INDEX(USER(), '@', 1)"
        ).one_or_none()
        say("ROLLBACK")
        if row is None:
            return None
        # In PostgreSQL's words, which the verdict is on.
        state = "idle in transaction" if row[1] == "Sleep" else "active"
        return Holder(row[0], state, "SyncRep" if "semi-sync" in str(row[2]).lower() else None)

    def terminate(self, connection: Connection, holder: Holder) -> None:
        try:
            connection.exec_driver_sql(f"KILL CONNECTION {holder.pid}")
        except exc.DBAPIError as error:
            if number_of(error) not in {_NO_SUCH_SESSION, _NOT_OUR_SESSION}:
                raise

    def remember_purge(self, table: str, horizon: uuid.UUID, milliseconds: int) -> str:
        return (
            f"INSERT INTO {table} (id, n) VALUES ({self.literal(horizon)}, {milliseconds}) "
            f"ON DUPLICATE KEY UPDATE n = GREATEST(n, {milliseconds})"
        )

    def delete_some(
        self, connection: Connection, table: str, after: uuid.UUID, before: uuid.UUID, batch: int
    ) -> int:
        # Each row by its key: a range would lock what is next to it as well, which may be in use.
        rows = connection.exec_driver_sql(
            f"SELECT HEX(id) FROM {table} WHERE id > {self.literal(after)} AND id < {self.literal(before)} "
            f"ORDER BY id LIMIT {batch}"
        ).all()
        if not rows:
            return 0
        keys = ", ".join(f"x'{key}'" for (key,) in rows)
        return connection.exec_driver_sql(f"DELETE FROM {table} WHERE id IN ({keys})").rowcount

    def is_still_open(self, error: BaseException) -> bool:
        return number_of(error) == _LOCK_WAIT_TIMEOUT

    def lacks_table(self, error: BaseException) -> bool:
        return number_of(error) in {_NO_SUCH_TABLE, _NO_SUCH_DATABASE}


@contextlib.contextmanager
def _impatient(connection: Connection, wait: float) -> Iterator[None]:
    """Statements wait for locks for so long at most. The server counts in whole seconds; MariaDB takes 0, too."""
    dialect: Any = connection.dialect
    say = connection.exec_driver_sql
    before = say("SELECT @@SESSION.innodb_lock_wait_timeout").scalar_one()
    try:
        least = 0 if getattr(dialect, "is_mariadb", False) else 1
        say(f"SET SESSION innodb_lock_wait_timeout = {max(least, int(wait))}")
        yield
    finally:
        if not connection.invalidated:
            try:
                say(f"SET SESSION innodb_lock_wait_timeout = {before}")
            except BaseException:
                # Nobody else is to have our haste.
                connection.invalidate()
                raise
