"""Processes: each has a pool of a few connections with a line in front, a gate (a breaker), retries, and a prober.

The line, the breaker, the budget and the numbers of the backoff are the library's own code and options; only what
waits, sleeps or connects is replaced by events in virtual time.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from resilientdb.policy.budget import Budget
from resilientdb.policy.saturation import Admission, Lane, Refusal

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.simulation.database import Database, Job
    from tests.simulation.systems import System
    from tests.simulation.world import World

__all__ = ["Fleet", "Gate", "Process", "Request"]

USER_WAITS = 2.0
"""Seconds after which whoever asked is gone: a later answer is for nobody."""

ASKS_AGAIN = 0.05
"""Most seconds after which somebody asks again whom the slow start does not let through."""

FIRST_PAUSE = 0.02
"""As the prober's own, after a failure that came at once."""


class Gate(Protocol):
    """What stands before the pool, and hears how each call ended. ``moved``: it opened, or closed."""

    @property
    def is_open(self) -> bool: ...

    @property
    def starts_slowly(self) -> bool: ...

    def enter(self, now: float) -> object | None:
        """A permit, or None."""

    def success(self, permit: object, now: float) -> None: ...

    def failure(self, permit: object, now: float) -> None: ...

    def late(self, permit: object, now: float, *, connecting: bool) -> None:
        """The caller's time was over before there was an answer, or a connection."""

    def release(self, permit: object) -> None:
        """Nothing was asked."""

    def rate(self, now: float) -> float:
        """Successes a second."""

    def prober_succeeded(self, now: float) -> None: ...

    def prober_failed(self, now: float) -> None: ...


class Request:
    """One of a user's. It stands in line itself: the first attributes are the line's."""

    __slots__ = (
        "asked_at",
        "attempts",
        "born",
        "deadline",
        "job",
        "lane",
        "permit",
        "process",
        "remaining",
        "since",
        "state",
    )

    holds = 0

    def __init__(self, process: Process, born: float, deadline: float) -> None:
        self.process = process
        self.born = born
        self.deadline = deadline
        self.lane = Lane.CRITICAL
        self.since = born
        self.remaining: float | None = None
        self.attempts = 0
        self.asked_at = born
        self.permit: object = None
        self.job: Job | None = None
        self.state = "new"
        """new, asking, line, connecting, running, pausing, over"""


class Process:
    """One program with its pool."""

    __slots__ = (
        "admission",
        "again",
        "answered",
        "answered_before",
        "asked_at",
        "budget",
        "epoch",
        "gate",
        "idle",
        "looks_at_line",
        "pause",
        "probe",
        "probe_epoch",
    )

    def __init__(self, system: System, idle: int, limit: int) -> None:
        self.admission: Admission[Request] = system.line(limit)
        self.admission.total = idle
        self.idle = idle
        self.epoch = 0
        """The server's life to which the idle connections belong."""
        self.looks_at_line = False
        self.budget = Budget(system.retry.budget)
        self.gate: Gate
        self.answered = 0
        self.answered_before = 0
        self.again = False
        self.pause = FIRST_PAUSE
        self.asked_at = 0.0
        self.probe: Job | None = None
        self.probe_epoch: int | None = 0


class Fleet:
    """``processes`` of them over one database."""

    def __init__(
        self,
        world: World,
        database: Database,
        system: System,
        chance: random.Random,
        *,
        processes: int,
        rate: float,
        pool_size: int = 2,
        max_overflow: int = 1,
    ) -> None:
        """``rate``: requests a second of each process."""
        self._world = world
        self._database = database
        self._system = system
        self._chance = chance
        self._rate = rate * processes
        self._keep = pool_size
        self._patience = system.patience
        self._by_deadline: deque[Request] = deque()
        self.offered: list[int] = []
        """By the second in which they came."""
        self.good: list[int] = []
        """Of those, how many were answered in time."""
        self.retries = 0
        self.processes = [Process(system, pool_size, pool_size + max_overflow) for _ in range(processes)]
        for process in self.processes:
            process.gate = system.gate(world.now, chance, self._on_open(process))
            if system.probe_interval is not None:
                world.after(chance.random() * system.probe_interval, self._examine, process)
        world.after(0.0, self._arrive)
        world.after(self._patience, self._expire)

    def _on_open(self, process: Process) -> Callable[[], None]:
        return lambda: self._opened(process)

    # -- requests ---------------------------------------------------------------------------------------------

    def _arrive(self, _: Any) -> None:
        world = self._world
        now = world.now
        world.after(self._chance.expovariate(self._rate), self._arrive)
        process = self.processes[int(self._chance.random() * len(self.processes))]
        request = Request(process, now, now + self._patience)
        second = int(now)
        while len(self.offered) <= second:
            self.offered.append(0)
            self.good.append(0)
        self.offered[second] += 1
        self._by_deadline.append(request)
        self._attempt(request)

    def _attempt(self, request: Request) -> None:
        if request.state == "over":
            return
        process, now = request.process, self._world.now
        if request.state != "asking":
            request.asked_at = now
        permit = process.gate.enter(now)
        if permit is None:
            if process.gate.starts_slowly and now < request.asked_at + self._system.waits_for_place:
                request.state = "asking"
                self._world.after(self._chance.uniform(0.5, 1) * ASKS_AGAIN, self._attempt, request)
            else:
                self._again_or_over(request, refused=True)
            return
        request.permit = permit
        admission = process.admission
        if process.idle:
            process.idle -= 1
            self._run(request)
        elif admission.try_take():
            self._connect(request)
        else:
            request.state = "line"
            left = request.deadline - now if self._system.bounded else None
            answer = admission.join(request, Lane.CRITICAL, now, left)
            if isinstance(answer, Refusal):
                self._send_away(request)
                return
            if answer is not None:
                self._send_away(answer)
            self._look_at_line(process)

    def _run(self, request: Request) -> None:
        request.state = "running"
        request.job = self._database.query(request.process.epoch, self._ran, request)

    def _ran(self, request: Request, answered: bool) -> None:
        process, now = request.process, self._world.now
        if answered:
            process.answered += 1
            process.gate.success(request.permit, now)
            request.state = "over"
            if now - request.born <= USER_WAITS:
                self.good[int(request.born)] += 1
            self._give_back(process)
            return
        # A dead session: its pool does not believe in the others either.
        process.admission.total -= process.idle
        process.idle = 0
        process.epoch = self._database.epoch
        process.gate.failure(request.permit, now)
        self._give_back(process, lost=True)
        self._again_or_over(request)

    def _connect(self, request: Request) -> None:
        request.state = "connecting"
        request.job = self._database.open(self._connected, request)

    def _connected(self, request: Request, opened: bool) -> None:
        process = request.process
        if opened:
            process.epoch = self._database.epoch
            if request.state == "over":
                self._give_back(process)  # its caller has left; the connection joins the pool
            else:
                self._run(request)
            return
        if request.state != "over":
            process.gate.failure(request.permit, self._world.now)
        self._give_back(process, lost=True)
        if request.state != "over":
            self._again_or_over(request)

    def _give_back(self, process: Process, *, lost: bool = False) -> None:
        admission = process.admission
        shed, following = admission.serve(self._world.now, lost=lost)
        for request in shed:
            self._send_away(request)
        if following is not None:
            (self._connect if lost else self._run)(following)
        elif not lost:
            if process.idle < self._keep:
                process.idle += 1
            else:
                admission.total -= 1

    def _send_away(self, request: Request) -> None:
        request.process.gate.release(request.permit)
        if self._system.retries_refusals:
            self._again_or_over(request, refused=True)
        else:
            request.state = "over"

    def _again_or_over(self, request: Request, *, refused: bool = False) -> None:
        """The attempt failed: make another, after a pause, if anything allows one."""
        retry, now = self._system.retry, self._world.now
        request.attempts += 1
        request.state = "over"
        if (refused and not self._system.retries_refusals) or request.attempts >= retry.attempts:
            return
        backoff = retry.backoff
        bound = min(backoff.maximum, backoff.initial * backoff.multiplier ** (request.attempts - 1))
        pause = self._chance.uniform(0, bound) if backoff.jitter == "full" else bound
        process = request.process
        if now + pause >= request.deadline:
            return
        if not process.budget.try_spend(now, process.gate.rate(now)):
            return
        self.retries += 1
        request.state = "pausing"
        self._world.after(pause, self._attempt, request)

    # -- time that is over ------------------------------------------------------------------------------------

    def _expire(self, _: Any) -> None:
        """Deadlines come in the order in which the requests did."""
        world, line = self._world, self._by_deadline
        while line and (line[0].deadline <= world.now or line[0].state == "over"):
            request = line.popleft()
            if request.state != "over":
                self._give_up(request)
        world.at(line[0].deadline if line else world.now + self._patience, self._expire)

    def _give_up(self, request: Request) -> None:
        process, now, state = request.process, self._world.now, request.state
        if state == "line":
            request.state = "over"
            if process.admission.leave(request, now):
                process.gate.release(request.permit)
        elif state in {"pausing", "asking"}:
            request.state = "over"
        elif self._system.bounded:
            request.state = "over"
            process.gate.late(request.permit, now, connecting=state == "connecting")
            if state == "running":
                assert request.job is not None
                self._database.abandon(
                    request.job
                )  # its connection is closed, whatever the server makes of it
                self._give_back(process, lost=True)

    def _opened(self, process: Process) -> None:
        """The circuit opened: who waits is told, and the connections are not believed in."""
        process.admission.total -= process.idle
        process.idle = 0
        for request in process.admission.dismiss():
            request.state = "over"

    # -- the line that stands ----------------------------------------------------------------------------------

    def _look_at_line(self, process: Process) -> None:
        if not process.looks_at_line and self._system.sheds:
            delay = process.admission.next_stall(self._world.now)
            if delay is not None:
                process.looks_at_line = True
                self._world.after(delay, self._look, process)

    def _look(self, process: Process) -> None:
        process.looks_at_line = False
        for request in process.admission.stalled(self._world.now):
            self._send_away(request)
        self._look_at_line(process)

    # -- the prober ---------------------------------------------------------------------------------------------

    def _examine(self, process: Process) -> None:
        database, world = self._database, self._world
        process.asked_at = world.now
        known = process.probe_epoch == database.epoch
        if known and database.idle:
            self._examined(process, answered=True)  # at once; there is nothing to wait for
            return
        process.probe = probe = (
            database.ask(self._probed, process) if known else database.open(self._probed, process)
        )
        world.after(self._system.probe_timeout, self._probe_is_late, (process, probe))

    def _probed(self, process: Process, answered: bool) -> None:
        process.probe = None
        self._examined(process, answered=answered)

    def _probe_is_late(self, late: tuple[Process, Job]) -> None:
        process, probe = late
        if process.probe is probe:
            self._database.abandon(probe)
            process.probe = None
            self._examined(process, answered=False, at_once=False)

    def _examined(self, process: Process, *, answered: bool, at_once: bool = True) -> None:
        """What ``NodeProbe`` and ``Prober`` make of it."""
        world, interval = self._world, self._system.probe_interval or math.inf
        again, process.again = process.again, False
        before, process.answered_before = process.answered_before, process.answered
        pause = interval
        if answered:
            process.probe_epoch = self._database.epoch
            process.gate.prober_succeeded(world.now)
            process.pause = FIRST_PAUSE
        else:
            process.probe_epoch = None
            if at_once:
                process.again = True
                pause, process.pause = min(process.pause, interval), min(2 * process.pause, interval)
            seen = process.answered != before and not process.gate.is_open
            if not seen and (again or not at_once):
                process.gate.prober_failed(world.now)
        world.at(max(world.now, process.asked_at + pause), self._examine, process)
