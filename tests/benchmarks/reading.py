"""One row by its key, inside ``read_only()``: one round trip, where plain SQLAlchemy makes three.

What remains is SQLAlchemy's own work and the driver's, the same in both. ``AUTOCOMMIT`` shows how much that is: an
engine of plain SQLAlchemy that never begins and never resets.
"""

from __future__ import annotations

import contextlib
from time import perf_counter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext import asyncio as sa_asyncio

import resilientdb as rdb
from resilientdb.testing import ServiceUnavailable, ToxiproxyServer, faults

from .measure import Lap, race
from .report import Report, Row, Target
from .systems import Bench, Loop, assert_guarded, async_engines, engines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["run"]

_ROWS = 1000
_ACCOUNT = sa.table(
    "account", sa.column("id", sa.Integer), sa.column("name"), sa.column("balance", sa.Integer)
)
_SELECT = sa.select(_ACCOUNT).where(_ACCOUNT.c.id == sa.bindparam("id"))
_AUTOCOMMIT: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
_PLAIN: Callable[[], Any] = contextlib.nullcontext
_AWAY = 0.001
"""Seconds for a round trip to a server that is not next door, but near."""


def run(bench: Bench) -> Report:
    server = bench.server
    for statement in (
        "CREATE TABLE account (id int PRIMARY KEY, name text NOT NULL, balance int NOT NULL)",
        f"INSERT INTO account SELECT n, 'name ' || n, n FROM generate_series(0, {_ROWS - 1}) n",
        "VACUUM ANALYZE account",
    ):
        server.query(statement)
    rows: list[Row] = []
    notes: list[str] = []
    try:
        for driver in ("psycopg", "psycopg2", "psycopg_async", "asyncpg"):
            limit = 0.5 if driver == "psycopg" else None
            rows += _rows(driver, _race(bench, driver, server.url(driver)), limit)
        try:
            with _away(bench) as port:
                for driver in ("psycopg", "asyncpg"):
                    laps = _race(bench, driver, server.url(driver, port=port))
                    rows += _rows(f"{driver}, {_AWAY * 1000:g} ms away", laps)
        except ServiceUnavailable as error:
            notes.append(f"no server away: {error}")
    finally:
        server.query("DROP TABLE account")
    return Report("reading", "one row inside read_only()", rows, notes=notes)


@contextlib.contextmanager
def _away(bench: Bench) -> Iterator[int]:
    with (
        ToxiproxyServer() as toxiproxy,
        toxiproxy.proxy(bench.server.address) as proxy,
        faults.latency(proxy, _AWAY),
    ):
        yield proxy.listen_port


def _race(bench: Bench, driver: str, url: str) -> Mapping[str, Lap]:
    if driver in {"psycopg", "psycopg2"}:
        autocommit = sa.create_engine(url, **_AUTOCOMMIT)
        with engines(url) as (plain, guarded):
            laps = race(
                {
                    "plain": _cycle(plain),
                    "guarded, read_only()": _cycle(guarded, rdb.read_only),
                    "plain, AUTOCOMMIT": _cycle(autocommit),
                },
                bench.scale,
            )
            assert_guarded(guarded)
        autocommit.dispose()
        return laps
    with Loop() as loop, async_engines(url, loop) as (async_plain, async_guarded):
        async_autocommit = sa_asyncio.create_async_engine(url, **_AUTOCOMMIT)
        laps = race(
            {
                "plain": _async_cycle(async_plain, loop),
                "guarded, read_only()": _async_cycle(async_guarded, loop, rdb.read_only),
                "plain, AUTOCOMMIT": _async_cycle(async_autocommit, loop),
            },
            bench.scale,
        )
        assert_guarded(async_guarded)
        loop.run(async_autocommit.dispose())
    return laps


def _rows(case: str, laps: Mapping[str, Lap], limit: float | None = None) -> list[Row]:
    return [
        Row(
            case,
            system,
            {"us": lap.seconds.median * 1e6},
            lap.ratio,
            (Target(f"{case} ratio", lap.ratio.median, limit),)
            if limit is not None and system.startswith("guarded")
            else (),
        )
        for system, lap in laps.items()
    ]


def _cycle(engine: sa.Engine, scope: Callable[[], Any] = _PLAIN) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = perf_counter()
        for number in range(times):
            with scope(), engine.connect() as connection:
                connection.execute(_SELECT, {"id": number % _ROWS}).one()
        return perf_counter() - begun

    return turn


def _async_cycle(
    engine: AsyncEngine, loop: Loop, scope: Callable[[], Any] = _PLAIN
) -> Callable[[int], float]:
    async def turn(times: int) -> float:
        begun = perf_counter()
        for number in range(times):
            with scope():
                async with engine.connect() as connection:
                    (await connection.execute(_SELECT, {"id": number % _ROWS})).one()
        return perf_counter() - begun

    return lambda times: loop.run(turn(times))
