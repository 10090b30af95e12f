"""Who takes the writes, as the nodes are seen to change roles."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.engine import probe
from resilientdb.engine.control import cluster_of
from resilientdb.testing import Postgres, faults

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.engine.cluster import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Nobody is there: what the probers would see is said by the test.
    engine = rdb.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none", replicas=["127.0.0.1:2"])
    yield cluster_of(engine)
    engine.dispose()


def test_writes_follow_a_promotion_and_the_next_one(cluster: Cluster) -> None:
    left, right = cluster.nodes
    left.saw_role("primary")
    right.saw_role("replica")
    right.saw_role("primary")
    assert cluster.for_write() is right
    left.saw_role("replica")
    left.saw_role("primary")
    assert cluster.for_write() is left


def test_a_promotion_is_followed_though_nobody_saw_the_replica_that_it_was(cluster: Cluster) -> None:
    """The old primary came back as a replica and was promoted between two looks: it was seen as a primary, always."""
    left, right = cluster.nodes
    left.saw_role("primary")
    right.saw_role("replica")
    right.saw_role("primary")
    left.saw_role("primary")
    assert cluster.for_write() is right, "so does an old primary that was never told"
    right.saw_role("replica")
    with pytest.raises(rdb.NoPrimaryAvailable):
        cluster.for_write()
    left.saw_role("primary")
    assert cluster.for_write() is left


def test_a_promotion_is_seen_however_long_there_was_no_primary(
    resilientdb_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who are refused use the engine, too: the probers go on looking for as long as anybody asks."""
    monkeypatch.setattr(probe, "_LINGER", 0.3)
    with (
        Postgres(name="lost", binaries=resilientdb_postgres.binaries) as lost,
        Postgres.standby(lost, name="found") as found,
    ):
        engine = rdb.create_engine(lost.url(), replicas=[found.address])
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
        lost.crash()
        asked_until = time.monotonic() + 1.0
        while time.monotonic() < asked_until:
            assert not _is_served(engine)
        faults.promote(found)
        give_up = time.monotonic() + 10.0
        while not _is_served(engine):
            assert time.monotonic() < give_up
        assert rdb.control(engine).snapshot().primary == found.address
        engine.dispose()


def _is_served(engine: sa.Engine) -> bool:
    time.sleep(0.02)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text("SELECT 1"))
    except (rdb.ResilienceError, sa.exc.OperationalError):
        return False
    return True
