"""``SELECT 1`` through the engine: BEGIN, the statement, ROLLBACK; three round trips to a server next door.

The cheapest thing a program can do with a database, so the library's share in it is the largest there is.
"""

from __future__ import annotations

import contextlib
from time import perf_counter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

import resilientdb as rdb

from .measure import Lap, race
from .report import Report, Row
from .systems import Bench, Loop, assert_guarded, async_engines, engines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["run"]

_SELECT = sa.text("SELECT 1")
_PLAIN: Callable[[], Any] = contextlib.nullcontext


def run(bench: Bench) -> Report:
    rows = [*_sync(bench), *_async(bench, "asyncpg"), *_async(bench, "psycopg_async")]
    return Report("select", "SELECT 1 cycle", rows)


def _sync(bench: Bench) -> list[Row]:
    with engines(bench.server.url("psycopg")) as (plain, guarded):
        laps = race(
            {
                "plain": _cycle(plain),
                "guarded": _cycle(guarded),
                "guarded, deadline": _cycle(guarded, lambda: rdb.deadline(5.0)),
            },
            bench.scale,
        )
        assert_guarded(guarded)
    return _rows("psycopg", laps)


def _async(bench: Bench, driver: str) -> list[Row]:
    with Loop() as loop, async_engines(bench.server.url(driver), loop) as (plain, guarded):
        laps = race(
            {
                "plain": _async_cycle(plain, loop),
                "guarded": _async_cycle(guarded, loop),
                "guarded, deadline": _async_cycle(guarded, loop, lambda: rdb.deadline(5.0)),
            },
            bench.scale,
        )
        assert_guarded(guarded)
    return _rows(driver, laps)


def _rows(case: str, laps: Mapping[str, Lap]) -> list[Row]:
    return [Row(case, system, {"us": lap.seconds.median * 1e6}, lap.ratio) for system, lap in laps.items()]


def _cycle(engine: sa.Engine, scope: Callable[[], Any] = _PLAIN) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = perf_counter()
        for _ in range(times):
            with scope(), engine.connect() as connection:
                connection.execute(_SELECT)
        return perf_counter() - begun

    return turn


def _async_cycle(
    engine: AsyncEngine, loop: Loop, scope: Callable[[], Any] = _PLAIN
) -> Callable[[int], float]:
    async def turn(times: int) -> float:
        begun = perf_counter()
        for _ in range(times):
            with scope():
                async with engine.connect() as connection:
                    await connection.execute(_SELECT)
        return perf_counter() - begun

    return lambda times: loop.run(turn(times))
