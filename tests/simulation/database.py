"""A database server, as much of it as a herd meets: cores that are shared, a cache that is cold, a knee.

* Statements share the cores equally. One statement uses one core at most.
* Past ``knee`` statements at once, each further one costs efficiency (locks, caches, the scheduler): with twice as
  many the server does ``1 / (1 + thrash)`` of what it could, with three times ``1 / (1 + 2 * thrash)``.
* After a start the cache is cold: a statement costs ``cold`` times as much, less and less as statements are done.
* Opening a session costs a core for ``connect`` seconds.
* What was begun is finished, also when nobody waits for it any more, unless it ``heeds`` that.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.simulation.world import World

__all__ = ["Database", "Job", "Server"]

ROUND_TRIP = 0.001
"""Seconds until a dead server's host has refused."""
ASK = 0.0001
"""Core-seconds of the prober's question."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """What one is like."""

    cores: float
    knee: float
    thrash: float = 2.0
    query: float = 0.010
    """Core-seconds of a statement on average, the cache being warm; exponentially distributed."""
    connect: float = 0.020
    cold: float = 4.0
    warm_after: float = 100.0
    """Statements after which the cache is warmer by a factor of e."""
    heeds: bool = False
    """Whether it ends a statement that has been given up."""


class Job:
    """Work that a server has begun."""

    __slots__ = ("is_statement", "is_there", "on_end", "whom")

    def __init__(self, on_end: Callable[[Any, bool], None], whom: Any, *, is_statement: bool) -> None:
        self.on_end: Callable[[Any, bool], None] | None = on_end
        self.whom = whom
        self.is_statement = is_statement
        self.is_there = False
        """Whether a server is at it."""


class Database:
    """One server. ``epoch`` counts its lives: a session of an earlier one is dead."""

    def __init__(self, world: World, server: Server, chance: random.Random) -> None:
        self._world = world
        self._server = server
        self._chance = chance
        self._jobs: list[tuple[float, int, Job]] = []
        self._serial = 0
        self.active = 0
        """Jobs that it is at."""
        self._done = math.inf
        """Statements done since the start: how warm the cache is."""
        self._clock = 0.0
        """How much of a core each job has had since the beginning: their common clock (processor sharing)."""
        self._told_at = 0.0
        self._planned = 0
        self.up = True
        self.epoch = 0
        self.sessions_opened = 0

    @property
    def idle(self) -> bool:
        """Whether one more job would slow nobody down."""
        return self.up and self.active < self._server.cores

    @property
    def coldness(self) -> float:
        """How many times as much as usual a statement costs."""
        return 1 + (self._server.cold - 1) * math.exp(-self._done / self._server.warm_after)

    # -- its lives ---------------------------------------------------------------------------------------------

    def die(self, _: Any = None) -> None:
        self.up = False
        self.epoch += 1
        lost, self._jobs = self._jobs, []
        self.active = 0
        self._planned += 1
        for _, _, job in lost:
            job.is_there = False
            if job.on_end is not None:
                self._world.after(ROUND_TRIP, self._refused, job)

    def start(self, _: Any = None) -> None:
        self.up = True
        self._done = 0.0
        self._told_at = self._world.now

    # -- what is asked of it ---------------------------------------------------------------------------------

    def query(self, epoch: int, on_end: Callable[[Any, bool], None], whom: Any) -> Job:
        """A statement in a session of ``epoch``; ``on_end(whom, answered)``."""
        job = Job(on_end, whom, is_statement=True)
        if not self.up or epoch != self.epoch:
            self._world.after(ROUND_TRIP, self._refused, job)
        else:
            self._begin(job, self._chance.expovariate(1 / (self._server.query * self.coldness)))
        return job

    def open(self, on_end: Callable[[Any, bool], None], whom: Any) -> Job:
        """A new session."""
        job = Job(on_end, whom, is_statement=False)
        if self.up:
            self.sessions_opened += 1
            self._begin(job, self._server.connect)
        else:
            self._world.after(ROUND_TRIP, self._refused, job)
        return job

    def ask(self, on_end: Callable[[Any, bool], None], whom: Any) -> Job:
        """The prober's question, in a session that is there."""
        job = Job(on_end, whom, is_statement=False)
        self._begin(job, ASK)
        return job

    def abandon(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.on_end = None
        if self._server.heeds and job.is_there:
            self._advance()
            job.is_there = False
            self.active -= 1
            self._plan()

    # -- sharing the cores -------------------------------------------------------------------------------------

    def _begin(self, job: Job, work: float) -> None:
        self._advance()
        self._serial += 1
        heapq.heappush(self._jobs, (self._clock + work, self._serial, job))
        job.is_there = True
        self.active += 1
        self._plan()

    def _speed(self) -> float:
        """The share of a core that each job has."""
        jobs, server = self.active, self._server
        beyond = max(0.0, jobs / server.knee - 1)
        return min(1.0, server.cores / jobs) / (1 + server.thrash * beyond)

    def _advance(self) -> None:
        now = self._world.now
        if self.active:
            self._clock += (now - self._told_at) * self._speed()
        self._told_at = now

    def _plan(self) -> None:
        self._planned += 1
        while self._jobs and not self._jobs[0][2].is_there:
            heapq.heappop(self._jobs)  # given up
        if self._jobs:
            left = max(0.0, self._jobs[0][0] - self._clock)
            self._world.after(left / self._speed(), self._next_ends, self._planned)

    def _next_ends(self, planned: int) -> None:
        if planned != self._planned:
            return  # somebody has come or gone since
        self._advance()
        end, _, job = heapq.heappop(self._jobs)
        self._clock = max(self._clock, end)
        job.is_there = False
        self.active -= 1
        if job.is_statement:
            self._done += 1
        self._plan()
        if job.on_end is not None:
            job.on_end(job.whom, True)

    @staticmethod
    def _refused(job: Job) -> None:
        if job.on_end is not None:
            job.on_end(job.whom, False)
