"""Starlette on psycopg's asynchronous side; reads may go to a replica.

::

    DATABASE_URL=postgresql+psycopg://app:secret@db/app REPLICAS=replica:5432 \
        uvicorn --app-dir examples starlette_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import resilientdb as rdb
from resilientdb.health import HealthApp
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.middleware.starlette import handlers

engine = rdb.create_async_engine(
    os.environ["DATABASE_URL"],
    replicas=os.environ.get("REPLICAS", "").split(),
    resilience=rdb.Resilience.profile("web"),
)


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with engine.begin() as connection:  # a real project runs a migration instead
        await connection.execute(
            text("CREATE TABLE IF NOT EXISTS item (id serial PRIMARY KEY, name text NOT NULL)")
        )
    yield
    await engine.dispose()


async def items(_request: Request) -> JSONResponse:
    with rdb.read_only():
        async with engine.connect() as connection:
            names = await connection.scalars(text("SELECT name FROM item ORDER BY id"))
            return JSONResponse(names.all())


async def add(request: Request) -> JSONResponse:
    new = await request.json()
    async with engine.begin() as connection:
        inserted = await connection.execute(
            text("INSERT INTO item (name) VALUES (:name) RETURNING id"), {"name": new["name"]}
        )
        number = inserted.scalar_one()
    return JSONResponse(number, status_code=201)


app = Starlette(
    routes=[
        Route("/items", items),
        Route("/items", add, methods=["POST"]),
        Mount("/internal", HealthApp(engine)),
    ],
    middleware=[Middleware(ResilienceMiddleware, engine=engine, deadline=2.0, exempt=["/internal"])],
    exception_handlers=handlers(engine),
    lifespan=lifespan,
)
