"""The WSGI middleware on bare applications, with ``wsgiref.validate`` on both sides of it where it can be."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest

from resilientdb.errors import CircuitOpen, ConfigurationError, PoolTimeout
from resilientdb.middleware.wsgi import ResilienceMiddleware
from resilientdb.runtime.context import (
    current_criticality,
    current_deadline,
    current_record,
    is_read_only,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    import sqlalchemy

    EngineIn = Callable[..., sqlalchemy.Engine]

OK = "200 OK"
PLAIN = [("Content-Type", "text/plain")]


class Reply:
    """What a server sent: the status and headers in force when the first byte went out."""

    status = ""

    def __init__(self, app: WSGIApplication, method: str = "GET", path: str = "/", **headers: str) -> None:
        environ: WSGIEnvironment = {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        setup_testing_defaults(environ)
        # The validator wants a method it knows and no unset variables.
        environ.update(REQUEST_METHOD=method, PATH_INFO=path, SCRIPT_NAME="", QUERY_STRING="")
        self.errors, out = io.StringIO(), io.BytesIO()
        handler = SimpleHandler(io.BytesIO(), out, self.errors, environ, multithread=True)
        handler.origin_server = False
        handler.run(app)
        head, _, self.body = out.getvalue().partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = lines[0].removeprefix("Status: ")
        self.headers = dict(line.split(": ", 1) for line in lines[1:])


def checked(app: WSGIApplication, **options: Any) -> WSGIApplication:
    """The middleware between two validators: a good server to ``app`` and a good app to its server."""
    return validator(ResilienceMiddleware(validator(app), **options))


def failing(error: Exception) -> WSGIApplication:
    def app(_environ: WSGIEnvironment, _start_response: StartResponse) -> Iterable[bytes]:
        raise error

    return app


class Seen:
    """An application that answers "ok" in two chunks and remembers what it saw while doing so."""

    calls = 0

    def __init__(self) -> None:
        self.context: list[object] = []

    def _note(self) -> None:
        limit = current_deadline()
        self.context.append((limit and limit.seconds, is_read_only(), current_criticality()))

    def __call__(self, _environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.calls += 1
        self._note()
        start_response(OK, list(PLAIN))

        def chunks() -> Iterator[bytes]:
            for chunk in (b"o", b"k"):
                self._note()
                yield chunk

        return chunks()


class Closing:
    """A response that counts how often it was closed, and in whose context."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self.closed: list[object] = []

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self.closed.append(current_record())


def test_a_response_passes_in_its_own_chunks(engine_in: EngineIn) -> None:
    app = Seen()
    reply = Reply(checked(app, engine=engine_in()))
    assert (reply.status, reply.body) == (OK, b"ok")


def test_the_context_is_in_force_while_the_response_is_iterated(engine_in: EngineIn) -> None:
    app = Seen()
    Reply(
        checked(app, engine=engine_in("read_only", deadline=3.0), criticality_header="x-criticality"),
        x_criticality="sheddable",
    )
    assert app.context == [(3.0, True, "sheddable")] * 3
    assert (current_deadline(), current_record(), is_read_only()) == (None, None, False)


def test_a_deadline_may_come_from_a_trusted_header(engine_in: EngineIn) -> None:
    app = Seen()
    Reply(checked(app, engine=engine_in(), deadline_header="Grpc-Timeout"), grpc_timeout="20m")
    assert app.context[0] == (0.02, False, "critical")


def test_interleaved_responses_keep_their_own_context(engine_in: EngineIn) -> None:
    app = Seen()
    wrapped = ResilienceMiddleware(app, engine=engine_in(), deadline_header="x-deadline")
    first, second = (
        iter(
            wrapped(
                {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_X_DEADLINE": seconds},
                lambda *_: lambda _data: None,
            )
        )
        for seconds in ("1", "2")
    )
    app.context.clear()
    for response in (first, second, second, first):
        next(response)
    assert [seen[0] for seen in app.context if isinstance(seen, tuple)] == [1.0, 2.0, 2.0, 1.0]


def test_an_error_about_the_service_becomes_a_problem(engine_in: EngineIn) -> None:
    app = checked(failing(CircuitOpen("x", retry_after=4.0)), engine=engine_in(), rng=lambda: 0.0)
    reply = Reply(app)
    assert reply.status == "503 Service Unavailable"
    assert reply.headers["Retry-After"] == "4"
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert b"circuit-open" in reply.body
    assert Reply(app, accept="text/html").headers["Content-Type"] == "text/html; charset=utf-8"


def test_head_gets_no_body(engine_in: EngineIn) -> None:
    app = checked(failing(PoolTimeout("x")), engine=engine_in(), rng=lambda: 0.0)
    reply = Reply(app, "HEAD")
    assert (reply.status[:3], reply.body) == ("503", b"")
    assert reply.headers["Content-Length"] == Reply(app).headers["Content-Length"]


def first_query() -> bytes:
    raise PoolTimeout("x")


def test_an_error_before_the_first_byte_still_becomes_a_problem(engine_in: EngineIn) -> None:
    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))

        return (query() for query in [first_query])

    reply = Reply(checked(app, engine=engine_in()))
    assert reply.status == "503 Service Unavailable"
    assert b"pool-timeout" in reply.body


def test_an_error_after_start_response_but_before_returning_becomes_a_problem(engine_in: EngineIn) -> None:
    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))
        raise PoolTimeout("x")

    assert Reply(checked(app, engine=engine_in())).status == "503 Service Unavailable"


@pytest.mark.parametrize("by_write", [False, True])
def test_after_the_first_byte_the_error_passes_and_the_response_is_closed(
    engine_in: EngineIn, by_write: bool
) -> None:
    error = PoolTimeout("x")

    def fail() -> Iterator[bytes]:
        if not by_write:
            yield b"begun"
        raise error

    response = Closing(fail())

    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response(OK, list(PLAIN))
        if by_write:
            write(b"begun")
        return response

    reply = Reply(ResilienceMiddleware(app, engine=engine_in()))
    assert (reply.status, reply.body) == (OK, b"begun")
    assert "PoolTimeout" in reply.errors.getvalue()
    assert len(response.closed) == 1


def test_every_other_error_passes_untouched(engine_in: EngineIn) -> None:
    error = ValueError("x")
    app = ResilienceMiddleware(failing(error), engine=engine_in())
    with pytest.raises(ValueError, match="x") as caught:
        app({"REQUEST_METHOD": "GET"}, lambda *_: lambda _data: None)
    assert caught.value is error


def test_close_is_called_once_in_the_requests_context(engine_in: EngineIn) -> None:
    response = Closing([b"x"])

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))
        assert environ["resilientdb.record"] is current_record()
        return response

    Reply(checked(app, engine=engine_in()))
    (record,) = response.closed
    assert record is not None


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/orders/7", "GET /orders/7"),
        ("POST", "/caf\u00e9/a b\r\nFORGED".encode().decode("latin-1"), "POST /caf%C3%A9/a%20b%0D%0AFORGED"),
        ("GET", "/\u00ff", "GET /%EF%BF%BD"),
    ],
)
def test_the_record_says_what_was_asked_for(engine_in: EngineIn, method: str, path: str, route: str) -> None:
    seen: list[str | None] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(environ["resilientdb.record"].route)
        start_response(OK, list(PLAIN))
        return []

    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "password=x"}
    list(ResilienceMiddleware(app, engine=engine_in())(environ, lambda *_: lambda _data: None))
    assert seen == [route]


def test_an_exempt_path_is_compared_as_text(engine_in: EngineIn) -> None:
    app = Seen()
    wrapped = ResilienceMiddleware(
        app, engine=engine_in("down"), reject_when_down=True, exempt=["/caf\u00e9"]
    )
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/caf\u00e9".encode().decode("latin-1")}
    list(wrapped(environ, lambda *_: lambda _data: None))
    assert app.calls == 1


def test_close_is_called_when_the_client_goes_away(engine_in: EngineIn) -> None:
    response = Closing([b"x"])
    wrapped: Any = ResilienceMiddleware(lambda _environ, _start: response, engine=engine_in())(
        {"REQUEST_METHOD": "GET"}, lambda *_: lambda _data: None
    )
    wrapped.close()
    assert len(response.closed) == 1


def test_cleaning_up_has_no_deadline(engine_in: EngineIn) -> None:
    limits: list[object] = []

    class Response(Closing):
        def close(self) -> None:
            limits.append(current_deadline())

    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))
        return Response([b"x"])

    Reply(ResilienceMiddleware(app, engine=engine_in(), deadline=1.0))
    assert limits == [None]


def test_the_response_is_neither_measured_nor_read_ahead(engine_in: EngineIn) -> None:
    produced: list[int] = []

    def produce(number: int) -> bytes:
        produced.append(number)
        return b"x"

    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))
        return map(produce, range(9))

    response = ResilienceMiddleware(app, engine=engine_in())(
        {"REQUEST_METHOD": "GET"}, lambda *_: lambda _data: None
    )
    assert not hasattr(response, "__len__")
    assert produced == []
    next(iter(response))
    assert produced == [0]


def test_start_response_is_not_delayed(engine_in: EngineIn) -> None:
    started: list[str] = []

    def start_response(status: str, *_: object) -> Callable[[bytes], object]:
        started.append(status)
        return lambda _data: None

    ResilienceMiddleware(Seen(), engine=engine_in())({"REQUEST_METHOD": "GET"}, start_response)
    assert started == [OK]


def test_exc_info_of_the_applications_own_reaches_the_server(engine_in: EngineIn) -> None:
    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))
        try:
            int("x")
        except ValueError:
            start_response("500 Internal Server Error", list(PLAIN), sys.exc_info())
        return [b"sorry"]

    reply = Reply(checked(app, engine=engine_in()))
    assert (reply.status[:3], reply.body) == ("500", b"sorry")


def test_write_works(engine_in: EngineIn) -> None:
    def app(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))(b"written ")
        return [b"and returned"]

    assert Reply(checked(app, engine=engine_in())).body == b"written and returned"


def test_a_file_is_left_to_the_servers_own_way_of_sending_it(engine_in: EngineIn) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(OK, list(PLAIN))
        return FileWrapper(io.BytesIO(b"file"))

    environ = {"REQUEST_METHOD": "GET", "wsgi.file_wrapper": FileWrapper}
    response = ResilienceMiddleware(app, engine=engine_in())(environ, lambda *_: lambda _data: None)
    assert type(response) is FileWrapper


def test_server_timing_is_added_where_it_was_asked_for(engine_in: EngineIn) -> None:
    assert "Server-Timing" not in Reply(checked(Seen(), engine=engine_in())).headers
    reply = Reply(checked(Seen(), engine=engine_in(), server_timing=True))
    assert reply.headers["Server-Timing"] == "pool;dur=0.0, db;dur=0.0"


def test_a_draining_engine_refuses_what_is_not_exempt(engine_in: EngineIn) -> None:
    app = Seen()
    wrapped = checked(app, engine=engine_in("draining"), exempt=["/healthz"])
    reply = Reply(wrapped)
    assert (reply.status, app.calls) == ("503 Service Unavailable", 0)
    assert "Connection" not in reply.headers
    assert Reply(wrapped, path="/healthz").status == OK


def test_an_engine_that_is_down_refuses_only_where_that_was_asked_for(engine_in: EngineIn) -> None:
    assert Reply(checked(Seen(), engine=engine_in("down"))).status == OK
    assert Reply(checked(Seen(), engine=engine_in("down"), reject_when_down=True)).status[:3] == "503"


def test_an_async_engine_is_refused_at_once(engine_in: EngineIn) -> None:
    with pytest.raises(ConfigurationError, match=r"create_engine\(\)"):
        ResilienceMiddleware(Seen(), engine=[engine_in(), engine_in(is_async=True)])
