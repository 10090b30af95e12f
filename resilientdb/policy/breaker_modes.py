"""The circuit as its callers meet it: the state machine, or what its mode puts in its place.

* ``normal``: the machine decides.
* ``metrics_only``: every call is let through, and the machine is told how each ended, as if it had been asked for
  leave at that moment. What it does is announced as what would have been.
* ``disabled``: every call is let through. Nothing opens it; successes are counted, for the retry budget.
* ``forced_open``: no call is let through, whatever a prober sees.

A change of mode begins anew: a machine that knows nothing, and no outcome of before counts any more. Where calls
were held back until then, they begin with a slow start.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, get_args

from resilientdb.policy.breaker import CLOSED, OPEN, BreakerCore, Permit, Transition

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.config import BreakerPolicy

__all__ = ["MODES", "Circuit", "Mode"]

Mode = Literal["normal", "metrics_only", "disabled", "forced_open"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

Moves = tuple[Transition, ...]


class Circuit:
    """One node's circuit, in one of its modes. Not thread-safe: every method requires the owner's lock.

    ``permit`` is what every caller may take without asking, or None if each has to ask ``try_acquire``. Each method
    that may move the circuit returns the moves, in order; most often none.
    """

    __slots__ = ("_core", "_free", "_make", "_mode", "_policy")

    def __init__(
        self, policy: BreakerPolicy, now: float, *, rng: Callable[[], float], probed: bool = False
    ) -> None:
        """As ``BreakerCore``."""
        self._policy = policy
        self._make: Callable[[float], BreakerCore] = functools.partial(
            BreakerCore, policy, rng=rng, probed=probed
        )
        self._mode: Mode = policy.mode if policy.enabled else "disabled"
        self._core = self._make(now)
        self._free = Permit(probe=False, issued_at=now)
        """The permit of everybody, where nobody has to ask the machine."""

    @property
    def mode(self) -> Mode:
        return self._mode

    def set_mode(self, mode: Mode, now: float) -> Moves:
        """Go on in another mode; nothing happens if it is the same."""
        before, was = self._mode, self.state
        if mode == before:
            return ()
        self._mode = mode
        self._core = self._make(now)
        self._free = Permit(probe=False, issued_at=now)
        if mode == "normal" and was != CLOSED:
            self._core.start_slowly()
        return () if self.state == was else (Transition(was, self.state, f"its mode was set to {mode}"),)

    @property
    def permit(self) -> Permit | None:
        if self._mode == "normal":
            return self._core.closed_permit
        return None if self._mode == "forced_open" else self._free

    @property
    def state(self) -> str:
        """The state that callers meet."""
        if self._mode == "normal":
            return self._core.state
        return OPEN if self._mode == "forced_open" else CLOSED

    @property
    def would_be(self) -> str:
        """The state that it would be in, if it were not for its mode."""
        return self._core.state

    # -- calls ---------------------------------------------------------------------------------------------

    def try_acquire(self, now: float) -> tuple[Permit | None, Moves]:
        """Leave to call the node, or None."""
        if self._mode == "normal":
            permit, moved = self._core.try_acquire(now)
            return permit, _as_moves(moved)
        return self.permit, ()

    def is_current(self, permit: Permit) -> bool:
        """Whether an outcome under ``permit`` still counts."""
        return permit is self._free if self._mode != "normal" else self._core.is_current(permit)

    @property
    def following(self) -> Permit | None:
        """As ``BreakerCore.following``; whoever needs no leave goes on as it came."""
        return self._core.following if self._mode == "normal" else self.permit

    def record_success(self, permit: Permit, now: float) -> Moves:
        """The node answered the call made under ``permit``."""
        return self._record(permit, now, self._core.record_success)

    def record_slow(self, permit: Permit, now: float) -> Moves:
        """The node answered, but too slowly."""
        outcome = self._core.record_success if self._mode == "disabled" else self._core.record_slow
        return self._record(permit, now, outcome)

    def record_failure(self, permit: Permit, now: float, cause: str, *, no_answer: bool = False) -> Moves:
        """As ``BreakerCore.record_failure``."""
        if self._mode == "disabled":
            return ()
        failure = functools.partial(self._core.record_failure, cause=cause, no_answer=no_answer)
        return self._record(permit, now, failure)

    def release(self, permit: Permit) -> None:
        """The call made under ``permit`` showed nothing about the node."""
        self._core.release(permit)

    def absorb(self, successes: int, now: float) -> Moves:
        """Count successes under ``permit`` that were tallied elsewhere since the last time."""
        if self._mode == "forced_open":
            return ()
        moves: Moves = ()
        while self._mode == "metrics_only" and successes and self._core.closed_permit is None:
            # It would have let one of them through, perhaps, and learnt from that.
            moves += self._record(self._free, now, self._core.record_success)
            successes -= 1
            if self._core.state == OPEN:
                break
        self._core.absorb(successes, now)
        return moves

    # -- the prober, and by hand ---------------------------------------------------------------------------

    def prober_succeeded(self, now: float) -> Moves:
        """The background prober got an answer."""
        return self._as_announced(self._core.prober_succeeded(now)) if self._is_watched else ()

    def prober_failed(self, now: float, cause: str) -> Moves:
        """The background prober found the node dead."""
        return self._as_announced(self._core.prober_failed(now, cause)) if self._is_watched else ()

    def force(self, state: str, now: float, cause: str) -> Moves:
        """Move by hand. A mode that lets nothing through, or everything, is not moved."""
        return self._as_announced(self._core.force(state, now, cause)) if self._is_watched else ()

    # -- what can be seen ----------------------------------------------------------------------------------

    @property
    def slow_start(self) -> tuple[int, int] | None:
        """As ``BreakerCore.slow_start``; None in any other mode than normal."""
        return self._core.slow_start if self._mode == "normal" else None

    def has_room(self, now: float) -> bool:
        """Whether a call would be let through."""
        return self._core.has_room(now) if self._mode == "normal" else self._mode != "forced_open"

    def retry_after(self, now: float) -> float | None:
        """Seconds after which another call makes sense; None when closed. Of one that is held open nobody knows."""
        if self._mode == "normal":
            return self._core.retry_after(now)
        return self._policy.reset_timeout if self._mode == "forced_open" else None

    def retry_after_slow_start(self, now: float) -> float:
        """As ``BreakerCore``'s."""
        return self._core.retry_after_slow_start(now)

    def rate(self, now: float) -> float:
        """Successes a second over the window."""
        return self._core.rate(now)

    # -- inside --------------------------------------------------------------------------------------------

    @property
    def _is_watched(self) -> bool:
        """Whether the machine is told anything."""
        return self._mode in {"normal", "metrics_only"}

    def _record(
        self, permit: Permit, now: float, outcome: Callable[[Permit, float], Transition | None]
    ) -> Moves:
        if self._mode == "normal":
            return _as_moves(outcome(permit, now))
        if permit is not self._free:
            return ()
        leave, half_opened = self._core.try_acquire(now)
        moved = None if leave is None else outcome(leave, now)
        return self._as_announced(half_opened) + self._as_announced(moved)

    def _as_announced(self, moved: Transition | None) -> Moves:
        if moved is not None and self._mode == "metrics_only":
            moved = replace(moved, would_be=True)
        return _as_moves(moved)


def _as_moves(moved: Transition | None) -> Moves:
    return () if moved is None else (moved,)
