"""Many threads, or tasks, on five connections, each doing ``SELECT 1`` as fast as it may: throughput, and who waits
how long.

The guarded queue is made long enough for all of them: to shed is what ``overload`` is about. A pool that lets a
returning thread take its connection straight back keeps its throughput and lets the others starve, so the
longest wait, and the share of whoever was served least, belong beside the throughput.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psycopg_pool
import sqlalchemy as sa

import resilientdb as rdb

from .measure import in_turns, percentile, spread
from .report import Report, Row, Target
from .systems import Bench, Loop, assert_guarded, async_engines, engines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from .measure import Scale

__all__ = ["run"]

_CONNECTIONS = 5
_SELECT = sa.text("SELECT 1")
_OPTIONS: dict[str, Any] = {
    "pool_size": _CONNECTIONS,
    "max_overflow": 0,
    "pool_timeout": 30,
    "resilience": rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=1000)),
}
_WARM_UP = 0.05

Cycle = Callable[[], float]
"""One connection, one statement; gives how long the connection was waited for, in seconds."""
AsyncCycle = Callable[[], Awaitable[float]]
Turn = Callable[[float, "_Seen"], float]
"""Lets everybody loose for so many seconds; gives the cycles a second that all did together."""


@dataclass
class _Seen:
    waits: list[float] = field(default_factory=list)
    """Of every turn, in seconds."""
    longest: list[float] = field(default_factory=list)
    """Of each turn."""
    least: list[float] = field(default_factory=list)
    """Of each turn: the cycles of whoever did fewest, as a share of the average."""
    errors: list[Exception] = field(default_factory=list)

    def note(self, waits: Sequence[Sequence[float]], counts: Sequence[int]) -> None:
        """``waits`` of each caller; ``counts``: how many of them fell into the turn."""
        everybody = [wait for mine in waits for wait in mine]
        self.waits += everybody
        self.longest.append(max(everybody, default=0.0))
        self.least.append(min(counts) * len(counts) / max(1, sum(counts)))


def run(bench: Bench) -> Report:
    rows = []
    for callers in bench.scale.callers:
        rows += _threads(bench, callers)
    for callers in bench.scale.callers:
        rows += _tasks(bench, callers)
    return Report(
        "contention",
        f"threads and tasks sharing {_CONNECTIONS} connections",
        rows,
        ratio_of="throughput",
        notes=[
            "longest ms: median over the rounds of the longest wait in each; longest/p50: to the median wait",
            "least served %: cycles of whoever did fewest, of the average; median over the rounds",
        ],
    )


def _threads(bench: Bench, threads: int) -> list[Row]:
    server = bench.server
    with (
        engines(server.url("psycopg"), **_OPTIONS) as (plain, guarded),
        psycopg_pool.ConnectionPool(
            server.url(""), min_size=_CONNECTIONS, max_size=_CONNECTIONS, open=True
        ) as pool,
    ):
        pool.wait()
        cycles = {
            "plain": _through(plain),
            "guarded": _through(guarded),
            "psycopg_pool": _through_psycopg_pool(pool),
        }
        turns: dict[str, Turn] = {
            name: lambda seconds, seen, cycle=cycle: _thread_turn(cycle, threads, seconds, seen)  # type: ignore[misc]
            for name, cycle in cycles.items()
        }
        return _contend(f"{threads} threads", turns, guarded, bench.scale)


def _tasks(bench: Bench, tasks: int) -> list[Row]:
    server = bench.server
    with (
        Loop() as loop,
        async_engines(server.url("psycopg_async"), loop, **_OPTIONS) as (plain, guarded),
    ):
        pool = loop.run(_open_pool(server.url("")))
        try:
            cycles = {
                "plain": _async_through(plain),
                "guarded": _async_through(guarded),
                "psycopg_pool": _async_through_psycopg_pool(pool),
            }
            turns: dict[str, Turn] = {
                name: lambda seconds, seen, cycle=cycle: loop.run(  # type: ignore[misc]
                    _task_turn(cycle, tasks, seconds, seen)
                )
                for name, cycle in cycles.items()
            }
            return _contend(f"{tasks} tasks", turns, guarded, bench.scale)
        finally:
            loop.run(pool.close())


def _contend(case: str, turns: dict[str, Turn], guarded: sa.Engine | AsyncEngine, scale: Scale) -> list[Row]:
    for turn in turns.values():
        turn(_WARM_UP, _Seen())
    assert_guarded(guarded)
    seen = {name: _Seen() for name in turns}
    rates = in_turns(
        {
            name: lambda turn=turn, mine=seen[name]: turn(scale.contention_turn, mine)  # type: ignore[misc]
            for name, turn in turns.items()
        },
        scale.contention_rounds,
    )
    return [_row(case, name, mine, rates[name], rates["plain"]) for name, mine in seen.items()]


def _row(case: str, name: str, seen: _Seen, rates: Sequence[float], base: Sequence[float]) -> Row:
    ratio = spread([rate / plain for rate, plain in zip(rates, base, strict=True)])
    median, longest = percentile(seen.waits, 0.5), spread(seen.longest).median
    return Row(
        case,
        name,
        {
            "per second": spread(rates).median,
            "wait p50 ms": _ms(median),
            "wait p99 ms": _ms(percentile(seen.waits, 0.99)),
            "longest ms": _ms(longest),
            "longest/p50": longest / median if median else None,
            "least served %": spread(seen.least).median * 100,
            "errors": float(len(seen.errors)),
        },
        ratio,
        (Target(f"{case}: throughput ratio", ratio.median, 1.0, at_least=True),) if name == "guarded" else (),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


# -- threads -------------------------------------------------------------------------------------------------


def _thread_turn(cycle: Cycle, threads: int, seconds: float, seen: _Seen) -> float:
    start = threading.Barrier(threads + 1)
    over = threading.Event()
    waits: list[list[float]] = [[] for _ in range(threads)]

    def work(mine: list[float]) -> None:
        start.wait()
        while not over.is_set():
            try:
                mine.append(cycle())
            except Exception as error:  # noqa: BLE001 - counted
                seen.errors.append(error)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in waits]
    for worker in workers:
        worker.start()
    start.wait()
    begun = perf_counter()
    over.wait(seconds)
    counts = [len(mine) for mine in waits]
    taken = perf_counter() - begun
    over.set()
    for worker in workers:
        worker.join()
    seen.note(waits, counts)  # the waits of those, too, who waited until the others had stopped
    return sum(counts) / taken


def _through(engine: sa.Engine) -> Cycle:
    def cycle() -> float:
        begun = perf_counter()
        with engine.connect() as connection:
            waited = perf_counter() - begun
            connection.execute(_SELECT)
        return waited

    return cycle


def _through_psycopg_pool(pool: psycopg_pool.ConnectionPool[Any]) -> Cycle:
    def cycle() -> float:
        begun = perf_counter()
        with pool.connection() as connection:
            waited = perf_counter() - begun
            connection.execute("SELECT 1")
        return waited

    return cycle


# -- asyncio -------------------------------------------------------------------------------------------------


async def _task_turn(cycle: AsyncCycle, tasks: int, seconds: float, seen: _Seen) -> float:
    over = False
    waits: list[list[float]] = [[] for _ in range(tasks)]

    async def work(mine: list[float]) -> None:
        while not over:
            try:
                mine.append(await cycle())
            except Exception as error:  # noqa: BLE001 - counted
                seen.errors.append(error)

    begun = perf_counter()
    workers = [asyncio.create_task(work(mine)) for mine in waits]
    await asyncio.sleep(seconds)
    counts = [len(mine) for mine in waits]
    taken = perf_counter() - begun
    over = True
    await asyncio.gather(*workers)
    seen.note(waits, counts)
    return sum(counts) / taken


def _async_through(engine: AsyncEngine) -> AsyncCycle:
    async def cycle() -> float:
        begun = perf_counter()
        async with engine.connect() as connection:
            waited = perf_counter() - begun
            await connection.execute(_SELECT)
        return waited

    return cycle


def _async_through_psycopg_pool(pool: psycopg_pool.AsyncConnectionPool[Any]) -> AsyncCycle:
    async def cycle() -> float:
        begun = perf_counter()
        async with pool.connection() as connection:
            waited = perf_counter() - begun
            await connection.execute("SELECT 1")
        return waited

    return cycle


async def _open_pool(url: str) -> psycopg_pool.AsyncConnectionPool[Any]:
    pool: psycopg_pool.AsyncConnectionPool[Any] = psycopg_pool.AsyncConnectionPool(
        url, min_size=_CONNECTIONS, max_size=_CONNECTIONS, open=False
    )
    await pool.open(wait=True)
    return pool
