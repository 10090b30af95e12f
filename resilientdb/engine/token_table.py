"""The table that ``exactly_once=True`` stands on, in the hands of its operator: made, purged, and asked later.

What is in it, and why it can be asked, is in ``outcome``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.engine import once, outcome
from resilientdb.engine.compat import greenlet_spawn
from resilientdb.engine.hands import InTask, InThread
from resilientdb.engine.outcome import TokenTable
from resilientdb.engine.targets import Target
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    import uuid

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from resilientdb.stats import CommitOutcome

__all__ = [
    "install",
    "install_async",
    "purge",
    "purge_async",
    "resolve",
    "resolve_async",
]


def install(engine: Engine, *, table: TokenTable = TokenTable()) -> None:  # noqa: B008 - frozen
    """Create the table that ``exactly_once=True`` needs, if it is not there. Its schema, if one is named, must be."""
    target = Target(engine, is_async=False)
    with target.begin() as connection:
        outcome.create(connection, table)


async def install_async(engine: AsyncEngine, *, table: TokenTable = TokenTable()) -> None:  # noqa: B008
    """As ``install``, for an ``AsyncEngine``."""
    target = Target(engine, is_async=True)
    async with target.begin_async() as connection:
        await connection.run_sync(outcome.create, table)


def purge(
    engine: Engine,
    *,
    older_than: float = 7 * 86_400.0,
    batch: int = 1000,
    table: TokenTable = TokenTable(),  # noqa: B008
) -> int:
    """Forget the transactions that began longer ago than that, in seconds; returns how many those were.

    Each ``batch`` is a transaction of its own. What is forgotten can no longer be resolved: ``resolve()`` says
    ``"unknown"`` of it. Must be longer than any caller goes on asking: at least 60 seconds.
    """
    _check_purge(older_than, batch)
    target = Target(engine, is_async=False)
    total = 0
    while True:
        with target.begin() as connection:
            deleted = outcome.purge_some(connection, table, older_than, batch)
        total += deleted
        if deleted < batch:
            return total


async def purge_async(
    engine: AsyncEngine,
    *,
    older_than: float = 7 * 86_400.0,
    batch: int = 1000,
    table: TokenTable = TokenTable(),  # noqa: B008
) -> int:
    """As ``purge``, for an ``AsyncEngine``."""
    _check_purge(older_than, batch)
    target = Target(engine, is_async=True)
    total = 0
    while True:
        async with target.begin_async() as connection:
            deleted: int = await connection.run_sync(outcome.purge_some, table, older_than, batch)
        total += deleted
        if deleted < batch:
            return total


def resolve(engine: Engine, key: uuid.UUID, *, table: TokenTable = TokenTable()) -> CommitOutcome:  # noqa: B008
    """What became of the transaction whose ``CommitOutcomeUnknown`` carries ``key``.

    ``"committed"``: it is, and as durably as this engine's own transactions are. ``"aborted"``: it is not, and never
    will be. ``"unknown"``: it is still open when the deadline, or ``RetryPolicy.timeout``, is over; or its key has
    been purged. Raises the last real error when the database cannot be asked.
    """
    target = Target(engine, is_async=False)
    with target.default_deadline():
        return once.resolve(InThread(target), target.cluster, table, key)


async def resolve_async(
    engine: AsyncEngine,
    key: uuid.UUID,
    *,
    table: TokenTable = TokenTable(),  # noqa: B008
) -> CommitOutcome:
    """As ``resolve``, for an ``AsyncEngine``."""
    target = Target(engine, is_async=True)
    with target.default_deadline():
        return await greenlet_spawn(once.resolve, InTask(target), target.cluster, table, key)


def _check_purge(older_than: float, batch: int) -> None:
    if not older_than >= 60:
        raise ConfigurationError(
            f"older_than must be 60 seconds or more, or a transaction could be forgotten while its outcome is looked "
            f"for; got {older_than!r}",
            key="older_than",
            value=older_than,
        )
    if not batch >= 1:
        raise ConfigurationError(f"batch must be 1 or more; got {batch!r}", key="batch", value=batch)
