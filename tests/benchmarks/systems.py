"""The engines and pools that are compared, always made in the same way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext import asyncio as sa_asyncio

import resilientdb as rdb
from resilientdb.testing import Postgres, ToxiproxyServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncEngine

    from .measure import Scale

__all__ = ["Bench", "Loop", "assert_guarded", "async_engines", "engines"]


class Bench:
    """How much to measure, and what to measure with, started when first asked for."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._stack = contextlib.ExitStack()
        self._server: Postgres | None = None
        self._toxiproxy: ToxiproxyServer | None = None

    @property
    def server(self) -> Postgres:
        if self._server is None:
            self._server = self._stack.enter_context(Postgres(name="benchmarks"))
        return self._server

    @property
    def toxiproxy(self) -> ToxiproxyServer:
        if self._toxiproxy is None:
            self._toxiproxy = self._stack.enter_context(ToxiproxyServer())
        return self._toxiproxy

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@contextlib.contextmanager
def engines(
    url: str, *, resilience: rdb.Resilience | None = None, **options: Any
) -> Iterator[tuple[sa.Engine, sa.Engine]]:
    """(plain, guarded), made with the same options."""
    plain = sa.create_engine(url, **options)
    guarded = rdb.create_engine(url, resilience=resilience, **options)
    try:
        yield plain, guarded
    finally:
        plain.dispose()
        guarded.dispose()


class Loop:
    """An event loop to measure in, turn by turn."""

    def __enter__(self) -> Loop:
        self._runner = asyncio.Runner()
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)


@contextlib.contextmanager
def async_engines(
    url: str, loop: Loop, *, resilience: rdb.Resilience | None = None, **options: Any
) -> Iterator[tuple[AsyncEngine, AsyncEngine]]:
    """(plain, guarded), made with the same options, for the tasks of ``loop``."""
    plain = sa_asyncio.create_async_engine(url, **options)
    guarded = rdb.create_async_engine(url, resilience=resilience, **options)
    try:
        yield plain, guarded
    finally:
        loop.run(plain.dispose())
        loop.run(guarded.dispose())


def assert_guarded(engine: sa.Engine | AsyncEngine) -> None:
    """That the whole library is at work behind ``engine``, its prober included; it has to be in use."""
    node = rdb.control(engine).snapshot().nodes[0]
    begun = time.monotonic()
    name = f"resilientdb-prober {node.name}"
    while all(thread.name != name for thread in threading.enumerate()):
        if time.monotonic() - begun > 5:
            raise AssertionError(f"no prober looks after {node.name}")
        time.sleep(0.01)
    if node.breaker != "closed":
        raise AssertionError(f"the circuit of {node.name} is {node.breaker}")
