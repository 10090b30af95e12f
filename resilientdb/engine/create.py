"""``create_engine`` and ``create_async_engine``: SQLAlchemy's own, with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.dialects import plugins
from sqlalchemy.engine.url import make_url

from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import URL, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.config import Resilience

__all__ = ["create_async_engine", "create_engine"]

# Found through the entry point once the package is installed; this also serves a source tree.
plugins.register("resilientdb", "resilientdb.engine.plugin", "ResilientPlugin")


def create_engine(
    url: str | URL,
    *,
    replicas: Sequence[str | URL] = (),
    resilience: Resilience | None = None,
    **sqlalchemy_options: Any,
) -> Engine:
    """A real ``sqlalchemy.Engine`` that keeps answering while its database does not.

    ``replicas``: URLs, or ``host:port`` with all else as in ``url``. ``resilience``: options; what it leaves out
    comes from the environment (``RESILIENTDB_…``), the URL (``?resilientdb_…``) and the profile. All other
    keyword arguments are ``sqlalchemy.create_engine``'s and keep their meaning (``pool_timeout`` included).

    Raises ``ConfigurationError`` at once for an option that is unknown, malformed or contradictory. Does not
    connect: see ``control(engine).validate()``.
    """
    return sqlalchemy.create_engine(url, **_with_plugin(url, replicas, resilience, sqlalchemy_options))


def create_async_engine(
    url: str | URL,
    *,
    replicas: Sequence[str | URL] = (),
    resilience: Resilience | None = None,
    **sqlalchemy_options: Any,
) -> AsyncEngine:
    """As ``create_engine``; a real ``sqlalchemy.ext.asyncio.AsyncEngine``."""
    from sqlalchemy.ext import asyncio

    return asyncio.create_async_engine(url, **_with_plugin(url, replicas, resilience, sqlalchemy_options))


def _with_plugin(
    url: str | URL, replicas: Sequence[str | URL], resilience: Resilience | None, options: dict[str, Any]
) -> dict[str, Any]:
    named = make_url(url).query.get("plugin", ())
    if "resilientdb" in ([named] if isinstance(named, str) else named):
        extra: list[str] = []  # the URL loads it already
    else:
        extra = ["resilientdb"]
    misspelt = {"replica": "replicas", "resilence": "resilience", "resiliency": "resilience"}
    for wrong, right in misspelt.items():
        if wrong in options:
            raise ConfigurationError(f"unknown option {wrong!r}; did you mean {right!r}?", key=wrong)
    return {
        **options,
        "plugins": [*options.get("plugins", ()), *extra],
        "resilientdb_replicas": tuple(replicas) if not isinstance(replicas, str) else replicas,
        "resilientdb_resilience": resilience,
    }
