"""Does this connection still answer? Asked within a bounded time, whatever the driver makes of silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.watchdog import Watch, watchdog

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.engine.drivers import Driver

__all__ = ["answers"]


def answers(dialect: Dialect, driver: Driver, connection: Any, seconds: float) -> bool:
    """Whether a driver connection answers within ``seconds``; after False it is fit for nothing but to be closed.

    The watchdog ends a call that gets no answer, by shutting the socket down under it.
    """
    fd = driver.socket_fd(connection)
    watch = Watch(fd) if fd is not None else None
    if watch is not None:
        watchdog.appoint(watch, monotonic() + seconds)
    try:
        alive = bool(dialect.do_ping(connection))
    except Exception:  # noqa: BLE001 - whatever it is, a connection that cannot answer is of no use
        alive = False
    finally:
        cut = watch is not None and watch.end()
    return alive and not cut
