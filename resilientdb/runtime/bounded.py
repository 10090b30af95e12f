"""Opening a connection takes as long as it takes; waiting for it need not.

A connect cannot be interrupted (libpq rounds its timeout up to two seconds, and cancelling a task half-way
through a handshake throws the work away). So a caller with a deadline has it done elsewhere, in a helper
thread or a task of its loop, and waits for that long as it may. When it leaves, the connect goes on, and what
it brings is handed to ``adopt``: it joins the pool instead of being lost.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["LeftBehind", "run_in_task", "run_in_thread"]

T = TypeVar("T")


class LeftBehind(Exception):
    """The caller's time was over, or it was interrupted (``__cause__`` says by what); the work goes on and will
    be adopted, or has been."""


class _Outcome(Generic[T]):
    """The one result of one piece of work, taken by its caller or adopted; ``_guard`` decides which."""

    __slots__ = ("_adopt", "_done", "_guard", "_left", "error", "value")

    def __init__(self, adopt: Callable[[T | None, BaseException | None], object]) -> None:
        self._guard = threading.Lock()
        self._adopt = adopt
        self._done = False
        self._left = False
        self.value: T | None = None
        self.error: BaseException | None = None

    def settle(self, value: T | None, error: BaseException | None) -> None:
        with self._guard:
            self.value, self.error = value, error
            self._done = True
            orphaned = self._left
        if orphaned:
            self._adopt(value, error)

    def leave(self) -> bool:
        """Stop waiting; False when the result is there already and is the caller's."""
        with self._guard:
            if self._done:
                return False
            self._left = True
            return True

    def abandon(self) -> None:
        """Stop waiting, whatever has come of it."""
        if not self.leave():
            self._adopt(self.value, self.error)

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def run_in_thread(
    work: Callable[[], T], seconds: float, adopt: Callable[[T | None, BaseException | None], object]
) -> T:
    """``work()`` in a daemon thread with the caller's context variables; wait at most ``seconds``.

    Returns its result or raises its error. Raises ``LeftBehind`` when the time is over first, or from what
    interrupts the caller; then, and only then, ``adopt(value, error)`` is called, once, as a rule in the helper
    thread.
    """
    outcome: _Outcome[T] = _Outcome(adopt)
    finished = threading.Lock()
    finished.acquire()
    context = contextvars.copy_context()

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = context.run(work)
        except BaseException as raised:  # noqa: BLE001 - carried to the caller
            error = raised
        try:
            outcome.settle(value, error)
        finally:
            finished.release()

    try:
        threading.Thread(target=run, name="resilientdb-connect", daemon=True).start()
        finished.acquire(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))
    except RuntimeError:
        raise  # no thread could be started: nothing was done
    except BaseException as interruption:
        outcome.abandon()
        raise LeftBehind from interruption
    if outcome.leave():
        raise LeftBehind
    return outcome.result()


_tasks: set[asyncio.Task[Any]] = set()
"""Strong references: the loop keeps only weak ones to its tasks."""


def run_in_task(
    work: Callable[[], T],
    seconds: float,
    adopt: Callable[[T | None, BaseException | None], object],
    *,
    spawn: Callable[[Callable[[], None]], Awaitable[None]],
    suspend: Callable[[Awaitable[Any]], Any],
) -> T:
    """As ``run_in_thread``, in a task of the running loop.

    ``spawn`` runs a plain function where it may suspend (SQLAlchemy's ``greenlet_spawn``); ``suspend`` awaits
    something from inside the caller's greenlet.
    """
    outcome: _Outcome[T] = _Outcome(adopt)

    def body() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = work()
        except BaseException as raised:  # noqa: BLE001 - carried to the caller
            error = raised
        outcome.settle(value, error)

    async def run() -> None:
        await spawn(body)

    task = asyncio.get_running_loop().create_task(run())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    try:
        # asyncio.wait neither cancels the task when it times out nor when its caller is cancelled.
        suspend(asyncio.wait({task}, timeout=max(0.0, seconds)))
    except BaseException as interruption:
        outcome.abandon()
        raise LeftBehind from interruption
    if outcome.leave():
        raise LeftBehind
    return outcome.result()
