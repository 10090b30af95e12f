"""Named sets of options for common kinds of process; each value with the reason it differs from the default.

A profile ranks above the defaults and below everything somebody said: any option may still be set.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from resilientdb.config.wording import nearest, wrong_value
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PROFILES", "Profile", "ProfileName", "Setting", "find_profile"]

ProfileName = Literal["web", "worker", "batch", "pgbouncer"]


class Setting(NamedTuple):
    """One value a profile sets."""

    value: object
    reason: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """``settings`` by dotted key."""

    name: ProfileName
    summary: str
    settings: Mapping[str, Setting]

    def values(self) -> dict[str, object]:
        """What the profile sets, by dotted key."""
        return {key: setting.value for key, setting in self.settings.items()}


_WEB = Profile(
    name="web",
    summary="A person or another service waits for the answer: a late one is worth less than a quick 503.",
    settings={
        "queue.timeout": Setting(2.0, "a page that waits longer is reloaded, which doubles the load"),
        "retry.timeout": Setting(3.0, "retries must fit in what the visitor will wait"),
        "retry.backoff.maximum": Setting(0.5, "a longer pause holds a worker of the server for nothing"),
        "lifecycle.connect_timeout": Setting(2.0, "a healthy server accepts in milliseconds"),
        "lifecycle.tcp_user_timeout": Setting(5.0, "a dead peer should not outlive half a request"),
        "deadline": Setting(10.0, "about as long as attention lasts, and well below a proxy's usual 30-60 s"),
    },
)

_WORKER = Profile(
    name="worker",
    summary="Jobs from a queue (Celery, RQ, Dramatiq): nobody watches, a failed job costs a redelivery.",
    settings={
        "queue.timeout": Setting(15.0, "waiting is cheaper than redelivering the job"),
        "retry.attempts": Setting(8, "with the pauses below, rides out a server's restart"),
        "retry.wait_when_open": Setting(True, "the job can wait until the database is back"),
        "retry.timeout": Setting(60.0, "longer than a usual failover: Patroni's leader key lives 30 s"),
        "retry.backoff.initial": Setting(0.25, "nobody notices, and a struggling server gets room"),
        "retry.backoff.maximum": Setting(10.0, "keeps trying through a failover without hammering it"),
    },
)

_BATCH = Profile(
    name="batch",
    summary="Few long transactions (reports, ETL, migrations): hours of work are worth minutes of waiting.",
    settings={
        "queue.timeout": Setting(60.0, "connections are held for long, so a free one takes long to come"),
        "retry.attempts": Setting(15, "with the pauses below, rides out a slow failover"),
        "retry.wait_when_open": Setting(True, "starting over costs more than waiting"),
        "retry.timeout": Setting(300.0, "what was lost takes longer than that to compute again"),
        "retry.backoff.initial": Setting(0.5, "a batch must not compete with interactive work"),
        "retry.backoff.maximum": Setting(30.0, "a server in recovery gains nothing from quicker questions"),
        "lifecycle.connect_timeout": Setting(15.0, "a busy server may be slow to accept"),
        "lifecycle.tcp_user_timeout": Setting(
            60.0, "a short network fault should not end a long transaction"
        ),
        "lifecycle.validation_timeout": Setting(
            5.0, "a busy server may be slow to answer, and to open another connection is slower still"
        ),
    },
)

_PGBOUNCER = Profile(
    name="pgbouncer",
    summary="A transaction-mode pooler stands in front of the database and queues on its own.",
    settings={
        "queue.max_waiting": Setting(20, "the pooler holds a queue too; two long ones in a row add up"),
        "queue.timeout": Setting(2.0, "waiting here comes before waiting there (query_wait_timeout, 120 s)"),
        "lifecycle.connect_timeout": Setting(2.0, "a pooler near by answers at once unless it is full"),
        "lifecycle.idle_timeout": Setting(
            60.0,
            "each takes one of the pooler's places (max_client_conn, 100), and another is opened cheaply",
        ),
        "breaker.probe_interval": Setting(
            1.0, "each probe borrows one of the pooler's few server connections"
        ),
        "breaker.probe_timeout": Setting(
            2.0, "a probe that waits in the pooler shows a full one, not a dead node"
        ),
    },
)

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {profile.name: profile for profile in (_WEB, _WORKER, _BATCH, _PGBOUNCER)}
)


def find_profile(name: object, *, said: str | None = None) -> Profile:
    """The profile of that name; ``said`` is how the source spells the option that holds it."""
    if isinstance(name, str) and name in PROFILES:
        return PROFILES[name]
    allowed = " or ".join(map(repr, get_args(ProfileName)))
    error = wrong_value("profile", name, allowed, said=said)
    meant = nearest(name, PROFILES) if isinstance(name, str) else None
    if meant is None:
        raise error
    raise ConfigurationError(f"{error}; did you mean {meant!r}?", key=error.key, value=error.value)
