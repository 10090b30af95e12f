"""A connection out of the pool and back, without a statement: what every request pays.

Nothing is sent: all of it is Python. The guarded engine has its breaker, queue and retries on, and its prober
running, which is checked. Timed by the thread's own processor time: nothing is waited for, so a busy neighbour
must not count.
"""

from __future__ import annotations

import contextlib
from time import thread_time
from typing import TYPE_CHECKING, Any

import psycopg_pool
from sqlalchemy.util import greenlet_spawn

from .measure import Lap, pinned, race
from .report import Report, Row, Target
from .systems import Bench, Loop, assert_guarded, async_engines, engines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["run"]


def run(bench: Bench) -> Report:
    with pinned():
        rows = [*_sync(bench), *_async(bench, "asyncpg"), *_async(bench, "psycopg_async")]
    return Report("checkout", "checkout and checkin, no SQL", rows)


def _sync(bench: Bench) -> list[Row]:
    server = bench.server
    with (
        engines(server.url("psycopg")) as (plain, guarded),
        psycopg_pool.ConnectionPool(server.url(""), min_size=1, max_size=5, open=True) as pool,
    ):
        pool.wait()
        guarded.connect().close()
        assert_guarded(guarded)
        raw = race(
            {"plain": _raw(plain), "guarded": _raw(guarded), "psycopg_pool": _getconn(pool)}, bench.scale
        )
        connect = race(
            {"plain": _connect(plain), "guarded": _connect(guarded), "psycopg_pool": _connection(pool)},
            bench.scale,
        )
        assert_guarded(guarded)
    return [*_rows("psycopg raw_connection()", raw, 0.9), *_rows("psycopg connect()", connect, 0.95)]


def _async(bench: Bench, driver: str) -> list[Row]:
    server = bench.server
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(Loop())
        plain, guarded = stack.enter_context(async_engines(server.url(driver), loop))
        raw: dict[str, Callable[[int], float]] = {
            "plain": _async_raw(plain, loop),
            "guarded": _async_raw(guarded, loop),
        }
        connect: dict[str, Callable[[int], float]] = {
            "plain": _async_connect(plain, loop),
            "guarded": _async_connect(guarded, loop),
        }
        if driver.startswith("psycopg"):
            pool = loop.run(_open_pool(server.url("")))
            stack.callback(lambda: loop.run(pool.close()))
            raw["psycopg_pool"] = _async_getconn(pool, loop)
            connect["psycopg_pool"] = _async_connection(pool, loop)
        connect["guarded"](1)
        assert_guarded(guarded)
        rows = [
            *_rows(f"{driver} raw_connection()", race(raw, bench.scale), 1.0),
            *_rows(f"{driver} connect()", race(connect, bench.scale), 1.0),
        ]
        assert_guarded(guarded)
    return rows


def _rows(case: str, laps: Mapping[str, Lap], wanted: float) -> list[Row]:
    return [
        Row(
            case,
            system,
            {"us": lap.seconds.median * 1e6},
            lap.ratio,
            (Target(f"{case} ratio", lap.ratio.median, wanted),) if system == "guarded" else (),
        )
        for system, lap in laps.items()
    ]


# -- threads -------------------------------------------------------------------------------------------------


def _raw(engine: sa.Engine) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            engine.raw_connection().close()
        return thread_time() - begun

    return turn


def _connect(engine: sa.Engine) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            with engine.connect():
                pass
        return thread_time() - begun

    return turn


def _getconn(pool: psycopg_pool.ConnectionPool[Any]) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            pool.putconn(pool.getconn())
        return thread_time() - begun

    return turn


def _connection(pool: psycopg_pool.ConnectionPool[Any]) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            with pool.connection():
                pass
        return thread_time() - begun

    return turn


# -- asyncio -------------------------------------------------------------------------------------------------


def _async_raw(engine: AsyncEngine, loop: Loop) -> Callable[[int], float]:
    async def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            (await engine.raw_connection()).close()  # sends nothing: asyncpg knows that it is idle
        return thread_time() - begun

    async def turn_awaited(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            # psycopg's rollback has to be awaited, even if it finds nothing to send.
            await greenlet_spawn((await engine.raw_connection()).close)
        return thread_time() - begun

    if engine.driver == "asyncpg":
        return lambda times: loop.run(turn(times))
    return lambda times: loop.run(turn_awaited(times))


def _async_connect(engine: AsyncEngine, loop: Loop) -> Callable[[int], float]:
    async def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            async with engine.connect():
                pass
        return thread_time() - begun

    return lambda times: loop.run(turn(times))


def _async_getconn(pool: psycopg_pool.AsyncConnectionPool[Any], loop: Loop) -> Callable[[int], float]:
    async def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            await pool.putconn(await pool.getconn())
        return thread_time() - begun

    return lambda times: loop.run(turn(times))


def _async_connection(pool: psycopg_pool.AsyncConnectionPool[Any], loop: Loop) -> Callable[[int], float]:
    async def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            async with pool.connection():
                pass
        return thread_time() - begun

    return lambda times: loop.run(turn(times))


async def _open_pool(url: str) -> psycopg_pool.AsyncConnectionPool[Any]:
    pool: psycopg_pool.AsyncConnectionPool[Any] = psycopg_pool.AsyncConnectionPool(
        url, min_size=1, max_size=5, open=False
    )
    await pool.open(wait=True)
    return pool
