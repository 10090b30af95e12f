"""The health endpoints: what each answers in each state, wherever they are mounted, in both protocols."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import fastapi
import flask
import pytest
import sqlalchemy
from anyio import wait_all_tasks_blocked
from anyio.to_thread import current_default_thread_limiter
from starlette.applications import Starlette
from starlette.routing import Mount
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import resilientdb as rdb
from resilientdb.health import HealthApp, WSGIHealthApp
from resilientdb.stats import EngineState, NodeStats, PoolStats, Snapshot
from resilientdb.testing.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from wsgiref.types import WSGIEnvironment

PAGES = ("/livez", "/readyz", "/startupz", "/health")
POOL = PoolStats(total=2, active=1, idle=1, waiting=0, limit=2, max_waiting=10)
NODE = NodeStats(
    name="db1:5432",
    role="primary",
    breaker="closed",
    retry_after=None,
    pool=POOL,
    last_error='FATAL: password authentication failed for user "app" SELECT hunter2',
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        assert self.headers["content-length"] == str(len(self.body))
        content: dict[str, Any] = json.loads(self.body)
        return content


def get(app: Any, path: str, *, method: str = "GET", accept: str = "", root_path: str = "") -> Answer:
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "headers": [(b"accept", accept.encode())] if accept else [],
        "query_string": b"",
    }

    async def receive() -> Any:
        raise AssertionError("a health endpoint has nothing to read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, body = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], headers, body["body"])


def get_wsgi(app: Any, path: str, *, method: str = "GET", accept: str = "") -> Answer:
    environ: WSGIEnvironment = {"HTTP_ACCEPT": accept} if accept else {}
    setup_testing_defaults(environ)
    environ.update(REQUEST_METHOD=method, PATH_INFO=path, SCRIPT_NAME="", QUERY_STRING="")
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        assert exc_info is None
        started.extend((int(status[:3]), {name.lower(): value for name, value in headers}))
        return lambda _data: None

    with contextlib.closing(validator(app)(environ, start_response)) as response:  # type: ignore[type-var]
        body = b"".join(response)
    return Answer(started[0], started[1], body)


class Pretend:
    """The control of an engine whose snapshot is whatever the test says."""

    def __init__(self) -> None:
        self.now = Snapshot(state="healthy", retry_after=None, primary="db1:5432", nodes=(NODE,))

    def snapshot(self) -> Snapshot:
        return self.now

    def become(self, state: EngineState, pool: PoolStats = POOL, breaker: str = "closed") -> None:
        node = replace(NODE, pool=pool, breaker=breaker)
        self.now = replace(self.now, state=state, nodes=(node,), retry_after=4.0)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Pretend]:
    """Two engines that pretend; keyed by the engine."""
    controls: dict[Any, Pretend] = {sqlalchemy.create_engine("sqlite://"): Pretend() for _ in range(2)}
    monkeypatch.setattr("resilientdb.health.control", controls.__getitem__)
    return controls


@pytest.fixture
def pretend(engines: dict[Any, Pretend]) -> tuple[Any, Pretend]:
    return next(iter(engines.items()))


@pytest.mark.parametrize(
    ("state", "livez", "readyz", "strict", "health", "status"),
    [
        ("healthy", 200, 200, 200, 200, "pass"),
        ("saturated", 200, 200, 200, 200, "warn"),
        ("read_only", 200, 200, 200, 200, "warn"),
        ("down", 200, 200, 503, 503, "fail"),
        ("draining", 200, 503, 503, 503, "fail"),
    ],
)
def test_each_state_at_each_endpoint(
    pretend: tuple[Any, Pretend],
    state: EngineState,
    livez: int,
    readyz: int,
    strict: int,
    health: int,
    status: str,
) -> None:
    engine, control = pretend
    control.become(state)
    app = HealthApp(engine)
    assert get(app, "/livez").status == livez
    ready = get(app, "/readyz")
    assert (ready.status, ready.json["state"]) == (readyz, state)
    assert get(HealthApp(engine, readiness="strict"), "/readyz").status == strict
    answer = get(app, "/health")
    assert (answer.status, answer.json) == (health, {"status": status, "state": state})


def test_startup_is_over_for_good_once_the_engine_could_serve(pretend: tuple[Any, Pretend]) -> None:
    engine, control = pretend
    app = HealthApp(engine)
    control.become("down")
    assert get(app, "/startupz").status == 503
    control.become("read_only")
    assert get(app, "/startupz").status == 200
    control.become("down")
    assert get(app, "/startupz").status == 200


def test_of_several_engines_the_worst_counts(engines: dict[Any, Pretend]) -> None:
    first, second = engines.values()
    app = HealthApp(list(engines))
    second.become("read_only")
    assert get(app, "/health").json["state"] == "read_only"
    first.become("draining")
    assert get(app, "/readyz").status == 503


USED_UP = replace(POOL, active=2, idle=0, waiting=3, checkouts=50)


def test_a_pool_that_hands_nothing_out_makes_its_process_unready(pretend: tuple[Any, Pretend]) -> None:
    engine, control = pretend
    clock = FakeClock()
    app = HealthApp(engine, clock=clock)
    control.become("saturated", USED_UP)
    assert get(app, "/readyz").status == 200
    clock.advance(29.9)
    assert get(app, "/readyz").status == 200
    clock.advance(0.2)
    answer = get(app, "/readyz")
    assert (answer.status, answer.json["reason"]) == (503, "stuck")
    control.become("saturated", replace(USED_UP, checkouts=51))
    assert get(app, "/readyz").status == 200


@pytest.mark.parametrize(
    ("pool", "breaker"),
    [
        (replace(USED_UP, waiting=0), "closed"),
        (replace(USED_UP, active=1), "closed"),
        (replace(USED_UP, limit=None), "closed"),
        (USED_UP, "open"),
    ],
)
def test_a_pool_is_stuck_only_when_it_is_used_up_and_the_node_is_well(
    pretend: tuple[Any, Pretend], pool: PoolStats, breaker: str
) -> None:
    engine, control = pretend
    clock = FakeClock()
    app = HealthApp(engine, clock=clock)
    control.become("saturated", pool, breaker)
    get(app, "/readyz")
    clock.advance(100.0)
    assert get(app, "/readyz").status == 200


def test_looking_for_stuck_pools_can_be_switched_off(pretend: tuple[Any, Pretend]) -> None:
    engine, control = pretend
    clock = FakeClock()
    app = HealthApp(engine, stuck_after=None, clock=clock)
    control.become("saturated", USED_UP)
    get(app, "/readyz")
    clock.advance(1e6)
    assert get(app, "/readyz").status == 200


@pytest.mark.parametrize("accept", ["", "application/health+json"])
def test_details_are_shown_only_where_that_was_asked_for(pretend: tuple[Any, Pretend], accept: str) -> None:
    engine, _ = pretend
    assert b"db1" not in get(HealthApp(engine), "/health", accept=accept).body
    shown = get(HealthApp(engine, detail=True), "/health", accept=accept).body
    assert b"db1:5432" in shown
    assert b"hunter2" not in shown


def test_details_in_plain_json(pretend: tuple[Any, Pretend]) -> None:
    engine, _ = pretend
    answer = get(HealthApp(engine, detail=True), "/health")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["engines"] == [
        {
            "state": "healthy",
            "primary": "db1:5432",
            "retry_after": None,
            "retry_budget": 1.0,
            "nodes": [
                {
                    "name": "db1:5432",
                    "role": "primary",
                    "breaker": "closed",
                    "retry_after": None,
                    "connections": {"total": 2, "active": 1, "idle": 1, "waiting": 0, "limit": 2},
                }
            ],
        }
    ]


def test_details_as_health_json_for_those_who_ask(pretend: tuple[Any, Pretend]) -> None:
    engine, control = pretend
    control.become("down", breaker="open")
    answer = get(HealthApp(engine, detail=True), "/health", accept="application/health+json")
    assert (answer.status, answer.headers["content-type"]) == (503, "application/health+json")
    assert answer.headers["vary"] == "Accept"
    entry = {"componentId": "db1:5432", "componentType": "datastore", "status": "fail"}
    assert answer.json == {
        "status": "fail",
        "checks": {
            "database:breaker": [{**entry, "observedValue": "open"}],
            "database:connections": [{**entry, "observedValue": 1}],
            "database:waiting": [{**entry, "observedValue": 0}],
        },
    }


@pytest.mark.parametrize("path", PAGES)
def test_head_gets_no_body_and_nothing_is_stored(pretend: tuple[Any, Pretend], path: str) -> None:
    for ask, app in ((get, HealthApp(pretend[0])), (get_wsgi, WSGIHealthApp(pretend[0]))):
        head, full = ask(app, path, method="HEAD"), ask(app, path)
        assert (head.body, head.headers) == (b"", full.headers)
        assert full.headers["cache-control"] == "no-store"
        assert full.json


def test_other_methods_and_paths(pretend: tuple[Any, Pretend]) -> None:
    app = HealthApp(pretend[0])
    answer = get(app, "/livez", method="POST")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert get(app, "/").status == 404
    assert get(app, "/livez/").status == 200


@pytest.mark.parametrize("prefix", ["", "/internal", "/a/b"])
def test_mounted_in_starlette_and_fastapi(pretend: tuple[Any, Pretend], prefix: str) -> None:
    health = HealthApp(pretend[0])
    starlette = Starlette(routes=[Mount(prefix or "/", health)])
    api = fastapi.FastAPI()
    api.mount(prefix or "/", health)
    for app in (starlette, api):
        for path in PAGES:
            assert get(app, prefix + path).status == 200
        # Behind a proxy that strips a prefix which the server was told of.
        assert get(app, f"/proxied{prefix}/livez", root_path="/proxied").status == 200


def test_mounted_in_flask(pretend: tuple[Any, Pretend]) -> None:
    app = flask.Flask("shop")
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/internal": WSGIHealthApp(pretend[0])})  # type: ignore[method-assign]
    client = app.test_client()
    assert client.get("/internal/readyz").json == {"status": "pass", "state": "healthy"}
    assert client.get("/internal/nothing").status_code == 404


def test_run_alone_it_takes_part_in_the_lifespan_and_refuses_websockets(pretend: tuple[Any, Pretend]) -> None:
    incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(HealthApp(pretend[0])({"type": "lifespan"}, receive, send))
    asyncio.run(HealthApp(pretend[0])({"type": "websocket", "path": "/livez"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


@pytest.mark.parametrize(
    ("options", "key"), [({"readiness": "lenient"}, "readiness"), ({"stuck_after": 0.0}, "stuck_after")]
)
def test_an_option_that_cannot_be_meant_is_refused(
    pretend: tuple[Any, Pretend], options: dict[str, Any], key: str
) -> None:
    with pytest.raises(rdb.ConfigurationError) as caught:
        HealthApp(pretend[0], **options)
    assert caught.value.key == key


def test_an_engine_must_be_given_and_be_ours() -> None:
    with pytest.raises(rdb.ConfigurationError, match="at least one"):
        HealthApp([])
    with pytest.raises(rdb.ConfigurationError, match="create_engine"):
        WSGIHealthApp(sqlalchemy.create_engine("sqlite://"))


# -- with a real engine ------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    """One connection, which is out."""
    engine = rdb.create_engine(f"sqlite:///{tmp_path}/shop.db", pool_size=1, max_overflow=0)
    with engine.connect():
        yield engine
    engine.dispose()


def test_no_endpoint_takes_a_connection(full: sqlalchemy.Engine) -> None:
    before = rdb.control(full).snapshot()
    for path in PAGES:
        assert get(HealthApp(full), path).status == 200
        assert get_wsgi(WSGIHealthApp(full), path).status == 200
    assert rdb.control(full).snapshot() == before


def test_it_answers_while_every_thread_of_the_application_waits_for_a_connection(
    full: sqlalchemy.Engine,
) -> None:
    app = fastapi.FastAPI()
    app.mount("/internal", HealthApp(full))
    release = threading.Event()

    @app.get("/")
    def blocked() -> None:
        release.wait(30)

    async def run() -> int:
        threads = current_default_thread_limiter()
        threads.total_tokens = 2
        sent: list[int] = []

        async def send(message: Any) -> None:
            sent.append(message.get("status", 0))

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        def scope(path: str) -> dict[str, Any]:
            return {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}

        waiting = [asyncio.create_task(app(scope("/"), receive, send)) for _ in range(4)]
        await wait_all_tasks_blocked()
        assert threads.borrowed_tokens == 2
        await app(scope("/internal/readyz"), receive, send)
        answered = list(sent)
        release.set()
        await asyncio.gather(*waiting)
        return answered[0]

    assert asyncio.run(run()) == 200


def test_an_open_circuit_is_down_but_this_process_stays_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    engine = rdb.create_engine(f"sqlite:///{tmp_path}/shop.db")
    rdb.control(engine).breaker().open()
    assert get(HealthApp(engine), "/health").json == {"status": "fail", "state": "down"}
    assert get(HealthApp(engine), "/readyz").status == 200
    assert get(HealthApp(engine, readiness="strict"), "/readyz").status == 503
    engine.dispose()
