"""What ``once`` does differently in a thread and in a task: begin a transaction, find its connection, pause."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import await_only

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import Connection

    from resilientdb.engine.targets import Target

__all__ = ["InTask", "InThread"]


class InThread:
    """``once.Hands`` of a thread."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def begin(self) -> AbstractContextManager[Any]:
        return self._target.begin()

    def connection(self, work: Any) -> Connection:
        return self._target.connection(work)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


class InTask:
    """``once.Hands`` of a task, used in a greenlet of it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def begin(self) -> AbstractContextManager[Any]:
        return _Awaited(self._target.begin_async())

    def connection(self, work: Any) -> Connection:
        return self._target.connection_in_greenlet(work)

    def pause(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))


class _Awaited(AbstractContextManager[Any]):
    """An asynchronous context manager, entered and left in a greenlet."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self._manager = manager

    def __enter__(self) -> Any:
        return await_only(self._manager.__aenter__())

    def __exit__(self, *error: Any) -> bool | None:
        return await_only(self._manager.__aexit__(*error))
