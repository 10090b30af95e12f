"""The options, by subject. Floats in seconds; ``None`` = no limit, ``0`` = do not wait.

Frozen and checked when made. Any field may also be set from the environment (``RESILIENTDB_QUEUE_TIMEOUT``)
or the database URL (``resilientdb_queue_timeout``) unless code has set it.

No ``from __future__ import annotations`` here: what a field allows is read from its annotation at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from resilientdb.config.base import Options
from resilientdb.config.fields import Choice, Count, Factory, Flag, Listeners, Number, Seconds
from resilientdb.config.wording import wrong_value

if TYPE_CHECKING:
    from pybreaker import CircuitBreakerListener, CircuitBreakerStorage

__all__ = [
    "Backoff",
    "BreakerPolicy",
    "Lifecycle",
    "RetryBudget",
    "RetryPolicy",
    "Routing",
    "SaturationQueue",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class SaturationQueue(Options, table="queue"):
    """Who may wait for a connection when all are in use, and how long."""

    max_waiting: Annotated[int | None, Count(minimum=0)] = 50
    """Most callers waiting at once, a node; 0 or more. One more is told ``PoolSaturated`` at once; 0 = nobody
    ever waits. 50: ten callers for each connection of SQLAlchemy's default pool of 5; at 20 ms a transaction
    the last of them waits 0.2 s, while a longer queue would mostly hold callers that have given up."""

    timeout: Annotated[float | None, Seconds()] = 5.0
    """Seconds one checkout may wait, 0 or more, then ``PoolTimeout``; never longer than the deadline. An
    explicit SQLAlchemy ``pool_timeout`` takes its place. 5.0: longer than any healthy wait, and a sixth of
    SQLAlchemy's 30 s, after which a visitor is long gone."""

    target: Annotated[float, Seconds(above=True)] = 0.05
    """Seconds of wait, above 0, that are no cause for concern. When nobody has waited less for ``interval``
    seconds, the pool is overloaded: the newest is then served first, and who has waited more than twice the
    target is told ``PoolSaturated``. 0.05: what a person does not notice (Elixir's ``db_connection``)."""

    interval: Annotated[float, Seconds(above=True)] = 1.0
    """Seconds, above 0, over which a line may stand before it counts as overload. 1.0: a burst of requests
    passes in less (Elixir's ``db_connection``)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Backoff(Options, table="retry.backoff"):
    """How long to pause before each further attempt."""

    initial: Annotated[float, Seconds(above=True)] = 0.05
    """Longest first pause in seconds, above 0. 0.05: a few round trips, enough for a deadlock's other side to
    finish."""

    maximum: Annotated[float, Seconds(above=True)] = 2.0
    """Longest pause in seconds, at least ``initial``. 2.0: a server that has come back is noticed soon, and
    one that has not is asked at most every other second."""

    multiplier: Annotated[float, Number(minimum=1)] = 2.0
    """Growth of the pause from one attempt to the next, 1 or more (1 = constant). 2.0: the usual doubling."""

    jitter: Annotated[Literal["full", "none"], Choice(("full", "none"))] = "full"
    """``"full"`` draws each pause between 0 and its limit, ``"none"`` takes the limit. Full: callers that
    failed together do not come back together."""

    def _check_together(self) -> None:
        if self.maximum < self.initial:
            allowed = f"at least {self._key('initial')} ({self.initial:g} seconds)"
            raise wrong_value(self._key("maximum"), self.maximum, allowed)


@dataclass(frozen=True, kw_only=True, repr=False)
class RetryBudget(Options, table="retry.budget"):
    """How much of the load may be retries, so that retrying never keeps a struggling database down."""

    ratio: Annotated[float, Number(maximum=1)] = 0.2
    """Share of the window's successes that may be retried, 0 to 1. 0.2: a fault that hits one transaction in
    five is hidden completely, and an outage adds a fifth to the load and not a multiple."""

    window: Annotated[float, Seconds(above=True)] = 10.0
    """Seconds of history that count, above 0. 10.0: long enough to be steady, short enough to forget an
    outage once it is over."""

    floor: Annotated[int, Count(minimum=0)] = 3
    """Retries a window that are always allowed, 0 or more. 3: a nearly idle service has no successes to earn
    its retries with, and three in ten seconds harm nobody."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RetryPolicy(Options, table="retry"):
    """What is tried again: opening a connection, and whole transactions run by ``run_transaction``."""

    attempts: Annotated[int, Count(minimum=1)] = 3
    """Attempts in all, 1 or more; the first try counts, so 1 = never retry. 3: two retries hide nearly every
    deadlock and dropped connection; what fails three times is seldom helped by a fourth."""

    timeout: Annotated[float | None, Seconds(above=True)] = 10.0
    """Seconds for all attempts and pauses together, above 0; never past the deadline. 10.0: outlasts a quick
    failover, and ends before most callers do."""

    wait_when_open: Annotated[bool, Flag()] = False
    """Whether a call that an open circuit refuses is tried again like one that failed. False: refused at once,
    for callers that somebody waits for. True: rides out an outage, for work that nobody watches. Costs nothing of
    the budget, since nothing is sent."""

    backoff: Backoff = field(default_factory=Backoff)
    """The pauses between attempts."""

    budget: RetryBudget = field(default_factory=RetryBudget)
    """The limit over all callers of one database."""

    def _check_together(self) -> None:
        pause = self.backoff
        if (
            self.attempts > 1
            and self.timeout is not None
            and pause.jitter == "none"
            and pause.initial >= self.timeout
        ):
            allowed = (
                f"more than {pause.table}.initial ({pause.initial:g} seconds, no jitter), or no attempt "
                f"after the first can be made; to mean that, set {self._key('attempts')} to 1"
            )
            raise wrong_value(self._key("timeout"), self.timeout, allowed)


@dataclass(frozen=True, kw_only=True, repr=False)
class BreakerPolicy(Options, table="breaker"):
    """When a node counts as failing, and how it is let back in. One breaker a node."""

    failure_rate_threshold: Annotated[float, Number(above=True, maximum=1)] = 0.5
    """Share of failed calls in the window that opens the breaker, above 0, at most 1. 0.5: when more calls
    fail than succeed, waiting for the node costs more than doing without it."""

    minimum_calls: Annotated[int, Count(minimum=1)] = 10
    """Calls in the window before the share means anything, 1 or more. 10: one failure at start-up, or at
    night, is no trend."""

    window: Annotated[float, Seconds(above=True)] = 10.0
    """Seconds of history that count, above 0. 10.0: the same as the retry budget's."""

    reset_timeout: Annotated[float, Seconds(above=True)] = 5.0
    """Seconds an open breaker refuses before it lets a call try, above 0; a good background probe ends it
    sooner. 5.0: about what a server needs to restart."""

    half_open_max_calls: Annotated[int, Count(minimum=1)] = 1
    """Calls that may try at once while half open, 1 or more. 1: a server that is coming back is not met by a
    crowd, and one caller at most pays for finding out."""

    probe_interval: Annotated[float | None, Seconds(above=True)] = 0.25
    """Seconds between background probes of a node, above 0; None = no prober, so that callers find out. 0.25:
    four probes fit in the second within which silence should be noticed."""

    probe_timeout: Annotated[float, Seconds(above=True)] = 0.75
    """Seconds after which an unanswered probe has failed, above 0. 0.75: with the interval, one second from
    silence to an open breaker, while a garbage collection or a checkpoint does not open it."""

    listeners: Annotated[tuple["CircuitBreakerListener", ...], Listeners()] = field(default=(), hash=False)
    """pybreaker listeners, told of every call and change of state, outside every lock. From code only."""

    storage: Annotated[Callable[[str], "CircuitBreakerStorage"] | None, Factory()] = field(
        default=None, hash=False
    )
    """Called with the node's name for the pybreaker storage that holds its state (Redis, to share it between
    processes); None = this process's memory. From code only. Memory: a breaker that depends on another
    server fails with that server."""

    enabled: Annotated[bool, Flag()] = True
    """False = no breaker: every call goes to the node. True: it costs nothing while the node is well."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Routing(Options, table="routing"):
    """Which node serves which work."""

    fallback_to_primary: Annotated[bool, Flag()] = True
    """Reads go to the primary when no replica can serve them. True: a page that works is worth some load on
    the primary, whose own queue and breaker bound it; False = ``NoReplicaAvailable``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Lifecycle(Options, table="lifecycle"):
    """The sockets below the connections. Each is set where the driver knows it and the user has not."""

    connect_timeout: Annotated[float | None, Seconds(above=True)] = 5.0
    """Seconds to open a connection, above 0; None = the driver's own limit. 5.0: ample for a healthy server,
    TLS and all, where an unreachable host would take the kernel's two minutes."""

    tcp_user_timeout: Annotated[float | None, Seconds(above=True)] = 10.0
    """Seconds that sent data may stay unacknowledged before the kernel drops the connection, above 0 (Linux);
    None = the kernel's quarter of an hour. 10.0: several retransmissions, so packet loss is survived and a
    vanished peer is not waited for."""

    keepalive_idle: Annotated[float | None, Seconds(above=True)] = 5.0
    """Seconds of silence before the kernel asks whether the peer is alive, above 0; None = the kernel's two
    hours. 5.0: catches a peer that dies during a long query, when nothing is sent that could go
    unacknowledged; a keepalive is one small packet."""
