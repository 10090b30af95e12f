"""Whole transactions, run again when the database says that another run may succeed.

A statement inside a transaction cannot be retried: what came before it is lost with it. The unit of retry is the
function that does the whole of the transaction's work, from BEGIN to COMMIT. It is run again on a serialization
failure, a deadlock, a connection lost before COMMIT was sent, or a node that turned out not to be the primary. Once
COMMIT was sent and its reply lost, nothing is run again: ``CommitOutcomeUnknown``.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine

from resilientdb.engine import retrying
from resilientdb.engine.control import cluster_of
from resilientdb.errors import ConfigurationError
from resilientdb.policy.faults import classify
from resilientdb.runtime.context import current_deadline, deadline
from resilientdb.runtime.context import read_only as read_only_scope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from resilientdb.engine.cluster import Cluster

__all__ = ["run_transaction", "run_transaction_async"]

T = TypeVar("T")


def run_transaction(
    target: Any, function: Callable[..., T], /, *args: Any, read_only: bool = False, **kwargs: Any
) -> T:
    """Run ``function(connection_or_session, *args, **kwargs)`` in a transaction and commit it; retry as a whole.

    ``target``: an ``Engine`` made by this library (the function gets a ``Connection``) or a ``sessionmaker`` or
    other session factory bound to one (a ``Session``); each attempt gets a fresh one. The function must be safe
    to run again: no effects outside the database. ``read_only=True``: a replica may serve it. Attempts, pauses
    and their total are ``RetryPolicy``'s, within the caller's ``deadline()`` or the configured default one.

    Returns what the function returned in the attempt that was committed. Raises the last real error, or
    ``CommitOutcomeUnknown`` when a COMMIT's reply was lost.
    """
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            "run_transaction got an async function: use run_transaction_async", key="function"
        )
    cluster = _cluster_behind(target, is_async=False)

    def attempt() -> T:
        with target.begin() as work:
            return function(work, *args, **kwargs)

    with _scopes(cluster, read_only=read_only):
        try:
            return attempt()
        except Exception as error:
            if not cluster.resilience.enabled or not _may_run_again(error):
                raise
            first = error
        return retrying.loop(attempt, first, cluster.resilience.retry, time.sleep, **_rules(cluster))


async def run_transaction_async(
    target: Any, function: Callable[..., Awaitable[T]], /, *args: Any, read_only: bool = False, **kwargs: Any
) -> T:
    """As ``run_transaction``, for an ``AsyncEngine`` or ``async_sessionmaker`` and an async function."""
    cluster = _cluster_behind(target, is_async=True)

    async def attempt() -> T:
        async with target.begin() as work:
            result = function(work, *args, **kwargs)
            if not inspect.isawaitable(result):
                raise ConfigurationError(
                    "run_transaction_async needs an async function; for a plain one use run_transaction",
                    key="function",
                )
            return await result

    with _scopes(cluster, read_only=read_only):
        try:
            return await attempt()
        except Exception as error:
            if not cluster.resilience.enabled or not _may_run_again(error):
                raise
            first = error
        return await retrying.async_loop(attempt, first, cluster.resilience.retry, **_rules(cluster))


def _is_async_engine(target: Any) -> bool:
    # By its shape: importing SQLAlchemy's asyncio extension brings the whole ORM along.
    return isinstance(getattr(target, "sync_engine", None), Engine)


def _cluster_behind(target: Any, *, is_async: bool) -> Cluster:
    is_engine = isinstance(target, Engine) or _is_async_engine(target)
    engine = target if is_engine else getattr(target, "kw", {}).get("bind")
    if engine is None:
        raise ConfigurationError(
            f"{type(target).__name__} is neither an engine nor a sessionmaker with a bind: give one of them",
            key="target",
        )
    if _is_async_engine(engine) is not is_async:
        name, other = "run_transaction", "run_transaction_async"
        if is_async:
            name, other = other, name
        raise ConfigurationError(
            f"{name} got {'a sessionmaker of ' * (not is_engine)}an {type(engine).__name__}: use {other}",
            key="target",
        )
    return cluster_of(engine)


@contextlib.contextmanager
def _scopes(cluster: Cluster, *, read_only: bool) -> Any:
    with contextlib.ExitStack() as stack:
        if read_only:
            stack.enter_context(read_only_scope())
        if current_deadline() is None:
            stack.enter_context(deadline(cluster.resilience.deadline))
        yield


def _may_run_again(error: BaseException) -> bool:
    fault = classify(error)
    return fault.retry_transaction


def _rules(cluster: Cluster) -> dict[str, Any]:
    return {
        "is_retryable": _may_run_again,
        "spend": cluster.spend_retry,
        "announce": cluster.announce_transaction_retry,
    }
