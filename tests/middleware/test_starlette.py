"""Starlette and FastAPI applications, with handlers inside and the middleware around, over real engines."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import fastapi
import httpx
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

import resilientdb as rdb
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.middleware.starlette import handlers, install
from resilientdb.runtime.context import current_deadline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message
    from starlette.websockets import WebSocket

ORIGIN = {"Origin": "https://shop.example"}
UNREACHABLE = "postgresql+{driver}://app:hunter2@127.0.0.1:1/shop"


def ask(app: ASGIApp, method: str = "GET", path: str = "/", **headers: str) -> httpx.Response:
    """One request; what the application raises becomes the server's 500, as it would."""
    return ask_all(app, httpx.Request(method, f"http://test{path}", headers={**ORIGIN, **headers}))[0]


def ask_all(app: ASGIApp, *requests: httpx.Request) -> list[httpx.Response]:
    """Requests one after the other, on one event loop."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            return [await client.send(request) for request in requests]

    return asyncio.run(send())


def problem(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["reason"])


async def session_of(request: fastapi.Request) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(request.app.state.engine) as session:
        yield session


def seconds_left() -> float | None:
    limit = current_deadline()
    return None if limit is None else limit.seconds


@pytest.fixture
def full(tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    """An engine whose one connection is out, and where nobody may wait."""
    engine = rdb.create_engine(
        f"sqlite:///{tmp_path}/full.db",
        pool_size=1,
        max_overflow=0,
        resilience=rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=0)),
    )
    with engine.connect():
        yield engine
    engine.dispose()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    engine = rdb.create_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE item (id INTEGER PRIMARY KEY)"))
        connection.execute(sqlalchemy.text("INSERT INTO item VALUES (1)"))
    yield engine
    engine.dispose()


def starlette_app(engine: Any, *routes: Route | WebSocketRoute, **options: Any) -> Starlette:
    app = Starlette(routes=routes, **options)
    install(app, engine)
    app.add_middleware(ResilienceMiddleware, engine=engine)
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN["Origin"]], expose_headers=["Retry-After"])
    return app


def test_a_full_pool_is_a_503_that_a_page_of_another_origin_can_read(full: sqlalchemy.Engine) -> None:
    def query(_request: Request) -> Response:
        with full.connect():
            raise AssertionError("got a connection")

    response = ask(starlette_app(full, Route("/", query)))
    assert (response.status_code, problem(response)) == (503, "pool-saturated")
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert response.headers["access-control-expose-headers"] == "Retry-After"


def test_head_gets_no_body_from_a_handler_either(full: sqlalchemy.Engine) -> None:
    def query(_request: Request) -> Response:
        with full.connect():
            raise AssertionError("got a connection")

    response = ask(starlette_app(full, Route("/", query)), "HEAD")
    assert (response.status_code, response.content) == (503, b"")
    assert int(response.headers["content-length"]) > 0


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_sync_route_of_fastapi_over_an_unreachable_server(driver: str) -> None:
    engine = rdb.create_engine(UNREACHABLE.format(driver=driver))
    app = fastapi.FastAPI()
    install(app, engine)
    app.add_middleware(ResilienceMiddleware, engine=engine, deadline=5.0)

    @app.get("/")
    def route() -> Any:
        with Session(engine) as session:
            return session.scalar(sqlalchemy.text("SELECT 1"))

    check_unreachable(app)
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_async_route_of_fastapi_over_an_unreachable_server(driver: str) -> None:
    engine = rdb.create_async_engine(UNREACHABLE.format(driver=driver))
    app = fastapi.FastAPI()
    install(app, engine)
    app.add_middleware(ResilienceMiddleware, engine=engine, deadline=5.0)

    app.state.engine = engine

    @app.get("/")
    async def route(session: Annotated[AsyncSession, fastapi.Depends(session_of)]) -> Any:
        return await session.scalar(sqlalchemy.text("SELECT 1"))

    check_unreachable(app)
    engine.sync_engine.dispose(close=False)


def check_unreachable(app: ASGIApp) -> None:
    responses = ask_all(
        app,
        *(
            httpx.Request("GET", "http://test/", headers={"Accept": accept})
            for accept in ("*/*", "text/html")
        ),
    )
    for response in responses:
        assert response.status_code == 503
        assert 1 <= int(response.headers["retry-after"]) <= 30
        for secret in ("hunter2", "127.0.0.1", "SELECT", "psycopg", "asyncpg"):
            assert secret not in response.text
    assert problem(responses[0]) in {"cannot-connect", "circuit-open"}


def test_without_handlers_the_middleware_alone_answers_too(full: sqlalchemy.Engine) -> None:
    app = fastapi.FastAPI()
    app.add_middleware(ResilienceMiddleware, engine=full)

    @app.get("/")
    def route() -> None:
        full.connect()

    assert problem(ask(app)) == "pool-saturated"


def test_without_the_middleware_the_handlers_alone_answer_too(full: sqlalchemy.Engine) -> None:
    def query(_request: Request) -> Response:
        full.connect()
        raise AssertionError("got a connection")

    app = Starlette(routes=[Route("/", query)], exception_handlers=handlers(full))
    assert problem(ask(app)) == "pool-saturated"


def duplicate(engine: sqlalchemy.Engine) -> Callable[[Request], Response]:
    def insert(_request: Request) -> Response:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("INSERT INTO item VALUES (1)"))
        raise AssertionError("inserted twice")

    return insert


def test_an_application_error_keeps_the_frameworks_500(engine: sqlalchemy.Engine) -> None:
    response = ask(starlette_app(engine, Route("/", duplicate(engine))))
    assert (response.status_code, response.text) == (500, "Internal Server Error")


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("cls", [sqlalchemy.exc.IntegrityError, sqlalchemy.exc.SQLAlchemyError])
def test_handlers_of_the_application_still_get_what_is_not_ours(
    engine: sqlalchemy.Engine, cls: type[Exception], is_async: bool
) -> None:
    def answer(_request: Request, error: Exception) -> Response:
        assert isinstance(error, sqlalchemy.exc.IntegrityError)
        return PlainTextResponse("already there", 409)

    async def answer_async(request: Request, error: Exception) -> Response:
        return answer(request, error)

    app = starlette_app(
        engine,
        Route("/", duplicate(engine)),
        exception_handlers={cls: answer_async if is_async else answer},
    )
    response = ask(app)
    assert (response.status_code, response.text) == (409, "already there")


def test_errors_of_other_services_and_http_errors_are_left_alone(engine: sqlalchemy.Engine) -> None:
    def refused(_request: Request) -> Response:
        raise ConnectionRefusedError("some other service")

    def teapot(_request: Request) -> Response:
        raise HTTPException(418)

    app = starlette_app(engine, Route("/refused", refused), Route("/teapot", teapot))
    assert ask(app, path="/refused").text == "Internal Server Error"
    assert ask(app, path="/teapot").status_code == 418


def test_the_deadline_is_seen_in_async_routes_and_in_the_threads_of_sync_ones(
    engine: sqlalchemy.Engine,
) -> None:
    app = fastapi.FastAPI()
    app.add_middleware(ResilienceMiddleware, engine=engine, deadline=3.0)

    @app.get("/sync")
    def sync() -> float | None:
        return seconds_left()

    @app.get("/async")
    async def asynchronous() -> float | None:
        return seconds_left()

    @app.get("/dependency")
    async def dependency(seconds: Annotated[float | None, fastapi.Depends(seconds_left)]) -> float | None:
        return seconds

    assert [ask(app, path=path).json() for path in ("/sync", "/async", "/dependency")] == [3.0, 3.0, 3.0]


def test_the_configured_deadline_bounds_the_wait_for_a_connection(tmp_path: Path) -> None:
    engine = rdb.create_engine(
        f"sqlite:///{tmp_path}/shop.db",
        pool_size=1,
        max_overflow=0,
        resilience=rdb.Resilience(deadline=0.05),
    )

    def query(_request: Request) -> Response:
        engine.connect()
        raise AssertionError("got a connection")

    with engine.connect():
        before = time.monotonic()
        response = ask(starlette_app(engine, Route("/", query)))
        assert problem(response) == "deadline-exceeded"
        assert time.monotonic() - before < 5.0
    engine.dispose()


def test_an_error_after_the_response_has_started_ends_it(engine: sqlalchemy.Engine) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun"
        raise rdb.PoolTimeout("x")

    async def stream(_request: Request) -> Response:
        return StreamingResponse(chunks())

    app = starlette_app(engine, Route("/", stream))
    response = ask(app)
    assert (response.status_code, response.content) == (200, b"begun")


def test_background_tasks_run_without_the_requests_deadline(engine: sqlalchemy.Engine) -> None:
    remaining: dict[str, float | None] = {}

    def note(moment: str) -> None:
        limit = current_deadline()
        remaining[moment] = None if limit is None else limit.remaining()

    async def accept(_request: Request) -> Response:
        note("route")
        return PlainTextResponse("accepted", background=BackgroundTask(note, "background"))

    app = Starlette(
        routes=[Route("/", accept)],
        middleware=[Middleware(ResilienceMiddleware, engine=engine, deadline=2.0)],
    )
    assert ask(app).text == "accepted"
    assert remaining["route"] is not None
    assert remaining["route"] <= 2.0
    assert remaining["background"] is None


def test_an_error_in_a_websocket_route_passes(full: sqlalchemy.Engine) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        full.connect()

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    app = starlette_app(full, WebSocketRoute("/", endpoint))
    scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
    with pytest.raises(rdb.PoolSaturated):
        asyncio.run(app(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.accept"]


def test_both_engines_of_one_application(engine: sqlalchemy.Engine, tmp_path: Path) -> None:
    async_engine: AsyncEngine = rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    app = fastapi.FastAPI()
    install(app, [engine, async_engine])
    app.add_middleware(ResilienceMiddleware, engine=[engine, async_engine], server_timing=True)

    @app.get("/sync")
    def sync() -> Any:
        with Session(engine) as session:
            return session.scalar(sqlalchemy.text("SELECT count(*) FROM item"))

    @app.get("/async")
    async def asynchronous() -> Any:
        try:
            async with AsyncSession(async_engine) as session:
                return await session.scalar(sqlalchemy.text("SELECT count(*) FROM item"))
        finally:
            await async_engine.dispose()

    for path in ("/sync", "/async"):
        response = ask(app, path=path)
        assert response.json() == 1
        assert response.headers["server-timing"].startswith("pool;dur=")
