"""A deadline that cuts a statement: what that shows about the node depends on why the call was let through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing import Postgres

SLEEP = sa.text("SELECT pg_sleep(20)")


@pytest.fixture
def engine(resilientdb_postgres: Postgres) -> Iterator[sa.Engine]:
    # Without a prober, which would close the circuit in between.
    policy = rdb.BreakerPolicy(probe_interval=None, minimum_calls=1)
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"), resilience=rdb.Resilience(breaker=policy))
    with engine.connect():
        pass
    yield engine
    engine.dispose()


def cut(engine: sa.Engine) -> None:
    with rdb.deadline(0.2), pytest.raises(DeadlineExceeded), engine.connect() as connection:
        connection.execute(SLEEP)


def test_a_call_that_was_let_through_to_see_whether_the_node_answers_has_seen_that_it_does_not(
    engine: sa.Engine,
) -> None:
    breaker = rdb.control(engine).breaker()
    breaker.half_open()
    cut(engine)
    assert breaker.current_state == "open"


def test_any_other_call_shows_nothing_by_it(engine: sa.Engine) -> None:
    breaker = rdb.control(engine).breaker()
    cut(engine)
    assert breaker.current_state == "closed"
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
