"""What listeners are told: one frozen record a transition, never one a request.

``control(engine).on_event(listener)`` registers a callable. Listeners run outside every lock, in the
thread that caused the event; an exception in one is logged and reaches nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from resilientdb.stats import CommitOutcome, Holder, Role

__all__ = [
    "AcquisitionRetried",
    "CircuitStateChanged",
    "CircuitWouldChange",
    "CommitInDoubt",
    "CommitSettled",
    "ConnectionLeaked",
    "DrainBegun",
    "Event",
    "PrimaryChanged",
    "RetryBudgetExhausted",
    "RoleChanged",
    "TransactionRetried",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitStateChanged(Event):
    """A node's breaker moved. ``cause`` says why in words, without SQL or credentials."""

    node: str
    old: str
    new: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitWouldChange(Event):
    """A node's breaker did not move, but would have, if its mode were not ``metrics_only``."""

    node: str
    old: str
    new: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleChanged(Event):
    """A node was seen in another role than before."""

    node: str
    old: Role
    new: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class PrimaryChanged(Event):
    """Writes go to another node from now on; None = to none."""

    old: str | None
    new: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLeaked(Event):
    """A connection has been out for longer than ``lifecycle.leak_threshold``; said once a checkout."""

    holder: Holder


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainBegun(Event):
    """``control(engine).drain()`` was called: no new work is taken any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AcquisitionRetried(Event):
    """Opening a connection to ``node`` failed and is tried again after ``delay`` seconds. ``attempt`` is the one that
    failed, counted from 1; ``error`` says how, without SQL or credentials."""

    node: str
    attempt: int
    delay: float
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TransactionRetried(Event):
    """``run_transaction`` runs its function again after ``delay`` seconds. ``attempt`` is the one that failed,
    counted from 1; ``error`` says how, without SQL or credentials. ``node`` is where; None if the driver's error
    did not come through SQLAlchemy."""

    attempt: int
    delay: float
    error: str
    node: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryBudgetExhausted(Event):
    """A retry was not made because too many were made lately; said once until one is allowed again."""

    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitInDoubt(Event):
    """COMMIT was sent to ``node``, and its reply was lost or not awaited; ``error`` says how, without SQL or
    credentials. Of a transaction run with ``exactly_once=True`` a ``CommitSettled`` follows, unless its caller was
    cancelled."""

    node: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitSettled(Event):
    """What became of a COMMIT in doubt, found out by ``attempts`` questions in ``seconds``.

    ``unknown``: it could not be learned in time; whoever called was told so, and ``resolve(engine, key)`` may tell it
    later.
    """

    key: UUID
    outcome: CommitOutcome
    attempts: int
    seconds: float
