"""What can be observed at one moment: frozen, plain, consistent.

One vocabulary everywhere (errors, logs, metrics, dashboard): ``total`` connections are ``active`` (in
somebody's hands, or being opened for somebody) plus ``idle``; callers without one are ``waiting``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["EngineState", "NodeStats", "PoolStats", "Role", "Snapshot"]

Role = Literal["primary", "replica", "unknown"]

EngineState = Literal["healthy", "saturated", "read_only", "down", "draining"]
"""healthy: all work is accepted. saturated: callers are waiting and the queue is at least half full.
read_only: no primary, but a replica serves reads. down: nothing can be served. draining: shutting down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """Connections and callers of one node's pool; the first four are of one instant, the rest count since
    the engine was created (``dispose()`` does not reset them)."""

    total: int
    active: int
    idle: int
    waiting: int
    limit: int | None
    """Most connections at once; None = unlimited."""
    max_waiting: int | None
    checkouts: int = 0
    waited: int = 0
    """Checkouts that had to wait, whatever came of it."""
    timeouts: int = 0
    rejected: int = 0
    """Callers told ``PoolSaturated``."""
    opened: int = 0
    """Physical connections opened."""
    closed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeStats:
    """One database node as this process sees it."""

    name: str
    """``host:port``; never a URL, never a password."""
    role: Role
    breaker: str
    """pybreaker's spelling (``closed``, ``open``, ``half-open``) or ``disabled``."""
    retry_after: float | None
    """Seconds until the breaker next lets somebody try, None when it is closed."""
    pool: PoolStats | None
    """None where the pool class is the user's own (``NullPool`` …)."""
    last_error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The whole engine."""

    state: EngineState
    retry_after: float | None
    """Seconds after which a refused caller should try again, None when healthy."""
    primary: str | None
    nodes: tuple[NodeStats, ...]
    retries: int = 0
    retry_budget: float = 1.0
    """Share of the retry budget that is left, 0.0 to 1.0."""
    detail: dict[str, object] = field(default_factory=dict)
