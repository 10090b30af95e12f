"""Keys of transactions, what to do with one that stands in the way of learning whether it was committed, and when a
transaction's number says nothing any more.

A key is a UUID whose first 48 bits are the time it was made (UUID version 7), so that keys sort by age: a table of
them grows at one end and is purged from the other, and a key says by itself whether it is older than the last purge.
"""

from __future__ import annotations

import uuid
from typing import Final, Literal, NamedTuple

__all__ = [
    "Holder",
    "Life",
    "forget_before",
    "lock_number",
    "made_at",
    "new_key",
    "patience",
    "verdict_on",
    "what_ended",
]

_LOW_62_BITS: Final = (1 << 62) - 1
_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 2.0


def new_key(now: float, bits: int) -> uuid.UUID:
    """A key made at ``now`` (seconds since 1970) of 74 random bits."""
    milliseconds = int(now * 1000) & ((1 << 48) - 1)
    high, low = bits >> 62 & 0xFFF, bits & _LOW_62_BITS
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | high << 64 | 2 << 62 | low)


def made_at(key: uuid.UUID) -> float:
    """When a key was made, in seconds since 1970."""
    return (key.int >> 80) / 1000


def forget_before(now: float, older_than: float) -> uuid.UUID:
    """The least key that a purge of all that is older leaves alone."""
    return uuid.UUID(int=max(0, int((now - older_than) * 1000)) << 80)


def lock_number(key: uuid.UUID) -> int:
    """The random half of the key as a signed 64-bit number: what the server calls its advisory lock."""
    number = key.int & (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number


class Holder:
    """The server process that has a key's transaction open; None where the server does not tell us."""

    __slots__ = ("pid", "state", "wait_event")

    def __init__(self, pid: int, state: str | None, wait_event: str | None) -> None:
        self.pid = pid
        self.state = state
        self.wait_event = wait_event


def patience(waits: int, left: float | None) -> float:
    """Seconds to wait for a transaction that is still open, the ``waits``-th time (from 0); ``left`` is all there is.

    Short at first: one that has lost its client mostly waits for a COMMIT that will not come. Never all that is left:
    the server is to answer before the deadline.
    """
    wait = min(_LONGEST_WAIT, _FIRST_WAIT * float(2 ** min(waits, 10)))
    return wait if left is None else max(0.001, min(wait, left / 2))


def verdict_on(holder: Holder, waited: float, left: float | None) -> Literal["wait", "terminate"]:
    """What to do with a transaction that is still open ``waited`` seconds after its client has lost it.

    Idle, it waits for its COMMIT, which is lost or late: once it is terminated, both are the same. At work, it is
    committing, and is left half of the time. A COMMIT that waits for its standby is never touched: terminated, it
    would be visible, and gone after a failover.
    """
    if holder.wait_event == "SyncRep" or holder.state is None:
        return "wait"
    if holder.state.startswith("idle"):
        return "terminate"
    return "terminate" if left is not None and waited >= left else "wait"


class Life(NamedTuple):
    """What tells one life of a PostgreSQL server from every other, its own next one included. Only in the life in
    which a transaction got its number, the number means that transaction."""

    timeline: str
    """Another after a promotion."""
    started: str
    """When its first process started, in microseconds: no two servers have the same, and none the same twice."""
    reset: str | None
    """When its statistics were last reset. The one thing to be seen of a recovery from the crash of a single server
    process, which the first process survives; None if the server does not say."""


def what_ended(life: Life, now: Life) -> str | None:
    """Why ``now`` is not that life any more, in words; None: it is the same."""
    if life.timeline != now.timeline:
        return "a standby was promoted since"
    if life.started != now.started:
        return "the server was started anew since, or is another one"
    if now.reset is None or life.reset != now.reset:
        return "the server has recovered from a crash since, or its statistics were reset"
    return None
