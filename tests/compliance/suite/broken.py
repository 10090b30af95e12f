"""Plugins with one fault each. A comparison that does not find them out proves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import CreateEnginePlugin

from resilientdb.engine.plugin import ResilientPlugin
from resilientdb.engine.pool import AsyncQueueDoor, QueueDoor

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine
    from sqlalchemy.pool import PoolProxiedConnection


class _InExcept(QueueDoor):
    def connect(self) -> PoolProxiedConnection:
        try:
            raise LookupError("nothing idle")  # noqa: TRY301 - it is the fault
        except LookupError:
            return super().connect()  # its errors now drag this one along


class _AsyncInExcept(_InExcept, AsyncQueueDoor):
    pass


class InExcept(ResilientPlugin):
    """Connects while it handles an exception of its own."""

    def handle_dialect_kwargs(self, dialect_cls: Any, dialect_args: dict[str, Any]) -> None:
        super().handle_dialect_kwargs(dialect_cls, dialect_args)
        swapped = {QueueDoor: _InExcept, AsyncQueueDoor: _AsyncInExcept}
        self._kwargs["poolclass"] = swapped.get(self._kwargs["poolclass"], self._kwargs["poolclass"])


class Forgetful(ResilientPlugin):
    """Gives connections back with the isolation level that their last user had set."""

    def engine_created(self, engine: Engine) -> None:
        super().engine_created(engine)
        dialect: Any = engine.dialect
        dialect.reset_isolation_level = lambda _connection: None


class Absent(CreateEnginePlugin):
    """Does nothing at all, so every test passes."""

    def update_url(self, url: URL) -> URL:
        return url
