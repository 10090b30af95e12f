"""What is compared. ``ours`` and its parts are made of the library's own policy code and default options."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resilientdb import Backoff, BreakerPolicy, RetryBudget, RetryPolicy, SaturationQueue
from resilientdb.policy.breaker import OPEN, BreakerCore, Permit, Transition
from resilientdb.policy.saturation import Admission

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.simulation.fleet import Gate, Request

__all__ = ["SYSTEMS", "System"]

NO_BUDGET = RetryBudget(ratio=1.0, floor=1_000_000)
IN_STEP = Backoff(initial=0.5, maximum=0.5, multiplier=1.0, jitter="none")
"""What programs do: half a second, every time."""


@dataclass(frozen=True, kw_only=True)
class System:
    """How every process of a fleet guards itself."""

    name: str
    label: str
    retry: RetryPolicy
    gate: Callable[[float, random.Random, Callable[[], None]], Gate]
    """``gate(now, chance, on_open)``."""
    patience: float = 2.0
    """Seconds after which a request is given up."""
    bounded: bool = True
    """Whether that also ends a statement or a connect, and is known to the line."""
    sheds: bool = True
    """Whether the line is the library's, or just a line."""
    retries_refusals: bool = False
    waits_for_place: float = 0.0
    """Seconds for which somebody waits until the slow start lets it through."""
    probe_interval: float | None = None
    probe_timeout: float = math.inf

    def line(self, limit: int) -> Admission[Request]:
        if not self.sheds:
            return Admission(limit=limit, max_waiting=None, interval=math.inf)
        queue = SaturationQueue()
        return Admission(
            limit=limit, max_waiting=queue.max_waiting, target=queue.target, interval=queue.interval
        )


# -- the library's ------------------------------------------------------------------------------------------------


class Guarded:
    """The library's breaker, as ``runtime.breaker`` asks it."""

    def __init__(
        self,
        policy: BreakerPolicy,
        now: float,
        rng: Callable[[], float],
        on_open: Callable[[], None],
        *,
        probed: bool,
    ) -> None:
        self._core = BreakerCore(policy, now, rng=rng, probed=probed)
        self._on_open = on_open

    @property
    def is_open(self) -> bool:
        return self._core.closed_permit is None

    @property
    def starts_slowly(self) -> bool:
        return self._core.slow_start is not None

    def enter(self, now: float) -> Permit | None:
        permit = self._core.closed_permit
        if permit is None:
            permit, moved = self._core.try_acquire(now)
            self._moved(moved)
        return permit

    def success(self, permit: Any, now: float) -> None:
        self._moved(self._core.record_success(permit, now))

    def failure(self, permit: Any, now: float) -> None:
        self._moved(self._core.record_failure(permit, now, "lost"))

    def late(self, permit: Any, now: float, *, connecting: bool) -> None:
        # One call that was let through to see whether the node answers has seen that it does not.
        if permit.probe and not connecting:
            self._moved(self._core.record_failure(permit, now, "late", no_answer=True))
        else:
            self._core.release(permit)

    def release(self, permit: Any) -> None:
        self._core.release(permit)

    def rate(self, now: float) -> float:
        return self._core.rate(now)

    def prober_succeeded(self, now: float) -> None:
        self._moved(self._core.prober_succeeded(now))

    def prober_failed(self, now: float) -> None:
        self._moved(self._core.prober_failed(now, "refused"))

    def _moved(self, moved: Transition | None) -> None:
        if moved is not None and moved.new == OPEN:
            self._on_open()


def ours(
    name: str,
    label: str,
    *,
    jitter: bool = True,
    slow_start: bool = True,
    budget: bool = True,
    prober: bool = True,
    breaker: bool = True,
) -> System:
    """The library with its defaults, without the parts that are switched off."""
    retry = RetryPolicy()
    if not jitter:
        retry = dataclasses.replace(retry, backoff=Backoff(jitter="none"))
    if not budget:
        retry = dataclasses.replace(retry, budget=NO_BUDGET)
    policy = BreakerPolicy() if slow_start else BreakerPolicy(slow_start_calls=0)

    def gate(now: float, chance: random.Random, on_open: Callable[[], None]) -> Gate:
        if not breaker:
            return Open()
        rng = chance.random if jitter else (lambda: 0.0)
        return Guarded(policy, now, rng, on_open, probed=prober)

    return System(
        name=name,
        label=label,
        retry=retry,
        gate=gate,
        probe_interval=policy.probe_interval if prober and breaker else None,
        probe_timeout=policy.probe_timeout,
        waits_for_place=0.5,
    )


# -- without it ---------------------------------------------------------------------------------------------------


class Ungated:
    """As pybreaker's ``calling()``, with its defaults but for the reset: opens after five failures in a row, and is
    half open after five seconds, for everybody."""

    FAIL_MAX = 5
    RESET = 5.0

    def __init__(self) -> None:
        self._failures = 0
        self._open_until: float | None = None
        self._half_open = False

    starts_slowly = False

    @property
    def is_open(self) -> bool:
        return self._open_until is not None

    def enter(self, now: float) -> object | None:
        if self._open_until is not None:
            if now < self._open_until:
                return None
            self._open_until = None
            self._half_open = True
        return self

    def success(self, permit: object, now: float) -> None:
        self._failures = 0
        self._half_open = False

    def failure(self, permit: object, now: float) -> None:
        self._failures += 1
        if self._open_until is None and (self._half_open or self._failures >= self.FAIL_MAX):
            self._open_until = now + self.RESET

    def late(self, permit: object, now: float, *, connecting: bool) -> None:
        self.failure(permit, now)  # a timeout is an exception like any other

    def release(self, permit: object) -> None: ...

    def rate(self, now: float) -> float:
        return 0.0

    def prober_succeeded(self, now: float) -> None: ...

    def prober_failed(self, now: float) -> None: ...


class Open(Ungated):
    """Nothing stands before the pool."""

    def failure(self, permit: object, now: float) -> None: ...


SYSTEMS = {
    system.name: system
    for system in (
        ours("ours", "resilientdb"),
        System(
            name="pybreaker",
            label="fixed backoff, ungated half-open",
            retry=RetryPolicy(attempts=3, backoff=IN_STEP, budget=NO_BUDGET),
            gate=lambda _now, _chance, _on_open: Ungated(),
            sheds=False,
            retries_refusals=True,
        ),
        System(
            name="plain",
            label="retry in a loop",
            retry=RetryPolicy(attempts=1_000, timeout=None, backoff=IN_STEP, budget=NO_BUDGET),
            gate=lambda _now, _chance, _on_open: Open(),
            patience=30.0,
            bounded=False,
            sheds=False,
        ),
        ours("no jitter", "resilientdb without jitter", jitter=False),
        ours("no slow start", "resilientdb without slow start", slow_start=False),
        ours("no budget", "resilientdb without a retry budget", budget=False),
        ours("no prober", "resilientdb without a prober", prober=False),
        ours("no breaker", "resilientdb without a breaker", breaker=False),
        ours("no breaker or budget", "resilientdb without breaker and budget", breaker=False, budget=False),
    )
}
