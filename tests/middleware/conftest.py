"""Engines that report any state asked for, so that the web edge can be tested in states that a single SQLite
database never has. The frameworks are tested over real engines, in ``test_starlette`` and ``test_flask``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy

from resilientdb.engine.control import control
from resilientdb.stats import EngineState, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class PretendResilience:
    deadline: float | None


@dataclass
class PretendControl:
    state: EngineState
    retry_after: float | None
    resilience: PretendResilience
    is_async: bool

    def snapshot(self) -> Snapshot:
        return Snapshot(
            state=self.state,
            retry_after=self.retry_after,
            primary=None if self.state in {"read_only", "down"} else "db1:5432",
            nodes=(),
        )


@pytest.fixture
def engine_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., sqlalchemy.Engine]]:
    """``engine_in(state, retry_after=..., deadline=..., is_async=...)``: an engine in that state for ever."""
    controls: dict[Any, PretendControl] = {}

    def engine_in(
        state: EngineState = "healthy",
        *,
        retry_after: float | None = None,
        deadline: float | None = None,
        is_async: bool = False,
    ) -> sqlalchemy.Engine:
        engine = sqlalchemy.create_engine("sqlite://")
        controls[engine] = PretendControl(state, retry_after, PretendResilience(deadline), is_async)
        return engine

    monkeypatch.setattr(
        "resilientdb.middleware.edge.control", lambda engine: controls.get(engine) or control(engine)
    )
    yield engine_in
    for engine in controls:
        engine.dispose()
