"""The few bytes of PostgreSQL's protocol that tell, with no driver, whether a server answers.

Used to wait for a server and, through a proxy, to prove that a fault has its effect.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import time
from dataclasses import dataclass

__all__ = ["Answer", "Probe", "accepts_connections", "ask"]

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_REPLIES = (b"S", b"N", b"G", b"E")
_TERMINATE = b"X" + struct.pack("!i", 4)


class Answer(enum.StrEnum):
    """What became of one small question to a port."""

    REPLIED = "replied"
    SILENT = "silent"
    CLOSED = "closed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Probe:
    """One question's answer and the seconds until it came (or until we stopped waiting)."""

    answer: Answer
    seconds: float

    def __str__(self) -> str:
        return f"{self.answer} after {self.seconds * 1000:.0f} ms"


def ask(host: str, port: int, *, wait: float) -> Probe:
    """Connect and send an SSLRequest, to which every PostgreSQL replies with one byte before anything else.

    MySQL and MariaDB greet unasked, and then reply that this was nonsense; their greeting is no reply. No login,
    no session, nothing that shows in ``pg_stat_activity``. Never raises; ``wait`` seconds bound it all.
    """
    begun = time.monotonic()

    def after(answer: Answer) -> Probe:
        return Probe(answer, time.monotonic() - begun)

    try:
        connection = socket.create_connection((host, port), timeout=wait)
    except TimeoutError:
        return after(Answer.SILENT)
    except OSError:
        return after(Answer.REFUSED)
    with connection:
        try:
            connection.sendall(_SSL_REQUEST)
            connection.settimeout(max(wait - (time.monotonic() - begun), 0.001))
            reply = connection.recv(1)
            if reply and reply not in _REPLIES:
                rest = 3 + reply[0]  # it began with its length, which fits in one byte of three
                while rest and (chunk := connection.recv(rest)):
                    rest -= len(chunk)
                reply = connection.recv(1)
        except TimeoutError:
            return after(Answer.SILENT)
        except OSError:
            return after(Answer.CLOSED)
        return after(Answer.REPLIED if reply else Answer.CLOSED)


def accepts_connections(
    host: str, port: int, *, user: str = "postgres", database: str = "postgres", timeout: float = 1.0
) -> bool:
    """Whether a login without a password reaches "ready for query". Never raises.

    A server that is starting, recovering or shutting down answers with an error instead.
    """
    body = struct.pack("!i", 196608) + f"user\0{user}\0database\0{database}\0\0".encode()
    deadline = time.monotonic() + timeout
    received = b""
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.sendall(struct.pack("!i", len(body) + 4) + body)
            while not _finished(received):
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                chunk = connection.recv(4096)
                if not chunk:
                    return False
                received += chunk
            with contextlib.suppress(OSError):
                connection.sendall(_TERMINATE)
    except OSError:
        return False
    return _finished(received) == b"Z"


def _finished(received: bytes) -> bytes:
    """The kind of the message that ends a login (``Z`` ready, ``E`` error), or empty if it has not come."""
    position = 0
    while len(received) >= position + 5:
        kind = received[position : position + 1]
        if kind in {b"Z", b"E"}:
            return kind
        position += 1 + int(struct.unpack_from("!i", received, position + 1)[0])
    return b""
