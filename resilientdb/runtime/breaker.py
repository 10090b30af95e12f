"""The circuit breaker that callers meet: pybreaker's class, with permits, a window and a monotonic clock.

Existing pybreaker listeners, storages and ``except CircuitBreakerError`` keep working. What is replaced is
what makes pybreaker's own ``call`` unfit for a pool: it holds its lock across the guarded call (a pool of ten
becomes a pool of one), counts cancellations, times by the wall clock and calls listeners under the lock.
Here the lock covers bookkeeping only; listeners are called after it is released, and a storage is written by a
thread of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import random
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import pybreaker

from resilientdb.errors import CircuitOpen, ConfigurationError
from resilientdb.policy.breaker import CLOSED, HALF_OPEN, OPEN, Permit, Transition
from resilientdb.policy.breaker_modes import MODES, Circuit, Mode
from resilientdb.policy.faults import classify, describe, is_overload
from resilientdb.runtime.clock import Clock, monotonic
from resilientdb.runtime.emitter import Emitter
from resilientdb.runtime.storage import StorageWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.config import BreakerPolicy
    from resilientdb.policy.breaker_modes import Moves

__all__ = ["CircuitBreaker"]

logger = logging.getLogger("resilientdb")

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
    that much.) ``_guard`` guards the circuit; it is never held while a listener, a storage or anything of the
    user's runs. A garbage collection may run inside it all the same and give a forgotten connection back in this
    very thread: what that reports is put off until the section has ended. ``on_move``, and all that
    ``subscribe``, are called for each transition after the lock is released, in order.

    While the circuit is slow to start, ``permit`` is None and ``current_state`` is ``"closed"``: pybreaker has no
    word for it, and who looks at the state wants to know whether the node works.
    """

    def __init__(
        self,
        policy: BreakerPolicy,
        *,
        name: str,
        clock: Clock = monotonic,
        probed: bool = False,
        on_move: Callable[[Transition], object] | None = None,
        rng: Callable[[], float] | None = None,
    ) -> None:
        """``rng`` gives a number from 0 to below 1; None = as ``random`` does."""
        self._guard = threading.RLock()
        self._clock = clock
        self._circuit = Circuit(policy, clock(), rng=rng or random.random, probed=probed)
        self._emitter = Emitter()
        self._on_move: list[Callable[[Transition], object]] = [] if on_move is None else [on_move]
        self.policy = policy
        self.slow_after = policy.slow_call_duration
        """Seconds; who measures a call that took longer says ``record_slow``. None: nobody need measure."""
        self.permit: Permit | None = self._circuit.permit
        self.answered = 0
        """Calls that succeeded while the circuit was closed, since the breaker was made."""
        self._absorbed = 0
        self.last_error: BaseException | None = None
        """A copy, without traceback, of the last failure counted; the ``__cause__`` of refusals."""
        super().__init__(
            fail_max=policy.minimum_calls,
            reset_timeout=policy.reset_timeout,
            listeners=list(policy.listeners),
            name=name,
            throw_new_error_on_trip=False,
        )
        self._state = _STATES[self.current_state](self, prev_state=None, notify=False)
        self._writer: StorageWriter | None = None
        if policy.storage is not None:
            self._writer = StorageWriter(name, policy.storage)
            weakref.finalize(self, self._writer.stop).atexit = False
            # pybreaker starts from its storage; ours starts by itself, and says how.
            self._writer.tell(self.current_state)

    def subscribe(self, on_move: Callable[[Transition], object]) -> None:
        """Have ``on_move`` called for each transition, too."""
        self._on_move.append(on_move)

    def unsubscribe(self, on_move: Callable[[Transition], object]) -> None:
        """Nothing happens if it is not subscribed."""
        with contextlib.suppress(ValueError):
            self._on_move.remove(on_move)

    # -- permits: what the engine uses ---------------------------------------------------------------

    def try_acquire(self) -> Permit | None:
        """Leave to call the node, or None when the circuit is open and its probes are taken."""
        permit = self.permit
        if permit is not None:
            return permit
        with self._guard:
            permit, moves = self._circuit.try_acquire(self._clock())
            self._moved(moves)
        self._emitter.deliver()
        return permit

    def record_success(self, permit: Permit) -> None:
        """The node answered (an application error is an answer)."""
        if permit is self.permit:
            self.answered += 1
            return
        if self._is_inside():
            self._emitter.post(functools.partial(self.record_success, permit))
            return
        self.record_answer(permit)

    def record_answer(self, permit: Permit) -> Permit | None:
        """The node has given the first answer of a call under a probe's permit. Returns the permit under which the
        rest of the call is made, of which a success is nothing new; None: nothing of it counts any more."""
        with self._guard:
            now = self._clock()
            counts = self._circuit.is_current(permit)
            self._note_answer(permit)
            self._moved(self._circuit.record_success(permit, now))
            following = self._circuit.following if counts else None
        self._emitter.deliver()
        return following

    def record_slow(self, permit: Permit) -> None:
        """The node answered, after more than ``slow_after`` seconds. In place of ``record_success``: a permit has one
        outcome."""
        if self._is_inside():
            self._emitter.post(functools.partial(self.record_slow, permit))
            return
        with self._guard:
            now = self._absorb()
            self._note_answer(permit)
            self._moved(self._circuit.record_slow(permit, now))
        self._emitter.deliver()

    def record_failure(self, permit: Permit, error: BaseException, *, no_answer: bool = False) -> None:
        """The node failed the call. ``no_answer``: there was none in time, whatever ``error`` says."""
        no_answer = no_answer or is_overload(error)
        self._remember(error)
        cause = describe(error)
        with self._guard:
            now = self._absorb()
            self._moved(self._circuit.record_failure(permit, now, cause, no_answer=no_answer))
        for listener in self.listeners:
            self._emitter.post(functools.partial(listener.failure, self, error))
        self._emitter.deliver()

    def release(self, permit: Permit) -> None:
        """The call showed nothing about the node: cancelled, refused locally, never sent."""
        if self._is_inside():
            self._emitter.post(functools.partial(self.release, permit))
            return
        with self._guard:
            self._circuit.release(permit)
        self._emitter.deliver()

    def prober_succeeded(self) -> None:
        with self._guard:
            self._moved(self._circuit.prober_succeeded(self._absorb()))
        self._emitter.deliver()

    def prober_failed(self, error: BaseException, answered: int) -> None:
        """The prober got no answer; ``answered`` is what the counter of that name said when it asked.

        If a call has succeeded since, it is the prober's own connection that is dead, or the prober that is slow
        on a busy machine, and a node that answers is not cut off.
        """
        cause = describe(error)
        with self._guard:
            now = self._absorb()
            believed = self._circuit.state != CLOSED or self.answered == answered
            if believed:
                self._moved(self._circuit.prober_failed(now, cause))
        if believed:
            self._remember(error)
        self._emitter.deliver()

    # -- the mode --------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """``"normal"``; ``"metrics_only"``: let every call through, and say what would have been done;
        ``"disabled"``: let every call through; ``"forced_open"``: let none through. May be set at any time."""
        return self._circuit.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ConfigurationError(
                f"a circuit breaker's mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}",
                key="breaker.mode",
                value=mode,
            )
        with self._guard:
            self._moved(self._circuit.set_mode(mode, self._absorb()))
        self._emitter.deliver()

    @property
    def would_be(self) -> str:
        """``current_state``; in the mode ``"metrics_only"`` the state that it would be in without."""
        return self._circuit.would_be if self.mode == "metrics_only" else self.current_state

    def after_fork(self) -> None:
        """In the child: a lock may be held by a thread that did not come along."""
        self._guard = threading.RLock()
        self._lock = threading.RLock()
        self._emitter = Emitter()
        if self._writer is not None:
            self._writer.after_fork()

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may be let through; None when closed."""
        with self._guard:
            return self._circuit.retry_after(self._clock())

    @property
    def starts_slowly(self) -> bool:
        """Whether it has closed, and lets few calls through at once for a moment."""
        return self._circuit.slow_start is not None

    @property
    def has_room(self) -> bool:
        """Whether a call would be let through now."""
        if self.permit is not None:
            return True
        with self._guard:
            return self._circuit.has_room(self._clock())

    @property
    def rate(self) -> float:
        """Successful calls a second, over the window."""
        with self._guard:
            rate = self._circuit.rate(self._absorb())
        self._emitter.deliver()
        return rate

    def refusal(self) -> CircuitOpen:
        """The error for a caller who got no permit, with the last real failure as its cause."""
        with self._guard:
            now, circuit = self._clock(), self._circuit
            state, mode, slow_start = circuit.state, circuit.mode, circuit.slow_start
            after = circuit.retry_after(now) if slow_start is None else circuit.retry_after_slow_start(now)
        if slow_start is not None:
            at_once, missing = slow_start
            what = (
                f"has just closed and lets only {at_once} call{'' if at_once == 1 else 's'} through at once until "
                f"{missing} more {'has' if missing == 1 else 'have'} been answered"
            )
        elif mode == "forced_open":
            what = "is held open by its mode"
        else:
            # It may have closed since the permit was asked for: then another attempt makes sense at once.
            what = "was open a moment ago" if after is None else f"is {state}"
        error = CircuitOpen(
            f"the circuit of {self.name} {what}"
            + (f"; last failure: {describe(self.last_error)}" if self.last_error is not None else ""),
            retry_after=0.0 if after is None else after,
        )
        error.__cause__ = self.last_error
        return error

    # -- pybreaker's surface --------------------------------------------------------------------------

    @property
    def current_state(self) -> str:
        """This process's state. A storage is told of it; it does not dictate it."""
        return self._circuit.state

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
            self._moved(self._circuit.force(state, self._absorb(), cause))
        self._emitter.deliver()

    def _is_inside(self) -> bool:
        """Whether this very thread is inside the guarded section: then a finalizer runs in the middle of it."""
        # What threading.Condition asks of an RLock, too.
        return bool(self._guard._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001

    def _absorb(self) -> float:
        """Bring the circuit up to date; returns the time it is."""
        now = self._clock()
        answered = self.answered
        moves = self._circuit.absorb(answered - self._absorbed, now)
        self._absorbed = answered
        self._moved(moves)
        return now

    def _note_answer(self, permit: Permit) -> None:
        """An answer that the circuit counts itself: whoever watches ``answered`` is to know of it, too."""
        counts = permit is self.permit or (permit.probe and self._circuit.is_current(permit))
        if counts and self._circuit.state == CLOSED:
            self.answered += 1
            self._absorbed += 1

    def _moved(self, moves: Moves) -> None:
        """Publish what has changed; under the lock, so that ``permit`` and the announcements keep its order."""
        permit = self._circuit.permit
        if permit is not self.permit:
            self._absorbed = self.answered  # what was tallied until now belongs to the period that has ended
            self.permit = permit
        for transition in moves:
            self._emitter.post(functools.partial(self._announce, transition))

    def _announce(self, transition: Transition) -> None:
        if transition.would_be:
            # pybreaker's listeners and storages are not told: they would take it for the truth.
            logger.warning(
                "the circuit of %s would have moved from %s to %s (metrics_only): %s",
                self.name,
                transition.old,
                transition.new,
                transition.cause,
            )
            self._tell_subscribers(transition)
            return
        old = self._state
        # pybreaker's state objects announce themselves from their constructor when told to; we do not, since
        # every listener is to be guarded on its own.
        self._state = new = _STATES[transition.new](self, prev_state=old, notify=False)
        self._tell_subscribers(transition)
        if self._writer is not None:
            self._writer.tell(transition.new)
        for listener in self.listeners:
            self._emitter.post(functools.partial(listener.state_change, self, old, new))

    def _tell_subscribers(self, transition: Transition) -> None:
        for on_move in tuple(self._on_move):
            try:
                on_move(transition)
            except Exception:
                logger.exception("a resilientdb listener failed")

    def _remember(self, error: BaseException) -> None:
        try:
            kept = copy.copy(error)
        except Exception:  # noqa: BLE001 - a driver's exception that cannot be copied
            return
        # Its traceback would keep the caller's frames, and so its connections, alive.
        kept.__traceback__ = None
        kept.__cause__ = kept.__context__ = None
        self.last_error = kept
