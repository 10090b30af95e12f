"""What a caller is told who gets no connection: the state of the pool in words, and when to come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.errors import DeadlineExceeded, PoolSaturated, PoolTimeout
from resilientdb.policy.saturation import Refusal

if TYPE_CHECKING:
    from resilientdb.engine.pool import QueueDoor
    from resilientdb.runtime.context import Deadline

__all__ = ["deadline_exceeded", "saturated", "timed_out"]

_WHY = {
    Refusal.FULL: "all places to wait are taken",
    Refusal.HOPELESS: "the wait would be longer than this caller may wait",
    Refusal.DISPLACED: "its place went to a more critical or a newer caller",
    Refusal.SHED: "it is overloaded, and this caller has waited too long to be served in time",
}


def saturated(pool: QueueDoor, refusal: Refusal, waited: float = 0.0) -> PoolSaturated:
    """The caller was sent away, on arrival or after ``waited`` seconds in line."""
    after = f" after {waited:.2f} s in line" if waited else ""
    return PoolSaturated(
        f"the pool of {pool.node.name} is saturated: {_WHY[refusal]}{after} ({pool.counts()})",
        reason=refusal.value,
        retry_after=pool.expected_wait(),
        snapshot=pool.node.stats(),
    )


def timed_out(pool: QueueDoor, waited: float) -> PoolTimeout:
    """The caller waited as long as the pool allows. Begins as SQLAlchemy's own message does: people search for it."""
    return PoolTimeout(
        f"QueuePool limit of size {pool.size()} overflow {pool.most_overflow} reached, connection timed out, "
        f"timeout {pool.timeout() or 0:0.2f}: waited {waited:.2f} s for {pool.node.name} ({pool.counts()})",
        retry_after=pool.expected_wait(),
        snapshot=pool.node.stats(),
    )


def deadline_exceeded(pool: QueueDoor, deadline: Deadline | None, waited: float = 0.0) -> DeadlineExceeded:
    """The caller's deadline ended first."""
    after = f" after {waited:.2f} s in line" if waited else ""
    return DeadlineExceeded(
        f"the deadline of {deadline.seconds if deadline else 0:g} s ended{after} before {pool.node.name} gave a "
        f"connection ({pool.counts()})",
        retry_after=pool.expected_wait(),
        snapshot=pool.node.stats(),
    )
