"""Trying again, on tenacity: which attempts, how long in between, and when to stop.

The first attempt always runs outside of here, so that a call that succeeds pays nothing. The loop is then
tenacity's; what is ours is when it must not go on: past the caller's deadline, over the budget of retries that
the database can bear, or on an error that another attempt cannot mend. The last real error is what is raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from resilientdb.errors import CircuitOpen, NoPrimaryAvailable, NoReplicaAvailable
from resilientdb.runtime.context import current_deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from resilientdb.config import Backoff, RetryPolicy

__all__ = ["REFUSALS", "async_loop", "loop"]

T = TypeVar("T")

REFUSALS = (CircuitOpen, NoPrimaryAvailable, NoReplicaAvailable)
"""What an attempt ends with when no node was asked: no news beside an earlier attempt's real error."""


def wait_strategy(backoff: Backoff) -> tenacity.wait.wait_base:
    """Exponential backoff; with full jitter, uniform between 0 and the exponential (AWS's "Full Jitter")."""
    strategy = tenacity.wait_random_exponential if backoff.jitter == "full" else tenacity.wait_exponential
    return strategy(multiplier=backoff.initial, max=backoff.maximum, exp_base=backoff.multiplier)


class _stop_at_deadline(tenacity.stop.stop_base):  # noqa: N801 - tenacity names its strategies so
    """The wait before the next attempt would outlast the deadline in force, or all the time a retry may take."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        wait = retry_state.upcoming_sleep
        deadline = current_deadline()
        if deadline is not None and wait >= deadline.remaining():
            return True
        spent = retry_state.seconds_since_start or 0.0
        return self._timeout is not None and spent + wait > self._timeout


class _stop_without_budget(tenacity.stop.stop_base):  # noqa: N801
    """No retry is granted. Asked last, since asking spends."""

    def __init__(self, spend: Callable[[BaseException], bool]) -> None:
        self._spend = spend

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None else None
        return error is not None and not self._spend(error)


def _options(
    policy: RetryPolicy,
    *,
    is_retryable: Callable[[BaseException], bool],
    spend: Callable[[BaseException], bool],
    announce: Callable[[int, float, BaseException], None],
) -> dict[str, Any]:
    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None:
            announce(state.attempt_number, state.upcoming_sleep, error)

    return {
        "wait": wait_strategy(policy.backoff),
        # stop_any asks in order and stops at the first yes.
        "stop": tenacity.stop_any(
            tenacity.stop_after_attempt(policy.attempts),
            _stop_at_deadline(policy.timeout),
            _stop_without_budget(spend),
        ),
        # Exceptions only, never a cancellation: tenacity hands those to predicates too.
        "retry": tenacity.retry_if_exception(
            lambda error: isinstance(error, Exception) and is_retryable(error)
        ),
        "before_sleep": before_sleep,
        "reraise": True,
    }


def loop(
    attempt: Callable[[], T],
    first: Exception,
    policy: RetryPolicy,
    pause: Callable[[float], Any],
    **rules: Any,
) -> T:
    """Go on after ``first``, the error of an attempt made already, which counts as one of ``policy.attempts``.

    ``pause(seconds)`` sleeps. ``rules``: ``is_retryable(error)``, ``spend(error)`` (take one retry out of the
    budget), ``announce(attempt, delay, error)``.
    """
    pending: Exception | None = first
    failure = first

    def attempt_or_first() -> T:
        nonlocal pending, failure
        if pending is not None:
            error, pending = pending, None
            raise error
        try:
            return attempt()
        except REFUSALS:
            raise
        except Exception as error:
            failure = error
            raise

    try:
        return tenacity.Retrying(sleep=pause, **_options(policy, **rules))(attempt_or_first)
    except REFUSALS:
        if isinstance(failure, REFUSALS):
            raise
    raise failure  # what the database said, not that it was not asked again


async def async_loop(
    attempt: Callable[[], Awaitable[T]], first: Exception, policy: RetryPolicy, **rules: Any
) -> T:
    """As ``loop``, for a coroutine function."""
    pending: Exception | None = first
    failure = first

    async def attempt_or_first() -> T:
        nonlocal pending, failure
        if pending is not None:
            error, pending = pending, None
            raise error
        try:
            return await attempt()
        except REFUSALS:
            raise
        except Exception as error:
            failure = error
            raise

    try:
        return await tenacity.AsyncRetrying(**_options(policy, **rules))(attempt_or_first)
    except REFUSALS:
        if isinstance(failure, REFUSALS):
            raise
    raise failure
