"""libpq's cancel requests, called directly, for drivers that hold on to the interpreter while they send one.

``psycopg2.connection.cancel()`` waits for the server with the interpreter's lock held: in silence, no thread of the
process runs until the kernel gives up. libpq 17 can do it step by step.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

__all__ = ["cancel_connection"]


def cancel_connection(module: str, connection: int) -> Connection | None:
    """A cancel request for the PGconn at address ``connection``, which must not be closed meanwhile; None where the
    libpq that ``module`` is linked with has none.

    Costs no waiting: it copies what it needs to know.
    """
    library = _library(module)
    if library is None:
        return None
    made = library.PQcancelCreate(connection)
    return Connection(library, made) if made else None


class Connection:
    """A ``PGcancelConn``, as psycopg has it."""

    def __init__(self, library: Any, made: int) -> None:
        self._library = library
        self._made: int | None = made

    @property
    def socket(self) -> int:
        return int(self._library.PQcancelSocket(self._made))

    def start(self) -> None:
        self._library.PQcancelStart(self._made)

    def poll(self) -> int:
        return int(self._library.PQcancelPoll(self._made))

    def finish(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            self._library.PQcancelFinish(made)

    def __del__(self) -> None:
        self.finish()


@functools.cache
def _library(module: str) -> Any:
    try:
        # Names are looked up in the libraries that the module is linked with, too: in the very libpq that it uses.
        library = ctypes.CDLL(importlib.import_module(module).__file__)
        library.PQcancelCreate.restype = ctypes.c_void_p
        library.PQcancelCreate.argtypes = [ctypes.c_void_p]
        for name in ("PQcancelStart", "PQcancelPoll", "PQcancelSocket", "PQcancelFinish"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    return library
