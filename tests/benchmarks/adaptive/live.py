"""The same candidates, driving the limit of a real pool in front of PostgreSQL.

Closed-loop: more callers than connections, each with a deadline of a second, so that the limit is what holds them
back. Everybody has short turns in every round, because the machine is nobody's alone; a candidate's turns go on with
what it has learned, and before them it has a few seconds to find its limit.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.testing import Postgres

from ..measure import percentile, pinned
from .controllers import FIRST, Anchored, Vegas

if TYPE_CHECKING:
    from collections.abc import Callable

    from .controllers import Controller

__all__ = ["run"]

_CALLERS = 64
_DEADLINE = 1.0
_FIXED = (2, 5, 15, 50)
_CANDIDATES: tuple[type[Controller], ...] = (Anchored, Vegas)
_WINDOW = 0.25
_SEARCHES, _SEARCH = 2, 4.0
"""Turns to find a limit in, and their seconds."""
_ROUNDS, _BEFORE, _TURN = 2, 0.4, 1.3
"""Turns; seconds before each that do not count, while connections are opened; and its own seconds."""
_QUEUE = rdb.SaturationQueue(max_waiting=_CALLERS, interval=3600.0)
"""Room for all, and no shedding: nothing but the limit differs, and only a deadline out of reach is refused."""
_PAUSE = 0.05
"""Seconds until a refused caller comes again."""

_READ = sa.text("SELECT sum(i) FROM generate_series(1, 40000) i")
_UPDATE = sa.text("UPDATE hot SET n = n + 1 WHERE id = 1")
_LOOK = sa.text("SELECT n FROM hot WHERE id = 1")
_SLEEP = sa.text("SELECT pg_sleep(0.1)")


def _read(connection: sa.Connection, _: random.Random) -> None:
    connection.execute(_READ)


def _hot_row(connection: sa.Connection, _: random.Random) -> None:
    """The row's lock is kept over two round trips, as applications do."""
    connection.execute(_UPDATE)
    connection.execute(_LOOK)
    connection.commit()


def _sleep(connection: sa.Connection, _: random.Random) -> None:
    connection.execute(_SLEEP)


def _mixture(connection: sa.Connection, rng: random.Random) -> None:
    rng.choices((_read, _hot_row, _sleep), (6, 2, 2))[0](connection, rng)


_WORKLOADS: dict[str, Callable[[sa.Connection, random.Random], None]] = {
    "CPU-bound reads": _read,
    "one hot row": _hot_row,
    "pure latency, 100 ms": _sleep,
    "mixture 6:2:2": _mixture,
}


@dataclass
class _Tally:
    """What has been answered since ``since``. Guarded by the contender's lock."""

    since: float = 0.0
    answered: list[float] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    """At each return."""
    refused: int = 0


class _Contender:
    """A pool with a fixed limit, or with a candidate that drives it. ``_lock`` guards candidate and tally."""

    def __init__(self, url: str, limit: int | type[Controller]) -> None:
        self._controller = None if isinstance(limit, int) else limit(_WINDOW)
        self.name = f"fixed {limit}" if isinstance(limit, int) else limit.__name__.lower()
        self._limit = limit if isinstance(limit, int) else FIRST
        # One connection is kept; the others are overflow, whose number may change.
        self._engine = rdb.create_engine(
            url,
            pool_size=1,
            max_overflow=self._limit - 1,
            resilience=rdb.Resilience(queue=_QUEUE),
        )
        self._lock = threading.Lock()
        self._tally = _Tally()
        self.rates: list[float] = []
        self.seconds: list[float] = []
        self.limits: list[float] = []
        self.refused = 0

    def turn(
        self, work: Callable[[sa.Connection, random.Random], None], before: float, seconds: float
    ) -> None:
        """Load for ``before`` and then ``seconds``, of which the latter count (0: nothing does)."""
        self._tally = _Tally(time.monotonic() + before)
        until = self._tally.since + seconds
        callers = [
            threading.Thread(target=self._call, args=(work, until, random.Random(number)))
            for number in range(_CALLERS)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        if seconds:
            tally = self._tally
            self.rates.append(sum(taken <= _DEADLINE for taken in tally.answered) / seconds)
            self.seconds += tally.answered
            self.limits.append(statistics.fmean(tally.limits))
            self.refused += tally.refused

    def close(self) -> None:
        self._engine.dispose()

    def _call(
        self, work: Callable[[sa.Connection, random.Random], None], until: float, rng: random.Random
    ) -> None:
        while (begun := time.monotonic()) < until:
            try:
                with rdb.deadline(_DEADLINE), self._engine.connect() as connection:
                    taken = time.monotonic()
                    work(connection, rng)
                    self._came_back(connection, time.monotonic() - taken)
            except rdb.ResilienceError:
                self._count(begun, until, answered=False)
                time.sleep(_PAUSE)
            else:
                self._count(begun, until, answered=True)

    def _came_back(self, connection: sa.Connection, held: float) -> None:
        if self._controller is None:
            return
        pool: Any = self._engine.pool
        with self._lock:
            self._limit = self._controller.observe(held, pool.stats().waiting, time.monotonic())
            pool._max_overflow = self._limit - 1
        if pool.checkedout() > self._limit:
            # A connection that is returned goes to the next in line, whatever the limit has become; a lost one
            # does not.
            connection.invalidate()

    def _count(self, begun: float, until: float, *, answered: bool) -> None:
        now = time.monotonic()
        with self._lock:
            tally = self._tally
            if not tally.since <= now <= until:
                return
            tally.limits.append(self._limit)
            if answered:
                tally.answered.append(now - begun)
            else:
                tally.refused += 1


def run() -> tuple[list[str], list[list[str]]]:
    """(headings, rows)."""
    rows = []
    with Postgres(name="adaptive") as server, pinned():
        _keep_apart(server)
        server.query("CREATE TABLE hot (id int PRIMARY KEY, n int NOT NULL)")
        server.query("INSERT INTO hot VALUES (1, 0)")
        for name, work in _WORKLOADS.items():
            limits: tuple[int | type[Controller], ...] = (*_FIXED, *_CANDIDATES)
            contenders = [_Contender(server.url(), limit) for limit in limits]
            for contender in contenders[len(_FIXED) :]:
                for _ in range(_SEARCHES):
                    contender.turn(work, _SEARCH, 0.0)
            for number in range(_ROUNDS):
                for contender in contenders[:: -1 if number % 2 else 1]:
                    contender.turn(work, _BEFORE, _TURN)
            rows += _rows(name, contenders)
            for contender in contenders:
                contender.close()
    return [
        "workload",
        "limit",
        "goodput a second",
        "of the best fixed",
        "p99 ms",
        "refused",
        "limits held",
    ], rows


def _keep_apart(server: Postgres) -> None:
    """The server on another processor than the callers: else more backends only take more of the callers' time."""
    if hasattr(os, "sched_setaffinity") and server.pid is not None:
        (ours,) = os.sched_getaffinity(0)
        others = os.sched_getaffinity(server.pid) - {ours}
        os.sched_setaffinity(server.pid, {min(others, default=ours)})


def _rows(name: str, contenders: list[_Contender]) -> list[list[str]]:
    means = [sum(contender.rates) / len(contender.rates) for contender in contenders]
    best = max(means[: len(_FIXED)])
    return [
        [
            name,
            contender.name,
            f"{mean:.0f} ({min(contender.rates):.0f}-{max(contender.rates):.0f})",
            f"{mean / best:.2f}",
            f"{(percentile(contender.seconds, 0.99) or 0) * 1e3:.0f}",
            str(contender.refused),
            " ".join(f"{limit:.0f}" for limit in contender.limits),
        ]
        for contender, mean in zip(contenders, means, strict=True)
    ]
