"""A permit and its outcome on the healthy path, against ``pybreaker.CircuitBreaker.call`` of a no-op.

By the thread's own processor time, as in ``checkout``.
"""

from __future__ import annotations

from time import thread_time
from typing import TYPE_CHECKING, Any

import pybreaker

import resilientdb as rdb

from .measure import pinned, race
from .report import Report, Row, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from .systems import Bench

__all__ = ["run"]


def run(bench: Bench) -> Report:
    # No connection is made: a breaker comes with its engine.
    engine = rdb.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    ours: Any = rdb.control(engine).breaker()
    with pinned():
        laps = race(
            {
                "pybreaker call()": _call(pybreaker.CircuitBreaker()),
                "guarded: as the pool does": _inline(ours),
                "guarded: try_acquire, record_success": _permit(ours),
                "guarded: call()": _call(ours),
                "no breaker": _bare,
            },
            bench.scale,
        )
    engine.dispose()
    rows = [
        Row(
            "healthy call",
            system,
            {"us": lap.seconds.median * 1e6},
            lap.ratio,
            (
                Target("permit and outcome, us", lap.seconds.median * 1e6, 0.5),
                Target("permit and outcome, ratio to pybreaker", lap.ratio.median, 1.0),
            )
            if system == "guarded: as the pool does"
            else (),
        )
        for system, lap in laps.items()
    ]
    return Report("breaker", "permit and outcome of a healthy call", rows)


def _noop() -> None:
    pass


def _bare(times: int) -> float:
    begun = thread_time()
    for _ in range(times):
        _noop()
    return thread_time() - begun


def _call(breaker: pybreaker.CircuitBreaker) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            breaker.call(_noop)
        return thread_time() - begun

    return turn


def _inline(breaker: Any) -> Callable[[int], float]:
    """What ``QueueDoor`` does around a checkout; changes with it."""

    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            permit = breaker.permit
            if permit is not None:
                _noop()
                if permit is breaker.permit:
                    breaker.answered += 1
        return thread_time() - begun

    return turn


def _permit(breaker: Any) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            permit = breaker.try_acquire()
            _noop()
            breaker.record_success(permit)
        return thread_time() - begun

    return turn
