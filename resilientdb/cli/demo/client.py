"""A small HTTP/1.1 client for loopback: connections are kept and reused, one request at a time on each.

A general client would spend more processor time on a request than the applications under test.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Final, NamedTuple

__all__ = ["ConnectionBroken", "Pool", "Response"]

_IDLE: Final = 5.0
"""Seconds after which an unused connection is not trusted any more; the servers keep theirs for longer."""


class ConnectionBroken(ConnectionError):
    """The server closed the connection before the response was complete."""


class Response(NamedTuple):
    """What is kept of a response."""

    status: int
    retry_after: str | None
    reason: str
    """Of an RFC 9457 problem, its ``reason``; "" for everything else."""


class Pool:
    """Connections to one server; as many as there are requests under way. For one event loop."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str) -> Response:
        """Send a request without a body. ``OSError`` (``ConnectionBroken`` among them) when that fails.

        A cancelled request closes its connection, as a client that hangs up.
        """
        connection = self._reusable()
        if connection is None:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        length = "Content-Length: 0\r\n" if method == "POST" else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{length}\r\n"
        try:
            response = await connection.exchange(head.encode("ascii"))
        except BaseException:
            connection.abort()
            raise
        if connection.reusable:
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()
        return response

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def _reusable(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.monotonic() - connection.used_at < _IDLE:
                return connection
            connection.abort()
        return None


class _Connection(asyncio.Protocol):
    """One connection. Understands responses with ``Content-Length``, which both applications send."""

    def __init__(self) -> None:
        self.reusable = True
        self.used_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._waiter: asyncio.Future[Response] | None = None

    async def exchange(self, request: bytes) -> Response:
        assert self._transport is not None
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiter

    def abort(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionBroken(str(exc or "closed")))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(body) < length or self._waiter is None or self._waiter.done():
            return
        self._received = b""
        self.reusable = self.reusable and headers.get("connection", "").lower() != "close"
        self._waiter.set_result(
            Response(int(status_line.split()[1]), headers.get("retry-after"), _reason(headers, body))
        )


def _reason(headers: dict[str, str], body: bytes) -> str:
    if not headers.get("content-type", "").startswith("application/problem+json"):
        return ""
    try:
        return str(json.loads(body).get("reason", ""))
    except ValueError:
        return ""
