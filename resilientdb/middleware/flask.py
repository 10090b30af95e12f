"""For Flask: error handlers and the WSGI middleware, in one call.

Both are needed. Flask turns an error into a 500 before anything around ``wsgi_app`` could see it, so handlers
make the response; only the middleware is there early enough to give the request its deadline, and late enough
to see a streamed response to its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from flask import Response, current_app, request

from resilientdb.middleware.edge import CONFIGURED, HANDLED, Edge, Engines, Reads
from resilientdb.middleware.problem import PROBLEM_BASE
from resilientdb.middleware.wsgi import ResilienceMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flask import Flask
    from flask.typing import ErrorHandlerCallable

__all__ = ["install"]


def install(
    app: Flask,
    engine: Engines,
    *,
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
    """Register error handlers with ``app`` and wrap ``app.wsgi_app``; before the first request, once.

    The options are the WSGI middleware's. Error handlers of the application for narrower classes
    (``IntegrityError``) stay in front, and those for broader ones (``SQLAlchemyError``, ``Exception``) still
    get what is not about the database's service.
    """
    app.wsgi_app = ResilienceMiddleware(  # type: ignore[method-assign]
        app.wsgi_app,
        engine=engine,
        deadline=deadline,
        reads=reads,
        exempt=exempt,
        reject_when_down=reject_when_down,
        deadline_header=deadline_header,
        criticality_header=criticality_header,
        server_timing=server_timing,
        problem_base=problem_base,
        rng=rng,
    )
    edge = Edge(engine, problem_base=problem_base, rng=rng, threads_only=True)

    def handler(error: Exception) -> Any:
        problem = edge.problem(error)
        if problem is None:
            return _next_handler(error, handler)
        answer = problem.answer(method=request.method, accept=request.headers.get("Accept", ""))
        return Response(answer.body, answer.status, answer.headers)

    for cls in HANDLED:
        app.register_error_handler(cls, handler)


def _next_handler(error: Exception, ours: ErrorHandlerCallable) -> Any:
    """What Flask would have answered without us (its order: blueprints, then the application), or ``error``
    again."""
    for name in (*request.blueprints, None):
        registered = current_app.error_handler_spec[name][None]
        for cls in type(error).__mro__:
            handler = registered.get(cls)
            if handler is not None and handler is not ours:
                return current_app.ensure_sync(handler)(error)
    raise error
