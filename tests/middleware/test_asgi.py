"""The ASGI middleware on bare ASGI applications: what it sets, refuses, maps and leaves alone."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy

from resilientdb.errors import CircuitOpen, CommitOutcomeUnknown, ConfigurationError, PoolTimeout
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.runtime.context import (
    current_criticality,
    current_deadline,
    current_record,
    deadline,
    is_read_only,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    EngineIn = Callable[..., sqlalchemy.Engine]


def http_scope(method: str = "GET", path: str = "/", headers: dict[str, str] | None = None) -> Scope:
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return {"type": "http", "http_version": "1.1", "method": method, "path": path, "headers": raw}


async def call_async(app: ASGIApp, scope: Scope, incoming: Sequence[Message] = ()) -> list[Message]:
    inbox, sent = list(incoming), []

    async def receive() -> Message:
        return inbox.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def call(app: ASGIApp, method: str = "GET", path: str = "/", **headers: str) -> list[Message]:
    scope = http_scope(method, path, {name.replace("_", "-"): value for name, value in headers.items()})
    return asyncio.run(call_async(app, scope))


def header(messages: list[Message], name: str) -> str | None:
    return {key.decode().lower(): value.decode() for key, value in messages[0]["headers"]}.get(name)


class Seen:
    """An application that answers 204 and remembers what it saw in its context."""

    calls: int = 0
    seconds: float | None = None
    read_only: bool = False
    criticality: str = ""
    scope: Scope

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        self.calls += 1
        limit = current_deadline()
        self.seconds = None if limit is None else limit.seconds
        self.read_only, self.criticality, self.scope = is_read_only(), current_criticality(), scope
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})


def failing(error: BaseException) -> ASGIApp:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise error

    return app


def test_an_error_about_the_service_becomes_a_problem(engine_in: EngineIn) -> None:
    app = ResilienceMiddleware(
        failing(CircuitOpen("x", retry_after=4.0)), engine=engine_in(), rng=lambda: 0.0
    )
    start, body = call(app, accept="application/json")
    assert start["status"] == 503
    assert header([start], "retry-after") == "4"
    assert header([start], "content-type") == "application/problem+json"
    assert header([start], "connection") is None
    assert json.loads(body["body"])["type"] == "urn:resilientdb:problem:circuit-open"


def test_head_gets_no_body(engine_in: EngineIn) -> None:
    app = ResilienceMiddleware(failing(PoolTimeout("x")), engine=engine_in(), rng=lambda: 0.0)
    start, body = call(app, "HEAD")
    assert (start["status"], body["body"]) == (503, b"")
    assert header([start], "content-length") == header(call(app, "GET"), "content-length")


def test_a_browser_gets_html(engine_in: EngineIn) -> None:
    app = ResilienceMiddleware(failing(PoolTimeout("x")), engine=engine_in())
    start, body = call(app, accept="text/html,*/*;q=0.8")
    assert header([start], "content-type") == "text/html; charset=utf-8"
    assert b"Service busy" in body["body"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), asyncio.CancelledError()])
def test_every_other_error_passes_untouched(engine_in: EngineIn, error: BaseException) -> None:
    app = ResilienceMiddleware(failing(error), engine=engine_in())
    with pytest.raises(type(error)) as caught:
        call(app)
    assert caught.value is error


def test_a_commit_in_doubt_is_logged_for_a_human(
    engine_in: EngineIn, caplog: pytest.LogCaptureFixture
) -> None:
    app = ResilienceMiddleware(failing(CommitOutcomeUnknown("x")), engine=engine_in())
    messages = call(app, "POST")
    assert messages[0]["status"] == 500
    assert header(messages, "retry-after") is None
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None


def test_after_the_response_has_started_the_error_passes(engine_in: EngineIn) -> None:
    error, sent = CircuitOpen("x"), []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    async def send(message: Message) -> None:
        sent.append(message["status"])

    async def run() -> None:
        await ResilienceMiddleware(app, engine=engine_in())(http_scope(), receive_nothing, send)

    with pytest.raises(CircuitOpen) as caught:
        asyncio.run(run())
    assert caught.value is error
    assert sent == [200]


async def receive_nothing() -> Message:
    raise AssertionError("nothing to receive")


def test_messages_that_it_does_not_know_pass_in_both_directions(engine_in: EngineIn) -> None:
    outgoing: list[Message] = [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.early_hint", "links": [b"</x>"]},
        {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.pathsend", "path": "/tmp/x"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive()) == {"type": "http.future"}
        for message in outgoing:
            await send(message)

    wrapped = ResilienceMiddleware(app, engine=engine_in())
    assert asyncio.run(call_async(wrapped, http_scope(), [{"type": "http.future"}])) == outgoing


@pytest.mark.parametrize("state", ["healthy", "down", "draining"])
@pytest.mark.parametrize("kind", ["lifespan", "websocket", "something.new"])
def test_other_scopes_reach_the_application_in_every_state(
    engine_in: EngineIn, kind: str, state: str
) -> None:
    app = Seen()
    scope: Scope = {"type": kind, "path": "/", "headers": []}
    wrapped = ResilienceMiddleware(app, engine=engine_in(state, deadline=1.0), reject_when_down=True)
    assert asyncio.run(call_async(wrapped, scope)) == []
    assert app.scope is scope
    assert app.seconds is None


def test_a_websockets_errors_pass(engine_in: EngineIn) -> None:
    app = ResilienceMiddleware(failing(CircuitOpen("x")), engine=engine_in())
    with pytest.raises(CircuitOpen):
        asyncio.run(call_async(app, {"type": "websocket", "path": "/", "headers": []}))


@pytest.mark.parametrize(
    ("given", "headers", "expected"),
    [
        ({}, {}, 5.0),
        ({"deadline": None}, {}, None),
        ({"deadline": 2.0}, {}, 2.0),
        ({}, {"x_deadline": "0.5"}, 5.0),
        ({"deadline_header": "X-Deadline"}, {}, 5.0),
        ({"deadline_header": "X-Deadline"}, {"x_deadline": "0.5"}, 0.5),
        ({"deadline_header": "X-Deadline"}, {"x_deadline": "600"}, 5.0),
        ({"deadline_header": "X-Deadline", "deadline": None}, {"x_deadline": "60"}, 60.0),
        ({"deadline_header": "X-Deadline", "deadline": None}, {"x_deadline": "99999999"}, 300.0),
        ({"deadline_header": "grpc-timeout"}, {"grpc_timeout": "250m"}, 0.25),
        ({"deadline_header": "grpc-timeout"}, {"grpc_timeout": "2S"}, 2.0),
        ({"deadline_header": "grpc-timeout"}, {"grpc_timeout": "1H"}, 5.0),
        ({"deadline_header": "grpc-timeout"}, {"grpc_timeout": "123456789m"}, 5.0),
        (
            {"deadline_header": "x-envoy-expected-rq-timeout-ms"},
            {"x_envoy_expected_rq_timeout_ms": "1500"},
            1.5,
        ),
        *(
            ({"deadline_header": "X-Deadline"}, {"x_deadline": garbage}, 5.0)
            for garbage in ("", "0", "-1", "nan", "inf", "1e3", "soon", "1,2", "0x1", "٣", "9" * 400)
        ),
    ],
)
def test_the_deadline_is_the_configured_one_or_a_shorter_one_from_a_trusted_header(
    engine_in: EngineIn, given: dict[str, Any], headers: dict[str, str], expected: float | None
) -> None:
    app = Seen()
    call(ResilienceMiddleware(app, engine=engine_in(deadline=5.0), **given), **headers)
    assert app.seconds == expected


def test_of_several_engines_the_shortest_deadline_holds(engine_in: EngineIn) -> None:
    app, engines = Seen(), [engine_in(deadline=5.0), engine_in(), engine_in(deadline=3.0, is_async=True)]
    call(ResilienceMiddleware(app, engine=engines))
    assert app.seconds == 3.0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (None, "sheddable", "critical"),
        ("X-Criticality", "sheddable", "sheddable"),
        ("X-Criticality", "CRITICAL-PLUS", "critical_plus"),
        ("X-Criticality", "root", "critical"),
        ("X-Other", "sheddable", "critical"),
    ],
)
def test_criticality_is_taken_only_from_a_header_that_was_named(
    engine_in: EngineIn, name: str | None, value: str, expected: str
) -> None:
    app = Seen()
    call(ResilienceMiddleware(app, engine=engine_in(), criticality_header=name), x_criticality=value)
    assert app.criticality == expected


@pytest.mark.parametrize(
    ("reads", "state", "method", "expected"),
    [
        ("degraded", "healthy", "GET", False),
        ("degraded", "read_only", "GET", True),
        ("degraded", "read_only", "HEAD", True),
        ("degraded", "read_only", "OPTIONS", True),
        ("degraded", "read_only", "POST", False),
        ("degraded", "down", "GET", False),
        ("always", "healthy", "GET", True),
        ("always", "healthy", "DELETE", False),
        ("never", "read_only", "GET", False),
    ],
)
def test_reads_go_to_a_replica_when_they_may(
    engine_in: EngineIn, reads: Any, state: str, method: str, expected: bool
) -> None:
    app = Seen()
    messages = call(ResilienceMiddleware(app, engine=engine_in(state), reads=reads), method)
    assert messages[0]["status"] == 204
    assert app.read_only is expected


def test_a_draining_engine_refuses_and_closes_the_connection(engine_in: EngineIn) -> None:
    app = Seen()
    wrapped = ResilienceMiddleware(app, engine=[engine_in(), engine_in("draining")], exempt=["/healthz"])
    messages = call(wrapped)
    assert (messages[0]["status"], app.calls) == (503, 0)
    assert header(messages, "connection") == "close"
    assert header(messages, "retry-after") in {"1", "2"}
    call(wrapped, path="/healthz/ready")
    assert app.calls == 1


def test_http_2_is_not_told_to_close_the_connection(engine_in: EngineIn) -> None:
    wrapped = ResilienceMiddleware(Seen(), engine=engine_in("draining"))
    messages = asyncio.run(call_async(wrapped, {**http_scope(), "http_version": "2"}))
    assert header(messages, "connection") is None


@pytest.mark.parametrize(
    ("states", "reject_when_down", "refused"),
    [
        (["down"], False, False),
        (["down"], True, True),
        (["down", "healthy"], True, False),
        (["down", "down"], True, True),
        (["read_only"], True, False),
        (["saturated"], True, False),
    ],
)
def test_a_request_is_refused_on_arrival_only_where_that_was_asked_for(
    engine_in: EngineIn, states: list[str], reject_when_down: bool, refused: bool
) -> None:
    app, engines = Seen(), [engine_in(state, retry_after=6.0) for state in states]
    wrapped = ResilienceMiddleware(app, engine=engines, reject_when_down=reject_when_down, rng=lambda: 0.0)
    messages = call(wrapped)
    assert app.calls == (0 if refused else 1)
    if refused:
        assert header(messages, "retry-after") == "6"
        assert json.loads(messages[1]["body"])["reason"] == "database-unavailable"


@pytest.mark.parametrize(
    ("path", "root_path", "exempt"),
    [
        ("/metrics", "", True),
        ("/metrics/", "", True),
        ("/metrics/x", "", True),
        ("/metricsx", "", False),
        ("/api/metrics", "", False),
        ("/api/metrics", "/api", True),
        ("/", "", False),
    ],
)
def test_exempt_paths_stand_for_themselves_and_what_is_below_them(
    engine_in: EngineIn, path: str, root_path: str, exempt: bool
) -> None:
    app = Seen()
    wrapped = ResilienceMiddleware(
        app, engine=engine_in("down"), reject_when_down=True, exempt=["/livez", "/metrics/"]
    )
    asyncio.run(call_async(wrapped, {**http_scope(path=path), "root_path": root_path}))
    assert app.calls == int(exempt)


def test_the_requests_record_is_in_the_scope_and_in_server_timing(engine_in: EngineIn) -> None:
    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        record = current_record()
        assert record is not None
        assert scope["resilientdb.record"] is record
        record.wait_time, record.hold_time = 0.25, 1.5
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})

    messages = call(ResilienceMiddleware(app, engine=engine_in(), server_timing=True))
    assert header(messages, "server-timing") == "pool;dur=250.0, db;dur=1500.0"
    assert header(messages, "x") == "y"
    assert header(call(ResilienceMiddleware(app, engine=engine_in())), "server-timing") is None


@pytest.mark.parametrize(
    ("scope", "route"),
    [
        (http_scope("GET", "/orders/7"), "GET /orders/7"),
        ({**http_scope("POST", "/login"), "query_string": b"password=x"}, "POST /login"),
        ({**http_scope(path="/api/orders"), "root_path": "/api"}, "GET /orders"),
        (http_scope(path="/caf\u00e9/a b\r\nFORGED"), "GET /caf%C3%A9/a%20b%0D%0AFORGED"),
        (http_scope(path="/" + 900 * "x"), "GET /" + 199 * "x"),
        ({"type": "websocket", "path": "/feed", "headers": []}, "WEBSOCKET /feed"),
    ],
)
def test_the_record_says_what_was_asked_for(engine_in: EngineIn, scope: Scope, route: str) -> None:
    seen: list[str | None] = []

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        record = current_record()
        assert record is not None
        seen.append(record.route)

    asyncio.run(call_async(ResilienceMiddleware(app, engine=engine_in()), scope))
    assert seen == [route]


def test_concurrent_requests_do_not_see_each_other(engine_in: EngineIn) -> None:
    seen: dict[str, set[object]] = {"a": set(), "b": set()}
    both_in = asyncio.Barrier(2)

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        for _ in range(3):
            await both_in.wait()
            limit = current_deadline()
            seen[scope["path"][1:]].add(
                (limit and limit.seconds, id(current_record()), current_criticality())
            )

    wrapped = ResilienceMiddleware(
        app, engine=engine_in(), deadline_header="x-deadline", criticality_header="x-criticality"
    )

    async def run() -> None:
        # In one task's context, so that a scope left behind would be seen.
        await asyncio.gather(
            call_async(wrapped, http_scope(path="/a", headers={"x-deadline": "1"})),
            call_async(
                wrapped, http_scope(path="/b", headers={"x-deadline": "2", "x-criticality": "sheddable"})
            ),
        )
        assert (current_deadline(), current_record()) == (None, None)

    asyncio.run(run())
    assert [len(values) for values in seen.values()] == [1, 1]
    assert seen["a"].isdisjoint(seen["b"])


@pytest.mark.parametrize("error", [None, CircuitOpen("x"), ValueError("x")])
def test_nothing_stays_behind_in_the_servers_context(engine_in: EngineIn, error: Exception | None) -> None:
    wrapped = ResilienceMiddleware(
        failing(error) if error else Seen(), engine=engine_in("read_only"), deadline=1.0
    )

    async def run() -> None:
        try:
            await call_async(wrapped, http_scope())
        except ValueError:
            assert error is not None
        assert (current_deadline(), current_record(), is_read_only()) == (None, None, False)

    asyncio.run(run())


def test_the_deadline_ends_with_the_response_so_that_background_work_may_last(engine_in: EngineIn) -> None:
    remaining: list[float | None] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        def note() -> None:
            limit = current_deadline()
            remaining.append(None if limit is None else limit.remaining())

        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        note()
        await send({"type": "http.response.body"})
        note()

    call(ResilienceMiddleware(app, engine=engine_in(), deadline=1.0))
    assert remaining[0] is not None
    assert remaining[0] <= 1.0
    assert remaining[1] is None


def test_an_outer_deadline_that_is_shorter_is_left_alone(engine_in: EngineIn) -> None:
    wrapped = ResilienceMiddleware(Seen(), engine=engine_in(), deadline=60.0)

    async def run() -> None:
        with deadline(0.5) as outer:
            assert outer is not None
            await call_async(wrapped, http_scope())
            assert outer.remaining() <= 0.5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"deadline": -1}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"reads": "sometimes"}, "reads"),
        ({"exempt": "/healthz"}, "exempt"),
        ({"exempt": ["healthz"]}, "exempt"),
        ({"exempt": ["/"]}, "exempt"),
        ({"deadline_header": "x deadline"}, "deadline_header"),
        ({"criticality_header": ""}, "criticality_header"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(
    engine_in: EngineIn, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ResilienceMiddleware(Seen(), engine=engine_in(), **options)
    assert caught.value.key == key


def test_an_engine_must_be_given_and_be_ours() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        ResilienceMiddleware(Seen(), engine=[])
    foreign = sqlalchemy.create_engine("sqlite://")
    with pytest.raises(ConfigurationError, match="create_engine"):
        ResilienceMiddleware(Seen(), engine=foreign)
