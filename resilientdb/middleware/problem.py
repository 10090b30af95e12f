"""What a client is told when the database could not serve its request: an RFC 9457 problem, or nothing.

Pure: an error goes in, a status, headers and a body come out; nothing is read or sent here. The text is
fixed for each kind of problem, so nothing of a host, DSN, SQL statement or driver message can reach a client.

========================================================================  ======  =====================
error (or behind ``orig`` / ``__cause__``)                                status  Retry-After
========================================================================  ======  =====================
PoolSaturated, PoolTimeout, CircuitOpen, DeadlineExceeded, PoolDraining,  503     from the cause
NoPrimaryAvailable, NoReplicaAvailable, sqlalchemy.exc.TimeoutError
driver error: connection lost, cannot connect, wrong role, overload       503     from the cause
driver error: statement timed out, and the request's deadline is over     503     from the cause
driver error: deadlock or serialization failure that survived retries     503     1
CommitOutcomeUnknown; driver error that left a COMMIT in doubt            500     **none**
anything else                                                             not ours: ``None``
========================================================================  ======  =====================

A COMMIT in doubt is a 500 without ``Retry-After`` on purpose: proxies and clients send a 503 again by
themselves, and the write may have been applied already. Such a client has to look first (or send an
idempotency key).
"""

from __future__ import annotations

import html
import json
import math
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import sqlalchemy.exc

from resilientdb import errors
from resilientdb.middleware.origin import behind, phase_of
from resilientdb.policy.faults import Fault, classify

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.stats import NodeStats, Snapshot

__all__ = ["PROBLEM_BASE", "Answer", "Problem", "Problems"]

PROBLEM_BASE: Final = "urn:resilientdb:problem:"
"""Put before the reason to make a problem's ``type``: ``urn:resilientdb:problem:circuit-open``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response, ready to send."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is said, before it is put in the form the client prefers."""

    status: int
    type: str
    title: str
    reason: str
    retry_after: int | None
    """Whole seconds, jittered already; None = do not say when."""
    detail: str

    def answer(self, *, method: str = "GET", accept: str = "", may_close: bool = False) -> Answer:
        """The response to a request with this method and ``Accept`` header.

        HTML only for a client that prefers it over JSON (browsers do), else ``application/problem+json``.
        HEAD gets the headers of the answer to GET and no body. ``may_close``: the protocol allows a
        ``Connection`` header (HTTP/1 does, HTTP/2 and WSGI forbid it), so a draining process can ask its
        clients to open their next connection elsewhere.
        """
        if _prefers_html(accept):
            media_type, body = "text/html; charset=utf-8", self._html()
        else:
            media_type, body = "application/problem+json", self._json()
        headers = [
            ("Content-Type", media_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Vary", "Accept"),
        ]
        if self.retry_after is not None:
            headers.append(("Retry-After", str(self.retry_after)))
        if may_close and self.reason == _DRAINING.reason:
            headers.append(("Connection", "close"))
        return Answer(self.status, headers, b"" if method == "HEAD" else body)

    def _json(self) -> bytes:
        members: dict[str, object] = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "reason": self.reason,
        }
        if self.retry_after is not None:
            members["retry_after"] = self.retry_after
        return json.dumps(members).encode()

    def _html(self) -> bytes:
        title, detail = html.escape(self.title), html.escape(self.detail)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{title}</title></head>'
            f"<body><h1>{title}</h1><p>{detail}</p></body></html>"
        ).encode()


@dataclass(frozen=True, slots=True)
class _Kind:
    """One row of the table in the module docstring; ``reason`` for errors that have none of their own."""

    reason: str
    title: str
    detail: str
    status: int = 503
    retry: Literal["from-cause", "soon", "never"] = "from-cause"


_AGAIN = "Please try again in a moment."
_BUSY = "All connections to the database are in use. " + _AGAIN
_UNREACHABLE = "The service cannot reach its database at the moment. " + _AGAIN

_UNAVAILABLE = _Kind("database-unavailable", "Database unavailable", _UNREACHABLE)
_POOL_TIMEOUT = _Kind("pool-timeout", "Service busy", _BUSY)
_DEADLINE = _Kind(
    "deadline-exceeded", "Out of time", "The request could not be served in the time it had. " + _AGAIN
)
_NO_PRIMARY = _Kind(
    "no-primary", "Changes unavailable", "No database that accepts changes can be reached. " + _AGAIN
)
_DRAINING = _Kind("draining", "Service stopping", "This instance of the service is shutting down. " + _AGAIN)
_IN_DOUBT = _Kind(
    "commit-outcome-unknown",
    "Outcome unknown",
    "The connection failed while the change was being stored. It may or may not have been applied: "
    "check before sending it again.",
    status=500,
    retry="never",
)

_ERRORS: Final[dict[type[BaseException], _Kind]] = {
    errors.PoolSaturated: _Kind("pool-saturated", "Service busy", _BUSY),
    errors.PoolTimeout: _POOL_TIMEOUT,
    errors.CircuitOpen: _Kind("circuit-open", "Database unavailable", _UNREACHABLE),
    errors.DeadlineExceeded: _DEADLINE,
    errors.NoPrimaryAvailable: _NO_PRIMARY,
    errors.NoReplicaAvailable: _Kind("no-replica", "Database unavailable", _UNREACHABLE),
    errors.PoolDraining: _DRAINING,
    errors.CommitOutcomeUnknown: _IN_DOUBT,
    sqlalchemy.exc.TimeoutError: _POOL_TIMEOUT,
}

_FAULTS: Final[dict[Fault, _Kind]] = {
    Fault.CONNECTION_LOST: _Kind("connection-lost", "Database unavailable", _UNREACHABLE),
    Fault.CANNOT_CONNECT: _Kind("cannot-connect", "Database unavailable", _UNREACHABLE),
    Fault.WRONG_ROLE: _NO_PRIMARY,
    Fault.OVERLOAD: _Kind(
        "database-overloaded", "Service busy", "The database takes no more work at the moment. " + _AGAIN
    ),
    Fault.RETRY_TRANSACTION: _Kind(
        "transaction-conflict",
        "Conflicting changes",
        "The change collided with others and was rolled back. " + _AGAIN,
        retry="soon",
    ),
    Fault.IN_DOUBT: _IN_DOUBT,
}

_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


class Problems:
    """Turns errors into problems. Immutable but for ``rng``; shared by all requests of a middleware.

    ``base`` is put before the reason to make the ``type``. ``Retry-After`` is computed from the cause
    (``error.retry_after``, else the node's, else the engine's), kept within ``minimum`` to ``maximum``
    seconds and spread over up to half as much again by ``rng`` (a number in [0, 1)), because clients that
    are all told the same second all come back in it.
    """

    def __init__(
        self,
        *,
        base: str = PROBLEM_BASE,
        rng: Callable[[], float] | None = None,
        minimum: float = 1.0,
        maximum: float = 30.0,
    ) -> None:
        if not 0 <= minimum <= maximum:
            raise errors.ConfigurationError(
                f"Retry-After must lie in a range; got minimum {minimum!r} and maximum {maximum!r}",
                key="minimum",
                value=minimum,
            )
        self._base = base
        self._rng = rng or random.random
        self._minimum = minimum
        self._maximum = maximum

    def of(
        self,
        error: BaseException,
        snapshot: Snapshot | None = None,
        *,
        expired: bool = False,
        read_only: bool = False,
    ) -> Problem | None:
        """The problem that ``error`` is to the client, or None when it is not about the database's service.

        ``snapshot`` is the engine's at this moment; ``expired``: the request's deadline is over;
        ``read_only``: it was sent to a replica on purpose, so that a write in it is its own mistake (unless
        there is no primary). An exception group is ours only if all its leaves are, with one status.
        """
        link = behind(error)
        if link is None:
            return None
        if isinstance(link, BaseExceptionGroup):
            leaves = [
                self.of(leaf, snapshot, expired=expired, read_only=read_only) for leaf in link.exceptions
            ]
            return _agreed(leaves)
        if isinstance(link, errors.ResilienceError | sqlalchemy.exc.TimeoutError):
            return self._of_ours(link, snapshot)
        fault = classify(link, phase_of(link))
        kind = _DEADLINE if fault is Fault.TIMEOUT and expired else _FAULTS.get(fault)
        if fault is Fault.WRONG_ROLE and read_only and snapshot and snapshot.state != "read_only":
            kind = None
        return None if kind is None else self._say(kind, None, _known(snapshot))

    def refused(self, state: Literal["down", "draining"], snapshot: Snapshot) -> Problem:
        """The problem of a request that is refused before the application sees it."""
        return self._say(_DRAINING if state == "draining" else _UNAVAILABLE, None, snapshot.retry_after)

    def _of_ours(self, error: BaseException, snapshot: Snapshot | None) -> Problem | None:
        kind = next((_ERRORS[cls] for cls in type(error).__mro__ if cls in _ERRORS), None)
        if kind is None:  # a ConfigurationError is a mistake, not an outage
            return None
        if not isinstance(error, errors.ResilienceError):
            return self._say(kind, None, _known(snapshot))
        retry_after = error.retry_after if error.retry_after is not None else _known(error.snapshot, snapshot)
        return self._say(kind, error.reason, retry_after)

    def _say(self, kind: _Kind, reason: str | None, seconds: float | None) -> Problem:
        if reason is None or not _SLUG.fullmatch(reason):
            reason = kind.reason
        retry_after = None
        if kind.retry == "soon":
            retry_after = 1
        elif kind.retry == "from-cause":
            retry_after = self._jittered(seconds)
        return Problem(
            status=kind.status,
            type=self._base + reason,
            title=kind.title,
            reason=reason,
            retry_after=retry_after,
            detail=kind.detail,
        )

    def _jittered(self, seconds: float | None) -> int:
        """A whole second from ``seconds`` to half as long again, or less where that passes the maximum."""
        if seconds is None or not math.isfinite(seconds):
            seconds = self._minimum
        base = min(max(seconds, self._minimum), self._maximum)
        spread = max(1.0, base / 2)
        latest = math.floor(min(base + spread, self._maximum))
        earliest = min(math.ceil(base), max(math.ceil(latest - spread / 2), math.ceil(self._minimum)))
        return earliest + int(self._rng() * max(1, latest - earliest + 1))


def _agreed(leaves: list[Problem | None]) -> Problem | None:
    """The problem of a group: the one that asks for the longest wait, if all are ours and of one status."""
    problems = [problem for problem in leaves if problem is not None]
    if len(problems) < len(leaves) or len({problem.status for problem in problems}) != 1:
        return None
    return max(problems, key=lambda problem: problem.retry_after or 0)


def _known(*sources: NodeStats | Snapshot | None) -> float | None:
    """The first wait that any of them knows of."""
    waits = (source.retry_after for source in sources if source is not None)
    return next((wait for wait in waits if wait is not None), None)


def _prefers_html(accept: str) -> bool:
    """Whether an ``Accept`` header ranks HTML above JSON; at equal rank JSON wins."""
    accept = accept.lower()
    if "html" not in accept and "text/*" not in accept:
        return False
    ranks = {}
    for entry in accept.split(","):
        media_range, *parameters = (part.strip() for part in entry.split(";"))
        rank = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    rank = float(parameter[2:])
                except ValueError:
                    rank = 0.0
        ranks[media_range] = rank
    html_rank = max(ranks.get(r, 0.0) for r in ("text/html", "application/xhtml+xml", "text/*"))
    json_rank = max(
        ranks.get(r, ranks.get("application/*", ranks.get("*/*", 0.0)))
        for r in ("application/problem+json", "application/json")
    )
    return html_rank > json_rank
