"""What a caller pays for being told no: the circuit is open because the server is really down, or the queue is full.

Where the server is down, plain SQLAlchemy is refused by the kernel, which is the fastest way to be down; where it
is silent instead, plain waits for its timeouts, and the guarded figures stay as they are here. Where the pool is
exhausted, plain is given the fastest refusal it has, ``pool_timeout=0``, and the guarded queue no room to wait.
"""

from __future__ import annotations

import time
from time import perf_counter
from typing import TYPE_CHECKING, Any

import resilientdb as rdb

from .measure import in_turns, percentile, spread
from .report import Report, Row, Target
from .systems import Bench, Loop, async_engines, engines

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["run"]

_BLOCK = 200
"""Calls in one turn: so many that the 99th percentile is not that of the first, who finds the other's turn in the
processor's caches."""
_WANTED = {
    "circuit open, psycopg": 0.1,
    "circuit open, asyncpg": 0.25,
    "pool full, psycopg": 0.1,
    "pool full, asyncpg": 0.25,
}
"""Milliseconds a refusal may take at the 99th percentile."""
_NO_QUEUE = rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=0))


def run(bench: Bench) -> Report:
    server = bench.server
    server.stop("immediate")
    try:
        rows = []
        with engines(server.url("psycopg")) as (plain, guarded):
            call = _caller(guarded)
            _open_circuit(call)
            rows += _compare("circuit open, psycopg", _caller(plain), call, bench)
        with Loop() as loop, async_engines(server.url("asyncpg"), loop) as (async_plain, async_guarded):
            call = _async_caller(async_guarded, loop)
            _open_circuit(call)
            rows += _compare("circuit open, asyncpg", _async_caller(async_plain, loop), call, bench)
    finally:
        server.start()
    nobody_waits: dict[str, Any] = {
        "pool_size": 1,
        "max_overflow": 0,
        "pool_timeout": 0,
        "resilience": _NO_QUEUE,
    }
    with (
        engines(server.url("psycopg"), **nobody_waits) as (plain, guarded),
        plain.connect(),
        guarded.connect(),
    ):
        rows += _compare("pool full, psycopg", _caller(plain), _caller(guarded), bench)
    with Loop() as loop, async_engines(server.url("asyncpg"), loop, **nobody_waits) as engine_pair:
        taken = [loop.run(_opened(engine)) for engine in engine_pair]
        plain_call, guarded_call = (_async_caller(engine, loop) for engine in engine_pair)
        rows += _compare("pool full, asyncpg", plain_call, guarded_call, bench)
        for connection in taken:
            loop.run(connection.close())
    return Report(
        "refused",
        "a call refused at once",
        rows,
        notes=["circuit open: plain is refused by the kernel, the quickest way to be down"],
    )


def _compare(
    case: str,
    plain: Callable[[int], list[tuple[float, Exception]]],
    guarded: Callable[[int], list[tuple[float, Exception]]],
    bench: Bench,
) -> list[Row]:
    seen: dict[str, list[tuple[float, Exception]]] = {"plain": [], "guarded": []}

    def block(name: str, call: Callable[[int], list[tuple[float, Exception]]]) -> float:
        calls = call(_BLOCK)
        seen[name] += calls
        return spread([seconds for seconds, _ in calls]).median

    call_times = in_turns(
        {"plain": lambda: block("plain", plain), "guarded": lambda: block("guarded", guarded)},
        max(1, bench.scale.refused_calls // _BLOCK),
    )
    ratios = {
        "plain": spread([1.0]),
        "guarded": spread(
            [mine / base for mine, base in zip(call_times["guarded"], call_times["plain"], strict=True)]
        ),
    }
    rows = []
    for name, calls in seen.items():
        # A call that the half-open circuit let through is not a refused one.
        refused = [
            seconds * 1e3
            for seconds, error in calls
            if name == "plain" or isinstance(error, rdb.CircuitOpen | rdb.PoolSaturated)
        ]
        slow = percentile(refused, 0.99)
        rows.append(
            Row(
                case,
                name,
                {
                    "p50 ms": percentile(refused, 0.5),
                    "p99 ms": slow,
                    "max ms": max(refused, default=None),
                    "calls": float(len(refused)),
                    "let through": float(len(calls) - len(refused)),
                },
                ratios[name],
                (Target(f"{case}: p99 ms", slow, _WANTED[case]),) if name == "guarded" else (),
            )
        )
    return rows


def _open_circuit(call: Callable[[int], list[tuple[float, Exception]]]) -> None:
    begun = time.monotonic()
    while not isinstance(call(1)[0][1], rdb.CircuitOpen):
        if time.monotonic() - begun > 20:
            raise AssertionError("the circuit of a dead server did not open in 20 s")


async def _opened(engine: AsyncEngine) -> AsyncConnection:
    return await engine.connect()


def _caller(engine: sa.Engine) -> Callable[[int], list[tuple[float, Exception]]]:
    def turn(times: int) -> list[tuple[float, Exception]]:
        calls = []
        for _ in range(times):
            begun = perf_counter()
            try:
                engine.connect()
            except Exception as error:  # noqa: BLE001 - drivers say it in many ways
                calls.append((perf_counter() - begun, error.with_traceback(None)))
            else:
                raise AssertionError("it was not refused")
        return calls

    return turn


def _async_caller(engine: AsyncEngine, loop: Loop) -> Callable[[int], list[tuple[float, Exception]]]:
    async def turn(times: int) -> list[tuple[float, Exception]]:
        calls = []
        for _ in range(times):
            begun = perf_counter()
            try:
                await engine.connect()
            except Exception as error:  # noqa: BLE001 - drivers say it in many ways
                calls.append((perf_counter() - begun, error.with_traceback(None)))
            else:
                raise AssertionError("it was not refused")
        return calls

    return lambda times: loop.run(turn(times))
