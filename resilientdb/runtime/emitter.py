"""Telling listeners, in order, outside every lock."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Emitter"]

logger = logging.getLogger("resilientdb")


class Emitter:
    """A queue of calls to make. ``post`` under any lock, ``deliver`` after it is released.

    Calls are made one at a time in the order posted, by whichever thread delivers first; a thread that finds
    another delivering leaves its calls to it. A listener that raises is logged and reaches nobody. A listener
    may itself cause new events: they are delivered after it returns.
    """

    __slots__ = ("_delivering", "_pending")

    def __init__(self) -> None:
        self._pending: deque[Callable[[], object]] = deque()
        self._delivering = threading.Lock()

    def post(self, call: Callable[[], object]) -> None:
        self._pending.append(call)

    def deliver(self) -> None:
        # Looked at again after releasing: a call posted meanwhile by a thread that found us busy is ours.
        while self._pending and self._delivering.acquire(blocking=False):
            try:
                while self._pending:
                    try:
                        call = self._pending.popleft()
                    except IndexError:  # pragma: no cover - only one thread pops
                        break
                    try:
                        call()
                    except Exception:
                        logger.exception("a resilientdb listener failed")
            finally:
                self._delivering.release()
