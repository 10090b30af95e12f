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
                # What the work waits for. It looks at the result itself.
                awaited = self._work.send(None)
                while awaited is None or not awaited.done():
                    try:
                        yield from _watch(awaited)
                    except asyncio.CancelledError as error:
                        if cancelled is None and not (awaited is not None and awaited.cancelled()):
                            cancelled = error
                            self._cut()
                    except Exception:  # noqa: BLE001, S110 - the work's own, which raises it
                        pass
                    if awaited is None:
                        break
        except StopIteration:
            if cancelled is not None:
                raise cancelled from None
        except Exception as error:
            if cancelled is not None:
                raise cancelled from error
            raise


def _watch(awaited: Any) -> Generator[Any, Any, None]:
    if awaited is None:
        yield  # a bare turn of the loop
        return
    awaited._asyncio_future_blocking = False  # noqa: SLF001 - it is not this future that the task waits for
    # A shield costs a future; a task of its own would cost several times that.
    yield from asyncio.shield(awaited).__await__()
