"""Health endpoints that answer from memory: no I/O, no thread, no connection of anybody's.

==============  ========================================================================================
``/livez``      200 as long as the process can answer at all. Never looks at the database: a restart
                cannot heal it, and restarting every process at once makes its recovery harder.
``/readyz``     200 while this process should get traffic, else 503; see ``readiness``.
``/startupz``   503 until the engine has been able to serve once, 200 ever after.
``/health``     the state as JSON, or as ``application/health+json`` for a client that asks for it: 200 for
                ``pass`` and ``warn``, 503 for ``fail``.
==============  ========================================================================================

``readiness="local"``, the default: unready only when the fault lies in this process (it is draining, or its
pool is stuck). When the database is down for everybody, every replica would become unready in the same
second, and the balancer would answer in their place: no degraded reads, no ``Retry-After``, no page at all.
``readiness="strict"`` is also unready while the database is down: for a process that is one of several, each
with a database of its own.

A pool is stuck when all its connections are out, callers wait, and for ``stuck_after`` seconds none of them
got one, although the prober, on a connection of its own, finds the node well: connections were leaked, or
are held by work that hangs.

May import ``engine``, ``runtime`` and the plain data. Needs no framework: the ASGI side sends its three
messages itself, so that a WSGI service needs nothing more than the library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from resilientdb.engine.control import control
from resilientdb.errors import ConfigurationError
from resilientdb.runtime.clock import Clock, monotonic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
    from wsgiref.types import StartResponse, WSGIEnvironment

    import sqlalchemy
    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.stats import EngineState, NodeStats, Snapshot

    Message = MutableMapping[str, Any]

__all__ = ["HealthApp", "WSGIHealthApp"]

Engines: TypeAlias = "sqlalchemy.Engine | AsyncEngine | Sequence[sqlalchemy.Engine | AsyncEngine]"
Readiness = Literal["local", "strict"]

_WORST_FIRST: Final[tuple[EngineState, ...]] = ("draining", "down", "read_only", "saturated", "healthy")
_STATUS: Final = {
    "draining": "fail",
    "down": "fail",
    "read_only": "warn",
    "saturated": "warn",
    "healthy": "pass",
}


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class _Health:
    """What both protocols share. ``engine``: one engine made by the library, or a list of them.

    ``detail``: let ``/health`` name nodes and count connections; not for the public. Messages of the database
    are never shown.

    ``readiness``, ``stuck_after`` (None = do not look): see the module docstring.

    Raises ``ConfigurationError`` for an engine that the library did not make.
    """

    def __init__(
        self,
        engine: Engines,
        *,
        detail: bool = False,
        readiness: Readiness = "local",
        stuck_after: float | None = 30.0,
        clock: Clock = monotonic,
    ) -> None:
        engines = list(engine) if isinstance(engine, Sequence) else [engine]
        if not engines:
            raise ConfigurationError("engine must name at least one engine", key="engine", value=engine)
        if readiness not in get_args(Readiness):
            raise ConfigurationError(
                f"readiness must be one of {', '.join(get_args(Readiness))}; got {readiness!r}",
                key="readiness",
                value=readiness,
            )
        if stuck_after is not None and not stuck_after > 0:
            raise ConfigurationError(
                f"stuck_after must be a number of seconds above 0, or None; got {stuck_after!r}",
                key="stuck_after",
                value=stuck_after,
            )
        self._snapshots = tuple(control(one).snapshot for one in engines)
        self._detail = detail
        self._strict = readiness == "strict"
        self._stuck_after = stuck_after
        self._clock = clock
        # What probes have seen so far. Written without a lock: each write is one assignment, and of two
        # probes at once it does not matter which is remembered.
        self._started = False
        self._progress: dict[tuple[int, str], tuple[int, float]] = {}
        """Of each pool that is used up: its count of checkouts, and when that was first seen."""

    def answer(self, method: str, path: str, accept: str) -> _Answer:
        pages = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/startupz": self._startupz,
            "/health": self._health,
        }
        page = pages.get(path.rstrip("/"))
        if page is None:
            return _json(404, {"status": "not found"}, method)
        if method not in {"GET", "HEAD"}:
            return _json(405, {"status": "method not allowed"}, method, ("Allow", "GET, HEAD"))
        return page(method, accept)

    def _livez(self, method: str, _accept: str) -> _Answer:
        return _json(200, {"status": "pass"}, method)

    def _readyz(self, method: str, _accept: str) -> _Answer:
        snapshots = self._look()
        state = _worst(snapshots)
        stuck = self._stuck(snapshots)
        unready = stuck or state == "draining" or (self._strict and state == "down")
        body: dict[str, object] = {"status": "fail" if unready else "pass", "state": state}
        if stuck:
            body["reason"] = "stuck"
        return _json(503 if unready else 200, body, method)

    def _startupz(self, method: str, _accept: str) -> _Answer:
        self._look()
        if self._started:
            return _json(200, {"status": "pass"}, method)
        return _json(503, {"status": "fail"}, method)

    def _health(self, method: str, accept: str) -> _Answer:
        snapshots = self._look()
        state = _worst(snapshots)
        status = _STATUS[state]
        standard = "application/health+json" in accept.lower()
        body: dict[str, object] = {"status": status}
        if not standard:
            body["state"] = state
        nodes = [node for snapshot in snapshots for node in snapshot.nodes]
        if self._detail and standard:
            body["checks"] = _checks(nodes)
        elif self._detail:
            body["engines"] = [_described(snapshot) for snapshot in snapshots]
        media_type = "application/health+json" if standard else "application/json"
        return _json(
            503 if status == "fail" else 200, body, method, ("Vary", "Accept"), media_type=media_type
        )

    def _look(self) -> list[Snapshot]:
        snapshots = [snapshot() for snapshot in self._snapshots]
        if not self._started:
            self._started = all(snapshot.state not in {"down", "draining"} for snapshot in snapshots)
        return snapshots

    def _stuck(self, snapshots: list[Snapshot]) -> bool:
        if self._stuck_after is None:
            return False
        now = self._clock()
        used_up = {
            (place, node.name): node.pool.checkouts
            for place, snapshot in enumerate(snapshots)
            for node in snapshot.nodes
            if node.pool is not None
            and node.pool.limit is not None
            and node.pool.active >= node.pool.limit
            and node.pool.waiting > 0
            and node.breaker in {"closed", "disabled"}
        }
        before = self._progress
        self._progress = {
            pool: before[pool] if before.get(pool, (None,))[0] == checkouts else (checkouts, now)
            for pool, checkouts in used_up.items()
        }
        return any(now - since >= self._stuck_after for _, since in self._progress.values())


class HealthApp(_Health):
    """The endpoints as an ASGI application: mount it, or run it alone. Holds nothing of a request.

    Starlette: ``Mount("/", HealthApp(engine))`` last, or ``Mount("/internal", ...)`` for ``/internal/livez``.
    FastAPI: ``app.mount("/internal", HealthApp(engine))``. Name the prefix in the middleware's ``exempt``.

    It runs in the event loop and not in the thread pool that ``def`` routes share, so it answers while every
    thread waits for a connection.
    """

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "http":
            accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
            answer = self.answer(scope["method"], _own_path(scope), accept.decode("latin-1"))
            headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})


class WSGIHealthApp(_Health):
    """The endpoints as a WSGI application. Flask: ``DispatcherMiddleware(app.wsgi_app, {"/internal": ...})``.

    A WSGI server answers with its worker threads: leave more of them than the pool has connections.
    """

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self.answer(
            environ["REQUEST_METHOD"], environ.get("PATH_INFO", ""), environ.get("HTTP_ACCEPT", "")
        )
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", answer.headers)
        return [answer.body]


def _worst(snapshots: list[Snapshot]) -> EngineState:
    return min((snapshot.state for snapshot in snapshots), key=_WORST_FIRST.index)


def _described(snapshot: Snapshot) -> dict[str, object]:
    return {
        "state": snapshot.state,
        "primary": snapshot.primary,
        "retry_after": snapshot.retry_after,
        "retry_budget": snapshot.retry_budget,
        "nodes": [
            {
                "name": node.name,
                "role": node.role,
                "breaker": node.breaker,
                "retry_after": node.retry_after,
                "connections": node.pool
                and {
                    "total": node.pool.total,
                    "active": node.pool.active,
                    "idle": node.pool.idle,
                    "waiting": node.pool.waiting,
                    "limit": node.pool.limit,
                },
            }
            for node in snapshot.nodes
        ],
    }


def _checks(nodes: list[NodeStats]) -> dict[str, list[dict[str, object]]]:
    """``component:measurement`` → one entry a node, as draft-inadarei-api-health-check-06 has it."""

    def entries() -> Iterator[tuple[str, dict[str, object]]]:
        for node in nodes:
            status = "pass" if node.breaker in {"closed", "disabled"} else "fail"
            entry = {"componentId": node.name, "componentType": "datastore", "status": status}
            yield "database:breaker", {**entry, "observedValue": node.breaker}
            if node.pool is not None:
                yield "database:connections", {**entry, "observedValue": node.pool.active}
                yield "database:waiting", {**entry, "observedValue": node.pool.waiting}

    checks: dict[str, list[dict[str, object]]] = {}
    for key, entry in entries():
        checks.setdefault(key, []).append(entry)
    return checks


def _json(
    status: int,
    body: dict[str, object],
    method: str,
    *headers: tuple[str, str],
    media_type: str = "application/json",
) -> _Answer:
    payload = json.dumps(body).encode()
    fixed = [
        ("Content-Type", media_type),
        ("Content-Length", str(len(payload))),
        ("Cache-Control", "no-store"),
    ]
    return _Answer(status, [*fixed, *headers], b"" if method == "HEAD" else payload)


def _own_path(scope: MutableMapping[str, Any]) -> str:
    """The path below the mount point: ASGI's ``path`` is the whole one, ``root_path`` what was matched."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path.startswith(f"{root}/") else path


async def _lifespan(
    receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
