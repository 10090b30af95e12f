"""The options, by subject. Floats in seconds; ``None`` = no limit, ``0`` = do not wait.

Frozen and checked when made. Any field may also be set from the environment (``RESILIENTDB_QUEUE_TIMEOUT``)
or the database URL (``resilientdb_queue_timeout``) unless code has set it.

No ``from __future__ import annotations`` here: what a field allows is read from its annotation at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from resilientdb.config.base import Options
from resilientdb.config.fields import (
    Choice,
    Count,
    Factory,
    Flag,
    Listeners,
    Name,
    Number,
    Seconds,
    Strategy,
)
from resilientdb.config.wording import wrong_value

if TYPE_CHECKING:
    from pybreaker import CircuitBreakerListener, CircuitBreakerStorage
    from tenacity import RetryCallState

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
    """Most callers waiting at once, a node; 0 or more. One more is told ``PoolSaturated`` at once, or takes the
    place of the oldest, if that has waited more than three times ``target``; 0 = nobody ever waits. 50: ten
    callers for each connection of SQLAlchemy's default pool of 5; at 20 ms a transaction the last of them waits
    0.2 s, while a longer queue would mostly hold callers that have given up."""

    timeout: Annotated[float | None, Seconds()] = 5.0
    """Seconds one checkout may wait, 0 or more, then ``PoolTimeout``; never longer than the deadline. An
    explicit SQLAlchemy ``pool_timeout`` takes its place. 5.0: longer than any healthy wait, and a sixth of
    SQLAlchemy's 30 s, after which a visitor is long gone."""

    target: Annotated[float, Seconds(above=True)] = 0.05
    """Seconds of wait, above 0 and at most ``timeout`` (unless that is 0), that are no cause for concern. Judged
    line by line, each criticality having its own: when nobody in a line has waited less for ``interval``
    seconds, that line is overloaded; its newest is then served first, and who has waited in it more than twice
    the target is told ``PoolSaturated``. 0.05: what a person does not notice (Elixir's ``db_connection``)."""

    interval: Annotated[float, Seconds(above=True)] = 1.0
    """Seconds, above 0, over which a line may stand before it counts as overload. 1.0: a burst of requests
    passes in less (Elixir's ``db_connection``)."""

    sheddable_plus_share: Annotated[float, Number(maximum=1)] = 0.5
    """Part of all places to wait, 0 to 1, up to which a ``sheddable_plus`` caller may join; 0 = it never waits.
    The more critical may take every place. 0.5: when the line is half full, the rest is for those who are
    missed."""

    sheddable_share: Annotated[float, Number(maximum=1)] = 0.25
    """The same for ``sheddable`` callers, at most ``sheddable_plus_share``. 0.25: they still wait out a short
    burst, and are the first to be refused in a longer one."""

    limiter: Annotated[str | None, Name()] = None
    """Name of a limiter: engines of this process that give the same name share, node by node, one limit of
    connections in use at once and one line in front of it, an Engine and an AsyncEngine too. None = an engine has
    its own."""

    def _check_together(self) -> None:
        if self.timeout and self.target > self.timeout:
            allowed = f"at most {self._key('timeout')} ({self.timeout:g} seconds), the longest anybody waits"
            raise wrong_value(self._key("target"), self.target, allowed)
        if self.sheddable_share > self.sheddable_plus_share:
            allowed = (
                f"at most {self._key('sheddable_plus_share')} ({self.sheddable_plus_share:g}), "
                "the share of the more critical"
            )
            raise wrong_value(self._key("sheddable_share"), self.sheddable_share, allowed)


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
    its retries with, and three in ten seconds harm nobody. It counts for each process: of a thousand processes these
    are three thousand."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RetryPolicy(Options, table="retry"):
    """What is tried again: opening a connection, and whole transactions run by ``run_transaction``."""

    attempts: Annotated[int, Count(minimum=1)] = 3
    """Attempts in all, 1 or more; the first try counts, so 1 = never retry. 3: two retries hide nearly every
    deadlock and dropped connection; what fails three times is seldom helped by a fourth."""

    timeout: Annotated[float | None, Seconds(above=True)] = 10.0
    """Seconds for all attempts and pauses together, the first attempt included, above 0: no attempt is begun after
    them, and none is past the deadline. 10.0: outlasts a quick failover, and ends before most callers do."""

    wait_when_open: Annotated[bool, Flag()] = False
    """Whether a call that an open circuit refuses is tried again like one that failed. False: refused at once,
    for callers that somebody waits for. True: rides out an outage, for work that nobody watches. Costs nothing of
    the budget, since nothing is sent."""

    wait: Annotated[
        Callable[["RetryCallState"], float] | None,
        Strategy("wait", "tenacity.wait_exponential_jitter()", "seconds"),
    ] = field(default=None, hash=False)
    """A tenacity wait strategy, or a function like one, that says how long to pause before the next attempt: in place
    of ``backoff``. From code only. None: the backoff. ``attempts``, ``timeout``, the budget and the deadline still
    bind."""

    stop: Annotated[
        Callable[["RetryCallState"], bool] | None,
        Strategy("stop", "tenacity.stop_after_delay(5)", "whether to stop"),
    ] = field(default=None, hash=False)
    """A tenacity stop strategy, or a function like one, that ends the attempts sooner: it is asked in addition to all
    other limits and lifts none of them. From code only."""

    backoff: Backoff = field(default_factory=Backoff)
    """The pauses between attempts."""

    budget: RetryBudget = field(default_factory=RetryBudget)
    """The limit over all callers of one database."""

    def _check_together(self) -> None:
        pause = self.backoff
        if (
            self.attempts > 1
            and self.timeout is not None
            and self.wait is None
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
    """Seconds an open breaker refuses before it lets a call try, above 0, at most ``max_reset_timeout``; a random
    part between a half and all of it. A good background probe ends it sooner. Doubled each time it opens again
    without having been closed for a whole ``window``. Also how long such a call may take until another may try.
    5.0: about what a server needs to restart."""

    max_reset_timeout: Annotated[float, Seconds(above=True)] = 60.0
    """Seconds to which that may grow, at least ``reset_timeout``; the same = it does not grow. 60.0: a server that
    stays away is asked by a caller once or twice a minute, and is back in use within one."""

    half_open_max_calls: Annotated[int, Count(minimum=1)] = 1
    """Calls that may try at once while half open, and at the beginning of the slow start, 1 or more. 1: a server
    that is coming back is not met by a crowd, and one caller at most pays for finding out."""

    slow_start_calls: Annotated[int, Count(minimum=0)] = 32
    """Calls that must succeed, once a server has come back, until as many as like may call at once, 0 or more;
    before that one more at once for each success. 0 = at once. 32: five doublings, which take a fast server a tenth
    of a second, and are as many as it answers for a slow one."""

    slow_call_duration: Annotated[float | None, Seconds(above=True)] = None
    """Seconds, above 0, after which a statement that was answered counts as slow; None = no matter how long it took.
    None: what is slow only the application knows."""

    slow_call_rate_threshold: Annotated[float, Number(above=True, maximum=1)] = 0.5
    """Share of slow calls in the window that opens the breaker, above 0, at most 1. 0.5: as for failures."""

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

    shared: Annotated[str | None, Name()] = None
    """Name of a set of breakers: engines of this process that give the same name share one breaker a node, an Engine
    and an AsyncEngine too. Their other options here must be the same. None = an engine has its own."""

    mode: Annotated[
        Literal["normal", "metrics_only", "disabled", "forced_open"],
        Choice(("normal", "metrics_only", "disabled", "forced_open")),
    ] = "normal"
    """``"metrics_only"``: says what it would do, and refuses nothing. ``"disabled"``: lets every call through.
    ``"forced_open"``: lets no call through. Can be changed in a running program. Normal: to try it out first,
    or to keep all callers away from a server, is a decision."""

    enabled: Annotated[bool, Flag()] = True
    """False = no breaker, and no prober: every call goes to the node. True: it costs nothing while the node is
    well."""

    def _check_together(self) -> None:
        if self.max_reset_timeout < self.reset_timeout:
            allowed = f"at least {self._key('reset_timeout')} ({self.reset_timeout:g} seconds)"
            raise wrong_value(self._key("max_reset_timeout"), self.max_reset_timeout, allowed)
        if not self.enabled and self.mode not in {"normal", "disabled"}:
            allowed = f"'disabled' or left out where {self._key('enabled')} is false"
            raise wrong_value(self._key("mode"), self.mode, allowed)


@dataclass(frozen=True, kw_only=True, repr=False)
class Routing(Options, table="routing"):
    """Which node serves which work."""

    fallback_to_primary: Annotated[bool, Flag()] = True
    """Reads go to the primary when no replica can serve them. True: a page that works is worth some load on
    the primary, whose own queue and breaker bound it; False = ``NoReplicaAvailable``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Lifecycle(Options, table="lifecycle"):
    """How connections are opened, kept, doubted and ended. What concerns their sockets is set where the driver
    knows it and the user has not."""

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

    min_size: Annotated[int, Count(minimum=0)] = 0
    """Connections kept open to a node, 0 or more, not above SQLAlchemy's ``pool_size``; opened in the background,
    at the start and whenever one is lost. 0: opened when needed, as SQLAlchemy does; an idle service occupies
    nothing of the server."""

    max_connecting: Annotated[int, Count(minimum=1)] = 2
    """Most connections opened to a node at once in the background, 1 or more. 2: a server that has just come
    back is not met by every process with all its connections, and one slow connect does not hold up the
    others."""

    max_age: Annotated[float | None, Seconds(above=True)] = 1800.0
    """Seconds, above 0, after which a connection is closed: when it lies idle, or comes back. Each ends at a
    moment of its own in the last tenth, so that they do not all end together; None = no limit. 1800.0: half an
    hour (HikariCP's), after which a moved address and what piles up in a server's process are left behind."""

    max_uses: Annotated[int | None, Count(minimum=1)] = None
    """Checkouts after which a connection is closed, 1 or more; None = no limit. None: age bounds what piles up
    in a connection, without closing many at once under load."""

    idle_timeout: Annotated[float | None, Seconds(above=True)] = 600.0
    """Seconds unused, above 0, after which a connection is closed while there are more than ``min_size``; None =
    kept. 600.0: a peak's connections go back to the server within ten minutes (HikariCP's), and are not
    opened anew for each small one."""

    keepalive: Annotated[float | None, Seconds(above=True)] = None
    """Seconds unused, above 0, after which an idle connection is asked whether it lives, each time they have
    passed: for a pooler or firewall that drops silent sessions. Below ``max_age``; and below ``idle_timeout``
    if ``min_size`` is 0, since nothing would be left to ask. None: an idle service costs the database nothing,
    and the kernel asks anyway (``keepalive_idle``)."""

    validate_idle: Annotated[float | None, Seconds()] = 0.5
    """Seconds unused, 0 or more, after which a connection is asked whether it lives before it is handed out;
    0 = each that had to be put by, None = never. 0.5: a busy connection is never asked, and one that died
    unseen meanwhile costs its next user nothing (HikariCP's 500 ms)."""

    validation_timeout: Annotated[float, Seconds(above=True)] = 1.0
    """Seconds, above 0, for the answer to either question; without one the connection is closed, and a new one
    opened for who waits. 1.0: a healthy server answers in milliseconds, and waiting for a dead one costs its
    caller no more than a slow connect."""

    leak_threshold: Annotated[float | None, Seconds(above=True)] = None
    """Seconds, above 0, after which a connection that is still out is reported, with the stack of its checkout;
    None = never. None: to keep that stack costs every checkout some microseconds, and how long is too long
    only the application knows."""

    def _check_together(self) -> None:
        if self.keepalive is None:
            return
        if self.max_age is not None and self.keepalive >= self.max_age:
            allowed = (
                f"less than {self._key('max_age')} ({self.max_age:g} seconds), when a connection is closed"
            )
            raise wrong_value(self._key("keepalive"), self.keepalive, allowed)
        if self.idle_timeout is not None and self.min_size == 0 and self.keepalive >= self.idle_timeout:
            allowed = (
                f"less than {self._key('idle_timeout')} ({self.idle_timeout:g} seconds), when an unused connection "
                f"is closed, or {self._key('min_size')} more than 0, so that some stay"
            )
            raise wrong_value(self._key("keepalive"), self.keepalive, allowed)
