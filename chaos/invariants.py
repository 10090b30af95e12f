"""What must hold: bounds with their numbers, and what is true after every scenario.

Allowances for a busy machine, and no others: ``EPSILON`` is added to deadlines. Where something must be ``fast``,
one call of ten may take ``EPSILON`` longer, and each what an ``Observer`` saw the machine stall during that very
call: it sleeps 10 ms at a time and notes how much longer it took.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

from sqlalchemy.exc import DBAPIError

import resilientdb as rdb
from chaos.bodies import Gate, echo
from chaos.workloads import Load, Work, once

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType

    from chaos.drivers import Stack
    from chaos.workloads import Call, Calls
    from resilientdb.testing import Postgres

__all__ = [
    "DETECTION",
    "EPSILON",
    "FAST",
    "Observer",
    "at_rest",
    "eventually",
    "fast",
    "fault_was_felt",
    "known_errors",
    "nothing_left",
    "own_answers",
    "recovered",
    "within_deadline",
]

EPSILON = 0.25
"""Seconds that a call may exceed its deadline by: 0.1, the promise, and the rest for a machine with two cores,
three servers and a hundred callers."""
FAST = 0.05
"""Seconds in which a refusal is given."""
DETECTION = 1.25
"""Seconds from silence to an open circuit: an interval (0.25) and a timeout (0.75) of the prober, and a quarter."""
FIRST_OK = 0.5
NORMAL = 1.0
"""Seconds after healing: the first answer; only answers from there on."""
_TICK = 0.01
_FOR_GOOD = {"resilientdb-watchdog", "resilientdb-keeper"}
"""Threads of the whole process, not of an engine: they stay."""


class Observer:
    """Watches one stack, and the machine, from a thread of its own, for the length of a block."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self._stalls: list[tuple[float, float]] = []
        self.most_waiting = 0
        self.most_checked_out = 0
        self._thread = threading.Thread(target=self._watch, name="chaos-observer", daemon=True)

    def stall(self, since: float, until: float) -> float:
        """The longest time the machine did nothing for us between these moments, seconds."""
        return max(
            (late for at, late in tuple(self._stalls) if since <= at and at - late <= until), default=0.0
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        due = time.monotonic() + _TICK
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            now = time.monotonic()
            if now - due > _TICK:
                self._stalls.append((now, now - due))
            due = now + _TICK
            self.most_checked_out = max(self.most_checked_out, self._stack.checked_out)
            if self._stack.guarded:
                for node in self._stack.snapshot().nodes:
                    if node.pool is not None:
                        self.most_waiting = max(self.most_waiting, node.pool.waiting)


def eventually(condition: Callable[[], bool], what: str, *, timeout: float = 3.0) -> float:
    """Wait until it holds; returns the seconds it took. ``AssertionError`` with ``what`` if it never does."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + timeout, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - begun


# ------------------------------------------------------------------------------------------- of the calls


def fault_was_felt(during: Calls, *, longer_than: float) -> None:
    """The fault had its effect: somebody failed or was kept waiting. What a bare run must show."""
    felt = during.where(lambda call: not call.ok or call.seconds > longer_than)
    assert felt, f"nobody of {len(during)} noticed the fault: slowest {during.slowest:.3f} s, all well"


def known_errors(calls: Calls) -> None:
    """Every failure is the library's own or the driver's, and a refusal says when to come back."""
    for call in calls.failed:
        assert isinstance(call.error, rdb.ResilienceError | DBAPIError | ConnectionError | TimeoutError), (
            f"call {call.number} ended with {call.error!r}"
        )
        if isinstance(call.error, rdb.CircuitOpen | rdb.NoPrimaryAvailable):
            after = call.error.retry_after
            assert after is not None and after >= 0, f"{call.error!r} does not say when to come back"  # noqa: PT018


def own_answers(calls: Calls) -> None:
    """Nobody got another caller's answer."""
    foreign = [(call.number, call.value) for call in calls.ok if call.value != call.number]
    assert not foreign, f"(asked, answered): {foreign[:10]}"


def fast(calls: Calls, observer: Observer, limit: float = FAST) -> None:
    """Nine of ten of these ended within ``limit``, all within ``EPSILON`` more."""
    late = calls.where(lambda call: call.seconds > limit + observer.stall(call.due, call.ended))
    if len(late) > len(calls) // 10:
        raise AssertionError(_late(late, calls, f"{limit:g} s"))
    _none_longer(
        calls,
        lambda call: limit + EPSILON + observer.stall(call.due, call.ended),
        f"{limit + EPSILON:g} s",
    )


def within_deadline(calls: Calls) -> None:
    """None of these went on past its deadline."""
    _none_longer(calls, lambda call: (call.work.deadline or 0) + EPSILON, f"the deadline and {EPSILON:g} s")


def recovered(calls: Calls, healed_at: float, observer: Observer) -> tuple[float, float]:
    """After healing somebody was served within ``FIRST_OK``, and from ``NORMAL`` on everybody was, quickly.

    Returns the seconds to the first answer, and to the last failure (0 if there was none).
    """
    after = calls.due(healed_at)
    first = min((call.ended for call in after.ok), default=float("inf")) - healed_at
    last_failure = max((call.ended for call in after.failed), default=healed_at) - healed_at
    allowed = FIRST_OK + observer.stall(healed_at, healed_at + FIRST_OK)
    assert first <= allowed, f"first answer {first:.3f} s after healing (allowed {allowed:.3f})"
    late = calls.due(healed_at + NORMAL)
    assert late, "nobody came after the time in which all should be normal"
    assert not late.failed, f"{NORMAL:g} s after healing still {dict(late.errors())}"
    fast(late, observer, EPSILON)
    return first, last_failure


def _none_longer(calls: Calls, allowed: Callable[[Call], float], what: str) -> None:
    late = calls.where(lambda call: call.seconds > allowed(call))
    assert not late, _late(late, calls, what)


def _late(late: Calls, calls: Calls, what: str) -> str:
    some = ", ".join(f"#{call.number} {call.seconds:.3f} s {type(call.error).__name__}" for call in late[:8])
    return f"{len(late)} of {len(calls)} took longer than {what}: {some}"


# ------------------------------------------------------------------------------------------- afterwards


def at_rest(stack: Stack, observer: Observer, server: Postgres | None) -> None:
    """No connection is out, nobody waits, every slot can be had again, and the server sees no more than these.

    ``server``: where the writes go now; None: nowhere, so nothing can be asked of it.
    """
    eventually(lambda: stack.checked_out == 0, f"all connections given back ({stack.checked_out} are out)")
    assert observer.most_checked_out <= stack.limit * _nodes(stack)
    if stack.guarded:
        bound = rdb.control(stack.engine).resilience.queue.max_waiting
        assert bound is None or observer.most_waiting <= bound, f"{observer.most_waiting} waited, of {bound}"
        for node in stack.snapshot().nodes:
            assert node.pool is not None
            assert node.pool.active == 0, f"{node.name}: {node.pool}"
            assert node.pool.waiting == 0, f"{node.name}: {node.pool}"
    if server is None or not stack.guarded:
        return  # plain SQLAlchemy may keep a connection that was cut while idle, until somebody uses it in vain
    eventually(lambda: _closed_by_use(stack), "the primary's circuit is closed")
    with (
        Gate(server) as gate,
        Load(stack, [Work(body=gate.body, commit=True)] * stack.limit, in_flight=stack.limit) as load,
    ):
        gate.wait_for(stack.limit)
        assert stack.checked_out == stack.limit
        eventually(
            lambda: _connections(server, stack.application) <= stack.limit + 1,
            f"no more than {stack.limit} connections and the prober's on the server",
        )
        gate.open()
    assert not load.calls.failed, f"with all slots in use: {dict(load.calls.errors())}"
    eventually(lambda: stack.checked_out == 0, "all connections given back once more")


def _closed_by_use(stack: Stack) -> bool:
    """A circuit that callers have opened, not the prober, is closed by a caller's success alone."""
    if not stack.is_closed():
        once(stack, Work(body=echo))
    return stack.is_closed()


def nothing_left(
    before: Collection[threading.Thread], servers: Collection[Postgres], application: str
) -> None:
    """After ``dispose()``: no thread that was not there before, no connection on a server."""

    def more() -> list[str]:
        return [t.name for t in threading.enumerate() if t not in before and t.name not in _FOR_GOOD]

    eventually(lambda: not more(), f"no thread left: {more()}")

    def connected() -> list[Postgres]:
        return [server for server in servers if server.running and _connections(server, application)]

    eventually(lambda: not connected(), f"no connection left on any of {list(servers)}")


def _connections(server: Postgres, application: str) -> int:
    rows = server.query("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [application])
    return int(rows[0][0])


def _nodes(stack: Stack) -> int:
    return len(stack.snapshot().nodes) if stack.guarded else 1
