"""One engine on one driver, bare or guarded, behind one shape.

A scenario is plain code in one thread; the callers it sets going are threads for a synchronous driver, tasks of
a loop in a thread of its own for an asynchronous one. What a caller does with its connection is one function for
both: SQLAlchemy's ``run_sync`` runs it in a task.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import os
import threading
import time
import types
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio

import resilientdb as rdb
from chaos.workloads import Call, Work
from resilientdb.events import CircuitStateChanged, Event

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Sequence

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.stats import Snapshot

    Done = Callable[[Call], object]

__all__ = ["STACKS", "Stack"]

T = TypeVar("T")
_serial = itertools.count(1)


class Stack(abc.ABC):
    """One engine. ``bare``: SQLAlchemy's, with its defaults but for the pool's size; else the library's.

    A replica's address (``replicas``) means something to the guarded one only.
    """

    driver: ClassVar[str]
    """Its name in the report."""
    scheme: ClassVar[str]
    """Its name in a URL."""

    def __init__(
        self,
        url: str,
        *,
        guarded: bool,
        pool_size: int = 5,
        replicas: Sequence[str] = (),
        resilience: rdb.Resilience | None = None,
        **options: Any,
    ) -> None:
        self.guarded = guarded
        self.limit = pool_size
        self.application = f"chaos-{os.getpid()}-{next(_serial)}"
        """How its connections are told from others' on the server."""
        self.connects: list[float] = []
        """When it tried to open a connection, probers included; monotonic."""
        self.transitions: list[tuple[float, CircuitStateChanged]] = []
        self.events: list[tuple[float, Event]] = []
        options = {"pool_size": pool_size, "max_overflow": 0, **options}
        options["connect_args"] = self._named(self.application)
        self._open(url, guarded, {"replicas": replicas, "resilience": resilience} if guarded else {}, options)
        event.listen(self.engine, "do_connect", self._count_connect)
        if guarded:
            rdb.control(self.engine).on_event(self._note)

    @property
    @abc.abstractmethod
    def engine(self) -> Engine:
        """SQLAlchemy's engine, synchronous face."""

    @abc.abstractmethod
    def start(self, work: Work, number: int, due: float, done: Done) -> None:
        """Begin one call in a thread or task of its own; ``done`` is called from there, once."""

    @abc.abstractmethod
    def close(self) -> None:
        """Dispose of the engine, and end what carried its callers."""

    @abc.abstractmethod
    def _open(self, url: str, guarded: bool, own: dict[str, Any], options: dict[str, Any]) -> None:
        """Make the engine."""

    def _named(self, application: str) -> dict[str, Any]:
        return {"application_name": application}

    # -- what can be seen ----------------------------------------------------------------------------------

    @property
    def control(self) -> rdb.Control:
        """A guarded engine's handle."""
        return rdb.control(self.engine)

    def snapshot(self) -> Snapshot:
        return self.control.snapshot()

    @property
    def checked_out(self) -> int:
        pool: Any = self.engine.pool
        return int(pool.checkedout())

    def moved_to(self, state: str, since: float = 0.0) -> float | None:
        """When a breaker first moved to that state after ``since``; None if none did."""
        return next((at for at, moved in tuple(self.transitions) if at >= since and moved.new == state), None)

    def is_closed(self) -> bool:
        """Whether the circuit of the primary lets calls through."""
        return self.control.breaker().current_state == "closed"

    def _count_connect(self, *_: object) -> None:
        self.connects.append(time.monotonic())

    def _note(self, happened: Event) -> None:
        now = time.monotonic()
        self.events.append((now, happened))
        if isinstance(happened, CircuitStateChanged):
            self.transitions.append((now, happened))

    @contextlib.contextmanager
    def _scopes(self, work: Work, due: float) -> Generator[None]:
        """What the caller says about its work, to a library that listens."""
        with contextlib.ExitStack() as scopes:
            if self.guarded and work.deadline is not None:
                scopes.enter_context(rdb.deadline(max(0.0, due + work.deadline - time.monotonic())))
            if self.guarded and work.read_only:
                scopes.enter_context(rdb.read_only())
            yield


class ThreadStack(Stack):
    """A synchronous driver; a caller is a thread."""

    driver = "psycopg"
    scheme = "psycopg"

    @property
    def engine(self) -> Engine:
        return self._engine

    def _open(self, url: str, guarded: bool, own: dict[str, Any], options: dict[str, Any]) -> None:
        create = rdb.create_engine if guarded else sqlalchemy.create_engine
        self._engine: Engine = create(url, **own, **options)

    def start(self, work: Work, number: int, due: float, done: Done) -> None:
        name = f"chaos-caller {self.application} {number}"
        threading.Thread(target=self._run, args=(work, number, due, done), name=name, daemon=True).start()

    def _run(self, work: Work, number: int, due: float, done: Done) -> None:
        began = time.monotonic()
        try:
            with self._scopes(work, due):
                value = self._perform(work, number)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the caller saw
            done(Call(number, due, began, time.monotonic(), work, error=_without_frames(error)))
        else:
            done(Call(number, due, began, time.monotonic(), work, value))

    def _perform(self, work: Work, number: int) -> Any:
        if (work.whole or work.exactly_once) and self.guarded:
            return rdb.run_transaction(self._engine, work.body, number, exactly_once=work.exactly_once)
        for left in reversed(range(work.tries)):
            try:
                with self._engine.begin() if _commits(work) else self._engine.connect() as connection:
                    return work.body(connection, number)
            except Exception:
                if not left:
                    raise
                time.sleep(_NAIVE_PAUSE)
        return None

    def close(self) -> None:
        self._engine.dispose()


class Psycopg2Threads(ThreadStack):
    driver = "psycopg2"
    scheme = "psycopg2"


class TaskStack(Stack):
    """An asynchronous driver; a caller is a task of the loop that runs in ``_thread``."""

    @property
    def engine(self) -> Engine:
        return self._engine.sync_engine

    def _open(self, url: str, guarded: bool, own: dict[str, Any], options: dict[str, Any]) -> None:
        create = rdb.create_async_engine if guarded else sqlalchemy_asyncio.create_async_engine
        self._engine: AsyncEngine = create(url, **own, **options)
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(
            target=self._carry, name=f"chaos-loop {self.application}", daemon=True
        )
        self._thread.start()

    def _carry(self) -> None:
        with self._runner:
            self._runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._closing.wait()
        await self._engine.dispose()

    def start(self, work: Work, number: int, due: float, done: Done) -> None:
        self._loop.call_soon_threadsafe(self._spawn, work, number, due, done)

    def _spawn(self, work: Work, number: int, due: float, done: Done) -> None:
        task = self._loop.create_task(self._run(work, number, due, done))
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _run(self, work: Work, number: int, due: float, done: Done) -> None:
        began = time.monotonic()
        try:
            with self._scopes(work, due):
                value = await _cancelled_at(work.cancel_at, self._perform(work, number))
        except BaseException as error:  # noqa: BLE001 - a cancellation, too, is what the caller saw
            done(Call(number, due, began, time.monotonic(), work, error=_without_frames(error)))
        else:
            done(Call(number, due, began, time.monotonic(), work, value))

    async def _perform(self, work: Work, number: int) -> Any:
        if (work.whole or work.exactly_once) and self.guarded:
            return await rdb.run_transaction_async(
                self._engine,
                lambda connection: connection.run_sync(work.body, number),
                exactly_once=work.exactly_once,
            )
        for left in reversed(range(work.tries)):
            try:
                async with self._engine.begin() if _commits(work) else self._engine.connect() as connection:
                    return await connection.run_sync(work.body, number)
            except Exception:
                if not left:
                    raise
                await asyncio.sleep(_NAIVE_PAUSE)
        return None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10.0)
        if self._thread.is_alive():
            raise TimeoutError(f"the loop of {self.application} did not end")


class PsycopgTasks(TaskStack):
    driver = "psycopg-async"
    scheme = "psycopg"


class AsyncpgTasks(TaskStack):
    driver = "asyncpg"
    scheme = "asyncpg"

    def _named(self, application: str) -> dict[str, Any]:
        return {"server_settings": {"application_name": application}}


_NAIVE_PAUSE = 0.2
"""Seconds before plain SQLAlchemy tries again."""


def _commits(work: Work) -> bool:
    return work.commit or work.whole or work.exactly_once


STACKS: dict[str, type[Stack]] = {
    stack.driver: stack for stack in (ThreadStack, Psycopg2Threads, PsycopgTasks, AsyncpgTasks)
}


def _without_frames(error: BaseException) -> BaseException:
    """The error, no longer holding on to the frames (and so the connections) it passed through."""
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        link.__traceback__ = None
        links += [link.__cause__, link.__context__]
    return error


@types.coroutine
def _cancelled_at(step: int | None, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await ``work``; cancel the task at the ``step``-th time it has to wait."""
    waits = 0
    answer: Any = None
    failure: BaseException | None = None
    while True:
        try:
            awaited = work.send(answer) if failure is None else work.throw(failure)
        except StopIteration as returned:
            result: T = returned.value
            return result
        waits += 1
        if waits == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        try:
            answer, failure = (yield awaited), None
        except BaseException as error:  # noqa: BLE001 - passed on to the work
            answer, failure = None, error
