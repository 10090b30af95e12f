"""Opening driver connections to one node: SQLAlchemy's own way, with that node's address and sane socket defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import URL
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.config import Lifecycle
    from resilientdb.engine.drivers import Driver

__all__ = ["Connector", "node_name"]

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


class Connector:
    """A pool's creator for one node.

    Runs the engine's ``do_connect`` listeners (token refresh and the like) with arguments of its own for each
    call, exactly as ``create_engine``'s creator does. What the user has set anywhere is never overridden.
    """

    def __init__(
        self,
        dialect: Dialect,
        driver: Driver,
        lifecycle: Lifecycle,
        url: URL,
        connect_args: Mapping[str, Any],
    ) -> None:
        arguments, parameters = dialect.create_connect_args(url)
        given = {**parameters, **connect_args}
        self._dialect = dialect
        self._driver = driver
        self._lifecycle = lifecycle
        self._arguments = tuple(arguments)
        self._parameters = {**driver.socket_defaults(lifecycle, given), **given}

    def __call__(self, connection_record: Any) -> Any:
        return self.open(connection_record)

    def open(self, connection_record: Any, timeout: float | None = None) -> Any:
        """A new driver connection. ``timeout`` bounds the attempt in place of what is configured, seconds."""
        arguments = list(self._arguments)
        parameters = dict(self._parameters)
        if timeout is not None:
            parameters.update(self._driver.connect_timeout_param(timeout))
        for listener in self._dialect.dispatch.do_connect:
            connection = listener(self._dialect, connection_record, arguments, parameters)
            if connection is not None:
                break
        else:
            connection = self._dialect.connect(*arguments, **parameters)
        self._driver.after_connect(connection, self._lifecycle)
        return connection


def node_name(url: URL) -> str:
    """``host:port``, or the database's name where there is no host; never credentials."""
    if not url.host:
        return f"{url.get_backend_name()}:{url.database or 'memory'}"
    port = url.port or _DEFAULT_PORTS.get(url.get_backend_name())
    return f"{url.host}:{port}" if port else url.host
