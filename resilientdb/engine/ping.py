"""Does this connection still answer? Asked within a bounded time, whatever the driver makes of silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilientdb.runtime.clock import monotonic
from resilientdb.runtime.context import current_deadline
from resilientdb.runtime.watchdog import Watch, watchdog

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import Dialect

    from resilientdb.engine.drivers import Driver

__all__ = ["answers", "bound"]


def answers(dialect: Dialect, connection: Any) -> bool:
    """Whether a driver connection answers in time (``bound``); after False it is fit for nothing but to be closed."""
    try:
        return bool(dialect.do_ping(connection))
    except Exception:  # noqa: BLE001 - whatever it is, a connection that cannot answer is of no use
        return False


def bound(dialect: Dialect, driver: Driver, seconds: float) -> None:
    """Have every ping of ``dialect`` end within ``seconds`` and the caller's deadline: SQLAlchemy's own
    (``pool_pre_ping``) would wait for ever. False also when it was cut; otherwise what it raises is raised.

    The watchdog ends a call that gets no answer, by shutting the socket down under it.
    """
    ask = dialect.do_ping

    def do_ping(connection: Any) -> bool:
        fd = driver.socket_fd(connection)
        if fd is None:
            return bool(ask(connection))
        deadline = current_deadline()
        limit = seconds if deadline is None else min(seconds, deadline.remaining())
        watch = Watch(fd)
        watchdog.appoint(watch, monotonic() + limit)
        try:
            alive = bool(ask(connection))
        except Exception:
            if watch.end():
                return False  # what the driver saw was our own hand
            raise
        finally:
            cut = watch.end()
        return alive and not cut

    dialect.do_ping = do_ping  # type: ignore[method-assign, assignment]
