"""Many threads on five connections, each doing ``SELECT 1`` as fast as it may: throughput, and who waits how long.

The guarded queue is made long enough for all of them: to shed is what ``overload`` is about. A pool that lets a
returning thread take its connection straight back keeps its throughput and lets the others starve, so the
longest wait belongs beside the throughput.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psycopg_pool
import sqlalchemy as sa

import resilientdb as rdb

from .measure import in_turns, percentile, spread
from .report import Report, Row
from .systems import Bench, assert_guarded, engines

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run"]

_CONNECTIONS = 5
_SELECT = sa.text("SELECT 1")
_LONG_QUEUE = rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=1000))


@dataclass
class _Seen:
    waits: list[float] = field(default_factory=list)
    """Of every turn, in seconds."""
    longest: list[float] = field(default_factory=list)
    """Of each turn."""
    errors: list[Exception] = field(default_factory=list)


def run(bench: Bench) -> Report:
    rows = []
    for threads in bench.scale.threads:
        rows += _with(bench, threads)
    return Report(
        "contention",
        f"threads sharing {_CONNECTIONS} connections",
        rows,
        ratio_of="throughput",
        notes=["longest ms: median over the rounds of the longest wait in each"],
    )


def _with(bench: Bench, threads: int) -> list[Row]:
    server = bench.server
    with (
        engines(
            server.url("psycopg"),
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_timeout=30,
            resilience=_LONG_QUEUE,
        ) as (plain, guarded),
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
        for cycle in cycles.values():
            _turn(cycle, threads, 0.05, _Seen())
        assert_guarded(guarded)
        seen = {name: _Seen() for name in cycles}
        rates = in_turns(
            {
                name: lambda name=name, cycle=cycle: _turn(  # type: ignore[misc]
                    cycle, threads, bench.scale.contention_turn, seen[name]
                )
                for name, cycle in cycles.items()
            },
            bench.scale.contention_rounds,
        )
    return [
        Row(
            f"{threads} threads",
            name,
            {
                "per second": spread(rates[name]).median,
                "wait p50 ms": _ms(percentile(mine.waits, 0.5)),
                "wait p99 ms": _ms(percentile(mine.waits, 0.99)),
                "longest ms": _ms(spread(mine.longest).median),
                "errors": float(len(mine.errors)),
            },
            spread([rate / base for rate, base in zip(rates[name], rates["plain"], strict=True)]),
        )
        for name, mine in seen.items()
    ]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _turn(cycle: Callable[[], float], threads: int, seconds: float, seen: _Seen) -> float:
    """Cycles a second that all threads did together."""
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
    done = sum(map(len, waits))
    taken = perf_counter() - begun
    over.set()
    for worker in workers:
        worker.join()
    everybody = [wait for mine in waits for wait in mine]
    seen.waits += everybody
    seen.longest.append(max(everybody, default=0.0))
    return done / taken


def _through(engine: sa.Engine) -> Callable[[], float]:
    """One cycle; gives how long the connection was waited for."""

    def cycle() -> float:
        begun = perf_counter()
        with engine.connect() as connection:
            waited = perf_counter() - begun
            connection.execute(_SELECT)
        return waited

    return cycle


def _through_psycopg_pool(pool: psycopg_pool.ConnectionPool[Any]) -> Callable[[], float]:
    def cycle() -> float:
        begun = perf_counter()
        with pool.connection() as connection:
            waited = perf_counter() - begun
            connection.execute("SELECT 1")
        return waited

    return cycle
