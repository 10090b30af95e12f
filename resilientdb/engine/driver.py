"""What a description of a driver has to say, and what the descriptions share.

One ``Driver`` a kind of driver: how to bound a connect, how to make the kernel notice a peer that has vanished,
where the socket is, how to ask a server for its role.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from resilientdb.config import Lifecycle

__all__ = [
    "KEEPALIVE_COUNT",
    "Cancel",
    "Driver",
    "TransactionStatus",
    "keepalive_seconds",
    "own_connection",
    "set_socket_options",
    "valid_fd",
]

TransactionStatus = Literal["idle", "open", "failed", "undecided"]
"""``failed``: the server will answer ROLLBACK to a COMMIT. ``undecided``: in a transaction, and the driver
does not say whether it has failed."""

Cancel: TypeAlias = "Callable[[float, Callable[[Callable[[Any], None]], None]], None]"
"""Has the server cancel a statement: called with the time by which it must be over, and with what does some work on
another connection to the same node. Raises when the server may not have heard."""

KEEPALIVE_COUNT: Final = 3
"""Unanswered keepalives before the connection is given up: one may be lost, two in a row hardly."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver of which nothing is known, and the promise that every described one keeps.

    No method but ``begin_with``, ``commit`` and ``rolls_back_on_timeout`` raises for a broken or closed connection,
    and no other waits.
    """

    name: str
    role_query: str | None = None
    """A statement whose one row says whether the server is a primary; None where there is no such thing."""
    has_server: bool = True
    """Whether there are sessions that can be lost: not with a database in this process."""
    reads_with_begin: bool = True
    """Whether the cursor has the rows of ``begin_with``'s statement afterwards, and the driver does not drop them."""

    def socket_defaults(self, lifecycle: Lifecycle, given: Mapping[str, Any]) -> dict[str, Any]:
        """Connect parameters to add to ``given``: all that the URL and ``connect_args`` already hold.

        Never contains what is given there, or in the environment where the driver reads it from there.
        """
        _ = lifecycle, given
        return {}

    def connect_timeout_param(self, seconds: float) -> dict[str, Any]:
        """Connect parameters that bound one attempt to about ``seconds``, replacing any given before."""
        _ = seconds
        return {}

    def after_connect(self, dbapi_connection: object, lifecycle: Lifecycle) -> None:
        """Set on a fresh connection's socket what could not be said in its connect parameters."""

    def socket_fd(self, dbapi_connection: object) -> int | None:
        """The descriptor of the connection's socket; None if it has none, or no longer.

        The number is only good until the driver closes it: whoever keeps it keeps a dup.
        """
        _ = dbapi_connection
        return None

    def transaction_status(self, dbapi_connection: object) -> TransactionStatus | None:
        """Where the connection stands, from what the driver already knows; None if it does not say."""
        _ = dbapi_connection
        return None

    def is_idle(self, dbapi_connection: object) -> bool:
        """Whether neither the server nor the driver is in a transaction, as far as the driver knows: there is nothing
        to commit or to roll back. False if it does not say."""
        _ = dbapi_connection
        return False

    def has_declared_read_only(self, dbapi_connection: object) -> bool:
        """Whether the transaction is READ ONLY because the application said so, as far as the driver knows, and not
        because the server takes no writes. False if it does not say."""
        _ = dbapi_connection
        return False

    def is_failed(self, dbapi_connection: object) -> bool:
        """Whether the server will answer ROLLBACK to a COMMIT. False if the driver does not say."""
        return self.transaction_status(dbapi_connection) == "failed"

    def answer_to_commit(self, dbapi_connection: object) -> Callable[[], str | None] | None:
        """For a driver that cannot say whether the transaction has failed: prepare to read the answer to the COMMIT
        that comes next, and return what tells it afterwards. None: there is no need."""
        _ = dbapi_connection
        return None

    def commit(self, dbapi_connection: object, commit: Callable[[Any], None], connection: Any) -> None:
        """``commit(connection)``, which is not cancelled at the server when the thread that waits for it is
        interrupted."""
        _ = dbapi_connection
        commit(connection)

    def rolls_back(self, error: BaseException) -> bool | None:
        """Whether the server, when it answers with this error, has rolled back the whole transaction and takes the
        next statement as the first of a new one. None: if it is set up so, see ``rolls_back_on_timeout``."""
        _ = error
        return False

    def rolls_back_on_timeout(self, dbapi_connection: object) -> bool:
        """Ask the server whether it does so when a lock could not be had in time."""
        _ = dbapi_connection
        return False

    def begin_with(self, dbapi_connection: object, cursor: Any, statement: str) -> None:
        """Execute ``statement``, which has no parameters, as the first of a transaction: in one message with BEGIN
        where the driver lets us. Its rows, see ``reads_with_begin``. Raises as ``cursor.execute`` does, and waits as
        it does."""
        _ = dbapi_connection
        cursor.execute(statement)

    def may_withhold_begin(self, dbapi_connection: object, default_isolation: str | None) -> bool:
        """Whether BEGIN could be left out before a read: no transaction is open, the next would be a plain one in
        READ COMMITTED, and leaving it out costs no round trip.

        ``default_isolation``: the level of a transaction that names none; None if unknown.
        """
        _ = dbapi_connection, default_isolation
        return False

    def withhold_begin(self, dbapi_connection: object) -> None:
        """Send what comes next without BEGIN in front of it, until ``allow_begin``."""

    def allow_begin(self, dbapi_connection: object) -> None:
        """End what ``withhold_begin`` began, or was about to begin."""

    def is_stale_plan(self, error: BaseException) -> bool:
        """Whether a statement failed because of what the driver has prepared on the connection, not for itself."""
        _ = error
        return False

    def is_busy(self, dbapi_connection: object) -> bool:
        """Whether the driver may wait for an answer just now. Also called from other threads than its own."""
        _ = dbapi_connection
        return True

    def commits_alone(self, dbapi_connection: object) -> bool:
        """Whether the statement that is under way may commit by itself. Called from other threads."""
        _ = dbapi_connection
        return True

    def cancel(self, dbapi_connection: object) -> Cancel | None:
        """What has the server cancel the statement that is under way; None where there is no way to. Called from
        other threads, and only during a statement."""
        _ = dbapi_connection
        return None

    def was_cancelled(self, error: BaseException) -> bool:
        """Whether the server says that it has cancelled the statement, and nothing else of it."""
        _ = error
        return False

    def is_whole(self, dbapi_connection: object) -> bool:
        """Whether the driver's idea of the transaction is still sound, so that the next one will be one. Asked after
        a statement has failed."""
        _ = dbapi_connection
        return True

    cancels_silently = False
    """Whether a statement that is cancelled may look as if it had ended by itself, with whatever result."""

    def settle(self, dbapi_connection: object, seconds: float) -> bool:
        """After a task was cancelled during a statement: wait until the driver's own cancel has come to its end.
        Whether the connection is as before the statement, or its transaction is, which then has failed."""
        _ = dbapi_connection, seconds
        return False

    def read_role(self, row: Sequence[Any]) -> Literal["primary", "replica"]:
        """What the row of ``role_query`` says: its first column is whether the server is in recovery."""
        return "replica" if row[0] else "primary"


def own_connection(connection: object) -> object:
    """The driver's own connection behind SQLAlchemy's async adapter or pool proxy, or the argument itself."""
    try:
        return getattr(connection, "driver_connection", None) or connection
    except Exception:  # noqa: BLE001 - a proxy that has been invalidated
        return connection


def valid_fd(fd: object) -> int | None:
    return fd if isinstance(fd, int) and fd >= 0 else None


def keepalive_seconds(idle: float) -> tuple[int, int]:
    """Idle time and interval, in whole seconds as the kernel takes them: a vanished peer is given up after
    about twice the idle time."""
    return max(1, math.ceil(idle)), max(1, math.ceil(idle / KEEPALIVE_COUNT))


def set_socket_options(fd: int | None, lifecycle: Lifecycle) -> None:
    """Have the kernel notice a peer that has vanished, where the driver's parameters cannot say it."""
    if fd is None:
        return
    # Options belong to the socket, not the descriptor: a dup reaches them without touching an object that
    # the event loop owns (uvloop's stand-in for a socket has no setsockopt).
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
        if duplicate.family in {socket.AF_INET, socket.AF_INET6}:
            _set_tcp_options(duplicate, lifecycle)


def _set_tcp_options(connected: socket.socket, lifecycle: Lifecycle) -> None:
    if lifecycle.keepalive_idle is not None:
        idle, interval = keepalive_seconds(lifecycle.keepalive_idle)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # macOS calls the idle time TCP_KEEPALIVE; a system that has none of these keeps its own.
        idle_option = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
        for option, value in (
            (idle_option, idle),
            ("TCP_KEEPINTVL", interval),
            ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ):
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if lifecycle.tcp_user_timeout is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = math.ceil(lifecycle.tcp_user_timeout * 1000)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
