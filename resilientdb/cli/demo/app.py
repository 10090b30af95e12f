"""The application, twice: the same routes over SQLAlchemy alone, and over resilientdb.

``python -m resilientdb.cli.demo.app plain|guarded PORT URL [REPLICA_URL]`` serves one of them with uvicorn.

Plain is what a tutorial writes: ``create_async_engine`` with its defaults, apart from the pool size. Guarded
differs in five places: the engine with its replica, ``read_only()`` around reads, ``run_transaction_async``
around the write, the middleware, and the exception handlers.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import resilientdb as rdb
from resilientdb.health import HealthApp
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.middleware.starlette import handlers

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.requests import Request

    from resilientdb.events import Event

__all__ = ["DEADLINE", "POOL_SIZE", "SCHEMA", "SLOW_QUERY", "guarded", "plain"]

POOL_SIZE: Final = 5
"""Connections of each engine to each of its nodes: SQLAlchemy's default, without its overflow, so that the
capacity is a round number."""

SLOW_QUERY: Final = 0.15
"""Seconds that the database takes for ``/slow``."""

DEADLINE: Final = 0.9
"""Seconds a request has in the guarded application. A server must give up a little before its clients do (they
wait 1 s), or its answer finds nobody there."""

SCHEMA: Final = "CREATE TABLE items (id bigserial PRIMARY KEY, app text NOT NULL, key text NOT NULL)"
"""Without a unique constraint on ``key``, so that a write applied twice is there twice."""

_RECENT = text("SELECT key FROM items ORDER BY id DESC LIMIT 20")
_REPORT = text("SELECT count(*) FROM generate_series(1, 10), pg_sleep(:seconds)")
_INSERT = text("INSERT INTO items (app, key) VALUES (:app, :key)")


# ------------------------------------------------------------------------------- what both do with a connection


async def _recent(connection: AsyncConnection) -> list[str]:
    return list((await connection.execute(_RECENT)).scalars())


async def _report(connection: AsyncConnection) -> int:
    return int((await connection.execute(_REPORT, {"seconds": SLOW_QUERY})).scalar_one())


async def _add(connection: AsyncConnection, app: str, key: str) -> None:
    await connection.execute(_INSERT, {"app": app, "key": key})


# ------------------------------------------------------------------------------------------- plain SQLAlchemy


def plain(url: str) -> Starlette:
    """The application without the library."""
    engine = create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0)

    async def items(_: Request) -> JSONResponse:
        async with engine.connect() as connection:
            return JSONResponse(await _recent(connection))

    async def slow(_: Request) -> JSONResponse:
        async with engine.connect() as connection:
            return JSONResponse(await _report(connection))

    async def add(request: Request) -> JSONResponse:
        async with engine.begin() as connection:
            await _add(connection, "plain", request.query_params["key"])
        return JSONResponse({"stored": True}, 201)

    return Starlette(routes=[*_routes(items, slow, add), Route("/livez", _alive)])


# ------------------------------------------------------------------------------------------------ resilientdb


def guarded(url: str, replica: str) -> Starlette:
    """The application with the library."""
    engine = rdb.create_async_engine(url, replicas=[replica], pool_size=POOL_SIZE, max_overflow=0)

    async def items(_: Request) -> JSONResponse:
        with rdb.read_only():
            async with engine.connect() as connection:
                return JSONResponse(await _recent(connection))

    async def slow(_: Request) -> JSONResponse:
        with rdb.read_only():
            async with engine.connect() as connection:
                return JSONResponse(await _report(connection))

    async def add(request: Request) -> JSONResponse:
        await rdb.run_transaction_async(engine, _add, "guarded", request.query_params["key"])
        return JSONResponse({"stored": True}, 201)

    watch = _Watch(rdb.control(engine))
    return Starlette(
        routes=[
            *_routes(items, slow, add),
            Route("/demo/state", watch.state),
            Mount("/", HealthApp(engine, detail=True)),
        ],
        middleware=[Middleware(ResilienceMiddleware, engine=engine, deadline=DEADLINE)],
        exception_handlers=handlers(engine),
    )


class _Watch:
    """Tells the demo what the guarded engine does: its events since a number, and its snapshot."""

    def __init__(self, handle: rdb.Control) -> None:
        self._handle = handle
        self._count = 0
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=5000)
        handle.on_event(self._note)

    def _note(self, event: Event) -> None:
        self._count += 1
        what = {"number": self._count, "at": time.monotonic(), "event": type(event).__name__}
        self._events.append({**what, **dataclasses.asdict(event)})

    async def state(self, request: Request) -> JSONResponse:
        since = int(request.query_params.get("since", "0"))
        snapshot = dataclasses.asdict(self._handle.snapshot())
        events = [event for event in tuple(self._events) if event["number"] > since]
        return JSONResponse({"at": time.monotonic(), "snapshot": snapshot, "events": events})


def _routes(items: Any, slow: Any, add: Any) -> list[Route]:
    return [
        Route("/items", items, methods=["GET"]),
        Route("/items", add, methods=["POST"]),
        Route("/slow", slow, methods=["GET"]),
    ]


async def _alive(_: Request) -> JSONResponse:
    return JSONResponse({"status": "pass"})


def _serve(kind: str, port: str, *urls: str) -> None:
    app = plain(*urls) if kind == "plain" else guarded(*urls)
    # Without a log of requests and errors: at these rates its tracebacks would cost the plain application
    # more than its work does.
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(port),
        log_level="critical",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    _serve(*sys.argv[1:])
