"""The table of tokens: how a transaction leaves a mark that tells, later and from anywhere, that it was committed.

A transaction run with ``exactly_once=True`` writes a row with its key. Row and work are committed together or not at
all, so that the row answers what a lost reply has left open, on whichever server is the primary by then. To ask is
to write: the resolver inserts the same key, or counts it up where it is. The insert waits for a transaction that has
the key and is still open; it finds what it was looking for or has the key to itself, and no packet that arrives late
can change that. And because it writes, its own COMMIT is answered only when all before it is as durable.

How each kind of server says it is in a file of its own (``outcome_postgresql``, ``outcome_mysql``).
"""

# ruff: noqa: S608 - what is put into statements is hexadecimal, a number, or a name that was quoted

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import sqlalchemy as sa
from sqlalchemy import exc

from resilientdb.engine.hooks import WITH_BEGIN
from resilientdb.engine.outcome_mysql import MySQL
from resilientdb.engine.outcome_postgresql import PostgreSQL
from resilientdb.errors import ConfigurationError
from resilientdb.policy.outcome import forget_before, made_at, patience, verdict_on
from resilientdb.runtime.clock import monotonic, wall

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.policy.outcome import Holder

__all__ = [
    "Claim",
    "NeverKnown",
    "StillOpen",
    "TokenTable",
    "Tokens",
    "create",
    "end_holder",
    "language_of",
    "purge_some",
    "was_purged",
    "write",
]

_HORIZON: Final = uuid.UUID(int=0)
"""The key of the row that says up to where the table was purged, in milliseconds since 1970."""

_KEY: Final = sa.Uuid().with_variant(sa.BINARY(16), "mysql").with_variant(sa.BINARY(16), "mariadb")


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Where the tokens are: a table of two columns, ``id`` (a UUID, the primary key) and ``n`` (a bigint).

    On MySQL and MariaDB ``schema`` is the database, and ``id`` a BINARY(16), which sorts by age on all of them.
    """

    name: str = "resilientdb_token"
    schema: str | None = None

    def to_metadata(self, metadata: sa.MetaData) -> sa.Table:
        """The table as SQLAlchemy's, in your metadata: for Alembic's autogenerate."""
        return sa.Table(
            self.name,
            metadata,
            sa.Column("id", _KEY, primary_key=True),
            sa.Column("n", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
            schema=self.schema,
            # A token that stays when its transaction is rolled back would say that it was committed.
            mysql_engine="InnoDB",
            mariadb_engine="InnoDB",
        )

    def ddl(self, dialect: Dialect) -> str:
        """The statement that ``install`` executes: for a migration by hand."""
        create = sa.schema.CreateTable(self.to_metadata(sa.MetaData()), if_not_exists=True)
        return str(create.compile(dialect=dialect)).strip()


class Language(Protocol):
    """How one kind of server says it."""

    def install(self, table: TokenTable, dialect: Dialect) -> list[str]:
        """Create the table where there is none; also when two do it at once."""

    def literal(self, key: uuid.UUID) -> str:
        """The key, as a statement has it."""

    def write(self, table: str, key: uuid.UUID) -> str:
        """Write the token. Raises where it is there already."""

    def claim(self, connection: Connection, table: str, key: uuid.UUID, wait: float) -> bool:
        """Take the key, or count it up where it is. True: it was not there. Raises when it had to wait too long."""

    def holder(self, connection: Connection, table: str, key: uuid.UUID) -> Holder | None:
        """Who has the key's transaction open. Called as the first of a transaction, which it may end."""

    def terminate(self, connection: Connection, holder: Holder) -> None:
        """End it, if it is ours and does not wait for a standby."""

    def remember_purge(self, table: str, horizon: uuid.UUID, milliseconds: int) -> str:
        """Put this time into the row ``horizon``, if it has no later one."""

    def delete_some(
        self, connection: Connection, table: str, after: uuid.UUID, before: uuid.UUID, batch: int
    ) -> int:
        """Delete that many of the keys between the two; how many there were."""

    def is_still_open(self, error: BaseException) -> bool:
        """Whether a ``claim`` has failed because the transaction in question is still open."""

    def lacks_table(self, error: BaseException) -> bool:
        """Whether a statement has failed because there is no table."""


_MYSQL: Final = MySQL()
_LANGUAGES: Final[dict[str, Language]] = {"mysql": _MYSQL, "mariadb": _MYSQL, "postgresql": PostgreSQL()}


def language_of(dialect: Dialect) -> Language:
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
        self.since = monotonic()
        self.attempts = 0
        """How many times it was asked."""
        self.waits = 0
        """How many times it was still open."""

    def was_not_committed(self, connection: Connection) -> bool:
        """Ask, as the first of a transaction.

        True: it was not and never will be, and the key is this transaction's. False: it was; this transaction proves
        it once its own COMMIT has been answered. Raises ``StillOpen`` when it can be neither yet.
        """
        dialect = connection.dialect
        language, left = language_of(dialect), self._left()
        self.attempts += 1
        try:
            table = _quoted(self._table, dialect)
            if self.waits:
                end_holder(connection, table, self._key, monotonic() - self.since, left)
            return language.claim(connection, table, self._key, patience(self.waits, left))
        except exc.DBAPIError as error:
            if language.is_still_open(error):
                self.waits += 1
                raise StillOpen from error
            if (lacking := _lacks_table(error, self._table, dialect)) is not None:
                raise lacking from error
            raise


class Tokens:
    """``once.Evidence``: a token in the table."""

    is_kept = True

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def leave(self, connection: Connection, key: uuid.UUID) -> None:
        write(connection, self._table, key)

    def question(self, key: uuid.UUID, left: Callable[[], float | None]) -> Claim:
        return Claim(self._table, key, left)


def end_holder(connection: Connection, table: str, key: uuid.UUID, waited: float, left: float | None) -> None:
    """End the transaction that has the key open, if it has been waited for long enough (``policy.outcome``)."""
    language = language_of(connection.dialect)
    holder = language.holder(connection, table, key)
    if holder is not None and verdict_on(holder, waited, left) == "terminate":
        language.terminate(connection, holder)


class StillOpen(Exception):
    """The transaction in question has neither been committed nor rolled back so far."""


class NeverKnown(Exception):
    """What became of the transaction in question can be learned neither now nor later. Its text says why."""


def create(connection: Connection, table: TokenTable) -> None:
    for statement in language_of(connection.dialect).install(table, connection.dialect):
        connection.exec_driver_sql(statement)


def was_purged(connection: Connection, table: TokenTable, key: uuid.UUID) -> bool:
    """Whether a key that is not there may have been, before the last purge."""
    dialect = connection.dialect
    horizon = connection.exec_driver_sql(
        f"SELECT n FROM {_quoted(table, dialect)} WHERE id = {language_of(dialect).literal(_HORIZON)}"
    ).scalar()
    return horizon is not None and made_at(key) * 1000 < horizon


def purge_some(connection: Connection, table: TokenTable, older_than: float, batch: int) -> int:
    """Delete some of the keys made longer ago than that; how many."""
    language, name = language_of(connection.dialect), _quoted(table, connection.dialect)
    before = forget_before(wall(), older_than)
    connection.exec_driver_sql(language.remember_purge(name, _HORIZON, before.int >> 80))
    return language.delete_some(connection, name, _HORIZON, before, batch)


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
