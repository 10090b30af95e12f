"""A database that comes back, behind a real pool: who is let through, and what becomes of everybody else."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError

import resilientdb as rdb
from resilientdb.errors import CircuitOpen
from resilientdb.testing import faults
from tests.engine.conftest import by_another, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.testing import Postgres, Proxy
    from tests.engine.conftest import FakeDatabase

    MakePool = Callable[..., QueueDoor]


def policy(**options: Any) -> rdb.Resilience:
    return rdb.Resilience(
        retry=rdb.RetryPolicy(attempts=1), breaker=rdb.BreakerPolicy(minimum_calls=1, **options)
    )


def come_back(pool: QueueDoor) -> None:
    """An outage, and the prober's first answer after it."""
    breaker = pool.node.breaker
    breaker.prober_failed(ConnectionError("gone"), breaker.answered)
    breaker.prober_succeeded()
    assert breaker.current_state == "closed"


def test_the_pool_lets_few_through_until_enough_were_answered(make_pool: MakePool) -> None:
    pool = make_pool(10, resilience=policy(slow_start_calls=7))
    come_back(pool)
    at_once = []
    while pool.node.breaker.permit is None:
        held: list[Any] = []
        with pytest.raises(CircuitOpen, match="has just closed"):  # noqa: PT012 - at one call or another
            while len(held) < 10:
                held.append(by_another(pool.connect))
        at_once.append(len(held))
        for connection in held:
            connection.close()
    assert at_once == [1, 2, 4]
    held = [by_another(pool.connect) for _ in range(10)]
    for connection in held:
        connection.close()


def test_a_caller_that_finds_the_pool_full_gives_its_place_back(make_pool: MakePool) -> None:
    pool = make_pool(1, resilience=policy(slow_start_calls=5), timeout=0.0)
    held = by_another(pool.connect)
    come_back(pool)
    for _ in range(3):
        with pytest.raises((rdb.PoolTimeout, rdb.PoolSaturated)):
            pool.connect()
    assert pool.node.breaker._circuit.slow_start == (1, 5)
    held.close()
    pool.connect().close()
    assert pool.node.breaker._circuit.slow_start == (2, 4), (
        "what came back from before the outage is no answer"
    )


def test_a_failure_meanwhile_opens_it_again(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(2, resilience=policy(slow_start_calls=5))
    come_back(pool)
    pool.connect().close()
    pool.dispose()
    pool = pool.recreate()
    database.failures.append(ConnectionRefusedError("refused"))
    with pytest.raises(ConnectionRefusedError):
        pool.connect()
    assert pool.node.breaker.current_state == "open"


def test_the_engine_counts_as_healthy_before_its_first_callers_come(make_pool: MakePool) -> None:
    """A load balancer that waits for it to be well would otherwise keep away those who show that it is."""
    pool = make_pool(2, resilience=policy())
    come_back(pool)
    assert pool.cluster.state() == "healthy"
    assert pool.cluster.snapshot().retry_after is None
    assert pool.node.stats().breaker == "closed"


@pytest.mark.parametrize("mode", ["metrics_only", "disabled"])
def test_a_breaker_that_only_looks_on_sends_nobody_away(
    make_pool: MakePool, database: FakeDatabase, mode: Any
) -> None:
    """Not even who waits in line, or finds its connection dead, while it would have opened."""
    pool = make_pool(1, resilience=policy(mode=mode))
    events: list[str] = []
    pool.cluster.listen(lambda event: events.append(type(event).__name__))
    held = by_another(pool.connect)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: by_another(pool.connect))
        until(lambda: pool.stats().waiting == 1, "one waits")
        breaker = pool.node.breaker
        assert breaker.permit is not None
        breaker.record_failure(breaker.permit, ConnectionError("gone"))
        held.invalidate()
        held.close()
        waiting.result(10).close()
    assert breaker.current_state == "closed"
    assert events == (["CircuitWouldChange"] if mode == "metrics_only" else [])
    assert database.opened == 2


def test_held_open_the_pool_refuses_and_goes_on_after(make_pool: MakePool) -> None:
    pool = make_pool(1, resilience=policy(mode="forced_open"))
    with pytest.raises(CircuitOpen, match="held open"):
        pool.connect()
    assert pool.cluster.state() == "down"
    pool.node.breaker.mode = "normal"
    pool.connect().close()


# -- a real server --------------------------------------------------------------------------------------------------


def test_a_real_database_has_its_traffic_back_soon(
    resilientdb_postgres: Postgres, resilientdb_proxy: Proxy
) -> None:
    """How soon exactly is measured elsewhere; here it must not take longer than the prober and a loaded machine."""
    engine = rdb.create_engine(
        resilientdb_postgres.url("psycopg", port=resilientdb_proxy.listen_port), pool_size=8, max_overflow=0
    )
    breaker = rdb.control(engine).breaker()
    answered: list[float] = []
    refused: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql("SELECT pg_sleep(0.01)")
                answered.append(time.monotonic())
            except Exception:  # noqa: BLE001 - whatever an outage looks like
                refused.append(time.monotonic())
                time.sleep(0.005)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answered) > 50, "it works")
        with faults.down(resilientdb_proxy):
            until(lambda: breaker.current_state == "open", "noticed")
            time.sleep(0.3)
        healed = time.monotonic()
        until(lambda: breaker.permit is not None, "the slow start is over")
        took = time.monotonic() - healed
        before = len(refused)
        until(lambda: answered[-1] > healed + took and len(answered) > 200, "it goes on")
        assert len(refused) == before, "nobody is refused any more"
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
        engine.dispose()
    assert took < 3.0


@pytest.mark.parametrize("statement", ["SELECT 1", "SELECT 1 WHERE 1 = %(one)s"])
def test_who_holds_a_connection_that_works_keeps_nobody_out(
    resilientdb_postgres: Postgres, statement: str
) -> None:
    """The first answer counts, not the end of the checkout."""
    engine = rdb.create_engine(
        resilientdb_postgres.url("psycopg"), pool_size=8, resilience=policy(slow_start_calls=32)
    )
    parameters = {"one": 1} if "%" in statement else None
    try:
        engine.connect().close()
        breaker = rdb.control(engine).breaker()
        breaker.open()
        breaker.half_open()
        with contextlib.ExitStack() as held:
            for _ in range(8):
                connection = held.enter_context(engine.connect())
                connection.exec_driver_sql(statement, parameters)
        assert breaker.current_state == "closed"
    finally:
        engine.dispose()


def test_a_connection_that_has_answered_can_still_show_that_the_node_fails(
    resilientdb_postgres: Postgres,
) -> None:
    engine = rdb.create_engine(
        resilientdb_postgres.url("psycopg"), resilience=policy(slow_start_calls=32, probe_interval=None)
    )
    try:
        engine.connect().close()
        breaker = rdb.control(engine).breaker()
        breaker.open()
        breaker.half_open()
        with engine.connect() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            assert breaker.current_state == "closed"
            resilientdb_postgres.query(f"SELECT pg_terminate_backend({pid}, 5000)")
            with pytest.raises(DBAPIError):
                connection.exec_driver_sql("SELECT 1")
            assert breaker.current_state == "open"
    finally:
        engine.dispose()
