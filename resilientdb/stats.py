"""What can be observed at one moment: frozen, plain, consistent.

One vocabulary everywhere (errors, logs, metrics, dashboard): ``total`` connections are ``active`` (in
somebody's hands, or being opened for somebody) plus ``idle``; callers without one are ``waiting``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BOUNDS",
    "CommitOutcome",
    "EngineState",
    "Histogram",
    "Holder",
    "NodeStats",
    "PoolStats",
    "Role",
    "Snapshot",
]

Role = Literal["primary", "replica", "unknown"]

EngineState = Literal["healthy", "saturated", "read_only", "down", "draining"]
"""healthy: all work is accepted. saturated: callers are waiting and the queue is at least half full.
read_only: no primary, but a replica serves reads. down: nothing can be served. draining: shutting down."""


CommitOutcome = Literal["committed", "aborted", "unknown"]
"""``unknown``: it is still open, or so old that its key has been purged, or nobody could be asked in time."""


BOUNDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of a histogram's buckets in seconds: from a local query to SQLAlchemy's 30 s of patience."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How long something took, sorted into buckets. Cumulative: ``later - earlier`` is what came in between."""

    counts: tuple[int, ...]
    """Observations in each bucket: above the bound before and at most its own. One more than ``bounds``: the
    last bucket is for what took longer than the last bound."""
    sum: float
    """Seconds, of all observations together."""
    bounds: tuple[float, ...] = BOUNDS
    """Seconds, ascending."""

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Seconds; None when empty."""
        count = self.count
        return self.sum / count if count else None

    def quantile(self, q: float) -> float | None:
        """Seconds in which a share ``q`` (0 to 1) of the observations was done; None when empty.

        The upper bound of a bucket, so never less than the truth; ``math.inf`` for the last, which has none.
        Raises ``ValueError`` for another ``q``.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile is a share from 0 to 1; got {q!r}")
        count = self.count
        passed = 0
        for counted, bound in zip(self.counts, (*self.bounds, math.inf), strict=True):
            passed += counted
            # Divided rather than multiplied: 7 / 100 is 0.07, but 0.07 * 100 is more than 7.
            if counted and passed / count >= q:
                return bound
        return None

    def __sub__(self, earlier: Histogram) -> Histogram:
        """What came since ``earlier``. Raises ``ValueError`` if its buckets are others."""
        if self.bounds != earlier.bounds:
            raise ValueError(f"histograms of different buckets: {self.bounds} and {earlier.bounds}")
        counts = tuple(now - before for now, before in zip(self.counts, earlier.counts, strict=True))
        return replace(self, counts=counts, sum=self.sum - earlier.sum)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """Connections and callers of one node's pool.

    Those that say "now" are gauges, of one instant; all others count since the engine was created
    (``dispose()`` does not reset them), or since an earlier look (``since()``).
    """

    total: int
    """Connections now, ``active`` and ``idle``."""
    active: int
    """Connections now in somebody's hands, or being opened for somebody."""
    idle: int
    """Connections now that nobody has."""
    waiting: int
    """Callers now in line."""
    limit: int | None
    """Most connections at once, now; None = unlimited."""
    max_waiting: int | None
    """Most callers in line at once, now; None = unlimited."""
    waiting_by_criticality: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Callers now in each line: ``critical_plus``, ``critical``, ``sheddable_plus``, ``sheddable``, and
    ``holding`` for those who hold a connection already."""

    checkouts: int = 0
    """Connections handed out."""
    waited: int = 0
    """Callers who had to wait in line, whatever came of it."""
    timeouts: int = 0
    """Callers whose time was over before their turn came."""
    rejected: int = 0
    """Callers told ``PoolSaturated``: the sum of ``refused``."""
    refused: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Callers told ``PoolSaturated``, by the error's ``reason``: ``pool-saturated``, ``pool-would-be-late``,
    ``pool-displaced``, ``pool-shed``, ``pool-nested``."""
    opened: int = 0
    """Physical connections opened."""
    closed: int = 0
    """Physical connections closed, for whatever reason."""
    retired: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Physical connections that were not to be used again, by why: ``age``, ``uses``, ``idle`` (too long),
    ``surplus``, ``invalidated``, ``disposed``, ``validation`` (did not answer) and what else there may be."""
    connect_failures: int = 0
    """Attempts to open a physical connection that failed."""
    leaks: int = 0
    """Checkouts that were held for longer than leak detection allows, or never given back."""

    wait: Histogram | None = None
    """Seconds in line, of all who had to wait; None where nobody measures."""
    hold: Histogram | None = None
    """Seconds from checkout to checkin, of a sample of the checkouts; None where nobody measures."""
    create: Histogram | None = None
    """Seconds to open a physical connection, of those that were opened; None where nobody measures."""

    def since(self, earlier: PoolStats) -> PoolStats:
        """Gauges as they are in this one; counters and histograms as what came since ``earlier`` of the same
        pool."""
        return replace(
            self,
            checkouts=self.checkouts - earlier.checkouts,
            waited=self.waited - earlier.waited,
            timeouts=self.timeouts - earlier.timeouts,
            rejected=self.rejected - earlier.rejected,
            refused=_less(self.refused, earlier.refused),
            opened=self.opened - earlier.opened,
            closed=self.closed - earlier.closed,
            retired=_less(self.retired, earlier.retired),
            connect_failures=self.connect_failures - earlier.connect_failures,
            leaks=self.leaks - earlier.leaks,
            wait=_came(self.wait, earlier.wait),
            hold=_came(self.hold, earlier.hold),
            create=_came(self.create, earlier.create),
        )


def _less(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {key: count - before.get(key, 0) for key, count in now.items()}


def _came(now: Histogram | None, before: Histogram | None) -> Histogram | None:
    return now if now is None or before is None else now - before


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who has a connection now."""

    node: str
    """The node that it is of, ``host:port``."""
    seconds: float
    """Since the checkout."""
    route: str | None = None
    """The request that it is held for (``GET /orders/7``); None outside one."""
    thread: str | None = None
    """The name of the thread that checked it out; None for a task."""
    task: str | None = None
    """The name of the asyncio task that checked it out; None for a thread."""
    stack: tuple[str, ...] = ()
    """Where it was checked out, outermost call first; empty unless leak detection records it."""


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
    commits_in_doubt: int = 0
    """COMMITs that were sent and whose reply was lost or not awaited."""
    commits_settled: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Those of transactions run with ``exactly_once=True``, by what became of them: ``committed``, ``aborted``, or
    ``unknown`` when it could not be learned in time."""
    detail: dict[str, object] = field(default_factory=dict)
