"""The primary is lost while a COMMIT is in doubt, and its synchronous standby promoted: the outcome is what the new
primary's history says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import resilientdb as rdb
from resilientdb.testing import Postgres, faults
from tests.engine.committing import run_over_a_failover, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing.toxiproxy import ToxiproxyServer


@pytest.fixture
def pair(resilientdb_postgres: Postgres) -> Iterator[tuple[Postgres, Postgres]]:
    """A primary that acknowledges nothing that its standby does not have."""
    with Postgres(name="first", binaries=resilientdb_postgres.binaries) as first:
        first.query("CREATE TABLE entry (k int)")
        maker = rdb.create_engine(first.url("psycopg"))
        rdb.install(maker)
        maker.dispose()
        with Postgres.standby(first, name="second") as second:
            first.query("ALTER SYSTEM SET synchronous_standby_names = '*'")
            first.reload()
            until(
                lambda: first.query("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"),
                "the standby replicates synchronously",
            )
            yield first, second


@pytest.mark.parametrize(("driver", "is_committed"), [("psycopg", True), ("asyncpg", False)])
def test_settled_on_the_new_primary(
    pair: tuple[Postgres, Postgres], resilientdb_toxiproxy: ToxiproxyServer, driver: str, is_committed: bool
) -> None:
    first, second = pair

    def fail_over() -> None:
        if is_committed:
            until(lambda: first.query("SELECT 1 FROM entry"), "the first run is committed")
        first.crash()
        second.query("ALTER SYSTEM RESET synchronous_standby_names")
        faults.promote(second)

    with resilientdb_toxiproxy.proxy(first.address) as proxy:
        run = run_over_a_failover(first, second, driver, proxy, fail_over, is_committed=is_committed)
    assert run == (1 if is_committed else 2)
    assert second.query("SELECT count(*) FROM entry") == [(1,)]
