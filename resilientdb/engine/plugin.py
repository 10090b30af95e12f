"""SQLAlchemy's plugin hook: the one way in, for ``create_engine``, ``create_async_engine`` and a bare URL alike.

SQLAlchemy calls, in this order: ``__init__`` (the URL with our options still in it), ``update_url``,
``handle_dialect_kwargs`` (the dialect class is known, the pool class not yet taken), ``handle_pool_kwargs``,
``engine_created``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, make_url
from sqlalchemy.engine import CreateEnginePlugin
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from resilientdb.config import URL_PREFIX, resolve
from resilientdb.engine import hooks, ping
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.connector import Connector, node_name
from resilientdb.engine.control import remember_disabled
from resilientdb.engine.drivers import driver_of
from resilientdb.engine.pool import guarded
from resilientdb.engine.router import routed
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import Dialect
    from sqlalchemy.pool import Pool

    from resilientdb.stats import Role

__all__ = ["ResilientPlugin"]

_REPLICAS = f"{URL_PREFIX}replicas"


class ResilientPlugin(CreateEnginePlugin):
    """One engine's making. ``kwargs`` is SQLAlchemy's live dictionary of the caller's keyword arguments."""

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        self._kwargs = kwargs
        given = {key: value for key, value in url.query.items() if key.startswith(URL_PREFIX)}
        self._url = url.difference_update_query(["plugin", *given])
        in_url = _split(given.pop(_REPLICAS, ()))
        replicas = kwargs.pop("resilientdb_replicas", ())
        if isinstance(replicas, str | URL):
            raise ConfigurationError(
                "replicas must be a list or tuple of URLs, not one text", key="replicas", value="***"
            )
        self._replicas = [
            _replica(self._url, replica, key)
            for key, replica in (
                *((f"replicas[{i}]", replica) for i, replica in enumerate(replicas)),
                *((_REPLICAS, replica) for replica in in_url),
            )
        ]
        self._resolved = resolve(
            call=kwargs.pop("resilientdb_resilience", None),
            url_options={key.removeprefix(URL_PREFIX): value for key, value in given.items()},
        )
        self._connect_args: dict[str, Any] = {}
        self._own_creator = False
        self._cluster: Cluster | None = None

    def update_url(self, url: URL) -> URL:
        return url.difference_update_query([key for key in url.query if key.startswith(URL_PREFIX)])

    def handle_dialect_kwargs(self, dialect_cls: Any, dialect_args: dict[str, Any]) -> None:  # noqa: ARG002
        if not self._resolved.resilience.enabled:
            return
        if self._kwargs.get("pool") is not None:
            raise ConfigurationError(
                "pool= hands over a finished pool, which cannot be guarded: pass poolclass= and its options",
                key="pool",
                value=type(self._kwargs["pool"]).__name__,
            )
        self._own_creator = "creator" in self._kwargs
        if self._own_creator and self._replicas:
            raise ConfigurationError(
                "creator= connects to one place only: leave it out when there are replicas, or connect through "
                "a do_connect event",
                key="creator",
            )
        self._connect_args = dict(self._kwargs.get("connect_args") or {})
        pool_class = self._kwargs.get("poolclass") or dialect_cls.get_pool_class(self._url)
        self._kwargs["poolclass"] = routed(pool_class) if self._replicas else guarded(pool_class)

    def handle_pool_kwargs(self, pool_cls: type[Pool], pool_args: dict[str, Any]) -> None:
        resilience = self._resolved.resilience
        if not resilience.enabled:
            return
        dialect: Dialect = pool_args["dialect"]
        driver = driver_of(dialect)

        def connector(url: URL) -> Connector | None:
            if self._own_creator:
                return None
            return Connector(dialect, driver, resilience.lifecycle, url, self._connect_args)

        nodes: list[tuple[str, Role, Connector | None]] = [
            (node_name(self._url), "primary" if self._replicas else "unknown", connector(self._url))
        ]
        nodes += [(node_name(url), "replica", connector(url)) for url in self._replicas]
        names = [name for name, _, _ in nodes]
        if len(set(names)) < len(names):
            raise ConfigurationError(
                f"each node needs an address of its own; given: {', '.join(names)}", key="replicas"
            )
        self._cluster = Cluster(resilience, dialect, nodes)
        self._cluster.patient = "timeout" in pool_args
        if issubclass(pool_cls, QueuePool) and not self._cluster.patient:
            pool_args["timeout"] = resilience.queue.timeout
        pool_args["resilientdb_cluster"] = self._cluster

    def engine_created(self, engine: Engine) -> None:
        if self._cluster is not None:
            hooks.install(engine, self._cluster)
            lifecycle = self._cluster.resilience.lifecycle
            ping.bound(engine.dialect, self._cluster.driver, lifecycle.validation_timeout)
        else:
            # Switched off: SQLAlchemy's own engine, which control() still answers for.
            resilience = self._resolved.resilience
            remember_disabled(
                engine, Cluster(resilience, engine.dialect, [(node_name(self._url), "unknown", None)])
            )


def _split(value: str | Iterable[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value)
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:@/?\[\]]+))(?::([0-9]{1,5}))?")


def _replica(primary: URL, replica: str | URL, key: str) -> URL:
    """A replica's URL: in full, or ``host:port`` with all else as the primary's."""
    if isinstance(replica, str) and "://" not in replica:
        place = _HOST_PORT.fullmatch(replica)
        if place is None:
            # Not quoted: it may hold a password.
            raise ConfigurationError(
                f"{key} is neither a URL (dialect+driver://user@host:port/database) nor host:port", key=key
            )
        bracketed, host, port = place.groups()
        return primary.set(host=bracketed or host, port=int(port) if port else None)
    try:
        url: URL | None = make_url(replica)
    except (ArgumentError, ValueError):
        # Not chained, not even as context: the message may quote the text, and with it the password.
        url = None
    if url is None:
        raise ConfigurationError(
            f"{key} is not a database URL (expected dialect+driver://user@host:port/database, or host:port)",
            key=key,
        )
    if url.get_backend_name() != primary.get_backend_name():
        raise ConfigurationError(
            f"{key} is a {url.get_backend_name()} URL, but the primary is {primary.get_backend_name()}: "
            "replicas must be of the same dialect",
            key=key,
            value=url.render_as_string(hide_password=True),
        )
    if "+" in url.drivername and url.drivername != primary.drivername:
        raise ConfigurationError(
            f"{key} names the driver {url.drivername}, but the engine connects with {primary.drivername}: use one",
            key=key,
            value=url.render_as_string(hide_password=True),
        )
    if url.username is None:
        url = url.set(username=primary.username, password=primary.password)
    return url if url.database else url.set(database=primary.database)
