"""The middleware for WSGI applications (PEP 3333): Flask, Pyramid, Bottle, Django, or a bare callable."""

from __future__ import annotations

import sys
from contextvars import copy_context
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from resilientdb.middleware.edge import CONFIGURED, Edge, Engines, Reads, Request, Work
from resilientdb.middleware.problem import PROBLEM_BASE, Answer, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["ResilienceMiddleware"]


class ResilienceMiddleware:
    """Gives every request its terms, and answers 503 where the database cannot be had.

    The options are those of ``resilientdb.middleware.asgi.ResilienceMiddleware``, with these differences:

    * ``engine`` must be a sync one (or a list of them): ``ConfigurationError`` for an ``AsyncEngine``.
    * The request runs in a copy of the server thread's context, from the call of the application until its
      response is closed: a streamed response has its deadline and its record in every chunk, and nothing
      stays behind in the thread.
    * The response counts as started with its first byte, not with ``start_response``: a generator whose first
      query fails still becomes a 503.
    * ``Connection: close`` is the server's to say in WSGI, so a draining engine's 503 is without it.
    * The record is ``environ["resilientdb.record"]``.

    The response is neither buffered nor measured, its ``close()`` is called, and ``write()`` works.
    Flask turns an error into a 500 before it gets here: use ``resilientdb.middleware.flask.install``.
    """

    def __init__(
        self,
        app: WSGIApplication,
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
            threads_only=True,
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = _request(environ)
        work = self._edge.admit(request)
        if isinstance(work, Problem):
            answer = _answer(work, request)
            start_response(_status(answer), answer.headers)
            return [answer.body]
        response = _Response(self._edge, work, request, start_response, server_timing=self._server_timing)
        return response.begin(self.app, environ)


class _Response:
    """One response in the making. Used by one thread at a time, as PEP 3333 demands of a response."""

    def __init__(
        self,
        edge: Edge,
        work: Work,
        request: Request,
        start_response: StartResponse,
        *,
        server_timing: bool,
    ) -> None:
        self._edge = edge
        self._request = request
        self._start_response = start_response
        self._server_timing = server_timing
        self._context = copy_context()
        self._context.run(work.__enter__)  # left behind with the copy
        self._work = work
        self._result: Iterable[bytes] = ()
        self._chunks: Iterator[bytes] | None = None
        self._sent = False
        """Whether a byte has gone out: from then on the status cannot be changed."""

    def begin(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        environ["resilientdb.record"] = self._work.record
        try:
            self._result = self._context.run(app, environ, self._start)
        except Exception as error:  # noqa: BLE001 - re-raised by _fail unless it is ours
            return [self._fail(error)]
        file_wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(file_wrapper, type) and isinstance(self._result, file_wrapper):
            self._work.answered()
            return self._result  # the server sends it with sendfile() only if it gets it bare
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self._chunks is None:
                self._chunks = self._context.run(iter, self._result)
            chunk = self._context.run(next, self._chunks)
        except StopIteration:
            raise
        except Exception as error:  # noqa: BLE001 - re-raised by _fail unless it is ours
            body = self._fail(error)
            self._chunks = iter(())
            return body
        if chunk:
            self._sent = True
        return chunk

    def close(self) -> None:
        """Called by the server however the response ended; the application cleans up without a deadline."""
        self._work.answered()
        close = getattr(self._result, "close", None)
        if close is not None:
            self._context.run(close)

    def _start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        if self._server_timing:
            headers = [*headers, ("Server-Timing", self._work.server_timing())]
        write = self._start_response(status, headers, *(() if exc_info is None else (exc_info,)))

        def observed(data: bytes) -> object:
            self._sent = self._sent or bool(data)
            return write(data)

        return observed

    def _fail(self, error: Exception) -> bytes:
        """Make the response a problem and return its body, or raise ``error``."""
        problem = None if self._sent else self._context.run(self._edge.problem, error)
        if problem is None:
            raise error
        answer = _answer(problem, self._request)
        exc_info: Any = sys.exc_info()
        try:
            self._start_response(_status(answer), answer.headers, exc_info)
        finally:
            exc_info = None  # a cycle otherwise
        self._sent = True
        self._work.answered()
        return answer.body


def _request(environ: WSGIEnvironment) -> Request:
    def header(name: str) -> str:
        return str(environ.get("HTTP_" + name.upper().replace("-", "_"), ""))

    # PEP 3333: bytes that look like text.
    path = environ.get("PATH_INFO", "").encode("latin-1", "replace").decode("utf-8", "replace")
    return Request(environ["REQUEST_METHOD"], path, header)


def _answer(problem: Problem, request: Request) -> Answer:
    return problem.answer(method=request.method, accept=request.header("accept"))


def _status(answer: Answer) -> str:
    return f"{answer.status} {HTTPStatus(answer.status).phrase}"
