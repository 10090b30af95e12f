"""One logical transaction that is committed exactly once, however often its COMMIT gets lost.

Each run of the function is a transaction that begins with a token (``outcome``). When the reply to a COMMIT is lost,
the next transaction asks for that token first. If it is there, the work is done, and what the function returned is
still in memory; if not, it never will be, and the function runs again right there, in the transaction that has asked.

Written once, for threads; a task runs it in a greenlet, where waiting for a coroutine looks like a call.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from resilientdb.engine import retrying
from resilientdb.engine.outcome import Claim, StillOpen, was_purged, write
from resilientdb.errors import CommitOutcomeUnknown, ConfigurationError, DeadlineExceeded
from resilientdb.policy.faults import Fault, classify, describe
from resilientdb.policy.outcome import new_key
from resilientdb.runtime.clock import monotonic, wall
from resilientdb.runtime.context import current_deadline, deadline

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from sqlalchemy import Connection

    from resilientdb.config import RetryPolicy
    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.outcome import TokenTable
    from resilientdb.stats import CommitOutcome

__all__ = ["Hands", "Once", "resolve"]

T = TypeVar("T")

_LONGEST: Final = 30.0
"""Seconds that an outcome is looked for where neither a deadline nor ``RetryPolicy.timeout`` says."""


class Hands(Protocol):
    """What is done differently in a thread and in a task."""

    def begin(self) -> AbstractContextManager[Any]:
        """A transaction on a fresh connection or session; committed at the end."""

    def connection(self, work: Any) -> Connection:
        """SQLAlchemy's connection behind what ``begin`` has given."""

    def pause(self, seconds: float) -> None:
        """Let others go on."""


class Once(Generic[T]):
    """One call of ``run_transaction(exactly_once=True)``; used by one thread or task."""

    def __init__(
        self, hands: Hands, cluster: Cluster, table: TokenTable, function: Callable[[Any], T]
    ) -> None:
        self.key: uuid.UUID
        """Of the run in hand. A run whose COMMIT was never sent may linger at the server and keep its key: the next
        one has another. Only where a COMMIT is in doubt it must be the same."""
        self._hands = hands
        self._cluster = cluster
        self._table = table
        self._function = function
        self._claim: Claim | None = None
        """The question in hand, while a COMMIT is in doubt."""
        self._doubt: CommitOutcomeUnknown | None = None
        self._value: Any = None
        """What the function returned in the run whose COMMIT was sent last."""
        self._began = 0.0
        """When the doubt began."""

    def run(self) -> T:
        """One run, and what follows from a COMMIT in doubt. Raises as a single run does; ``CommitOutcomeUnknown``
        only when the outcome could not be learned in time."""
        try:
            return self._attempt()
        except CommitOutcomeUnknown as error:
            if self._claim is None:
                raise  # of another transaction, which the function made
            first = error
        self._began = monotonic()
        try:
            return retrying.loop(
                self._attempt,
                first,
                _patient(self._cluster.resilience.retry),
                self._hands.pause,
                is_retryable=self._may_ask_again,
                # To ask is no retry: nothing is done twice, and nobody else can answer.
                spend=lambda _: True,
                announce=lambda *_: None,
            )
        except Exception as last:
            if self._claim is None:
                raise  # the function's, in a transaction of its own
            self._settle("unknown")
            raise self._unknown(last) from self._doubt.__cause__ if self._doubt is not None else last

    def _attempt(self) -> T:
        committing = False
        try:
            with ExitStack() as last, self._hands.begin() as work:
                connection = self._hands.connection(work)
                if self._claim is None:
                    self._write(connection)
                elif self._claim.was_not_committed(connection):
                    self._settle("aborted")  # and it cannot be committed any more
                if self._claim is None:
                    self._value = self._function(work)
                committing = True
                # In silence, a COMMIT that may wait until the deadline leaves no time to find out what became of it.
                if (limit := current_deadline()) is not None:
                    last.enter_context(deadline(max(0.0, limit.remaining() / 2)))
        except CommitOutcomeUnknown as error:
            if committing:
                self._doubt = error
                error.key = self.key
                # Where a proof got lost, the question stays the same.
                self._claim = self._claim or Claim(self._table, self.key, self._left)
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and (committing or self._claim is not None):
                error.add_note(f"ask with resilientdb.resolve(engine, UUID('{self.key}'))")
            raise
        if self._claim is not None:
            self._settle("committed")
        value: T = self._value
        return value

    def _settle(self, outcome: CommitOutcome) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            self._cluster.commit_settled(self.key, outcome, claim.attempts, monotonic() - claim.since)

    def _write(self, connection: Connection) -> None:
        self.key = new_key(wall(), int.from_bytes(os.urandom(10)))
        write(connection, self._table, self.key)
        raw = connection.connection.dbapi_connection
        if raw is not None and self._cluster.driver.transaction_status(raw) == "idle":
            raise ConfigurationError(
                "exactly_once=True needs a transaction, and this engine or session is in AUTOCOMMIT",
                key="exactly_once",
            )

    def _may_ask_again(self, error: BaseException) -> bool:
        return self._claim is not None and _may_ask_again(error)

    def _left(self) -> float | None:
        return _left(self._cluster.resilience.retry, self._began)

    def _unknown(self, last: Exception) -> CommitOutcomeUnknown:
        why = "the transaction is still open" if isinstance(last, StillOpen) else describe(last)
        error = CommitOutcomeUnknown(
            "COMMIT was sent and its reply was lost, and what became of it could not be learned in time "
            f"({why}): ask with resilientdb.resolve(engine, UUID('{self.key}'))"
        )
        error.key = self.key
        return error


def resolve(hands: Hands, cluster: Cluster, table: TokenTable, key: uuid.UUID) -> CommitOutcome:
    """What became of the transaction with this key. Raises the last real error when the database cannot be asked."""
    began = monotonic()
    retry = cluster.resilience.retry
    claim = Claim(table, key, lambda: _left(retry, began))

    def ask() -> CommitOutcome:
        try:
            with hands.begin() as work:
                connection = hands.connection(work)
                if claim.was_not_committed(connection):
                    # Not for us to keep: whoever asks next must not find our own mark.
                    raise _NotThere(was_purged(connection, table, key))  # noqa: TRY301
        except _NotThere as answer:
            return "unknown" if answer.was_purged else "aborted"
        return "committed"

    try:
        try:
            return ask()
        except Exception as error:
            if not _may_ask_again(error):
                raise
            first = error
        return retrying.loop(
            ask,
            first,
            _patient(retry),
            hands.pause,
            is_retryable=_may_ask_again,
            spend=lambda _: True,
            announce=lambda *_: None,
        )
    except (StillOpen, DeadlineExceeded):
        if claim.waits == 0:
            raise
        return "unknown"


class _NotThere(Exception):
    def __init__(self, was_purged: bool) -> None:
        super().__init__()
        self.was_purged = was_purged


def _may_ask_again(error: BaseException) -> bool:
    """Whether a question that ended so may be put again. To ask changes nothing, so that only an answer that will
    stay the same ends it."""
    if isinstance(error, ConfigurationError):
        return False
    return isinstance(error, StillOpen) or classify(error) not in {Fault.APPLICATION, Fault.CONFIGURATION}


def _patient(retry: RetryPolicy) -> RetryPolicy:
    """As often as there is time for."""
    # The user's strategies are for doing it again, which this is not.
    return replace(retry, attempts=1_000_000, timeout=retry.timeout or _LONGEST, wait=None, stop=None)


def _left(retry: RetryPolicy, began: float) -> float | None:
    left = (retry.timeout or _LONGEST) - (monotonic() - began)
    deadline = current_deadline()
    return left if deadline is None else min(left, deadline.remaining())
