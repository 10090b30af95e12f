"""Exception handlers for Starlette and FastAPI.

The middleware alone would see these errors too, but only after everything between it and the route has. A
handler answers where the framework answers, so that sessions, CORS and logging treat the 503 as a response
like any other::

    resilientdb.middleware.starlette.install(app, engine)
    app.add_middleware(resilientdb.middleware.asgi.ResilienceMiddleware, engine=engine)
    app.add_middleware(CORSMiddleware, ...)  # added later = outside, where it belongs
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from resilientdb.middleware.edge import HANDLED, Edge, Engines
from resilientdb.middleware.problem import PROBLEM_BASE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection

    Handler = Callable[[Any, Exception], Awaitable[Any]]

__all__ = ["handlers", "install"]


def install(
    app: Starlette,
    engine: Engines,
    *,
    problem_base: str = PROBLEM_BASE,
    rng: Callable[[], float] | None = None,
) -> None:
    """Register ``handlers`` with an application, before its first request.

    Handlers that the application has for the very same classes are replaced; those for narrower ones
    (``IntegrityError``) stay in front, and those for broader ones (``SQLAlchemyError``) still get what is not
    ours.
    """
    for cls, handler in handlers(engine, problem_base=problem_base, rng=rng).items():
        app.add_exception_handler(cls, handler)


def handlers(
    engine: Engines, *, problem_base: str = PROBLEM_BASE, rng: Callable[[], float] | None = None
) -> dict[type[Exception], Handler]:
    """What ``Starlette(exception_handlers=...)`` takes: the problem response for what is about the database's
    service. Everything else goes to the application's next handler, or on to the framework's 500.
    """
    edge = Edge(engine, problem_base=problem_base, rng=rng)

    async def handler(connection: HTTPConnection, error: Exception) -> Any:
        # A WebSocket cannot be answered 503: Starlette calls handlers for it, but sends no response.
        if not isinstance(connection, Request) or (problem := edge.problem(error)) is None:
            return await _next_handler(connection, error, handler)
        answer = problem.answer(
            method=connection.method,
            accept=connection.headers.get("accept", ""),
            may_close=connection.scope.get("http_version", "1.1").startswith("1"),
        )
        return Response(answer.body, answer.status, dict(answer.headers))

    return dict.fromkeys(HANDLED, handler)


async def _next_handler(connection: HTTPConnection, error: Exception, ours: Handler) -> Any:
    """What the application would have answered without us, or ``error`` again."""
    registered = connection.app.exception_handlers
    for cls in type(error).__mro__:
        handler = registered.get(cls)
        # Starlette calls a handler for Exception elsewhere, with what is raised here.
        if handler is None or handler is ours or cls is Exception:
            continue
        if inspect.iscoroutinefunction(handler):
            return await handler(connection, error)
        answer = await run_in_threadpool(handler, connection, error)
        return await answer if inspect.isawaitable(answer) else answer
    raise error
