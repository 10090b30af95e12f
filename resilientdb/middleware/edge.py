"""The decisions that the ASGI and the WSGI middleware share: which engines stand behind an application, on
what terms a request may use them, and whether it is refused on arrival.

An ``Edge`` is built once, holds no request's state and reads what the engine knows already: no I/O.
"""

from __future__ import annotations

import logging
import math
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias, cast, get_args
from urllib.parse import quote

import sqlalchemy.exc

from resilientdb.engine.control import control
from resilientdb.errors import ConfigurationError, ResilienceError
from resilientdb.middleware.problem import PROBLEM_BASE, Problem, Problems
from resilientdb.runtime import context

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.stats import EngineState, Snapshot

__all__ = ["CONFIGURED", "HANDLED", "Edge", "Engines", "Reads", "Request", "Work"]

logger = logging.getLogger("resilientdb.middleware")

Engines: TypeAlias = "sqlalchemy.Engine | AsyncEngine | Sequence[sqlalchemy.Engine | AsyncEngine]"
Reads = Literal["never", "degraded", "always"]
CONFIGURED: Final = "configured"
"""Take the deadline from the engine's ``Resilience(deadline=...)``."""

HANDLED: Final[tuple[type[Exception], ...]] = (
    ResilienceError,
    sqlalchemy.exc.StatementError,
    sqlalchemy.exc.TimeoutError,
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    ExceptionGroup,
)
"""What a framework's handlers are registered for: all that may turn out to be ours. The builtin ones are
there because asyncpg lets them through while connecting."""

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
LONGEST_DEADLINE: Final = 300.0
"""Seconds a header may ask for where no deadline is configured."""

LONGEST_ROUTE: Final = 200
"""Characters of a path that are shown."""
_PATH_SAFE: Final = "/:@!$&'()*+,;=~"
"""What RFC 3986 lets stand in a path as it is."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is read of a request, whichever protocol brought it."""

    method: str
    """``WEBSOCKET`` for what has none."""
    path: str
    """Relative to where the application is mounted."""
    header: Callable[[str], str]
    """The value of a header by its lower-case name, several values joined by commas, "" when absent."""

    @property
    def route(self) -> str:
        """``GET /orders/7``: without the query string, which is where the secrets are; quoted, so that no client
        can write a second line into a log; and of a bounded length."""
        return f"{self.method} {quote(self.path[:LONGEST_ROUTE], safe=_PATH_SAFE, errors='replace')}"


class Work:
    """The scope in which one request runs: its terms, in force between entering and leaving it (in one
    context)."""

    __slots__ = ("_deadline", "_limit", "_route", "_scopes", "record")

    record: context.RequestRecord
    """What the request does to the pools. Set on entry."""

    def __init__(
        self, seconds: float | None, level: context.Criticality | None, *, read_only: bool, route: str
    ) -> None:
        self._route = route
        self._deadline = None if seconds is None else context.deadline(seconds)
        self._limit: context.Deadline | None = None
        scopes: list[AbstractContextManager[Any]] = [] if level is None else [context.criticality(level)]
        if read_only:
            scopes.append(context.read_only())
        self._scopes = scopes

    def __enter__(self) -> Self:
        recording = context.recording(self._route)
        self.record = cast("context.RequestRecord", recording.__enter__())
        for scope in self._scopes:
            scope.__enter__()
        self._scopes.append(recording)
        if self._deadline is not None:
            outer = context.current_deadline()
            limit = self._deadline.__enter__()
            self._scopes.append(self._deadline)
            self._limit = None if limit is outer else limit
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for scope in reversed(self._scopes):
            scope.__exit__(kind, error, trace)

    def server_timing(self) -> str:
        """The value of a ``Server-Timing`` header: milliseconds spent waiting for and holding connections."""
        return f"pool;dur={self.record.wait_time * 1000:.1f}, db;dur={self.record.hold_time * 1000:.1f}"

    def answered(self) -> None:
        """Nobody waits for an answer any more: what still runs (background tasks) has no deadline.

        The deadline itself is moved, because other tasks and threads of the request hold the same one.
        """
        if self._limit is not None:
            self._limit.ended = True
            self._limit.expires_at += 86_400.0
            self._limit = None


class Edge:
    """One application's way to its engines. See ``asgi.ResilienceMiddleware`` for the options."""

    def __init__(
        self,
        engine: Engines,
        *,
        deadline: float | Literal["configured"] | None = CONFIGURED,
        reads: Reads = "degraded",
        exempt: Sequence[str] = (),
        reject_when_down: bool = False,
        deadline_header: str | None = None,
        criticality_header: str | None = None,
        problem_base: str = PROBLEM_BASE,
        rng: Callable[[], float] | None = None,
        threads_only: bool = False,
    ) -> None:
        engines = list(engine) if isinstance(engine, Sequence) else [engine]
        if not engines:
            raise ConfigurationError("engine must name at least one engine", key="engine", value=engine)
        controls = [control(one) for one in engines]
        if threads_only and any(one.is_async for one in controls):
            raise ConfigurationError(
                "a WSGI application runs in threads, an AsyncEngine belongs to one event loop: give it an "
                "engine made by resilientdb.create_engine(), or use resilientdb.middleware.asgi",
                key="engine",
            )
        self._controls = tuple(controls)
        self._problems = Problems(base=problem_base, rng=rng)
        if deadline == CONFIGURED:
            known = [one.resilience.deadline for one in controls]
            self._deadline = min((limit for limit in known if limit is not None), default=None)
        else:
            context.deadline(deadline)  # refuses what is not a number of seconds
            self._deadline = deadline
        if reads not in get_args(Reads):
            raise ConfigurationError(
                f"reads must be one of {', '.join(get_args(Reads))}; got {reads!r}", key="reads", value=reads
            )
        self._reads = reads
        self._exempt = _paths(exempt)
        self._reject_when_down = reject_when_down
        self._deadline_header = _header_name(deadline_header, "deadline_header")
        self._criticality_header = _header_name(criticality_header, "criticality_header")

    def admit(self, request: Request) -> Work | Problem:
        """The scope to run a request in, or the answer to one that must not reach the application.

        Draining: refused, so that the balancer goes elsewhere. Down: refused only with ``reject_when_down``
        and when every engine is down. Exempt paths are never refused.
        """
        states = [one.state for one in self._controls]
        refusal = self._refusal(states)
        if refusal is not None and not self._is_exempt(request.path):
            return refusal
        read_only = (
            self._reads != "never"
            and request.method in SAFE_METHODS
            and (self._reads == "always" or "read_only" in states)
        )
        return Work(self._seconds(request), self._level(request), read_only=read_only, route=request.route)

    def endless(self, request: Request) -> Work:
        """The scope for what has no end of its own (a WebSocket): never refused, without a deadline."""
        return Work(None, self._level(request), read_only=False, route=request.route)

    def problem(self, error: BaseException) -> Problem | None:
        """What to answer for an error raised in the request that runs in this context; None = not ours."""
        limit = context.current_deadline()
        expired = limit is not None and limit.remaining() <= 0
        problem = self._problems.of(error, self._worst(), expired=expired, read_only=context.is_read_only())
        if problem is not None:
            # A write in doubt needs a human. An outage is told by the engine's events, once, not per request.
            level = logging.ERROR if problem.retry_after is None else logging.DEBUG
            logger.log(level, "answering %d: %s", problem.status, problem.reason, exc_info=error)
        return problem

    def _worst(self) -> Snapshot:
        """Of several engines, the one whose refusals last longest: a client told sooner would be refused."""
        return max((one.snapshot() for one in self._controls), key=lambda known: known.retry_after or 0.0)

    def _is_exempt(self, path: str) -> bool:
        return path in self._exempt or any(path.startswith(f"{one}/") for one in self._exempt)

    def _refusal(self, states: list[EngineState]) -> Problem | None:
        if "draining" in states:
            return self._problems.refused("draining", self._controls[states.index("draining")].snapshot())
        if self._reject_when_down and all(state == "down" for state in states):
            snapshots = [one.snapshot() for one in self._controls]
            return self._problems.refused("down", min(snapshots, key=lambda known: known.retry_after or 0.0))
        return None

    def _level(self, request: Request) -> context.Criticality | None:
        if self._criticality_header is None:
            return None
        named = request.header(self._criticality_header).strip().lower().replace("-", "_")
        return next((level for level in context.CRITICALITIES if level == named), None)

    def _seconds(self, request: Request) -> float | None:
        if self._deadline_header is None:
            return self._deadline
        asked = _duration(self._deadline_header, request.header(self._deadline_header))
        longest = LONGEST_DEADLINE if self._deadline is None else self._deadline
        return self._deadline if asked is None else min(asked, longest)


def _paths(exempt: Sequence[str]) -> frozenset[str]:
    paths = frozenset(path.rstrip("/") for path in exempt)
    if isinstance(exempt, str) or not all(path.startswith("/") for path in paths):
        raise ConfigurationError(
            f"exempt must be a list of paths such as '/healthz', each standing for itself and all below it; "
            f"got {exempt!r}",
            key="exempt",
            value=exempt,
        )
    return paths


def _header_name(name: str | None, key: str) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise ConfigurationError(
            f"{key} must be the name of a request header, or None; got {name!r}", key=key, value=name
        )
    return name and name.lower()


_GRPC_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def _duration(name: str, text: str) -> float | None:
    """Seconds left according to a header in its own notation; None when it says nothing sensible."""
    text = text.strip()
    if name == "grpc-timeout":
        if not re.fullmatch(r"[0-9]{1,8}[HMSmun]", text):
            return None
        seconds = int(text[:-1]) * _GRPC_UNITS[text[-1]]
    else:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
            return None
        seconds = float(text) / (1000.0 if name == "x-envoy-expected-rq-timeout-ms" else 1.0)
    return seconds if 0 < seconds < math.inf else None
