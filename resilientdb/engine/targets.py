"""Where a transaction can be had: an engine, a sessionmaker, or any function that makes connections or sessions.

A transaction that may have to be run again needs a fresh one each time, so that none of them may be in use already.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine

from resilientdb.engine.compat import await_only
from resilientdb.engine.control import cluster_of
from resilientdb.engine.hooks import WITH_BEGIN
from resilientdb.engine.reading import READ_ONLY
from resilientdb.errors import ConfigurationError
from resilientdb.runtime.context import current_deadline, deadline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from resilientdb.engine.cluster import Cluster

__all__ = ["Target"]


class Target:
    """What ``run_transaction`` was given, made fit for use. ``cluster`` is what stands behind it."""

    def __init__(
        self,
        given: Any,
        *,
        is_async: bool,
        options: Mapping[str, Any] | None = None,
        declaration: str | None = None,
    ) -> None:
        """``options``: execution options of each transaction's connection. ``declaration``: a SET TRANSACTION that
        each begins with. Both as PostgreSQL has them; others get the isolation level only."""
        self._given = given
        self._options = dict(options or {})
        self._spare: Any = None
        """What a function has made so that it could be seen where it leads; the first to be used."""
        self._is_engine = isinstance(given, Engine) or _is_async_engine(given)
        engine = self._engine_behind(given)
        if _is_async_engine(engine) is not is_async:
            self._drop_spare()
            name, other = "run_transaction", "run_transaction_async"
            if is_async:
                name, other = other, name
            kind = "" if self._is_engine else "a sessionmaker of "
            raise ConfigurationError(
                f"{name} got {kind}an {type(engine).__name__}: use {other}", key="target"
            )
        try:
            self.cluster: Cluster = cluster_of(engine)
        except ConfigurationError:
            self._drop_spare()
            raise
        is_postgresql = self.cluster.dialect.name == "postgresql"
        self._declaration = declaration if is_postgresql else None
        if not is_postgresql:
            self._options.pop(READ_ONLY, None)
        self._is_plain = self._is_engine and not self._options and not self._declaration

    def begin(self) -> AbstractContextManager[Any]:
        """A transaction on a fresh connection or session, committed at the end."""
        if self._is_plain:
            plain: AbstractContextManager[Any] = self._given.begin()
            return plain
        return self._begin()

    def begin_async(self) -> AbstractAsyncContextManager[Any]:
        """As ``begin``, of an asynchronous engine."""
        if self._is_plain:
            plain: AbstractAsyncContextManager[Any] = self._given.begin()
            return plain
        return self._begin_async()

    def default_deadline(self) -> AbstractContextManager[Any]:
        """The configured deadline, for who has none in force."""
        if current_deadline() is not None:
            return contextlib.nullcontext()
        return deadline(self.cluster.resilience.deadline)

    @staticmethod
    def connection(work: Any) -> Connection:
        """The connection of a transaction: of a session, the one its own bind has."""
        connection: Connection = work if isinstance(work, Connection) else work.connection()
        return connection

    @staticmethod
    def connection_in_greenlet(work: Any) -> Connection:
        """As ``connection``, of an asynchronous one; called in a greenlet."""
        if not hasattr(work, "sync_connection"):
            work = await_only(work.connection())
        connection: Connection = work.sync_connection
        return connection

    @contextlib.contextmanager
    def _begin(self) -> Iterator[Any]:
        with self._make() as work:
            if isinstance(work, Connection):
                if self._options:
                    work.execution_options(**self._options)
                with work.begin():
                    self._declare(work)
                    yield work
            else:
                _refuse_if_begun(work)
                with work.begin():
                    if self._options:
                        self._declare(work.connection(execution_options=self._options))
                    yield work

    @contextlib.asynccontextmanager
    async def _begin_async(self) -> AsyncIterator[Any]:
        async with self._make() as work:
            if hasattr(work, "sync_connection"):
                if self._options:
                    await work.execution_options(**self._options)
                async with work.begin():
                    if self._declaration:
                        await work.run_sync(self._declare)
                    yield work
            else:
                _refuse_if_begun(work)
                async with work.begin():
                    if self._options:
                        connection = await work.connection(execution_options=self._options)
                        if self._declaration:
                            await connection.run_sync(self._declare)
                    yield work

    def _declare(self, connection: Connection) -> None:
        if self._declaration:
            connection.exec_driver_sql(self._declaration, execution_options=WITH_BEGIN)

    def _make(self) -> Any:
        made, self._spare = self._spare, None
        if made is not None:
            return made
        return self._given.connect() if self._is_engine else self._given()

    def _engine_behind(self, given: Any) -> Any:
        if self._is_engine:
            return given
        # A scoped_session passes on what its session has.
        if (
            hasattr(given, "in_transaction")
            and not hasattr(given, "session_factory")
            and not isinstance(given, type)
        ):
            raise ConfigurationError(
                f"a transaction may have to be run again, each time on a fresh connection: got an open "
                f"{type(given).__name__}, give the engine or the sessionmaker",
                key="target",
            )
        # A sessionmaker, or a bound ``engine.connect``.
        maker = getattr(given, "session_factory", given)
        engine = getattr(maker, "kw", {}).get("bind")
        owner = getattr(given, "__self__", None)
        if engine is None and (isinstance(owner, Engine) or _is_async_engine(owner)):
            engine = owner
        if engine is None and callable(given) and not hasattr(maker, "kw"):
            engine = self._engine_of_made(given)
        if engine is None:
            raise ConfigurationError(
                f"{type(given).__name__} is neither an engine nor a sessionmaker with a bind: give one of them, or a "
                "function that makes connections or sessions",
                key="target",
            )
        return engine

    def _engine_of_made(self, given: Any) -> Any:
        made = given()
        if inspect.iscoroutine(made):
            made.close()
            return None
        self._spare = made
        if hasattr(
            made, "get_bind"
        ):  # a session; of an asynchronous one, it is the engine's synchronous face
            return getattr(made, "bind", None) or made.get_bind()
        return getattr(made, "engine", None)

    def _drop_spare(self) -> None:
        if isinstance(self._spare, Connection):
            self._spare.close()
        self._spare = None


def _is_async_engine(engine: Any) -> bool:
    # By its shape: importing SQLAlchemy's asyncio extension brings the whole ORM along.
    return isinstance(getattr(engine, "sync_engine", None), Engine) and not hasattr(engine, "in_transaction")


def _refuse_if_begun(session: Any) -> None:
    if session.in_transaction():
        raise ConfigurationError(
            "the session is in a transaction already, which a retry could not run again from its beginning: give a "
            "sessionmaker, so that each attempt gets a session of its own",
            key="target",
        )
