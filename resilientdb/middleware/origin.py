"""Where an error that reaches the web edge came from: the link of its chain that speaks of the database, and
what was being done when it was raised."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import sqlalchemy.exc

from resilientdb.errors import ResilienceError
from resilientdb.policy.faults import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["behind", "phase_of"]

_DRIVERS: Final = frozenset(
    {"aiomysql", "aiosqlite", "asyncmy", "asyncpg", "psycopg", "psycopg2", "pymysql", "sqlite3"}
)
_DATABASE_CODE: Final = _DRIVERS | {"resilientdb", "sqlalchemy"}
_NEUTRAL_CODE: Final = (sys.stdlib_module_names - _DRIVERS) | {"anyio", "uvloop"}


def behind(error: BaseException) -> BaseException | None:
    """The first of ``error`` and what it was raised from that says anything about the database, or None."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, BaseExceptionGroup | ResilienceError | sqlalchemy.exc.TimeoutError):
            return link
        if _is_driver_error(link):
            return link
        link = (isinstance(link, sqlalchemy.exc.StatementError) and link.orig) or link.__cause__
    return None


def _is_driver_error(error: BaseException) -> bool:
    """Whether a database driver raised this: as SQLAlchemy wraps it, in the driver's own class, or leaked as
    a builtin (asyncpg raises a plain ``ConnectionRefusedError``).

    A builtin counts only if the innermost frame outside the standard library is SQLAlchemy's, a driver's or
    ours: a refused connection to some other service that the application called is not ours to explain, even
    when the call was made inside ``AsyncSession.run_sync``.
    """
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        return True
    if type(error).__module__.partition(".")[0] in _DRIVERS:
        return True
    if not isinstance(error, OSError):
        return False
    ours = False
    for module, _ in _frames(error):
        package = module.partition(".")[0]
        if package not in _NEUTRAL_CODE:
            ours = package in _DATABASE_CODE
    return ours


def phase_of(error: BaseException) -> Phase:
    """What was being done, read off the traceback: nothing else has come with the error as far as here.

    It matters most for COMMIT: a connection lost in one must not be answered with "send it again".
    """
    phase = Phase.STATEMENT
    for module, function in _frames(error):
        if module.startswith("sqlalchemy."):
            phase = _PHASES.get(function, phase)
    return phase


_PHASES: Final = {
    "_commit_impl": Phase.COMMIT,
    "_commit_twophase_impl": Phase.COMMIT,
    "_rollback_impl": Phase.STATEMENT,
    "__connect": Phase.CONNECT,
}
"""SQLAlchemy's functions through which all of a phase passes (2.0 and 2.1)."""


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """Module and function name of each frame that ``error`` passed, outermost first."""
    trace = error.__traceback__
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_frame.f_code.co_name
        trace = trace.tb_next
