"""What the library knows of pymysql, aiomysql and asyncmy, on MySQL and MariaDB.

All three end their ``connect_timeout`` with TCP's handshake: a server that accepts and then says nothing is waited
for without end. So the login is held to it here, too, each in the driver's own way. A ``read_timeout`` of our own is
not set for statements: no number is right for all of them, and a deadline ends any of them in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from resilientdb.engine import cancelling
from resilientdb.engine.driver import (
    Cancel,
    Driver,
    TransactionStatus,
    own_connection,
    set_socket_options,
    valid_fd,
)
from resilientdb.policy.faults import number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from resilientdb.config import Lifecycle

__all__ = ["MYSQL_DRIVERS"]

_IN_TRANSACTION: Final = 0x0001
_AUTOCOMMIT: Final = 0x0002
_IN_READ_ONLY_TRANSACTION: Final = 0x2000
"""Of the server's status, as told with each reply."""

_CANNOT_CONNECT: Final = 2003
_INTERRUPTED: Final = 1317

_ROLLED_BACK: Final = frozenset({1020, 1206, 1213})
"""Changed since it was read (in MariaDB, with ``innodb_snapshot_isolation``), no room for locks, deadlock."""
_LOCK_WAIT_TIMEOUT: Final = 1205
"""The statement only, unless ``innodb_rollback_on_timeout`` says more."""


class _MySQL(Driver):
    """They take the same status from the server, and keep the one that came with the last OK: a result set brings a
    newer one, which they throw away."""

    __slots__ = ()

    def connect_timeout_param(self, seconds: float) -> dict[str, Any]:
        return {"connect_timeout": seconds}

    def after_connect(self, dbapi_connection: object, lifecycle: Lifecycle) -> None:
        fd = self.socket_fd(dbapi_connection)
        set_socket_options(fd, lifecycle)
        if fd is not None:
            with contextlib.suppress(Exception):  # a connection that takes no attributes
                connection: Any = own_connection(dbapi_connection)
                connection.resilientdb_port = _own_port(fd)

    def transaction_status(self, dbapi_connection: object) -> TransactionStatus | None:
        status = _status(dbapi_connection)
        if status is None:
            return None
        if status & _IN_TRANSACTION:
            # A deadlock rolls the transaction back (see rolls_back), and an error brings no status.
            return "undecided"
        # Without autocommit, a SELECT since the last OK may have begun one.
        return "idle" if status & _AUTOCOMMIT else None

    def is_idle(self, dbapi_connection: object) -> bool:
        return self.transaction_status(dbapi_connection) == "idle"

    def has_declared_read_only(self, dbapi_connection: object) -> bool:
        return bool((_status(dbapi_connection) or 0) & _IN_READ_ONLY_TRANSACTION)

    cancels_silently = True  # SLEEP() and BENCHMARK() return what they like, and DO nothing at all

    def commits_alone(self, dbapi_connection: object) -> bool:
        status = _status(dbapi_connection)
        return status is None or (bool(status & _AUTOCOMMIT) and not status & _IN_TRANSACTION)

    def cancel(self, dbapi_connection: object) -> Cancel | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            return partial(cancelling.kill_query, int(connection.thread_id()), connection.resilientdb_port)
        except Exception:  # noqa: BLE001 - not connected by the library, or a connection that takes no attributes
            return None

    def was_cancelled(self, error: BaseException) -> bool:
        return bool(error.args) and error.args[0] == _INTERRUPTED

    def rolls_back(self, error: BaseException) -> bool | None:
        number = number_of(error)
        return None if number == _LOCK_WAIT_TIMEOUT else number in _ROLLED_BACK

    def rolls_back_on_timeout(self, dbapi_connection: object) -> bool:
        connection: Any = dbapi_connection
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT @@innodb_rollback_on_timeout")
            return bool(int(cursor.fetchone()[0]))
        finally:
            cursor.close()

    def read_role(self, row: Sequence[Any]) -> Literal["primary", "replica"]:
        # A number, or a word where there are more kinds of read-only than one.
        words = {str(value).upper() for value in row}
        return "primary" if words <= {"0", "OFF", "FALSE"} else "replica"


class _WhileConnecting(float):
    """A ``read_timeout`` that holds until the connection is open."""


class _PyMySQL(_MySQL):
    __slots__ = ()

    def socket_defaults(self, lifecycle: Lifecycle, given: Mapping[str, Any]) -> dict[str, Any]:
        seconds = given.get("connect_timeout", lifecycle.connect_timeout)
        added = {} if seconds is None else self.connect_timeout_param(float(seconds))
        return {key: value for key, value in added.items() if key not in given}

    def connect_timeout_param(self, seconds: float) -> dict[str, Any]:
        return {"connect_timeout": seconds, "read_timeout": _WhileConnecting(seconds)}

    def after_connect(self, dbapi_connection: object, lifecycle: Lifecycle) -> None:
        connection: Any = own_connection(dbapi_connection)
        # Private, but read before each answer: there since the first releases, and checked by the tests.
        if isinstance(getattr(connection, "_read_timeout", None), _WhileConnecting):
            connection._read_timeout = None  # noqa: SLF001
        super().after_connect(dbapi_connection, lifecycle)

    def socket_fd(self, dbapi_connection: object) -> int | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            return valid_fd(connection._sock.fileno())  # noqa: SLF001
        except Exception:  # noqa: BLE001 - a closed connection has none
            return None


class _AsyncMySQL(_MySQL):
    """On an asyncio transport, which is the protocol's own or a stream's."""

    __slots__ = ()
    leaves_it_running = (
        True  # and the connection is lost: it is closed, or the reply would be taken for the next one
    )

    def socket_defaults(self, lifecycle: Lifecycle, given: Mapping[str, Any]) -> dict[str, Any]:
        added: dict[str, Any] = {"async_creator_fn": _CREATORS[self.name]}
        if lifecycle.connect_timeout is not None:
            added["connect_timeout"] = lifecycle.connect_timeout
        return {key: value for key, value in added.items() if key not in given}

    def socket_fd(self, dbapi_connection: object) -> int | None:
        connection: Any = own_connection(dbapi_connection)
        try:
            transport = getattr(connection, "_transport", None) or connection._writer.transport  # noqa: SLF001
            return valid_fd(transport.get_extra_info("socket").fileno())
        except Exception:  # noqa: BLE001
            return None


async def _connect_aiomysql(*arguments: Any, **parameters: Any) -> Any:
    """``aiomysql.connect``, within its ``connect_timeout``."""
    aiomysql: Any = importlib.import_module("aiomysql")
    connection = aiomysql.Connection(*arguments, **parameters)
    await _open(connection, connection._connect, parameters, aiomysql.OperationalError)  # noqa: SLF001
    return connection


async def _connect_asyncmy(*arguments: Any, **parameters: Any) -> Any:
    """``asyncmy.connect``, within its ``connect_timeout``."""
    module: Any = importlib.import_module("asyncmy.connection")
    errors: Any = importlib.import_module("asyncmy.errors")
    connection = module.Connection(*arguments, **parameters)
    await _open(connection, connection.connect, parameters, errors.OperationalError)
    return connection


async def _open(
    connection: Any, connect: Callable[[], Any], parameters: Mapping[str, Any], kind: Any
) -> None:
    seconds = parameters.get("connect_timeout")
    try:
        async with asyncio.timeout(seconds):
            await connect()
    except TimeoutError as error:
        connection.close()
        # As the driver says it when TCP's handshake takes too long.
        message = f"Can't connect to MySQL server on '{parameters.get('host')}' (no answer in {seconds:g} s)"
        raise kind(_CANNOT_CONNECT, message) from error
    except BaseException:
        connection.close()
        raise


def _own_port(fd: int) -> int | None:
    """Of a TCP connection, as its server sees it if nothing is in between."""
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        if duplicate.family not in {socket.AF_INET, socket.AF_INET6}:
            return None
        return int(duplicate.getsockname()[1])


def _status(dbapi_connection: object) -> int | None:
    try:
        status = getattr(own_connection(dbapi_connection), "server_status", None)
    except Exception:  # noqa: BLE001
        return None
    return status if isinstance(status, int) else None


_CREATORS: Final[dict[str, Any]] = {"aiomysql": _connect_aiomysql, "asyncmy": _connect_asyncmy}

_ROLE: Final = "SELECT @@global.read_only, @@global.innodb_read_only"
"""``super_read_only`` implies the first; the second is how a reader of Amazon Aurora says it."""

MYSQL_DRIVERS: Final[dict[tuple[str, str, bool], Driver]] = {
    (dialect, driver.name, is_async): driver
    for driver, is_async in (
        (_PyMySQL("pymysql", _ROLE), False),
        (_AsyncMySQL("aiomysql", _ROLE), True),
        (_AsyncMySQL("asyncmy", _ROLE), True),
    )
    for dialect in ("mysql", "mariadb")
}
"""By dialect name, driver name and whether it is asynchronous."""
