"""The systems compared: each a request, sync or async, that does one query of a known length.

All have five connections and no overflow, and are otherwise as their name says and their defaults have it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import resilientdb as rdb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["CLIENTS", "CONNECTIONS", "PLAIN", "async_client", "client"]

CONNECTIONS = 5
PLAIN = "plain, pool_timeout 30"
CLIENTS = (
    PLAIN,
    "guarded",
    "guarded, deadline 1",
    "plain, pool_timeout 1",
    "psycopg_pool, no limit",
    "psycopg_pool, max_waiting 50",
)
_SIZE: dict[str, Any] = {"pool_size": CONNECTIONS, "max_overflow": 0}


def client(name: str, url: str, query_time: float) -> Callable[[], object]:
    """``url`` is a plain postgresql:// one. The request returns when it is served and raises when it is not."""
    query = f"SELECT pg_sleep({query_time})"
    if name.startswith("psycopg_pool"):
        import psycopg_pool

        pool: psycopg_pool.ConnectionPool[Any] = psycopg_pool.ConnectionPool(
            url, min_size=CONNECTIONS, max_size=CONNECTIONS, max_waiting=_max_waiting(name), open=True
        )
        pool.wait()

        def request_pool() -> None:
            with pool.connection() as connection:
                connection.execute(query.encode())

        return request_pool

    url = url.replace("postgresql://", "postgresql+psycopg://")
    statement = sa.text(query)
    engine = (
        rdb.create_engine(url, **_SIZE)
        if name.startswith("guarded")
        else sa.create_engine(url, pool_timeout=_pool_timeout(name), **_SIZE)
    )

    def request() -> None:
        with _scope(name), engine.connect() as connection:
            connection.execute(statement)

    return request


async def async_client(name: str, url: str, query_time: float) -> Callable[[], Awaitable[object]]:
    """As ``client``; asyncpg behind SQLAlchemy."""
    query = f"SELECT pg_sleep({query_time})"
    if name.startswith("psycopg_pool"):
        import psycopg_pool

        pool: psycopg_pool.AsyncConnectionPool[Any] = psycopg_pool.AsyncConnectionPool(
            url, min_size=CONNECTIONS, max_size=CONNECTIONS, max_waiting=_max_waiting(name), open=False
        )
        await pool.open(wait=True)

        async def request_pool() -> None:
            async with pool.connection() as connection:
                await connection.execute(query.encode())

        return request_pool

    url = url.replace("postgresql://", "postgresql+asyncpg://")
    statement = sa.text(query)
    engine = (
        rdb.create_async_engine(url, **_SIZE)
        if name.startswith("guarded")
        else create_async_engine(url, pool_timeout=_pool_timeout(name), **_SIZE)
    )

    async def request() -> None:
        with _scope(name):
            async with engine.connect() as connection:
                await connection.execute(statement)

    return request


def _scope(name: str) -> contextlib.AbstractContextManager[object]:
    return rdb.deadline(1.0) if name == "guarded, deadline 1" else contextlib.nullcontext()


def _pool_timeout(name: str) -> float:
    return float(name.rpartition(" ")[2])


def _max_waiting(name: str) -> int:
    return 50 if name.endswith("50") else 0  # psycopg_pool's 0 is no limit
