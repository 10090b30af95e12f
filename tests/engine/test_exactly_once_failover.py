"""The primary is lost while a COMMIT is in doubt, and its synchronous standby promoted: the outcome is what the new
primary's history says."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.testing import Postgres, faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing.toxiproxy import ToxiproxyServer

PATIENT = rdb.Resilience(
    retry=rdb.RetryPolicy(timeout=30.0, backoff=rdb.Backoff(initial=0.05, maximum=0.2)), deadline=None
)
INSERT = sa.text("INSERT INTO entry (k) VALUES (1)")


def until(condition: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, f"never: {what}"
        time.sleep(0.01)


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
    runs: list[int] = []
    is_async = driver == "asyncpg"

    with resilientdb_toxiproxy.proxy(first.address) as proxy:

        def fail_over() -> None:
            if is_committed:
                until(lambda: first.query("SELECT 1 FROM entry"), "the first run is committed")
            first.crash()
            second.query("ALTER SYSTEM RESET synchronous_standby_names")
            faults.promote(second)

        failing_over = threading.Thread(target=fail_over)

        def body(connection: sa.Connection) -> int:
            runs.append(1)
            connection.execute(INSERT)
            if len(runs) == 1:
                # From now on nothing comes back from the first primary, or nothing gets there.
                stream: Any = "downstream" if is_committed else "upstream"
                proxy.add_toxic("limit_data", stream=stream, bytes=0)
                failing_over.start()
            return len(runs)

        create: Any = rdb.create_async_engine if is_async else rdb.create_engine
        engine = create(
            first.url(driver, port=proxy.listen_port), replicas=[second.address], resilience=PATIENT
        )
        if is_async:

            async def main() -> int:
                value: int = await rdb.run_transaction_async(
                    engine, lambda connection: connection.run_sync(body), exactly_once=True
                )
                await engine.dispose()
                return value

            value = asyncio.run(main())
        else:
            value = rdb.run_transaction(engine, body, exactly_once=True)
            engine.dispose()
        failing_over.join()
    assert value == len(runs) == (1 if is_committed else 2)
    assert second.query("SELECT count(*) FROM entry") == [(1,)]
