"""A transaction that the server has rolled back by itself, while the program believes that it goes on.

After a deadlock MySQL and MariaDB have rolled back the whole transaction, with its savepoints, and take the next
statement as the first of a new one. A program that catches the error and goes on would commit the second half of its
work and be told that all is well. (PostgreSQL refuses all statements until ROLLBACK, and says so: see ``hooks``.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

from resilientdb.engine.compat import record_of_connection
from resilientdb.engine.driver import Driver
from resilientdb.errors import TransactionAborted
from resilientdb.policy.faults import classify, describe, number_of

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import Dialect

__all__ = ["Rollbacks"]

_NO_SUCH_SAVEPOINT = 1305


class _Rollback:
    """What ended a transaction, in words: its traceback would keep the connection out of the pool."""

    def __init__(self, raw: object, error: BaseException, is_certain: bool) -> None:
        self.raw = raw
        """The driver's connection; the record that this is kept on may have another one by then."""
        self.is_certain = is_certain
        self.words = describe(error)
        self.retryable = classify(error).retry_transaction


class Rollbacks:
    """Remembers them on the connections' records; of one engine."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.are_silent = type(driver).rolls_back is not Driver.rolls_back
        """Whether there are any to be remembered."""

    def attach(self, dialect: Dialect) -> None:
        """Have savepoints be left alone that the server has forgotten."""
        if not self.are_silent:
            return
        rollback_to, release = dialect.do_rollback_to_savepoint, dialect.do_release_savepoint

        def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
            record = record_of_connection(connection)
            gone = self._of(record)
            if gone is not None and gone.is_certain:
                return  # what its user is to see is why, not that there is no such savepoint
            try:
                rollback_to(connection, name)
            except exc.DBAPIError as error:
                if gone is None or number_of(error) != _NO_SUCH_SAVEPOINT:
                    raise
                gone.is_certain = True

        def do_release_savepoint(connection: Connection, name: str) -> None:
            gone = self._of(record_of_connection(connection))
            if gone is not None and gone.is_certain:
                raise _aborted(gone)
            release(connection, name)

        dialect.do_rollback_to_savepoint = do_rollback_to_savepoint  # type: ignore[method-assign]
        dialect.do_release_savepoint = do_release_savepoint  # type: ignore[method-assign]

    def note(self, record: Any, error: BaseException) -> None:
        """A statement has failed with ``error``."""
        raw = record.dbapi_connection
        answer = self._driver.rolls_back(error)
        if answer is not False and raw is not None and not self._driver.is_idle(raw):
            record.rollback = _Rollback(raw, error, answer is True)

    def before_commit(self, record: Any) -> TransactionAborted | None:
        """What to raise instead of committing what has come since; None: there was no such rollback."""
        gone = self._of(record)
        if gone is None:
            return None
        if gone.is_certain or self._driver.rolls_back_on_timeout(gone.raw):
            return _aborted(gone)
        return None

    def forget(self, record: Any) -> None:
        """The transaction is over for the program, too."""
        if getattr(record, "rollback", None) is not None:
            record.rollback = None

    def _of(self, record: Any) -> _Rollback | None:
        gone: _Rollback | None = getattr(record, "rollback", None)
        return gone if gone is not None and gone.raw is record.dbapi_connection else None


def _aborted(gone: _Rollback) -> TransactionAborted:
    error = TransactionAborted(
        f"a statement in this transaction had failed ({gone.words}), upon which the server rolled all of it back, "
        "savepoints included: nothing is committed; the whole transaction must be run again"
    )
    error.retryable = gone.retryable
    return error
