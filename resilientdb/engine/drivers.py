"""What the library knows of each DBAPI driver, so that nothing else has to ask which one it is talking to.

``driver_of(dialect)`` finds a driver's description; one that nobody has described gets the neutral one, which adds
nothing and knows nothing. PostgreSQL's and SQLite's are here, MySQL's and MariaDB's in ``drivers_mysql``.

Silence is the hard fault. Three settings answer three kinds of it, and none replaces another: the connect
timeout while connecting; TCP_USER_TIMEOUT while sent data is unacknowledged, when keepalives do not run; and
keepalives while an answer is awaited and nothing is unacknowledged. Drivers differ in what they can be told:
libpq takes all three as parameters, asyncpg only the first, and the rest is set on its socket.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import math
import os
import re
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from resilientdb.engine import hasty, libpq
from resilientdb.engine.compat import await_only, undisturbed
from resilientdb.engine.driver import (
    KEEPALIVE_COUNT,
    Cancel,
    Driver,
    TransactionStatus,
    keepalive_seconds,
    own_connection,
    set_socket_options,
    valid_fd,
)
from resilientdb.engine.drivers_mysql import MYSQL_DRIVERS
from resilientdb.runtime import cancel_request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.config import Lifecycle

__all__ = ["Driver", "TransactionStatus", "driver_of"]


class _Libpq(Driver):
    """psycopg (sync and async) and psycopg2: connect parameters are libpq's."""

    __slots__ = ()

    def socket_defaults(self, lifecycle: Lifecycle, given: Mapping[str, Any]) -> dict[str, Any]:
        added: dict[str, Any] = {}
        if lifecycle.connect_timeout is not None and "PGCONNECT_TIMEOUT" not in os.environ:
            added |= self.connect_timeout_param(lifecycle.connect_timeout)
        if lifecycle.keepalive_idle is not None and str(given.get("keepalives", "1")) != "0":
            idle, interval = keepalive_seconds(lifecycle.keepalive_idle)
            added |= {
                "keepalives": 1,
                "keepalives_idle": idle,
                "keepalives_interval": interval,
                "keepalives_count": KEEPALIVE_COUNT,
            }
        if lifecycle.tcp_user_timeout is not None and _libpq_version(self.name) >= 120_000:
            added["tcp_user_timeout"] = math.ceil(lifecycle.tcp_user_timeout * 1000)
        # Parameters may also come as one text, under either driver's name for it; keywords would override it.
        text = f"{given.get('dsn') or ''} {given.get('conninfo') or ''}"
        return {
            key: value
            for key, value in added.items()
            if key not in given and not re.search(rf"\b{key}\s*=", text)
        }

    def connect_timeout_param(self, seconds: float) -> dict[str, Any]:
        # libpq takes whole seconds, 0 means for ever, and both libpq and psycopg take 1 for 2.
        return {"connect_timeout": max(2, math.ceil(seconds))}

    def transaction_status(self, dbapi_connection: object) -> TransactionStatus | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            # Both drivers have .info; the numbers are libpq's PGTransactionStatusType.
            return _LIBPQ_STATUS.get(int(connection.info.transaction_status))
        except Exception:  # noqa: BLE001 - a closed connection raises the driver's own errors
            return None

    def is_busy(self, dbapi_connection: object) -> bool:
        # 1 is ACTIVE: sent, and not answered.
        return self.transaction_status(dbapi_connection) in {None, "undecided"}

    def commits_alone(self, dbapi_connection: object) -> bool:
        connection: Any = own_connection(dbapi_connection)
        return bool(connection.autocommit)

    def was_cancelled(self, error: BaseException) -> bool:
        return _sqlstate(error) == _QUERY_CANCELED


class _Psycopg(_Libpq):
    __slots__ = ()

    def is_idle(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        try:
            # The status alone says idle, too, while a prepared transaction awaits its end, or replies are to be read.
            return (
                connection.pgconn.transaction_status == 0
                and connection._tpc is None  # noqa: SLF001
                and connection._pipeline is None  # noqa: SLF001
            )
        except Exception:  # noqa: BLE001
            return False

    def is_failed(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        try:
            return bool(connection.pgconn.transaction_status == _LIBPQ_FAILED)
        except Exception:  # noqa: BLE001
            return False

    def begin_with(self, dbapi_connection: object, cursor: Any, statement: str) -> None:
        connection: Any = own_connection(dbapi_connection)
        if connection._autocommit or not self.is_idle(dbapi_connection):  # noqa: SLF001
            self._execute_unprepared(cursor, statement)
            return
        begin = connection._get_tx_start_command().decode()  # noqa: SLF001 - as it would send it itself
        self.withhold_begin(dbapi_connection)
        try:
            self._execute_unprepared(cursor, f"{begin}; {statement}")
        finally:
            self.allow_begin(dbapi_connection)

    def commit(self, dbapi_connection: object, commit: Callable[[Any], None], connection: Any) -> None:
        own: Any = dbapi_connection
        own._try_cancel = _let_the_interrupt_go_on  # noqa: SLF001 - what it calls upon Ctrl-C
        try:
            commit(connection)
        finally:
            del own._try_cancel  # noqa: SLF001 - the class has its own

    def _execute_unprepared(self, cursor: Any, statement: str) -> None:
        # Only what is not prepared can be several statements, and no two of these are alike.
        cursor.execute(statement, prepare=False)
        cursor.nextset()  # past BEGIN; it has been received already

    def may_withhold_begin(self, dbapi_connection: object, default_isolation: str | None) -> bool:
        connection: Any = dbapi_connection
        level = connection.isolation_level
        return (
            getattr(connection, "_autocommit", None) is False
            and (default_isolation == _ALONE if level is None else level == _PSYCOPG_READ_COMMITTED)
            and not connection.read_only
            and not connection.deferrable
            and self.is_idle(connection)
        )

    def withhold_begin(self, dbapi_connection: object) -> None:
        connection: Any = dbapi_connection
        # The property's setter takes a lock and waits, and an asynchronous connection has none.
        connection._autocommit = True  # noqa: SLF001

    def allow_begin(self, dbapi_connection: object) -> None:
        connection: Any = dbapi_connection
        connection._autocommit = False  # noqa: SLF001

    def has_declared_read_only(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        return _declared_read_only(lambda name: connection.info.parameter_status(name))  # noqa: PLW0108

    def cancel(self, dbapi_connection: object) -> Cancel | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            request = connection.pgconn.cancel_conn()
        except Exception:  # noqa: BLE001 - before libpq 17 it holds the interpreter's lock while it waits
            return None
        return partial(cancel_request.drive, request)

    def is_stale_plan(self, error: BaseException) -> bool:
        # It prepares what it has sent five times, and forgets that with a ROLLBACK only. Meanwhile a table may have
        # been altered ("cached plan must not change result type"), the session been reset, or another session been
        # put in its place by a pooler, which has no statement of this name, or another one.
        return getattr(error, "sqlstate", None) in {"0A000", "26000", "42P05"}

    def socket_fd(self, dbapi_connection: object) -> int | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            return valid_fd(connection.pgconn.socket)
        except Exception:  # noqa: BLE001
            return None


def _let_the_interrupt_go_on(*_: object, **__: object) -> None:
    """In place of a cancel request: a COMMIT that waits for its standby would be answered without it."""
    raise  # noqa: PLE0704 - what psycopg is handling, as it would in the end


class _PsycopgAsync(_Psycopg):
    """The same behind SQLAlchemy's adapter."""

    __slots__ = ()

    def socket_defaults(self, lifecycle: Lifecycle, given: Mapping[str, Any]) -> dict[str, Any]:
        added = super().socket_defaults(lifecycle, given)
        connect = hasty.connect()
        return added if connect is None else {"async_creator_fn": connect, **added}

    def settle(self, dbapi_connection: object, seconds: float) -> bool:
        _ = seconds  # it has been waited for: see hasty
        return self.transaction_status(dbapi_connection) in {"idle", "open", "failed"}

    def has_declared_read_only(self, dbapi_connection: object) -> bool:
        return super().has_declared_read_only(own_connection(dbapi_connection))

    def is_idle(self, dbapi_connection: object) -> bool:
        return super().is_idle(own_connection(dbapi_connection))

    def is_failed(self, dbapi_connection: object) -> bool:
        return super().is_failed(own_connection(dbapi_connection))

    def commit(self, dbapi_connection: object, commit: Callable[[Any], None], connection: Any) -> None:
        _ = dbapi_connection
        commit(connection)  # a task's cancellation does not get here: see engine.commit

    def _execute_unprepared(self, cursor: Any, statement: str) -> None:
        # The adapter's cursor does not pass the option on.
        own = cursor._cursor  # noqa: SLF001
        await_only(own.execute(statement, prepare=False))
        own.nextset()
        if own.description is not None:
            # As the adapter does after its own execute; what it has kept is all that SQLAlchemy can read.
            cursor._rows = deque(await_only(own.fetchall()))  # noqa: SLF001

    def may_withhold_begin(self, dbapi_connection: object, default_isolation: str | None) -> bool:
        return super().may_withhold_begin(own_connection(dbapi_connection), default_isolation)

    def withhold_begin(self, dbapi_connection: object) -> None:
        super().withhold_begin(own_connection(dbapi_connection))

    def allow_begin(self, dbapi_connection: object) -> None:
        super().allow_begin(own_connection(dbapi_connection))


class _Psycopg2(_Libpq):
    __slots__ = ()

    def is_failed(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        try:
            return bool(connection.get_transaction_status() == _LIBPQ_FAILED)
        except Exception:  # noqa: BLE001
            return False

    def is_idle(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        try:
            # It has a notion of its own, which outlives a COMMIT or ROLLBACK that was sent as a text.
            return bool(connection.status == 1 and connection.get_transaction_status() == 0)
        except Exception:  # noqa: BLE001
            return False

    def has_declared_read_only(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        return _declared_read_only(lambda name: connection.get_parameter_status(name))  # noqa: PLW0108

    def may_withhold_begin(self, dbapi_connection: object, default_isolation: str | None) -> bool:
        connection: Any = dbapi_connection
        return (
            default_isolation == _ALONE
            and self.is_idle(connection)
            and not connection.autocommit
            # Any value, also the server's own default, would be sent to the session when autocommit changes.
            and connection.isolation_level is None
            and connection.readonly is None
            and connection.deferrable is None
        )

    def cancel(self, dbapi_connection: object) -> Cancel | None:
        connection: Any = own_connection(dbapi_connection)
        request = libpq.cancel_connection("psycopg2._psycopg", connection.pgconn_ptr)
        return None if request is None else partial(cancel_request.drive, request)

    def withhold_begin(self, dbapi_connection: object) -> None:
        connection: Any = dbapi_connection
        connection.autocommit = True

    def allow_begin(self, dbapi_connection: object) -> None:
        connection: Any = dbapi_connection
        if not connection.closed:
            connection.autocommit = False

    def socket_fd(self, dbapi_connection: object) -> int | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            return valid_fd(connection.fileno())
        except Exception:  # noqa: BLE001
            return None


class _Asyncpg(Driver):
    """asyncpg speaks the protocol itself, on an asyncio transport, and sets nothing on its socket."""

    __slots__ = ()

    def socket_defaults(self, lifecycle: Lifecycle, given: Mapping[str, Any]) -> dict[str, Any]:
        if lifecycle.connect_timeout is None or "timeout" in given:
            return {}
        return self.connect_timeout_param(lifecycle.connect_timeout)

    def connect_timeout_param(self, seconds: float) -> dict[str, Any]:
        # It covers all hosts of a multi-host URL together, so a silent first one eats it.
        return {"timeout": seconds}

    def after_connect(self, dbapi_connection: object, lifecycle: Lifecycle) -> None:
        set_socket_options(self.socket_fd(dbapi_connection), lifecycle)

    def socket_fd(self, dbapi_connection: object) -> int | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            # Private, but its only way: there since the first releases, and checked by the tests.
            return valid_fd(connection._transport.get_extra_info("socket").fileno())  # noqa: SLF001
        except Exception:  # noqa: BLE001
            return None

    def is_idle(self, dbapi_connection: object) -> bool:
        adapter: Any = dbapi_connection  # SQLAlchemy's, which keeps asyncpg's transaction object
        try:
            return adapter._transaction is None and not adapter.driver_connection.is_in_transaction()  # noqa: SLF001
        except Exception:  # noqa: BLE001
            return False

    def has_declared_read_only(self, dbapi_connection: object) -> bool:
        connection: Any = own_connection(dbapi_connection)
        return _declared_read_only(lambda name: getattr(connection.get_settings(), name))

    def may_withhold_begin(self, dbapi_connection: object, default_isolation: str | None) -> bool:
        adapter: Any = dbapi_connection
        if not self.is_idle(adapter):
            return False
        level = adapter.isolation_level  # "autocommit" is one of them
        return (
            (default_isolation == _ALONE if level is None else level == "read_committed")
            and not adapter.readonly
            and not adapter.deferrable
            # Without it each statement is prepared in a round trip of its own, which a pooler in transaction mode may
            # take to another server than the next.
            and getattr(adapter, "_prepared_statement_cache", None) is not None
        )

    def withhold_begin(self, dbapi_connection: object) -> None:
        adapter: Any = dbapi_connection
        adapter.autocommit = True

    def allow_begin(self, dbapi_connection: object) -> None:
        adapter: Any = dbapi_connection
        adapter.autocommit = False

    def commits_alone(self, dbapi_connection: object) -> bool:
        adapter: Any = dbapi_connection
        return bool(adapter.isolation_level == "autocommit")

    def cancel(self, dbapi_connection: object) -> Cancel | None:
        connection: Any = own_connection(dbapi_connection)
        protocol, transport, parameters = connection._protocol, connection._transport, connection._params  # noqa: SLF001
        address, secure = connection._addr, None  # noqa: SLF001
        if transport.get_extra_info("ssl_object") is not None:
            context, host = parameters.ssl, None if isinstance(address, str) else address[0]
            secure = partial(cancel_request.ask_for_tls, context, host)
            if getattr(parameters, "direct_tls", False):
                secure = partial(context.wrap_socket, server_hostname=host)
        if not isinstance(address, str):
            address = transport.get_extra_info("peername")  # the very server, and no name to be resolved
        session = protocol.backend_pid, protocol.backend_secret
        return partial(cancel_request.send_cancel, address, secure, session)

    def was_cancelled(self, error: BaseException) -> bool:
        return _sqlstate(error) == _QUERY_CANCELED

    def settle(self, dbapi_connection: object, seconds: float) -> bool:
        connection: Any = own_connection(dbapi_connection)
        try:
            await_only(undisturbed(_wait_for_cancel(connection, seconds)))
            return not connection.is_closed() and self.is_whole(dbapi_connection)
        except Exception:  # noqa: BLE001
            return False

    def is_whole(self, dbapi_connection: object) -> bool:
        # What ends a BEGIN, ends it between asyncpg, which believes itself in a transaction from then on, and
        # SQLAlchemy's adapter, which does not. Each later transaction would then be a savepoint in one that nobody
        # commits, and all that was acknowledged would be lost.
        adapter: Any = dbapi_connection
        # 2.0 has a transaction object before it has begun.
        has_begun = getattr(adapter, "_started", adapter._transaction is not None)  # noqa: SLF001
        return has_begun is (adapter.driver_connection._top_xact is not None)  # noqa: SLF001

    def answer_to_commit(self, dbapi_connection: object) -> Callable[[], str | None] | None:
        adapter: Any = dbapi_connection
        transaction = getattr(adapter, "_transaction", None)
        if transaction is None:
            return None  # nothing will be sent
        transaction._connection = between = _Between(transaction._connection)  # noqa: SLF001
        return lambda: between.answer

    def begin_with(self, dbapi_connection: object, cursor: Any, statement: str) -> None:
        adapter: Any = dbapi_connection
        if adapter.isolation_level == "autocommit" or adapter._transaction is not None:  # noqa: SLF001
            cursor.execute(statement)
            return
        # As SQLAlchemy's adapter begins, which it would do just before this.
        connection = adapter.driver_connection
        transaction = connection.transaction(
            isolation=adapter.isolation_level, readonly=adapter.readonly, deferrable=adapter.deferrable
        )
        transaction._connection = between = _Between(connection, statement)  # noqa: SLF001
        await_only(transaction.start())
        transaction._connection = connection  # noqa: SLF001
        adapter._transaction = transaction  # noqa: SLF001
        if hasattr(adapter, "_started"):
            adapter._started = True  # noqa: SLF001 - SQLAlchemy 2.0
        if between.failure is not None:
            adapter._handle_exception(between.failure)  # noqa: SLF001 - raises it as the driver's

    def transaction_status(self, dbapi_connection: object) -> TransactionStatus | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            # It knows of the failed state, but does not tell it from an open transaction.
            return "undecided" if connection.is_in_transaction() else "idle"
        except Exception:  # noqa: BLE001
            return None


async def _wait_for_cancel(connection: Any, seconds: float) -> None:
    """Wait until asyncpg has had its cancel sent and answered; end the connection if that takes longer."""
    try:
        async with asyncio.timeout(seconds):
            # Private; what each of its statements begins with.
            await connection._protocol._wait_for_cancellation()  # noqa: SLF001
    except BaseException:
        connection.terminate()
        raise


class _Between:
    """Stands between asyncpg's transaction object and its connection, for the one message it sends: adds a statement
    to it, and keeps the answer, which the object drops."""

    __slots__ = ("_addition", "_connection", "answer", "failure")

    def __init__(self, connection: Any, addition: str = "") -> None:
        self._connection = connection
        self._addition = addition
        self.answer: str | None = None
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    @property
    def _top_xact(self) -> Any:
        return self._connection._top_xact  # noqa: SLF001

    @_top_xact.setter
    def _top_xact(self, transaction: Any) -> None:
        self._connection._top_xact = transaction  # noqa: SLF001

    async def execute(self, query: str) -> str | None:
        if not self._addition:
            return await self._commit(query)
        try:
            return await self._connection.execute(query + self._addition)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - raised as soon as the object has taken note of its BEGIN
            # Which may well have been executed: the transaction is there, to be rolled back.
            self.failure = error
            return None

    async def _commit(self, query: str) -> str | None:
        connection, timer, options = self._connection, None, {}
        limit = getattr(getattr(connection, "_config", None), "command_timeout", None)
        if limit:
            # At the end of it asyncpg would cancel the COMMIT at the server.
            timer = asyncio.get_running_loop().call_later(limit, connection.terminate)
            options = {"timeout": _FOR_EVER}
        try:
            self.answer = await connection.execute(query, **options)
        finally:
            if timer is not None:
                timer.cancel()
        return self.answer


class _Sqlite(Driver):
    """The standard library's sqlite3, and aiosqlite around it. No socket, no server, no role."""

    __slots__ = ()

    def transaction_status(self, dbapi_connection: object) -> TransactionStatus | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            # An error that SQLite answers by rolling back leaves no transaction, rather than a failed one.
            return "open" if connection.in_transaction else "idle"
        except Exception:  # noqa: BLE001
            return None


_ALONE: Final = "READ COMMITTED"
"""The level in which each statement has a snapshot of its own: it sees the same alone as in a transaction."""
_PSYCOPG_READ_COMMITTED: Final = 2

_LIBPQ_STATUS: Final[dict[int, TransactionStatus]] = {0: "idle", 1: "undecided", 2: "open", 3: "failed"}
"""1 is ACTIVE: a command is running; 4, UNKNOWN, is a connection that is gone."""

_LIBPQ_FAILED: Final = 3
_QUERY_CANCELED: Final = "57014"
_FOR_EVER: Final = 1e6
"""Seconds; asyncpg takes None for what is configured."""

_POSTGRESQL_ROLE: Final = "SELECT pg_is_in_recovery()"

_DRIVERS: Final[dict[tuple[str, str, bool], Driver]] = {
    ("postgresql", "psycopg", False): _Psycopg("psycopg", _POSTGRESQL_ROLE),
    ("postgresql", "psycopg", True): _PsycopgAsync("psycopg_async", _POSTGRESQL_ROLE),
    ("postgresql", "psycopg2", False): _Psycopg2("psycopg2", _POSTGRESQL_ROLE),
    ("postgresql", "asyncpg", True): _Asyncpg("asyncpg", _POSTGRESQL_ROLE, reads_with_begin=False),
    ("sqlite", "pysqlite", False): _Sqlite("pysqlite", has_server=False),
    ("sqlite", "aiosqlite", True): _Sqlite("aiosqlite", has_server=False),
    **MYSQL_DRIVERS,
}
"""By dialect name, driver name and whether it is asynchronous."""


_IN_PROCESS: Final = frozenset({"", "sqlite", "duckdb"})
"""Databases in this process, which may end with their last connection; and the stand-in, which cannot be asked."""


def driver_of(dialect: Dialect) -> Driver:
    """The driver that ``dialect`` uses.

    A dialect of another database that uses a known driver (CockroachDB over psycopg) gets that driver without
    a role query: the wire is the same, the meaning of its roles is not.
    """
    # A pool made without an engine has a stand-in for a dialect.
    key = (getattr(dialect, "name", ""), getattr(dialect, "driver", ""), bool(dialect.is_async))
    if key in _DRIVERS:
        return _DRIVERS[key]
    for (_, name, is_async), driver in _DRIVERS.items():
        if (name, is_async) == key[1:]:
            return replace(driver, role_query=None)
    return Driver(key[1], has_server=key[0] not in _IN_PROCESS)


def _declared_read_only(setting: Callable[[str], str | None]) -> bool:
    """Whether a READ ONLY transaction can only be the application's wish: PostgreSQL 14 and newer tell every client,
    and again when it changes, that they are no standby and that transactions are READ WRITE unless one says more."""
    try:
        return all(setting(name) == "off" for name in ("in_hot_standby", "default_transaction_read_only"))
    except Exception:  # noqa: BLE001 - an older server, or a connection that is gone
        return False


def _sqlstate(error: BaseException) -> str | None:
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


@functools.cache
def _libpq_version(driver: str) -> int:
    """Of the libpq in use, as in 160002, because it refuses parameters it does not know; 0 if unknown."""
    try:
        if driver == "psycopg2":
            return int(importlib.import_module("psycopg2.extensions").libpq_version())
        return int(importlib.import_module("psycopg").pq.version())
    except Exception:  # noqa: BLE001
        return 0
