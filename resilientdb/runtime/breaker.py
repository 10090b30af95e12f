"""The circuit breaker that callers meet: pybreaker's class, with permits, a window and a monotonic clock.

Existing pybreaker listeners, storages and ``except CircuitBreakerError`` keep working. What is replaced is
what makes pybreaker's own ``call`` unfit for a pool: it holds its lock across the guarded call (a pool of ten
becomes a pool of one), counts cancellations, times by the wall clock and calls listeners under the lock.
Here the lock covers bookkeeping only; listeners and storages are called after it is released.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import pybreaker

from resilientdb.errors import CircuitOpen
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, OPEN, BreakerCore, Permit, Transition
from resilientdb.policy.faults import classify, describe
from resilientdb.runtime.clock import Clock, monotonic
from resilientdb.runtime.emitter import Emitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.config import BreakerPolicy

__all__ = ["CircuitBreaker"]

T = TypeVar("T")

_STATES: dict[str, Callable[..., Any]] = {
    CLOSED: pybreaker.CircuitClosedState,
    OPEN: pybreaker.CircuitOpenState,
    HALF_OPEN: pybreaker.CircuitHalfOpenState,
}


class CircuitBreaker(pybreaker.CircuitBreaker):
    """One node's breaker.

    ``permit`` is the permit of the present closed period, or None when a caller has to ask ``try_acquire``.
    A call under that permit may report its success by adding one to ``answered``, if ``permit`` is still the
    same: reading the one and adding to the other is all that a healthy call costs, and no lock. (On an
    interpreter without a global lock an addition may get lost; the share of failures is then overstated by
    that much.) ``_guard`` guards the core; it is never held while a listener, a storage or anything of the
    user's runs. A garbage collection may run inside it all the same and give a forgotten connection back in this
    very thread: what that reports is put off until the section has ended. ``on_move`` is called for each
    transition after the lock is released, in order.
    """

    def __init__(
        self,
        policy: BreakerPolicy,
        *,
        name: str,
        clock: Clock = monotonic,
        probed: bool = False,
        on_move: Callable[[Transition], object] | None = None,
    ) -> None:
        self._guard = threading.RLock()
        self._clock = clock
        self._core = BreakerCore(policy, clock(), probed=probed)
        self._emitter = Emitter()
        self._on_move = on_move
        self.policy = policy
        self.permit: Permit | None = self._core.closed_permit
        self.answered = 0
        """Calls that succeeded while the circuit was closed, since the breaker was made."""
        self._absorbed = 0
        self.last_error: BaseException | None = None
        """A copy, without traceback, of the last failure counted; the ``__cause__`` of refusals."""
        super().__init__(
            fail_max=policy.minimum_calls,
            reset_timeout=policy.reset_timeout,
            listeners=list(policy.listeners),
            state_storage=policy.storage(name) if policy.storage is not None else None,
            name=name,
            throw_new_error_on_trip=False,
        )
        # pybreaker starts from its storage; ours starts closed and says so.
        self._state = pybreaker.CircuitClosedState(self)

    # -- permits: what the engine uses ---------------------------------------------------------------

    def try_acquire(self) -> Permit | None:
        """Leave to call the node, or None when the circuit is open and its probes are taken."""
        with self._guard:
            permit, moved = self._core.try_acquire(self._clock())
            self._moved(moved)
        self._emitter.deliver()
        return permit

    def record_success(self, permit: Permit) -> None:
        """The node answered (an application error is an answer)."""
        if self._is_inside():
            self._emitter.post(functools.partial(self.record_success, permit))
            return
        with self._guard:
            self._moved(self._core.record_success(permit, self._clock()))
        self._emitter.deliver()

    def record_failure(self, permit: Permit, error: BaseException) -> None:
        """The node failed the call."""
        self._remember(error)
        cause = describe(error)
        with self._guard:
            now = self._absorb()
            self._moved(self._core.record_failure(permit, now, cause))
        for listener in self.listeners:
            self._emitter.post(functools.partial(listener.failure, self, error))
        self._emitter.deliver()

    def release(self, permit: Permit) -> None:
        """The call showed nothing about the node: cancelled, refused locally, never sent."""
        if self._is_inside():
            self._emitter.post(functools.partial(self.release, permit))
            return
        with self._guard:
            self._core.release(permit)
        self._emitter.deliver()

    def prober_succeeded(self) -> None:
        with self._guard:
            self._moved(self._core.prober_succeeded(self._absorb()))
        self._emitter.deliver()

    def prober_failed(self, error: BaseException, answered: int) -> None:
        """The prober got no answer; ``answered`` is what the counter of that name said when it asked.

        If a call has succeeded since, it is the prober's own connection that is dead, or the prober that is slow
        on a busy machine, and a node that answers is not cut off.
        """
        cause = describe(error)
        with self._guard:
            now = self._absorb()
            if self.permit is not None and self.answered != answered:
                return
            self._moved(self._core.prober_failed(now, cause))
        self._remember(error)
        self._emitter.deliver()

    def after_fork(self) -> None:
        """In the child: a lock may be held by a thread that did not come along."""
        self._guard = threading.RLock()
        self._lock = threading.RLock()
        self._emitter = Emitter()

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may be let through; None when closed."""
        with self._guard:
            return self._core.retry_after(self._clock())

    @property
    def rate(self) -> float:
        """Successful calls a second, over the window."""
        with self._guard:
            return self._core.rate(self._absorb())

    def refusal(self) -> CircuitOpen:
        """The error for a caller who got no permit, with the last real failure as its cause."""
        after = self.retry_after
        # It may have closed since the permit was asked for: then another attempt makes sense at once.
        state = "was open a moment ago" if after is None else f"is {self.current_state}"
        error = CircuitOpen(
            f"the circuit of {self.name} {state}"
            + (f"; last failure: {describe(self.last_error)}" if self.last_error is not None else ""),
            retry_after=0.0 if after is None else after,
        )
        error.__cause__ = self.last_error
        return error

    # -- pybreaker's surface --------------------------------------------------------------------------

    @property
    def current_state(self) -> str:
        """This process's state. A storage is told of it; it does not dictate it."""
        return self._core.state

    @property
    def state(self) -> Any:
        return self._state

    @state.setter
    def state(self, state_str: str) -> None:
        self._force(state_str, "set by hand")

    def open(self) -> bool:
        self._force(OPEN, "opened by hand")
        return False

    def half_open(self) -> None:
        self._force(HALF_OPEN, "half-opened by hand")

    def close(self) -> None:
        self._force(CLOSED, "closed by hand")

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Guard a block with this breaker; works around an ``await`` too.

        An exception is judged by the fault taxonomy: an application error is the node's healthy answer, a
        cancellation shows nothing.
        """
        permit = self.try_acquire()
        if permit is None:
            raise self.refusal()
        try:
            yield
        except BaseException as error:
            self.settle(permit, error)
            raise
        else:
            self.record_success(permit)

    def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        with self.calling():
            return func(*args, **kwargs)

    def call_async(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Await ``func(*args, **kwargs)`` under this breaker."""

        async def guarded() -> Any:
            with self.calling():
                return await func(*args, **kwargs)

        return guarded()

    def settle(self, permit: Permit, error: BaseException) -> None:
        """Record what ``error`` says about the node."""
        fault = classify(error)
        if fault.is_node_failure:
            self.record_failure(permit, error)
        elif fault.is_healthy_reply:
            self.record_success(permit)
        else:
            self.release(permit)

    # -- inside ---------------------------------------------------------------------------------------

    def _force(self, state: str, cause: str) -> None:
        if state not in _STATES:
            raise ValueError(f"unknown state {state!r}; one of {', '.join(_STATES)}")
        with self._guard:
            self._moved(self._core.force(state, self._clock(), cause))
        self._emitter.deliver()

    def _is_inside(self) -> bool:
        """Whether this very thread is inside the guarded section: then a finalizer runs in the middle of it."""
        # What threading.Condition asks of an RLock, too.
        return bool(self._guard._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001

    def _absorb(self) -> float:
        """Bring the core up to date; returns the time it is."""
        now = self._clock()
        answered = self.answered
        self._core.absorb(answered - self._absorbed, now)
        self._absorbed = answered
        return now

    def _moved(self, transition: Transition | None) -> None:
        """Publish a transition; under the lock, so that ``permit`` and the announcements keep its order."""
        if transition is None:
            return
        self.permit = self._core.closed_permit
        self._absorbed = self.answered  # what was tallied until now belongs to the period that has ended
        self._emitter.post(lambda: self._announce(transition))

    def _announce(self, transition: Transition) -> None:
        old = self._state
        # pybreaker's state objects announce themselves from their constructor when told to; we do not, since
        # every listener is to be guarded on its own.
        self._state = new = _STATES[transition.new](self, prev_state=old, notify=False)
        try:
            if self._on_move is not None:
                self._on_move(transition)
        finally:
            for listener in self.listeners:
                self._emitter.post(functools.partial(listener.state_change, self, old, new))
            # Last: it may be another server, slow or away.
            self._emitter.post(functools.partial(self._store, transition.new))

    def _store(self, state: str) -> None:
        self._state_storage.state = state
        if state == OPEN:
            self._state_storage.opened_at = datetime.now(UTC)

    def _remember(self, error: BaseException) -> None:
        try:
            kept = copy.copy(error)
        except Exception:  # noqa: BLE001 - a driver's exception that cannot be copied
            return
        # Its traceback would keep the caller's frames, and so its connections, alive.
        kept.__traceback__ = None
        kept.__cause__ = kept.__context__ = None
        self.last_error = kept
