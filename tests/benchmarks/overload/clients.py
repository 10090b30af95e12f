"""The systems compared: each a request, sync or async, that does one query of a known length.

All have five connections and no overflow, and are otherwise as their name says and their defaults have it.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import resilientdb as rdb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["CLIENTS", "CONNECTIONS", "PLAIN", "SPARING", "Queries", "async_client", "client"]

CONNECTIONS = 5
PLAIN = "plain, pool_timeout 30"
SPARING = "guarded, slow sheddable"
"""For kinds of request that differ: all but the first are said to be less critical."""
CLIENTS = (
    PLAIN,
    "guarded",
    "guarded, deadline 1",
    "plain, pool_timeout 1",
    "psycopg_pool, no limit",
    "psycopg_pool, max_waiting 50",
)
_SIZE: dict[str, Any] = {"pool_size": CONNECTIONS, "max_overflow": 0}
_NOTHING = contextlib.nullcontext()

S = TypeVar("S")


class Queries(Generic[S]):
    """What each kind of request asks the database for, and what instead while the database is slow.

    ``slow_from`` and ``slow_until`` are moments on the monotonic clock, and may be set while requests are served.
    """

    def __init__(
        self, make: Callable[[str], S], seconds: Sequence[float], slow_seconds: Sequence[float]
    ) -> None:
        self._usual = [make(f"SELECT pg_sleep({time})") for time in seconds]
        self._slow = [make(f"SELECT pg_sleep({time})") for time in slow_seconds]
        self.slow_from = math.inf
        self.slow_until = math.inf

    def at(self, now: float, kind: int) -> S:
        return (self._slow if self.slow_from <= now < self.slow_until else self._usual)[kind]


def client(
    name: str, url: str, seconds: Sequence[float], slow_seconds: Sequence[float]
) -> tuple[Callable[[int], float], Queries[Any]]:
    """``url`` is a plain postgresql:// one.

    A request is given its kind. It returns when it is served, with the moment at which its query began, and
    raises when it is not.
    """
    if name.startswith("psycopg_pool"):
        import psycopg_pool

        pool: psycopg_pool.ConnectionPool[Any] = psycopg_pool.ConnectionPool(
            url, min_size=CONNECTIONS, max_size=CONNECTIONS, max_waiting=_max_waiting(name), open=True
        )
        pool.wait()
        texts = Queries(str.encode, seconds, slow_seconds)

        def request_pool(kind: int) -> float:
            with pool.connection() as connection:
                begun = time.monotonic()
                connection.execute(texts.at(begun, kind))
            return begun

        return request_pool, texts

    url = url.replace("postgresql://", "postgresql+psycopg://")
    statements = Queries(sa.text, seconds, slow_seconds)
    engine = (
        rdb.create_engine(url, **_SIZE)
        if name.startswith("guarded")
        else sa.create_engine(url, pool_timeout=_pool_timeout(name), **_SIZE)
    )

    def request(kind: int) -> float:
        with _scope(name, kind), engine.connect() as connection:
            begun = time.monotonic()
            connection.execute(statements.at(begun, kind))
        return begun

    return request, statements


async def async_client(
    name: str, url: str, seconds: Sequence[float], slow_seconds: Sequence[float]
) -> tuple[Callable[[int], Awaitable[float]], Queries[Any]]:
    """As ``client``; asyncpg behind SQLAlchemy."""
    if name.startswith("psycopg_pool"):
        import psycopg_pool

        pool: psycopg_pool.AsyncConnectionPool[Any] = psycopg_pool.AsyncConnectionPool(
            url, min_size=CONNECTIONS, max_size=CONNECTIONS, max_waiting=_max_waiting(name), open=False
        )
        await pool.open(wait=True)
        texts = Queries(str.encode, seconds, slow_seconds)

        async def request_pool(kind: int) -> float:
            async with pool.connection() as connection:
                begun = time.monotonic()
                await connection.execute(texts.at(begun, kind))
            return begun

        return request_pool, texts

    url = url.replace("postgresql://", "postgresql+asyncpg://")
    statements = Queries(sa.text, seconds, slow_seconds)
    engine = (
        rdb.create_async_engine(url, **_SIZE)
        if name.startswith("guarded")
        else create_async_engine(url, pool_timeout=_pool_timeout(name), **_SIZE)
    )

    async def request(kind: int) -> float:
        with _scope(name, kind):
            async with engine.connect() as connection:
                begun = time.monotonic()
                await connection.execute(statements.at(begun, kind))
        return begun

    return request, statements


def _scope(name: str, kind: int) -> contextlib.AbstractContextManager[object]:
    if name == "guarded, deadline 1":
        return rdb.deadline(1.0)
    if name == SPARING and kind:
        return rdb.criticality("sheddable")
    return _NOTHING


def _pool_timeout(name: str) -> float:
    return float(name.rpartition(" ")[2])


def _max_waiting(name: str) -> int:
    return 50 if name.endswith("50") else 0  # psycopg_pool's 0 is no limit
