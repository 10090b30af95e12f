"""What a caller is told who gets no connection: the state of the pool in words, and when to come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.engine.holders import describe_holder
from resilientdb.errors import DeadlineExceeded, PoolSaturated, PoolTimeout
from resilientdb.policy.saturation import Refusal
from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    from resilientdb.engine.pool import QueueDoor
    from resilientdb.runtime.context import Deadline
    from resilientdb.runtime.waiters import Waiter

__all__ = ["deadline_exceeded", "nested", "saturated", "timed_out"]

_WHY = {
    Refusal.FULL: "all places to wait are taken",
    Refusal.HOPELESS: "the wait would be longer than this caller may wait",
    Refusal.DISPLACED: "its place went to a more critical or a newer caller",
    Refusal.SHED: "it is overloaded, and this caller has waited too long to be served in time",
}


def saturated(pool: QueueDoor, refusal: Refusal, waiter: Waiter) -> PoolSaturated:
    """The caller was sent away, on arrival or after some time in line."""
    waited = monotonic() - waiter.since
    after = f" after {waited:.2f} s in line" if refusal in {Refusal.DISPLACED, Refusal.SHED} else ""
    return PoolSaturated(
        f"the pool of {pool.node.name} is saturated: {_WHY[refusal]}{after} ({_state(pool)})",
        reason=refusal.value,
        retry_after=pool.expected_wait(),
        snapshot=pool.moment()[1],
    )


def nested(pool: QueueDoor) -> PoolTimeout:
    """The caller would wait for itself. What it would be told after its whole time in line, it is told now."""
    held = ", ".join(map(describe_holder, pool.mine()))
    return PoolTimeout(
        f"QueuePool limit of size {pool.size()} overflow {pool.most_overflow} reached, and the caller would wait for "
        f"itself: it holds a connection of {pool.node.name} already ({held}), as does everybody else who waits, and "
        "there is none left that could come back. Use one connection for one piece of work, or a pool larger than "
        f"the number of such callers ({_state(pool)})",
        reason=Refusal.DEADLOCK.value,
        snapshot=pool.moment()[1],
    )


def timed_out(pool: QueueDoor, waited: float) -> PoolTimeout:
    """The caller waited as long as the pool allows. Begins as SQLAlchemy's own message does: people search for it."""
    return PoolTimeout(
        f"QueuePool limit of size {pool.size()} overflow {pool.most_overflow} reached, connection timed out, "
        f"timeout {pool.timeout() or 0:0.2f}: waited {waited:.2f} s for {pool.node.name} ({_state(pool)})",
        retry_after=pool.expected_wait(),
        snapshot=pool.moment()[1],
    )


def deadline_exceeded(pool: QueueDoor, deadline: Deadline | None, waited: float = 0.0) -> DeadlineExceeded:
    """The caller's deadline ended first."""
    after = f" after {waited:.2f} s in line" if waited else ""
    return DeadlineExceeded(
        f"the deadline of {deadline.seconds if deadline else 0:g} s ended{after} before {pool.node.name} gave a "
        f"connection ({_state(pool)})",
        retry_after=pool.expected_wait(),
        snapshot=pool.moment()[1],
    )


def _state(pool: QueueDoor) -> str:
    """The counts, and who has held connections longest: the first thing to be known about a full pool."""
    longest, _ = pool.moment()
    return f"{pool.counts()}; longest held {longest}" if longest else pool.counts()
