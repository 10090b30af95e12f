"""PostgreSQL's cancel requests: how one is sent, and seen through.

A request names a session and its secret, needs no login, and goes by a connection of its own, which the server closes
when the session has been told. What comes after that cannot be hit by it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any, Final, Protocol

from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CancelConnection", "ask_for_tls", "drive", "send_cancel"]


class CancelConnection(Protocol):
    """libpq's ``PGcancelConn``, as psycopg has it."""

    @property
    def socket(self) -> int: ...
    def start(self) -> None: ...
    def poll(self) -> int: ...
    def finish(self) -> None: ...


_READING, _WRITING, _OK = 1, 2, 3
"""Of libpq's PostgresPollingStatusType; 0 is FAILED."""


def drive(request: CancelConnection, until: float, _elsewhere: object = None) -> None:
    """See a request of libpq's through, which goes the way its connection went, TLS and all."""
    try:
        request.start()
        while (status := int(request.poll())) != _OK:
            if status not in {_READING, _WRITING}:
                raise ConnectionError("the server does not take the cancel")
            waiter = select.poll()
            waiter.register(request.socket, select.POLLIN if status == _READING else select.POLLOUT)
            if not waiter.poll(_milliseconds(until)):
                raise TimeoutError("the cancel is not answered")
    finally:
        request.finish()


def send_cancel(
    address: Any,
    secure: Callable[[socket.socket], ssl.SSLSocket] | None,
    session: tuple[int, int],
    until: float,
    _elsewhere: object = None,
) -> None:
    """Send PostgreSQL's CancelRequest to ``address``, for a ``session`` (its pid and secret)."""
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(_connected(address, _left(until)))
        if secure is not None:
            wire = stack.enter_context(secure(wire))  # the same one, from here on encrypted
        wire.sendall(struct.pack("!iiii", 16, _CANCEL_REQUEST, *session))
        while True:
            wire.settimeout(_left(until))
            try:
                if not wire.recv(1):
                    return  # closed: the session has been told
            except (ConnectionResetError, ssl.SSLError):
                return  # some close it this way


def _connected(address: Any, seconds: float) -> socket.socket:
    if not isinstance(address, str):
        return socket.create_connection(address[:2], seconds)
    wire = socket.socket(socket.AF_UNIX)
    try:
        wire.settimeout(seconds)
        wire.connect(address)
    except BaseException:
        wire.close()
        raise
    return wire


def ask_for_tls(context: ssl.SSLContext, host: str | None, wire: socket.socket) -> ssl.SSLSocket:
    """Turn a plain connection to PostgreSQL into an encrypted one."""
    wire.sendall(struct.pack("!ii", 8, _TLS_REQUEST))
    if wire.recv(1) != b"S":
        raise ConnectionError("the server does not take TLS here")
    return context.wrap_socket(wire, server_hostname=host)


_CANCEL_REQUEST: Final = 80877102
_TLS_REQUEST: Final = 80877103


def _left(until: float) -> float:
    left = until - monotonic()
    if left <= 0:
        raise TimeoutError("the cancel is not answered")
    return left


def _milliseconds(until: float) -> int:
    return max(1, int(_left(until) * 1000))
