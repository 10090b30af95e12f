"""Trying again, on tenacity: which attempts, how long in between, and when to stop.

The first attempt always runs outside of here, so that a call that succeeds pays nothing. The loop is then
tenacity's; what is ours is when it must not go on: past the caller's deadline, over the budget of retries that
the database can bear, or on an error that another attempt cannot mend. The user's own strategies (``retry.wait``,
``retry.stop``) shape it within these limits.

The last real error is what is raised, with a note on it (PEP 678) of what came of each attempt.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Final, TypeVar

import tenacity

from resilientdb.config.wording import name_of, shown
from resilientdb.errors import (
    CircuitOpen,
    CommitOutcomeUnknown,
    ConfigurationError,
    NoPrimaryAvailable,
    NoReplicaAvailable,
)
from resilientdb.policy.faults import classify, describe, from_driver, links_of
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from resilientdb.config import Backoff, RetryPolicy

__all__ = [
    "REFUSALS",
    "async_loop",
    "began_at",
    "happened_at",
    "loop",
    "may_run_again",
    "node_of",
    "remember_beginning",
]

T = TypeVar("T")

REFUSALS = (CircuitOpen, NoPrimaryAvailable, NoReplicaAvailable)
"""What an attempt ends with when no node was asked: no news beside an earlier attempt's real error."""


# -- what an error carries with it ----------------------------------------------------------------------------------

_BEGAN: Final = "_resilientdb_began"
_NODE: Final = "_resilientdb_node"


def remember_beginning(error: BaseException, began: float) -> None:
    """Say when the attempt began that ended with ``error``, for the loop that goes on after it.

    On the error, because only an attempt that fails has a use for it: a healthy one need not look at the clock.
    """
    with contextlib.suppress(AttributeError):
        setattr(error, _BEGAN, began)


def began_at(error: BaseException) -> float | None:
    """What ``remember_beginning`` said of it; None if it said nothing, or of a COMMIT in doubt: to find out what
    became of it is no further attempt at the same."""
    if isinstance(error, CommitOutcomeUnknown):
        return None
    return next((began for link in links_of(error) if (began := getattr(link, _BEGAN, None))), None)


def happened_at(error: BaseException, node: str) -> None:
    """Say that ``error`` came out of a call to ``node``: some drivers let out errors that look like anybody's."""
    with contextlib.suppress(AttributeError):
        setattr(error, _NODE, node)


def node_of(error: BaseException) -> str | None:
    """The node whose answer, or silence, ``error`` is; None if nobody said."""
    return next((node for link in links_of(error) if (node := getattr(link, _NODE, None)) is not None), None)


def may_run_again(error: BaseException) -> bool:
    """Whether a transaction that ended with ``error`` may be run again.

    Only if the error came out of a database call, and says that another run may succeed. A ``ConnectionError`` of the
    function's own (another service is down) says nothing about the transaction; one that a driver lets out raw does.
    What the function has raised *from* a database's error counts as that error.
    """
    if not classify(error).retry_transaction:
        return False
    for link in links_of(error):
        if from_driver(link) or getattr(link, _NODE, None) is not None:
            return classify(link).retry_transaction
    return False


# -- how long to pause, and when to stop ----------------------------------------------------------------------------


def wait_strategy(backoff: Backoff) -> tenacity.wait.wait_base:
    """Exponential backoff; with full jitter, uniform between 0 and the exponential (AWS's "Full Jitter")."""
    strategy = tenacity.wait_random_exponential if backoff.jitter == "full" else tenacity.wait_exponential
    return strategy(multiplier=backoff.initial, max=backoff.maximum, exp_base=backoff.multiplier)


def _checked(wait: Callable[[tenacity.RetryCallState], float]) -> Callable[[tenacity.RetryCallState], float]:
    """The user's own strategy, held to what can be slept."""

    def pause(state: tenacity.RetryCallState) -> float:
        seconds: object = wait(state)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise ConfigurationError(
                f"retry.wait must return seconds, 0 or more; {name_of(wait)} returned {shown(seconds)}",
                key="retry.wait",
            ) from _error_of(state)
        return float(seconds)

    return pause


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


class _Course:
    """One loop's attempts: what came of each, whether there may be another, and what is raised in the end."""

    def __init__(
        self,
        first: Exception,
        policy: RetryPolicy,
        began: float | None,
        *,
        is_retryable: Callable[[BaseException], bool],
        spend: Callable[[BaseException], bool],
        announce: Callable[[int, float, BaseException], None],
    ) -> None:
        self._policy = policy
        self._is_retryable = is_retryable
        self._spend = spend
        self._announce = announce
        if began is None:
            began = began_at(first)
        self._began = monotonic() if began is None else began
        self._pending: Exception | None = first
        self._last: Exception = first
        self._failure: Exception = first
        self._attempt_began = self._began
        self._attempts = 0
        self._lines: list[str] = []
        self._ended = ""

    def options(self) -> dict[str, Any]:
        """What to make tenacity's loop with."""
        policy = self._policy
        return {
            "wait": _checked(policy.wait) if policy.wait is not None else wait_strategy(policy.backoff),
            "stop": self._is_over,
            # Exceptions only, never a cancellation: tenacity hands those to predicates too.
            "retry": tenacity.retry_if_exception(
                lambda error: isinstance(error, Exception) and self._is_retryable(error)
            ),
            "before": self._start_the_clock,
            "before_sleep": self._before_sleep,
            "reraise": True,
        }

    def begin(self) -> None:
        """An attempt begins; in place of the first, which was made before, its error is raised."""
        if self._pending is not None:
            error, self._pending = self._pending, None
            self.failed(error)
            raise error
        self._attempt_began = monotonic()

    def failed(self, error: Exception) -> None:
        """The attempt that was begun last ended with ``error``."""
        self._last = error
        if not isinstance(error, REFUSALS) or isinstance(self._failure, REFUSALS):
            self._failure = error
        self._attempts += 1
        text = describe(error)
        if len(text) > _LONGEST_LINE:
            text = f"{text[: _LONGEST_LINE - 1]}…"
        self._lines.append(
            f"attempt {self._attempts} after {self._attempt_began - self._began:.2f} s: {text}"
        )
        if len(self._lines) > _MOST_LINES:
            del self._lines[_MOST_LINES // 2]

    def outcome(self, last: Exception) -> Exception:
        """What to raise where the loop ends with ``last``: what the database said, not that it was not asked."""
        if last is not self._last:  # a strategy of the user's does not work
            last.__cause__ = last.__cause__ or self._failure
            return last
        self._note(self._failure)
        return self._failure

    def _start_the_clock(self, state: tenacity.RetryCallState) -> None:
        # tenacity's own starts with the loop, and the first attempt is part of the time a retry may take.
        if state.attempt_number == 1:
            state.start_time = self._began

    def _before_sleep(self, state: tenacity.RetryCallState) -> None:
        error = _error_of(state)
        if error is not None:
            self._announce(state.attempt_number, state.upcoming_sleep, error)

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        self._ended = self._limit_reached(state)
        return bool(self._ended)

    def _limit_reached(self, state: tenacity.RetryCallState) -> str:
        """Which limit forbids another attempt, in words; empty if none does."""
        policy, wait, deadline = self._policy, state.upcoming_sleep, current_deadline()
        error = _error_of(state)
        if state.attempt_number >= policy.attempts:
            return f"retry.attempts is {policy.attempts}"
        if deadline is not None and wait >= deadline.remaining():
            return f"the deadline of {deadline.seconds:g} s would end during the pause of {wait:.2f} s"
        if policy.timeout is not None and (state.seconds_since_start or 0.0) + wait > policy.timeout:
            return f"retry.timeout of {policy.timeout:g} s would end during the pause of {wait:.2f} s"
        if policy.stop is not None and policy.stop(state):
            return f"retry.stop ({name_of(policy.stop)}) said so"
        # Asked last, since asking spends.
        if error is not None and not self._spend(error):
            return "too many retries lately (retry.budget)"
        return ""

    def _note(self, error: Exception) -> None:
        if self._attempts == 1 and self._policy.attempts == 1:
            return  # nobody expects more than one
        lines = list(self._lines)
        if (left_out := self._attempts - len(lines)) > 0:
            lines.insert(_MOST_LINES // 2, f"… {left_out} more …")
        lines.append(f"no other attempt: {self._ended or 'it would not mend this'}")
        # In place of an earlier one: the error may be a copy of another caller's, or have passed a loop further in.
        # A list of its own, since a copy shares its original's.
        notes = getattr(error, "__notes__", None)
        kept = [note for note in notes if not _is_ours(note)] if isinstance(notes, list) else []
        with contextlib.suppress(AttributeError):
            error.__notes__ = [*kept, "\n".join(lines)]


_MOST_LINES: Final = 6
_LONGEST_LINE: Final = 160


def _is_ours(note: object) -> bool:
    return isinstance(note, str) and note.startswith("attempt 1 after ")


# -- the loop -------------------------------------------------------------------------------------------------------


def loop(
    attempt: Callable[[], T],
    first: Exception,
    policy: RetryPolicy,
    pause: Callable[[float], Any],
    *,
    began: float | None = None,
    **rules: Any,
) -> T:
    """Go on after ``first``, the error of an attempt made already, which counts as one of ``policy.attempts``.

    ``pause(seconds)`` sleeps. ``began``: when the first attempt began, on the monotonic clock; None: ask the error
    (``remember_beginning``). ``rules``: ``is_retryable(error)``, ``spend(error)`` (take one retry out of the
    budget), ``announce(attempt, delay, error)``.
    """
    course = _Course(first, policy, began, **rules)

    def attempt_or_first() -> T:
        course.begin()
        try:
            return attempt()
        except Exception as error:
            course.failed(error)
            raise

    try:
        return tenacity.Retrying(sleep=pause, **course.options())(attempt_or_first)
    except Exception as last:  # noqa: BLE001 - raised, itself or what it would hide, outside of its own handling
        outcome = course.outcome(last)
    raise outcome


async def async_loop(
    attempt: Callable[[], Awaitable[T]],
    first: Exception,
    policy: RetryPolicy,
    *,
    began: float | None = None,
    **rules: Any,
) -> T:
    """As ``loop``, for a coroutine function."""
    course = _Course(first, policy, began, **rules)

    async def attempt_or_first() -> T:
        course.begin()
        try:
            return await attempt()
        except Exception as error:
            course.failed(error)
            raise

    try:
        return await tenacity.AsyncRetrying(**course.options())(attempt_or_first)
    except Exception as last:  # noqa: BLE001 - raised, itself or what it would hide, outside of its own handling
        outcome = course.outcome(last)
    raise outcome
