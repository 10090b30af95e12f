"""A COMMIT is sent once, is never cancelled, and its answer is read.

A task that is cancelled while it waits for COMMIT would have its driver cancel the COMMIT at the server: a
transaction that waits for its standby is then committed without it, and the driver is told that all is well. So the
task's cancellation does not reach the driver: the connection is cut, which the server need not even notice, and the
driver comes to its end by itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import await_only, greenlet_spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

__all__ = ["without_cancelling"]


def without_cancelling(work: Callable[[Any], None], argument: Any, cut: Callable[[], None]) -> None:
    """``work(argument)``, in a greenlet of its own. When the task is cancelled meanwhile, ``cut()`` is called, which
    must make the work end soon; when it has, the cancellation goes on."""
    await_only(_Undisturbed(greenlet_spawn(work, argument), cut))


class _Undisturbed:
    """Awaits a coroutine to its end. A cancellation waits until then."""

    __slots__ = ("_cut", "_work")

    def __init__(self, work: Coroutine[Any, Any, None], cut: Callable[[], None]) -> None:
        self._work = work
        self._cut = cut

    def __await__(self) -> Generator[Any, Any, None]:
        cancelled: asyncio.CancelledError | None = None
        try:
            while True:
                # What the work waits for; it looks at the result itself.
                awaited = self._work.send(None)
                while True:
                    try:
                        yield from _end_of(awaited)
                    except asyncio.CancelledError as error:
                        if cancelled is None:
                            cancelled = error
                            self._cut()
                    if awaited is None or awaited.done():
                        break
        except StopIteration:
            if cancelled is not None:
                raise cancelled from None
        except Exception as error:
            if cancelled is not None:
                raise cancelled from error
            raise


def _end_of(awaited: Any) -> Generator[Any, Any, None]:
    """Wait until a future is done, however, without being what cancels it."""
    if awaited is None:
        yield  # a bare turn of the loop
        return
    awaited._asyncio_future_blocking = False  # noqa: SLF001 - it is not this future that the task waits for
    done = awaited.get_loop().create_future()
    # As asyncio.shield, which costs several times that, and the more a task of its own.
    awaited.add_done_callback(lambda _: None if done.done() else done.set_result(None))
    yield from done.__await__()
