"""The systems compared: each a request, sync or async, that does one small query.

All have five connections and no overflow. ``timeouts`` is plain SQLAlchemy with every timeout that its driver has.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

import pybreaker
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import resilientdb as rdb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["CONNECTIONS", "DEADLINE", "GUARDED", "HURRIED", "PLAIN", "SYSTEMS", "async_client", "client"]

CONNECTIONS = 5
DEADLINE = 1.0
"""Seconds after which a visitor has gone."""
PLAIN = "plain"
GUARDED = "guarded"
HURRIED = "guarded, deadline 1"
_TIMEOUTS = "plain, timeouts"
_BREAKER = "plain, pybreaker"
_BOTH = "plain, timeouts, pybreaker"
SYSTEMS = (PLAIN, GUARDED, HURRIED, _TIMEOUTS, _BREAKER, _BOTH)
_RESET: Final = 5.0
_QUERY: Final = sa.text("SELECT pg_sleep(0.01)")
_SIZE: Final[dict[str, Any]] = {"pool_size": CONNECTIONS, "max_overflow": 0}
_NOTHING = contextlib.nullcontext()


def client(name: str, url: str) -> Callable[[], object]:
    """psycopg. ``url`` is a plain postgresql:// one. A request returns when it is served, and raises when not."""
    url = url.replace("postgresql://", "postgresql+psycopg://")
    engine = _engine(name, url)

    def request() -> None:
        with _deadline(name), engine.connect() as connection:
            connection.execute(_QUERY)

    if "pybreaker" not in name:
        return request
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=_RESET)
    return lambda: breaker.call(request)


def async_client(name: str, url: str) -> Callable[[], Awaitable[object]]:
    """As ``client``; asyncpg. pybreaker has ``call`` for functions only; a coroutine goes inside ``calling()``."""
    url = url.replace("postgresql://", "postgresql+asyncpg://")
    engine = _async_engine(name, url)
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=_RESET) if "pybreaker" in name else None
    limit = DEADLINE if "timeouts" in name else None

    async def request() -> None:
        with breaker.calling() if breaker is not None else _NOTHING:
            async with asyncio.timeout(limit):
                with _deadline(name):
                    async with engine.connect() as connection:
                        await connection.execute(_QUERY)

    return request


def _engine(name: str, url: str) -> sa.Engine:
    if name.startswith("guarded"):
        return rdb.create_engine(url, **_SIZE)
    if "timeouts" not in name:
        return sa.create_engine(url, pool_pre_ping=True, **_SIZE)
    arguments: dict[str, Any] = {
        "connect_timeout": 2,  # libpq's least
        "tcp_user_timeout": 1000,
        "keepalives_idle": 1,
        "keepalives_interval": 1,
        "keepalives_count": 1,
        "options": "-c statement_timeout=1000",
    }
    return sa.create_engine(url, pool_pre_ping=True, pool_timeout=1, connect_args=arguments, **_SIZE)


def _async_engine(name: str, url: str) -> Any:
    if name.startswith("guarded"):
        return rdb.create_async_engine(url, **_SIZE)
    if "timeouts" not in name:
        return create_async_engine(url, pool_pre_ping=True, **_SIZE)
    arguments = {"timeout": 2, "command_timeout": 1}
    return create_async_engine(url, pool_pre_ping=True, pool_timeout=1, connect_args=arguments, **_SIZE)


def _deadline(name: str) -> contextlib.AbstractContextManager[object]:
    return rdb.deadline(DEADLINE) if name == HURRIED else _NOTHING
