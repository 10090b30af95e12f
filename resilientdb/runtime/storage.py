"""Tells a pybreaker storage the state of a circuit, without ever making a caller wait for it.

A storage may be another server: slow, hung or gone. So it is made and written by a thread of its own, which lives
while there is something to write. Only the newest state matters, so that is all that is kept for it; and what could
not be written is tried again until it can be, since whoever reads there would believe an old state for ever.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pybreaker

from resilientdb.policy.breaker import OPEN
from resilientdb.policy.faults import describe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StorageWriter"]

logger = logging.getLogger("resilientdb")

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
"""Seconds until a storage that could not be written is tried again: the first time, and at most."""


class StorageWriter:
    """One circuit's storage. ``tell`` may be called from any thread, under any lock; it starts a thread at most.

    ``_lock`` guards ``_newest`` and ``_thread``; it is never held while the storage is used.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[str], pybreaker.CircuitBreakerStorage],
        *,
        pause: float = _FIRST_PAUSE,
    ) -> None:
        """``make`` is called with ``name`` by the thread; both it and the storage may raise, and take their time."""
        self._name = name
        self._make = make
        self._pause = pause
        self._storage: Any = None
        self._newest: tuple[str, datetime] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # a finalizer may tell in the middle of it
        self._stopped = threading.Event()

    def tell(self, state: str) -> None:
        """Have ``state`` written, unless a newer one comes before its turn."""
        with self._lock:
            self._newest = state, datetime.now(UTC)
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(
                    target=self._run, name=f"resilientdb-storage {self._name}", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends, or has no thread left
                    self._thread = None

    def stop(self) -> None:
        """Nobody is there any more whose state it could be."""
        self._stopped.set()

    def after_fork(self) -> None:
        """In the child: the thread did not come along. Its storage is made anew, with connections of its own."""
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread = None
        self._storage = None
        self._newest = None

    def _run(self) -> None:
        me = threading.current_thread()
        pause, failed = self._pause, False
        while (told := self._next(me)) is not None:
            try:
                self._write(*told)
            except Exception as error:  # noqa: BLE001 - whatever a storage raises
                if not failed:
                    logger.warning(
                        "the circuit of %s cannot be stored (%s); it goes on without, and tries again",
                        self._name,
                        describe(error),
                    )
                failed = True
                with self._lock:
                    if self._newest is None:
                        self._newest = told
                self._stopped.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if failed:
                logger.info("the circuit of %s is stored again", self._name)
            pause, failed = self._pause, False

    def _next(self, me: threading.Thread) -> tuple[str, datetime] | None:
        """What to write now; None: this thread is not needed any more."""
        with self._lock:
            told, self._newest = self._newest, None
            if told is None or self._stopped.is_set() or self._thread is not me:
                if self._thread is me:
                    self._thread = None
                return None
            return told

    def _write(self, state: str, at: datetime) -> None:
        if self._storage is None:
            self._storage = _outspoken(self._make(self._name))
        if state == OPEN:
            self._storage.opened_at = at  # before the state: who reads that it is open asks since when
        self._storage.state = state


def _outspoken(storage: pybreaker.CircuitBreakerStorage) -> Any:
    """pybreaker's Redis storage keeps its failures to itself, and its log. A copy of it tells them to us."""
    if not isinstance(storage, pybreaker.CircuitRedisStorage):
        return storage
    ours = copy.copy(storage)
    with contextlib.suppress(AttributeError):
        ours.logger = _Raises()  # type: ignore[assignment]
    return ours


class _Raises:
    """In place of a logger that is told of exceptions where they are swallowed."""

    def exception(self, *_what: object) -> None:
        raise  # noqa: PLE0704 - the one that is being handled
