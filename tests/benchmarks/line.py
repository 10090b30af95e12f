"""The line in front of a pool: what joining, being served and leaving cost where more and more wait, and the memory
that somebody who waits takes up.

No engine and no lock: the admission alone, by the thread's own processor time, as in ``breaker``. The lines are as
long as they are from beginning to end; whoever is served joins again.
"""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from time import thread_time
from typing import TYPE_CHECKING

from sqlalchemy.util.concurrency import await_only

from resilientdb.policy.saturation import Admission, Lane
from resilientdb.runtime.waiters import TaskWaiter, ThreadWaiter, Waiter

from .measure import pinned, race
from .report import Report, Row, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from .systems import Bench

__all__ = ["run"]

_LENGTHS = (1, 100, 10_000, 100_000)
_MEASURED = 20_000
_MOST_BYTES = 1024
_FLAT = 3.0
"""Ratio of 100,000 waiters to one that still counts as flat. They do not fit into the processor's caches, which is
felt where any of them may be the next to leave."""


def run(bench: Bench) -> Report:
    rows = []
    with pinned():
        for case, make in _CASES.items():
            laps = race({f"{length:,} waiting": make(length) for length in _LENGTHS}, bench.scale)
            rows += [
                Row(
                    case,
                    name,
                    {"us": lap.seconds.median * 1e6},
                    lap.ratio,
                    (Target(f"{case}: ratio, {name} to one", lap.ratio.median, _FLAT),)
                    if name == f"{_LENGTHS[-1]:,} waiting"
                    else (),
                )
                for name, lap in laps.items()
            ]
    rows += [
        Row("memory", name, {"bytes": taken}, None, (Target(f"{name}: bytes", taken, _MOST_BYTES),))
        for name, taken in (
            ("ThreadWaiter", _bytes(ThreadWaiter)),
            ("TaskWaiter", asyncio.run(_task_bytes())),
        )
    ]
    return Report(
        "line",
        "waiting: cost by the length of the line",
        rows,
        notes=[
            "bytes: of the waiter, its place in line and what it parks on; not the thread's or task's own"
        ],
    )


def _standing(length: int) -> tuple[Admission[Waiter], list[Waiter]]:
    """One slot, which is taken, and so many who wait for it."""
    admission: Admission[Waiter] = Admission(limit=1, max_waiting=None)
    admission.try_take()
    waiters = [Waiter() for _ in range(length)]
    for waiter in waiters:
        admission.join(waiter, Lane.CRITICAL, 0.0)
    return admission, waiters


def _join_and_be_served(length: int, remaining: float | None = None) -> Callable[[int], float]:
    admission, _ = _standing(length)
    spare = Waiter()

    def turn(times: int) -> float:
        nonlocal spare
        begun = thread_time()
        for _ in range(times):
            admission.join(spare, Lane.CRITICAL, 0.0, remaining)
            _, served = admission.serve(0.0)
            assert served is not None
            spare = served
        return thread_time() - begun

    return turn


def _with_a_deadline(length: int) -> Callable[[int], float]:
    return _join_and_be_served(length, 1e9)


def _leave_from_the_middle(length: int) -> Callable[[int], float]:
    """Whoever leaves joins again, at the end."""
    admission, waiters = _standing(length)
    chance = random.Random(1)
    chance.shuffle(waiters)  # who leaves next may stand anywhere
    place = 0

    def turn(times: int) -> float:
        nonlocal place
        begun = thread_time()
        for _ in range(times):
            waiter = waiters[place]
            place = (place + 1) % length
            admission.leave(waiter, 0.0)
            admission.join(waiter, Lane.CRITICAL, 0.0)
        return thread_time() - begun

    return turn


_CASES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "join, be served": _join_and_be_served,
    "join with a deadline, be served": _with_a_deadline,
    "leave from anywhere, join": _leave_from_the_middle,
}


def _bytes(make: Callable[[], Waiter]) -> float:
    admission, _ = _standing(1)
    waiters: list[Waiter | None] = [None] * _MEASURED
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(_MEASURED):
            waiter = waiters[number] = make()
            admission.join(waiter, Lane.CRITICAL, 0.0)
        return tracemalloc.get_traced_memory()[0] / _MEASURED
    finally:
        tracemalloc.stop()


async def _task_bytes() -> float:
    loop = asyncio.get_running_loop()
    return _bytes(lambda: TaskWaiter(loop, await_only))
