"""``breaker.slow_call_duration``: a node that answers too slowly, too often, is left alone for a while."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

import resilientdb as rdb

if TYPE_CHECKING:
    from resilientdb.testing.postgres import Postgres

SLOW = rdb.Resilience(
    breaker=rdb.BreakerPolicy(
        slow_call_duration=0.1, slow_call_rate_threshold=0.5, minimum_calls=4, probe_interval=None
    )
)


def wait(seconds: float) -> sa.TextClause:
    return sa.text(f"SELECT pg_sleep({seconds})")


def test_slow_answers_open_the_circuit(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"), resilience=SLOW)
    with contextlib.closing(engine.raw_connection()):
        pass
    try:
        for seconds in (0.0, 0.15, 0.15):
            with engine.connect() as connection:
                connection.execute(wait(seconds))
        with pytest.raises(rdb.CircuitOpen):
            engine.connect()
        state = rdb.control(engine).snapshot().nodes[0]
        assert (state.breaker, state.last_error) == ("open", None)
    finally:
        engine.dispose()


def test_a_slow_statement_that_fails_is_judged_by_its_failure(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"), resilience=SLOW)
    try:
        for _ in range(6):
            with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError):
                connection.execute(sa.text("SELECT 1 / (pg_sleep(0.12) IS NULL)::int"))
        assert rdb.control(engine).snapshot().nodes[0].breaker == "closed"
    finally:
        engine.dispose()


def test_many_slow_statements_of_one_checkout_are_one_slow_call(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"), resilience=SLOW)
    try:
        with engine.connect() as connection:
            for _ in range(5):
                connection.execute(wait(0.12))
        assert rdb.control(engine).snapshot().nodes[0].breaker == "closed"
    finally:
        engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_slow_answers_to_tasks(resilientdb_postgres: Postgres, driver: str) -> None:
    async def main() -> None:
        engine = rdb.create_async_engine(resilientdb_postgres.url(driver), resilience=SLOW)

        async def one(seconds: float) -> None:
            async with engine.connect() as connection:
                await connection.execute(wait(seconds))

        await asyncio.gather(*(one(0.2) for _ in range(4)))
        with pytest.raises(rdb.CircuitOpen):
            await one(0.0)
        await engine.dispose()

    asyncio.run(main())
