"""The table of tokens: how a transaction leaves a mark that tells, later and from anywhere, that it was committed.

A transaction run with ``exactly_once=True`` writes a row with its key. Row and work are committed together or not at
all, so that the row answers what a lost reply has left open, on whichever server is the primary by then. To ask is
to write: the resolver inserts the same key, or counts it up where it is. The insert waits for a transaction that has
the key and is still open; it finds what it was looking for or has the key to itself, and no packet that arrives late
can change that. And because it writes, its own COMMIT is answered only when all before it is as durable.

Each transaction also holds an advisory lock of the key's number, so that the server process that still has it open
can be found, behind a pooler too.
"""

# ruff: noqa: S608 - what is put into statements is hexadecimal, a number, or a name that was quoted

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

import sqlalchemy as sa
from sqlalchemy import exc

from resilientdb.engine.hooks import WITH_BEGIN
from resilientdb.errors import ConfigurationError
from resilientdb.policy.faults import sqlstate_of
from resilientdb.policy.outcome import Holder, forget_before, lock_number, made_at, patience, verdict_on
from resilientdb.runtime.clock import monotonic, wall

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import Dialect

__all__ = ["Claim", "CommitOutcome", "TokenTable", "create", "purge_some", "was_purged", "write"]

CommitOutcome = Literal["committed", "aborted", "unknown"]
"""``unknown``: it is still open, or so old that its key has been purged."""

_HORIZON: Final = "0" * 32
"""The key of the row that says up to where the table was purged."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Where the tokens are: a table of two columns, ``id`` (a UUID, the primary key) and ``n`` (a bigint)."""

    name: str = "resilientdb_token"
    schema: str | None = None

    def to_metadata(self, metadata: sa.MetaData) -> sa.Table:
        """The table as SQLAlchemy's, in your metadata: for Alembic's autogenerate."""
        return sa.Table(
            self.name,
            metadata,
            sa.Column("id", sa.Uuid(), primary_key=True),
            sa.Column("n", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
            schema=self.schema,
        )

    def ddl(self, dialect: Dialect) -> str:
        """The statement that ``install`` executes: for a migration by hand."""
        create = sa.schema.CreateTable(self.to_metadata(sa.MetaData()), if_not_exists=True)
        return str(create.compile(dialect=dialect)).strip()


class _Language(Protocol):
    """How one kind of server says it."""

    def install(self, table: TokenTable, dialect: Dialect) -> list[str]:
        """Create the table where there is none; also when two do it at once."""

    def write(self, table: str, key: uuid.UUID) -> str:
        """Write the token. Raises where it is there already."""

    def claim(self, connection: Connection, table: str, key: uuid.UUID, wait: float) -> bool:
        """Take the key, or count it up where it is. True: it was not there. Raises when it had to wait too long."""

    def holder(self, connection: Connection, key: uuid.UUID) -> Holder | None:
        """Who has the key's transaction open."""

    def terminate(self, connection: Connection, holder: Holder) -> None:
        """End it, if it is ours and does not wait for a standby."""

    def purge(self, table: str, before: uuid.UUID, batch: int) -> list[str]:
        """Say that all keys before this one are forgotten; then delete that many of them."""

    def is_still_open(self, error: BaseException) -> bool:
        """Whether a ``claim`` has failed because the transaction in question is still open."""

    def lacks_table(self, error: BaseException) -> bool:
        """Whether a statement has failed because there is no table."""


class _PostgreSQL:
    def install(self, table: TokenTable, dialect: Dialect) -> list[str]:
        # IF NOT EXISTS alone is not safe against another that creates it in this moment.
        return ["SELECT pg_advisory_xact_lock(7283473652)", table.ddl(dialect)]

    def write(self, table: str, key: uuid.UUID) -> str:
        # One statement, and the cheapest that takes the lock before it writes.
        lock = f"CASE WHEN pg_advisory_xact_lock({lock_number(key)}) IS NULL THEN 0 ELSE 0 END"
        return f"INSERT INTO {table} (id, n) VALUES (uuid '{key.hex}', {lock})"

    def claim(self, connection: Connection, table: str, key: uuid.UUID, wait: float) -> bool:
        say = connection.exec_driver_sql
        before = say("SELECT current_setting('lock_timeout')").scalar_one()
        say(f"SET LOCAL lock_timeout = {max(1, int(wait * 1000))}")
        say(f"SELECT 1 FROM pg_advisory_xact_lock({lock_number(key)})")
        n = say(
            f"INSERT INTO {table} AS token (id) VALUES (uuid '{key.hex}') "
            "ON CONFLICT (id) DO UPDATE SET n = token.n + 1 RETURNING n"
        ).scalar_one()
        # What follows may be the function, which knows nothing of our haste.
        say(f"SET LOCAL lock_timeout = '{before}'")
        return bool(n == 0)

    def holder(self, connection: Connection, key: uuid.UUID) -> Holder | None:
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

    def purge(self, table: str, before: uuid.UUID, batch: int) -> list[str]:
        say_so = (
            f"INSERT INTO {table} AS token (id, n) VALUES (uuid '{_HORIZON}', {before.int >> 80}) "
            "ON CONFLICT (id) DO UPDATE SET n = greatest(token.n, excluded.n)"
        )
        delete = (
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE id > uuid '{_HORIZON}' "
            f"AND id < uuid '{before.hex}' ORDER BY id LIMIT {batch} FOR UPDATE SKIP LOCKED)"
        )
        return [say_so, delete]

    def is_still_open(self, error: BaseException) -> bool:
        return sqlstate_of(error) == "55P03"

    def lacks_table(self, error: BaseException) -> bool:
        return sqlstate_of(error) in {"42P01", "3F000"}


_LANGUAGES: Final[dict[str, _Language]] = {"postgresql": _PostgreSQL()}


def language_of(dialect: Dialect) -> _Language:
    """``ConfigurationError`` for a server that this is not made for."""
    language = _LANGUAGES.get(dialect.name)
    if language is None:
        raise ConfigurationError(
            f"exactly once is for {', '.join(sorted(_LANGUAGES))}; this is {dialect.name}",
            key="exactly_once",
            value=dialect.name,
        )
    return language


def write(connection: Connection, table: TokenTable, key: uuid.UUID) -> None:
    """Begin the transaction with the token of ``key``, in one message where the driver lets us."""
    dialect = connection.dialect
    statement = language_of(dialect).write(_quoted(table, dialect), key)
    try:
        connection.exec_driver_sql(statement, execution_options=WITH_BEGIN)
    except exc.DBAPIError as error:
        if (lacking := _lacks_table(error, table, dialect)) is not None:
            raise lacking from error
        raise


class Claim:
    """The question whether the transaction with ``key`` was committed; asked until it is answered, each time in a new
    transaction. ``left`` tells how many seconds there still are, None = without end."""

    def __init__(self, table: TokenTable, key: uuid.UUID, left: Callable[[], float | None]) -> None:
        self._table = table
        self._key = key
        self._left = left
        self._since = monotonic()
        self.waits = 0
        """How many times it was still open."""

    def was_not_committed(self, connection: Connection) -> bool:
        """Ask, as the first of a transaction.

        True: it was not and never will be, and the key is this transaction's. False: it was; this transaction proves
        it once its own COMMIT has been answered. Raises ``StillOpen`` when it can be neither yet.
        """
        dialect = connection.dialect
        language, left = language_of(dialect), self._left()
        try:
            if self.waits and (holder := language.holder(connection, self._key)) is not None:
                waited = monotonic() - self._since
                if verdict_on(holder, waited, left) == "terminate":
                    language.terminate(connection, holder)
            table = _quoted(self._table, dialect)
            return language.claim(connection, table, self._key, patience(self.waits, left))
        except exc.DBAPIError as error:
            if language.is_still_open(error):
                self.waits += 1
                raise StillOpen from error
            if (lacking := _lacks_table(error, self._table, dialect)) is not None:
                raise lacking from error
            raise


class StillOpen(Exception):
    """The transaction in question has neither been committed nor rolled back so far."""


def create(connection: Connection, table: TokenTable) -> None:
    for statement in language_of(connection.dialect).install(table, connection.dialect):
        connection.exec_driver_sql(statement)


def was_purged(connection: Connection, table: TokenTable, key: uuid.UUID) -> bool:
    """Whether a key that is not there may have been, before the last purge."""
    horizon = connection.exec_driver_sql(
        f"SELECT n FROM {_quoted(table, connection.dialect)} WHERE id = '{_HORIZON}'"
    ).scalar()
    return horizon is not None and made_at(key) * 1000 < horizon


def purge_some(connection: Connection, table: TokenTable, older_than: float, batch: int) -> int:
    """Delete some of the keys made longer ago than that; how many."""
    dialect = connection.dialect
    deleted = 0
    before = forget_before(wall(), older_than)
    for statement in language_of(dialect).purge(_quoted(table, dialect), before, batch):
        deleted = connection.exec_driver_sql(statement).rowcount
    return deleted


def _quoted(table: TokenTable, dialect: Dialect) -> str:
    quote = dialect.identifier_preparer.quote
    return ".".join(quote(part) for part in (table.schema, table.name) if part)


def _lacks_table(error: exc.DBAPIError, table: TokenTable, dialect: Dialect) -> ConfigurationError | None:
    if not language_of(dialect).lacks_table(error):
        return None
    name = f"{table.schema}.{table.name}" if table.schema else table.name
    return ConfigurationError(
        f"exactly_once=True needs the table {name}, which is not there: create it with resilientdb.install(engine), "
        "or in a migration (see TokenTable)",
        key="exactly_once",
    )
