"""One run: a fleet at work, its database dead for ten seconds, and what becomes of both afterwards."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.simulation.database import Database, Server
from tests.simulation.fleet import Fleet
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.systems import System

__all__ = ["DIES", "STARTS", "Outcome", "run", "server_for"]

DIES, STARTS = 5.0, 15.0
RATE = 5.0
"""Requests a second of each process."""
LOAD = 0.5
"""Of what the database can do while it is warm."""
RECOVERED = 0.95
STEADY = 5
"""Seconds for which it has to stay so."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was seen. The series are by the second."""

    system: str
    processes: int
    seed: int
    offered: tuple[int, ...]
    good: tuple[int, ...]
    """Of the requests that came in that second, how many were answered while somebody waited."""
    active: tuple[int, ...]
    """What the database was busy with at once, at most."""
    knee: float
    sessions: tuple[int, ...]
    """Opened in that second."""
    retries: int

    @property
    def shares(self) -> list[float]:
        return [
            good / offered if offered else 1.0 for good, offered in zip(self.good, self.offered, strict=True)
        ]

    @property
    def recovery(self) -> float | None:
        """Seconds from the start of the database until ``RECOVERED`` of the requests are answered and stay so; None:
        not within the run."""
        shares = self.shares[int(STARTS) :]
        for second in range(len(shares) - STEADY):
            if min(shares[second : second + STEADY]) >= RECOVERED:
                return float(second)
        return None

    @property
    def lost(self) -> float:
        """Requests without an answer since the database started, in seconds' worth of all requests."""
        first = int(STARTS)
        offered, good = sum(self.offered[first:]), sum(self.good[first:])
        return (offered - good) / (RATE * self.processes)

    @property
    def relapses(self) -> int:
        """How often, after the start, more than half were answered and then fewer than half again."""
        found, well = 0, False
        for share in self.shares[int(STARTS) :]:
            if well and share < 0.5:
                found += 1
            well = share >= 0.5
        return found


def server_for(processes: int, **changes: Any) -> Server:
    """A database that grows with its fleet, so that only the herd's size differs."""
    cores = processes * RATE * Server.query / LOAD
    return Server(cores=cores, knee=10 * cores, warm_after=10.0 * processes, **changes)


def run(
    system: System,
    processes: int,
    *,
    seed: int = 1,
    seconds: float = 60.0,
    server: Server | None = None,
    rate: float = RATE,
) -> Outcome:
    """``seconds``: how long it goes on after the start."""
    world, chance = World(), random.Random(seed)
    server = server or server_for(processes)
    database = Database(world, server, chance)
    fleet = Fleet(world, database, system, chance, processes=processes, rate=rate)
    active: list[int] = []
    sessions: list[int] = []
    so_far = 0
    world.at(DIES, database.die)
    world.at(STARTS, database.start)
    end = STARTS + seconds
    for second in range(1, int(end) + 1):
        most = 0
        for part in range(1, 5):
            world.run(second - 1 + part / 4)
            most = max(most, database.active)
        active.append(most)
        sessions.append(database.sessions_opened - so_far)
        so_far = database.sessions_opened
    # Those who came in the last seconds may still be waiting.
    last = int(end) - 2
    return Outcome(
        system=system.name,
        processes=processes,
        seed=seed,
        offered=tuple(fleet.offered[:last]),
        good=tuple(fleet.good[:last]),
        active=tuple(active[:last]),
        knee=server.knee,
        sessions=tuple(sessions[:last]),
        retries=fleet.retries,
    )
