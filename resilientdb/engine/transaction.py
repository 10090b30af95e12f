"""Whole transactions, run again when the database says that another run may succeed.

A statement inside a transaction cannot be retried: what came before it is lost with it. The unit of retry is the
function that does the whole of the transaction's work, from BEGIN to COMMIT. It is run again on a serialization
failure, a deadlock, a connection lost before COMMIT was sent, or a node that turned out not to be the primary.
Once COMMIT was sent and its reply lost, nothing is run again (``CommitOutcomeUnknown``), unless
``exactly_once``: then it is first found out what became of it (``once``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from resilientdb.engine import outcome, retrying
from resilientdb.engine.compat import await_only, greenlet_spawn
from resilientdb.engine.guarded import Guarded
from resilientdb.engine.hands import InTask, InThread
from resilientdb.engine.once import Once
from resilientdb.engine.outcome import Tokens, TokenTable
from resilientdb.engine.reading import READ_ONLY
from resilientdb.engine.targets import Target
from resilientdb.errors import CommitOutcomeUnknown, ConfigurationError, TransactionAborted
from resilientdb.policy.faults import Fault, classify
from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import read_only as read_only_scope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from resilientdb.engine.cluster import Cluster

__all__ = [
    "IsolationLevel",
    "run_transaction",
    "run_transaction_async",
    "transactional",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

IsolationLevel = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


def run_transaction(
    target: Any,
    function: Callable[..., T],
    /,
    *args: Any,
    read_only: bool = False,
    exactly_once: bool | TokenTable | Literal["guarded"] = False,
    isolation_level: IsolationLevel | None = None,
    **kwargs: Any,
) -> T:
    """Run ``function(connection_or_session, *args, **kwargs)`` in a transaction and commit it; retry as a whole.

    ``target``: an ``Engine`` made by this library (the function gets a ``Connection``), a ``sessionmaker`` bound to
    one (a ``Session``), or any function that makes one of the two; each attempt gets a fresh one. The function must
    be safe to run again: no effects outside the database. Attempts, pauses and their total are ``RetryPolicy``'s,
    within the caller's ``deadline()`` or the configured default one.

    ``read_only=True``: a replica may serve it, and PostgreSQL refuses to write (READ ONLY; with SERIALIZABLE also
    DEFERRABLE, on the primary). ``isolation_level``: of this transaction; None = as configured.

    ``exactly_once=True``: when a COMMIT's reply is lost, find out what became of it, and run the function again only
    if it was not committed. Needs the table that ``install(engine)`` creates; a ``TokenTable`` says which, if it is
    another. ``exactly_once="guarded"`` (PostgreSQL) needs none: it asks by the transaction's number, which nobody can
    any more once the server has crashed, restarted or failed over.

    Returns what the function returned in the attempt that was committed. Raises the last real error, or
    ``CommitOutcomeUnknown`` when a COMMIT's reply was lost: with ``exactly_once``, only when what became of it could
    not be learned, and, where there is a table, with the ``key`` that ``resolve()`` takes later.
    """
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            "run_transaction got an async function: use run_transaction_async", key="function"
        )
    how = _How(target, False, read_only, exactly_once, isolation_level)
    begin = how.target.begin

    def attempt() -> T:
        with begin() as work:
            return function(work, *args, **kwargs)

    if how.evidence is not None:
        attempt = Once(
            InThread(how.target), how.cluster, how.evidence, lambda work: function(work, *args, **kwargs)
        ).run

    began = monotonic()
    with how.scopes():
        try:
            return attempt()
        except Exception as error:
            if not how.cluster.resilience.enabled or not how.may_run_again(error):
                raise
            first = error
        return retrying.loop(
            attempt, first, how.cluster.resilience.retry, time.sleep, began=began, **how.rules()
        )


async def run_transaction_async(
    target: Any,
    function: Callable[..., Awaitable[T]],
    /,
    *args: Any,
    read_only: bool = False,
    exactly_once: bool | TokenTable | Literal["guarded"] = False,
    isolation_level: IsolationLevel | None = None,
    **kwargs: Any,
) -> T:
    """As ``run_transaction``, for an ``AsyncEngine`` or ``async_sessionmaker`` and an async function."""
    how = _How(target, True, read_only, exactly_once, isolation_level)
    begin = how.target.begin_async

    def call(work: Any) -> Awaitable[T]:
        result = function(work, *args, **kwargs)
        if not inspect.isawaitable(result):
            raise ConfigurationError(
                "run_transaction_async needs an async function; for a plain one use run_transaction",
                key="function",
            )
        return result

    async def attempt() -> T:
        async with begin() as work:
            return await call(work)

    if how.evidence is not None:
        once = Once(
            InTask(how.target), how.cluster, how.evidence, lambda work: await_only(_awaiting(call(work)))
        )
        attempt = functools.partial(greenlet_spawn, once.run)

    began = monotonic()
    with how.scopes():
        try:
            return await attempt()
        except Exception as error:
            if not how.cluster.resilience.enabled or not how.may_run_again(error):
                raise
            first = error
        return await retrying.async_loop(
            attempt, first, how.cluster.resilience.retry, began=began, **how.rules()
        )


def transactional(
    target: Any,
    /,
    *,
    read_only: bool = False,
    exactly_once: bool | TokenTable | Literal["guarded"] = False,
    isolation_level: IsolationLevel | None = None,
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[P, R]]:
    """``run_transaction`` as a decorator, for plain and for async functions.

    The function's first parameter is the connection or session; callers leave it out::

        @rdb.transactional(engine, exactly_once=True)
        def transfer(connection, giver, taker, amount): ...


        transfer("alice", "bob", 10)
    """
    options: Any = {
        "read_only": read_only,
        "exactly_once": exactly_once,
        "isolation_level": isolation_level,
    }

    def decorate(function: Callable[Concatenate[Any, P], R]) -> Callable[P, R]:
        run: Any = run_transaction_async if inspect.iscoroutinefunction(function) else run_transaction

        @functools.wraps(function)
        def in_transaction(*args: P.args, **kwargs: P.kwargs) -> R:
            # Bound first: its parameters may have the names of ours.
            bound = functools.partial(_call, function, args, kwargs)
            result: R = run(target, bound, **options)
            return result

        @functools.wraps(function)
        async def in_transaction_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            return await run(target, functools.partial(_call, function, args, kwargs), **options)

        if inspect.iscoroutinefunction(function):
            return in_transaction_async  # type: ignore[return-value]
        return in_transaction

    return decorate


# -- inside ---------------------------------------------------------------------------------------------------------


class _Running:
    """A transaction under way, as seen from inside its function."""

    __slots__ = ("cluster", "ended", "outer")

    def __init__(self, cluster: Cluster, outer: _Running | None) -> None:
        self.cluster = cluster
        self.outer = outer
        self.ended = False
        """A task started in the function may outlive it, and keeps its context."""

    def is_on(self, cluster: Cluster) -> bool:
        return (self.cluster is cluster and not self.ended) or (
            self.outer is not None and self.outer.is_on(cluster)
        )


_running: ContextVar[_Running | None] = ContextVar("resilientdb_transaction", default=None)


class _How:
    """What one call asks for, checked."""

    def __init__(
        self,
        target: Any,
        is_async: bool,
        read_only: bool,
        exactly_once: bool | TokenTable | Literal["guarded"],
        isolation_level: str | None,
    ) -> None:
        level = isolation_level.upper().replace("_", " ") if isolation_level is not None else None
        serializable = level == "SERIALIZABLE"
        options: dict[str, Any] = {}
        if level is not None:
            options["isolation_level"] = level
        declaration = None
        if read_only and serializable:
            declaration = "SET TRANSACTION READ ONLY, DEFERRABLE"
        elif read_only:
            options[READ_ONLY] = True
        if exactly_once is not False and read_only:
            raise ConfigurationError(
                "exactly_once contradicts read_only=True: there is nothing that could be done twice",
                key="exactly_once",
            )
        if level == "AUTOCOMMIT":
            raise ConfigurationError("AUTOCOMMIT is no transaction", key="isolation_level", value=level)
        self.target = Target(target, is_async=is_async, options=options, declaration=declaration)
        self.cluster = self.target.cluster
        self.evidence = _evidence(exactly_once, self.cluster)
        running = _running.get()
        if running is not None and not read_only and running.is_on(self.cluster):
            raise ConfigurationError(
                "run_transaction inside the function of another one, of the same engine: a retry of the outer would "
                "run the inner again, though it is committed already, and each needs a connection of its own; pass "
                "the connection or session on, or open an independent transaction with engine.begin()",
                key="target",
            )
        self._read_only = read_only
        # PostgreSQL has no SERIALIZABLE on a standby; DEFERRABLE, on the primary, never conflicts with anybody.
        self._may_use_replica = read_only and not serializable
        self._writes_nothing = read_only and self.cluster.dialect.name == "postgresql"

    @contextlib.contextmanager
    def scopes(self) -> Any:
        running = _Running(self.cluster, _running.get())
        token = _running.set(running)
        try:
            with contextlib.ExitStack() as stack:
                if self._may_use_replica:
                    stack.enter_context(read_only_scope())
                stack.enter_context(self.target.default_deadline())
                yield
        finally:
            running.ended = True
            _running.reset(token)

    def may_run_again(self, error: BaseException) -> bool:
        if isinstance(error, TransactionAborted):
            return error.retryable
        if self._writes_nothing and isinstance(error, CommitOutcomeUnknown):
            return True  # a READ ONLY transaction has nothing to be in doubt about
        if self._writes_nothing and classify(error) is Fault.WRONG_ROLE:
            return False  # a write, in a transaction that was said to have none
        return retrying.may_run_again(error)

    def rules(self) -> dict[str, Any]:
        return {
            "is_retryable": self.may_run_again,
            "spend": self.cluster.spend_retry,
            "announce": self.cluster.announce_transaction_retry,
        }


def _evidence(
    exactly_once: bool | TokenTable | Literal["guarded"], cluster: Cluster
) -> Tokens | Guarded | None:
    """What ``exactly_once`` asks for, made for one call."""
    if exactly_once is False:
        return None
    if exactly_once == "guarded":
        return Guarded(cluster.dialect, cluster.driver)
    if exactly_once is not True and not isinstance(exactly_once, TokenTable):
        raise ConfigurationError(
            f'exactly_once must be a bool, a TokenTable or "guarded"; got {exactly_once!r}',
            key="exactly_once",
            value=exactly_once,
        )
    outcome.language_of(cluster.dialect)
    return Tokens(TokenTable() if exactly_once is True else exactly_once)


async def _awaiting(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _call(function: Callable[..., R], args: Any, kwargs: Any, work: Any) -> R:
    return function(work, *args, **kwargs)
