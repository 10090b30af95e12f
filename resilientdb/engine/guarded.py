"""Exactly once without a table, on PostgreSQL: a transaction's number, and what shows that it still means it.

The server can be asked by its number whether a transaction was committed (``pg_xact_status``). After a crash or a
failover it gives the same numbers out anew, and the answer may be another transaction's. So the transaction notes, as
it begins, in which life of the server it has its number (``policy.outcome.Life``). The question is good in that life
only; in any other, nobody can tell.

The transaction also holds an advisory lock of its key's number. Whoever asks waits for that lock: only when it is
free, the answer is final. And "committed" is believed once the transaction that has asked has written something and
is committed itself: by then both are as durable as this session's transactions are.
"""

# ruff: noqa: S608 - what is put into statements is numbers

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import exc

from resilientdb.engine.hooks import WITH_BEGIN
from resilientdb.engine.outcome import NeverKnown, StillOpen, end_holder, language_of
from resilientdb.engine.outcome_postgresql import impatient
from resilientdb.errors import ConfigurationError
from resilientdb.policy.faults import describe, sqlstate_of
from resilientdb.policy.outcome import Life, lock_number, patience, what_ended
from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.engine.driver import Driver

__all__ = ["Guarded", "GuardedQuestion"]


class Identity(NamedTuple):
    """A transaction's number, and the life of the server in which it means that transaction."""

    number: int
    life: Life


class Guarded:
    """``once.Evidence``: what the transaction noted about itself. It is in our memory and nowhere else."""

    is_kept = False

    def __init__(self, dialect: Dialect, driver: Driver) -> None:
        if dialect.name != "postgresql":
            raise ConfigurationError(
                f'exactly_once="guarded" is for postgresql; this is {dialect.name}',
                key="exactly_once",
                value="guarded",
            )
        self._reads_with_begin = driver.reads_with_begin
        self.identity: Identity
        """Of the transaction that has left it last."""

    def leave(self, connection: Connection, key: uuid.UUID) -> None:
        say = connection.exec_driver_sql
        lock = f"pg_advisory_xact_lock({lock_number(key)})"
        try:
            if self._reads_with_begin:
                said = say(f"SELECT {_WHO} FROM {lock}", execution_options=WITH_BEGIN).scalar_one()
            else:
                say(f"SELECT {lock}", execution_options=WITH_BEGIN)
                said = say(f"SELECT {_WHO}").scalar_one()
        except exc.DBAPIError as error:
            if sqlstate_of(error) not in _NOT_TO_BE_HAD:
                raise
            raise ConfigurationError(
                f'exactly_once="guarded" needs functions that this server or role does not have ({describe(error)}): '
                "use exactly_once=True, which needs a table",
                key="exactly_once",
                value="guarded",
            ) from error
        self.identity = _identity(said)

    def question(self, key: uuid.UUID, left: Callable[[], float | None]) -> GuardedQuestion:
        return GuardedQuestion(self, key, left)


class GuardedQuestion:
    """``once.Question`` about the transaction whose identity ``evidence`` has now."""

    def __init__(self, evidence: Guarded, key: uuid.UUID, left: Callable[[], float | None]) -> None:
        self._evidence = evidence
        self._about = evidence.identity
        self._key = key
        self._left = left
        self.since = monotonic()
        self.attempts = 0
        self.waits = 0
        """How many times it was still open."""

    def was_not_committed(self, connection: Connection) -> bool:
        """As ``once.Question`` has it."""
        self.attempts += 1
        say = connection.exec_driver_sql
        # To get a number is to be on a primary: a standby refuses.
        ours = _identity(say(f"SELECT {_WHO}").scalar_one())
        self._be_in_the_same_life(ours)
        status = self._status_once_settled(connection)
        if status == "aborted":
            self._evidence.identity = ours  # it holds the lock already
            return True
        if status != "committed":
            raise NeverKnown("the server has forgotten what became of a transaction so old")
        # To have a number is not enough to be waited for: what has written nothing is committed without a word to
        # disk or standby.
        say("SELECT pg_logical_emit_message(true, 'resilientdb'::text, ''::text)")
        return False

    def _status_once_settled(self, connection: Connection) -> str | None:
        language, left = language_of(connection.dialect), self._left()
        say = connection.exec_driver_sql
        if self.waits:
            end_holder(connection, "", self._key, monotonic() - self.since, left)
        try:
            with impatient(connection, patience(self.waits, left)):
                say(f"SELECT 1 FROM pg_advisory_xact_lock({lock_number(self._key)})")
                row = say(f"SELECT {_WHO}, pg_xact_status('{self._about.number}'::xid8)").one()
        except exc.DBAPIError as error:
            if language.is_still_open(error):
                self.waits += 1
                raise StillOpen from error
            if sqlstate_of(error) == _IN_THE_FUTURE:
                raise NeverKnown("the server has given out no such number in this life") from error
            raise
        self._be_in_the_same_life(_identity(row[0]))
        status: str | None = row[1]
        if status == "in progress":
            self.waits += 1
            raise StillOpen
        return status

    def _be_in_the_same_life(self, now: Identity) -> None:
        ended = what_ended(self._about.life, now.life)
        if ended is not None:
            raise NeverKnown(f"transaction {self._about.number} cannot be asked about: {ended}")


def _identity(said: str) -> Identity:
    number, timeline, started, *reset = said.split()
    return Identity(int(number), Life(timeline, started, reset[0] if reset else None))


_WHO: Final = (
    "concat_ws(' ', "
    # First what a standby refuses, as a write: the one error that says to look for the primary.
    "pg_current_xact_id(), "
    # As it is now; what the control file says of it is stale after a promotion.
    "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), "
    # As numbers, whatever the session's time zone and style of dates.
    "extract(epoch FROM pg_postmaster_start_time()), "
    "extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()))"
)
"""An ``Identity``, as one text: each column costs SQLAlchemy more than the server. The cluster's own identifier is
not in it: copies share it, others were not started in the same microsecond, and to read it is to read a file, in each
transaction."""

_NOT_TO_BE_HAD: Final = frozenset({"0A000", "42501", "42883"})
_IN_THE_FUTURE: Final = "22023"
