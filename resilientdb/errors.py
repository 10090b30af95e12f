"""Every error the library raises of its own, and nothing else.

Driver and SQLAlchemy errors are never wrapped or renamed: an ``IntegrityError`` stays one, and after the
last attempt the last real error is raised. What is added is this tree::

    sqlalchemy.exc.SQLAlchemyError
    └── ResilienceError
        ├── PoolSaturated            no room to wait: the queue is full, or the wait was refused or shed
        ├── PoolTimeout              waited for a connection as long as was allowed
        │                            (also a sqlalchemy.exc.TimeoutError)
        ├── CircuitOpen              the node is known to be failing; nothing was sent to it
        │                            (also a pybreaker.CircuitBreakerError)
        ├── DeadlineExceeded         the caller's deadline() ended first
        ├── NoPrimaryAvailable       every node that may take writes is out of service
        ├── NoReplicaAvailable       every node that may take reads is out of service
        ├── PoolDraining             the engine is shutting down
        ├── CommitOutcomeUnknown     COMMIT was sent and its reply was lost: committed or not, nobody knows
        ├── TransactionAborted       COMMIT of a transaction that a failed statement had aborted: rolled back
        └── ConfigurationError       an option is unknown, malformed or contradictory (also a ValueError)

Each carries ``reason`` (a stable slug, fit for a metric label or a problem ``type``), ``retry_after``
(seconds after which another attempt makes sense, or None) and ``snapshot`` (the node's counts at that
moment, within 50 ms, or None). The failure behind it, where there is one, is ``__cause__``.

A rejection is not a failure of the database: none of these derives from ``sqlalchemy.exc.DBAPIError``,
so code that retries on ``OperationalError`` does not retry them, and none derives from the builtin
``TimeoutError``, which SQLAlchemy would take for a lost connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pybreaker
import sqlalchemy.exc

if TYPE_CHECKING:
    from uuid import UUID

    from resilientdb.stats import NodeStats

__all__ = [
    "CircuitOpen",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "DeadlineExceeded",
    "NoPrimaryAvailable",
    "NoReplicaAvailable",
    "PoolDraining",
    "PoolSaturated",
    "PoolTimeout",
    "ResilienceError",
    "TransactionAborted",
]


class ResilienceError(sqlalchemy.exc.SQLAlchemyError):
    """Base of the tree drawn in the module docstring."""

    default_reason: ClassVar[str] = "resilience"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after: float | None = None,
        snapshot: NodeStats | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.retry_after = retry_after
        self.snapshot = snapshot

    def __reduce__(self) -> tuple[Any, ...]:
        # Task queues pickle exceptions; keyword-only arguments need to be said explicitly.
        return _restore, (type(self), self.args, self.__dict__.copy())


def _restore(
    cls: type[ResilienceError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> ResilienceError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class PoolSaturated(ResilienceError):
    """No connection is free and this caller may not wait: answered at once."""

    default_reason = "pool-saturated"


class PoolTimeout(ResilienceError, sqlalchemy.exc.TimeoutError):
    """No connection became free in the time this caller was allowed to wait."""

    default_reason = "pool-timeout"


class CircuitOpen(ResilienceError, pybreaker.CircuitBreakerError):
    """The node's circuit breaker is open (or its few probes are taken); nothing was sent."""

    default_reason = "circuit-open"


class DeadlineExceeded(ResilienceError):
    """The enclosing ``deadline()`` ended before the work did."""

    default_reason = "deadline-exceeded"


class NoPrimaryAvailable(ResilienceError):
    """No node that accepts writes can be reached."""

    default_reason = "no-primary"


class NoReplicaAvailable(ResilienceError):
    """No node may serve this read."""

    default_reason = "no-replica"


class PoolDraining(ResilienceError):
    """The engine takes no new work: it is draining."""

    default_reason = "draining"


class CommitOutcomeUnknown(ResilienceError):
    """COMMIT was sent but its reply never came: the transaction may or may not have been committed.

    Never retried by the library. The driver's error is ``__cause__``. ``key`` is that of a transaction run with
    ``exactly_once=True``, whose outcome ``resolve(engine, key)`` may be able to tell later; else None.
    """

    default_reason = "commit-outcome-unknown"
    key: UUID | None = None


class TransactionAborted(ResilienceError):
    """COMMIT of a transaction in which a statement had failed: the server rolls such a transaction back and calls
    that a success. Nothing of it is committed.

    The statement's error was caught inside the transaction. ``retryable`` tells whether it was one that another run
    of the whole transaction may mend, as a deadlock is.
    """

    default_reason = "transaction-aborted"
    retryable: bool = False


class ConfigurationError(ResilienceError, ValueError):
    """An option is unknown, of the wrong type, out of range or contradicts another.

    ``key`` is the dotted option (``queue.max_waiting``), ``value`` what was given (passwords hidden).
    """

    default_reason = "configuration"

    def __init__(self, message: str, *, key: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.key = key
        self.value = value
