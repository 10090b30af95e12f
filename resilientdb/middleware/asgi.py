"""The middleware for ASGI applications: Starlette, FastAPI, Litestar, or a bare callable.

Pure ASGI: the application runs in the task that the server started, so what it sets in context variables is
seen by what is around it, and a disconnect cancels nothing that the server would not cancel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starlette.responses import Response

from resilientdb.middleware.edge import CONFIGURED, Edge, Engines, Reads, Request, Work
from resilientdb.middleware.problem import PROBLEM_BASE, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["ResilienceMiddleware"]


class ResilienceMiddleware:
    """Gives every request its terms, and answers 503 where the database cannot be had.

    ``engine``: what the application uses, made by ``resilientdb.create_engine`` or ``create_async_engine``,
    or a list of them. A sync engine is right here too (FastAPI's ``def`` routes).

    ``deadline``: seconds a request has for all it asks of the database; None = no limit; by default the
    engine's configured one. It ends with the response: background tasks run without it.

    ``reads``: when GET, HEAD and OPTIONS run inside ``read_only()``, so that a replica may serve them:
    "degraded" (only while there is no primary), "always" or "never". Other methods are left to the engine,
    which refuses a write without a primary at once.

    ``exempt``: paths (and all below them) that are never refused on arrival.

    ``reject_when_down``: answer 503 at once, without asking the application, while no engine can serve
    anything. Off by default because some answers need no database. While an engine drains, every path that
    is not exempt is answered 503 with ``Connection: close``.

    ``deadline_header`` / ``criticality_header``: name a request header to take these from, only where a
    trusted proxy sets or strips it. The deadline's is ``grpc-timeout``, ``x-envoy-expected-rq-timeout-ms``
    or any other name with plain seconds; it can only shorten the configured one, and what cannot be read is
    ignored.

    ``server_timing``: add ``Server-Timing: pool;dur=…, db;dur=…`` to responses. It discloses load; not for
    the public.

    ``problem_base``, ``rng``: see ``problem.Problems``.

    An error that is about the database's service becomes the problem response of ``problem``, unless the
    response has started; that and every other error passes on untouched. Add it **inside** CORS (a browser
    hides a 503 without CORS headers from the page) and together with the framework's exception handlers.
    What a request did to the pools is in ``scope["resilientdb.record"]``, with its method and path as
    ``route``. WebSockets are given a record and a criticality, no deadline, and are never refused; everything
    else passes untouched.

    Raises ``ConfigurationError`` for an engine that the library did not make, and for contradictory options.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        engine: Engines,
        deadline: float | Literal["configured"] | None = CONFIGURED,
        reads: Reads = "degraded",
        exempt: Sequence[str] = (),
        reject_when_down: bool = False,
        deadline_header: str | None = None,
        criticality_header: str | None = None,
        server_timing: bool = False,
        problem_base: str = PROBLEM_BASE,
        rng: Callable[[], float] | None = None,
    ) -> None:
        self.app = app
        self._server_timing = server_timing
        self._edge = Edge(
            engine,
            deadline=deadline,
            reads=reads,
            exempt=exempt,
            reject_when_down=reject_when_down,
            deadline_header=deadline_header,
            criticality_header=criticality_header,
            problem_base=problem_base,
            rng=rng,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            with self._edge.endless(_request(scope)):
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _request(scope)
        work = self._edge.admit(request)
        if isinstance(work, Problem):
            await _respond(work, request, scope, receive, send)
            return
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            kind = message["type"]
            if kind == "http.response.start":
                started = True
                if self._server_timing:
                    message = _timed(message, work)
            await send(message)
            if kind == "http.response.body" and not message.get("more_body", False):
                work.answered()

        with work:
            scope["resilientdb.record"] = work.record
            try:
                await self.app(scope, receive, observed)
            except Exception as error:
                problem = None if started else self._edge.problem(error)
                if problem is None:
                    raise
                await _respond(problem, request, scope, receive, send)


def _request(scope: Scope) -> Request:
    headers: list[tuple[bytes, bytes]] = scope.get("headers", [])

    def header(name: str) -> str:
        raw = name.encode("ascii")
        return ",".join(value.decode("latin-1") for key, value in headers if key == raw)

    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return Request(scope.get("method", "WEBSOCKET"), path, header)


def _timed(message: Message, work: Work) -> Message:
    timing = (b"server-timing", work.server_timing().encode())
    return {**message, "headers": [*message.get("headers", ()), timing]}


async def _respond(problem: Problem, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
    may_close = scope.get("http_version", "1.1").startswith("1")
    answer = problem.answer(method=request.method, accept=request.header("accept"), may_close=may_close)
    await Response(answer.body, answer.status, dict(answer.headers))(scope, receive, send)
