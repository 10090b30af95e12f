"""As ``test_exactly_once_failover``, on MariaDB with a semi-synchronous replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import resilientdb as rdb
from resilientdb.testing.mariadb import MariaDB
from tests.engine.committing import run_over_a_failover, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing.toxiproxy import ToxiproxyServer


@pytest.fixture
def pair(resilientdb_mariadb: MariaDB) -> Iterator[tuple[MariaDB, MariaDB]]:
    """A primary that acknowledges, and shows, nothing that its replica does not have."""
    settings = {"rpl_semi_sync_master_wait_point": "AFTER_SYNC", "rpl_semi_sync_master_timeout": "60000"}
    with MariaDB(name="first", binaries=resilientdb_mariadb.binaries, settings=settings) as first:
        first.query("CREATE TABLE entry (k int) ENGINE=InnoDB", database="app")
        maker = rdb.create_engine(first.url())
        rdb.install(maker)
        maker.dispose()
        with MariaDB.replica(first, name="second", settings={"rpl_semi_sync_slave_enabled": "on"}) as second:
            second.wait_caught_up(first)
            first.query("SET GLOBAL rpl_semi_sync_master_enabled = 1")
            until(
                lambda: first.query("SHOW STATUS LIKE 'Rpl_semi_sync_master_clients'")[0][1] == "1",
                "the replica acknowledges",
            )
            yield first, second


@pytest.mark.parametrize(
    ("driver", "is_committed"),
    [("pymysql", True), ("pymysql", False), ("aiomysql", True), ("asyncmy", False)],
)
def test_settled_on_the_new_primary(
    pair: tuple[MariaDB, MariaDB], resilientdb_toxiproxy: ToxiproxyServer, driver: str, is_committed: bool
) -> None:
    first, second = pair

    def fail_over() -> None:
        if is_committed:
            until(lambda: second.query("SELECT 1 FROM entry", database="app"), "the first run is replayed")
        first.kill()
        second.promote()

    with resilientdb_toxiproxy.proxy(first.address) as proxy:
        run = run_over_a_failover(first, second, driver, proxy, fail_over, is_committed=is_committed)
    assert run == (1 if is_committed else 2)
    assert second.query("SELECT count(*) FROM entry", database="app") == [(1,)]
