"""The pool's queue with real threads: who is served, in which order, and that no slot is ever lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import exc

import resilientdb as rdb
from resilientdb.errors import CircuitOpen, DeadlineExceeded, PoolSaturated, PoolTimeout
from tests.engine.conftest import assert_whole, by_another, until, until_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.pool import QueueDoor
    from tests.engine.conftest import FakeDatabase

    MakePool = Callable[..., QueueDoor]


def no_retry(**queue: Any) -> rdb.Resilience:
    return rdb.Resilience(retry=rdb.RetryPolicy(attempts=1), queue=rdb.SaturationQueue(**queue))


# -- order ------------------------------------------------------------------------------------------------------


def test_first_come_first_served(make_pool: MakePool) -> None:
    pool = make_pool(1)
    order: list[int] = []

    def take(number: int) -> None:
        connection = pool.connect()
        order.append(number)
        connection.close()

    held = pool.connect()
    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        until_waiting(pool, number + 1)
    held.close()
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))


def test_who_returns_and_takes_again_stands_in_line(make_pool: MakePool) -> None:
    """SQLAlchemy's queue lets it win over five earlier waiters 50 times of 50."""
    pool = make_pool(1)
    order: list[str] = []
    everybody_waits = threading.Event()

    def take(name: str) -> None:
        connection = pool.connect()
        order.append(name)
        connection.close()

    def give_back_and_take() -> None:
        connection = pool.connect()
        everybody_waits.wait(10)
        connection.close()
        take("again")

    greedy = threading.Thread(target=give_back_and_take)
    greedy.start()
    until(lambda: pool.checkedout() == 1, "the greedy thread has it")
    patient = [threading.Thread(target=take, args=(f"waiter {i}",)) for i in range(5)]
    for number, thread in enumerate(patient):
        thread.start()
        until_waiting(pool, number + 1)
    everybody_waits.set()
    for thread in [greedy, *patient]:
        thread.join(10)
    assert order == [*(f"waiter {i}" for i in range(5)), "again"]


# -- slots without connections -----------------------------------------------------------------------------------


def test_a_failed_connect_is_told_to_all_who_wait_for_the_same(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    """SQLAlchemy's queue tells nobody: who waits sleeps for its whole timeout beside a free slot. Here nobody else
    holds a connection that could come back, so each would only spend its time on the same failure."""
    policy = rdb.Resilience(retry=rdb.RetryPolicy(attempts=1), breaker=rdb.BreakerPolicy(minimum_calls=2))
    pool = make_pool(1, resilience=policy, timeout=60.0)
    database.gate = threading.Event()
    database.failures.append(ConnectionRefusedError("connection refused"))
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(pool.connect)
        assert database.connecting.acquire(timeout=10)
        others = [threads.submit(pool.connect) for _ in range(2)]
        until_waiting(pool, 2)
        database.gate.set()
        own = first.exception(10)
        for other in others:
            told = other.exception(10)
            assert isinstance(told, ConnectionRefusedError)
            assert told is not own
            assert told.__cause__ is own
    assert pool.node.breaker.current_state == "closed", "it happened once"
    assert pool.stats().connect_failures == 1
    assert_whole(pool, database, 1)


def test_one_caller_s_deadline_ends_nobody_else_s_wait(make_pool: MakePool, database: FakeDatabase) -> None:
    """While it connected its time was over, in a listener that asked the database something: no failure of a node."""
    pool = make_pool(1, resilience=no_retry(), timeout=60.0)
    database.gate = threading.Event()
    database.failures.append(DeadlineExceeded("its own"))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pool.connect)
        assert database.connecting.acquire(timeout=10)
        second = threads.submit(pool.connect)
        until_waiting(pool, 1)
        database.gate.set()
        assert isinstance(first.exception(10), DeadlineExceeded)
        second.result(10).close()
    assert pool.stats().connect_failures == 0
    assert_whole(pool, database, 1)


def test_who_waits_goes_on_waiting_while_others_hold_connections(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    """The slot that could not be opened rests a moment, then the next in line may try."""
    pool = make_pool(2, resilience=no_retry(), timeout=60.0)
    held = pool.connect()
    database.gate = threading.Event()
    database.failures.append(ConnectionRefusedError("too many clients"))
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(pool.connect)
        assert database.connecting.acquire(timeout=10)
        others = [threads.submit(pool.connect) for _ in range(2)]
        until_waiting(pool, 2)
        database.gate.set()
        assert isinstance(first.exception(10), ConnectionRefusedError)
        held.close()
        connections = [other.result(10) for other in others]  # one is given what came back, one the slot
    assert database.opened == 2
    for connection in connections:
        connection.close()
    assert_whole(pool, database, 2)


def test_an_invalidated_connection_gives_its_slot_to_the_next(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    pool = make_pool(1)
    held = pool.connect()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.connect)
        until_waiting(pool, 1)
        held.invalidate()
        held.close()
        waiting.result(10).close()
    assert database.opened == 2
    assert_whole(pool, database, 1)


def test_detaching_frees_the_slot(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1)
    connection = pool.connect()
    connection.detach()
    assert pool.stats().active == 0
    pool.connect().close()
    connection.close()
    assert database.open_now == 1


def test_a_probe_that_finds_its_connection_stale_and_fails_keeps_no_slot(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    """Half-open, the reconnect happens inside the pool, which alone knows of the slot then."""
    pool = make_pool(2, resilience=no_retry())
    held = [pool.connect(), pool.connect()]
    for connection in held:
        connection.close()
    breaker = pool.node.breaker
    for _ in range(10):
        breaker.open()
        breaker.half_open()
        database.failures.append(ConnectionRefusedError("connection refused"))
        with pytest.raises(ConnectionRefusedError):
            pool.connect()
        assert breaker.current_state == "open"
    breaker.close()
    assert_whole(pool, database, 2)


# -- limits of the line -------------------------------------------------------------------------------------------


def test_timeout_names_what_it_waited_for(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=0.05)
    held = by_another(pool.connect)
    began = time.monotonic()
    with pytest.raises(PoolTimeout) as caught:
        pool.connect()
    assert 0.05 <= time.monotonic() - began < 5
    assert isinstance(caught.value, exc.TimeoutError)
    assert "QueuePool limit of size 1 overflow 0 reached" in str(caught.value)
    assert caught.value.reason == "pool-timeout"
    assert "1 active, 0 idle" in str(caught.value)
    assert pool.stats().timeouts == 1
    held.close()


@pytest.mark.parametrize("timeout", [0, 0.0])
def test_timeout_zero_does_not_wait(make_pool: MakePool, timeout: float) -> None:
    pool = make_pool(1, timeout=timeout)
    held = by_another(pool.connect)
    with pytest.raises(PoolTimeout, match="timed out"):
        pool.connect()
    held.close()
    pool.connect().close()


def test_no_timeout_waits_until_served(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=None)
    held = pool.connect()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.connect)
        until_waiting(pool, 1)
        held.close()
        waiting.result(10).close()


def test_a_timeout_beyond_all_clocks_is_no_error(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=1e12)
    held = pool.connect()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.connect)
        until_waiting(pool, 1)
        held.close()
        waiting.result(10).close()


def test_a_full_line_refuses_at_once(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1, resilience=no_retry(max_waiting=2, target=5.0))
    held = by_another(pool.connect)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(pool.connect) for _ in range(2)]
        until_waiting(pool, 2)
        with pytest.raises(PoolSaturated, match="1 active, 0 idle, 2 waiting") as caught:
            pool.connect()
        assert caught.value.reason == "pool-saturated"
        assert pool.stats().rejected == 1
        held.close()
        waiting[0].result(10).close()
        waiting[1].result(10).close()
    assert_whole(pool, database, 1)


def test_with_no_line_at_all_nobody_waits(make_pool: MakePool) -> None:
    pool = make_pool(1, resilience=no_retry(max_waiting=0))
    held = by_another(pool.connect)
    with pytest.raises(PoolSaturated):
        pool.connect()
    held.close()
    pool.connect().close()
    assert pool.stats().waited == 0


def test_unlimited_pools_never_wait(make_pool: MakePool, database: FakeDatabase) -> None:
    for pool in (make_pool(0), make_pool(1, max_overflow=-1)):
        held = [pool.connect() for _ in range(40)]
        assert pool.stats().limit is None
        for connection in held:
            connection.close()
        pool.dispose()
    assert database.open_now == 0


def test_overflow_connections_are_closed_when_nobody_waits(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    pool = make_pool(1, max_overflow=2)
    held = [pool.connect() for _ in range(3)]
    for connection in held:
        connection.close()
    assert (database.open_now, pool.stats().total, pool.stats().idle) == (1, 1, 1)
    assert pool.stats().opened - pool.stats().closed == 1


# -- being sent away ----------------------------------------------------------------------------------------------


def test_who_waits_is_told_when_the_circuit_opens(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1, timeout=60.0)
    held = pool.connect()
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(pool.connect) for _ in range(4)]
        until_waiting(pool, 4)
        pool.node.breaker.open()
        errors = [future.exception(10) for future in waiting]
    assert [type(error) for error in errors] == [CircuitOpen] * 4
    assert len({id(error) for error in errors}) == 4, "an exception belongs to one thread"
    held.close()
    pool.node.breaker.close()
    assert_whole(pool, database, 1)


def test_a_listener_that_takes_its_time_keeps_nobody_waiting(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=60.0)
    held, listening, go_on = pool.connect(), threading.Event(), threading.Event()

    def slow(_event: object) -> None:
        listening.set()
        assert go_on.wait(10)

    pool.cluster.listen(slow)
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(pool.connect)
        until_waiting(pool, 1)
        opening = threads.submit(pool.node.breaker.open)
        assert listening.wait(10)
        assert isinstance(waiting.exception(10), CircuitOpen)
        go_on.set()
        opening.result(10)
    held.close()


def test_disposing_while_somebody_waits(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1, timeout=60.0)
    held = pool.connect()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.connect)
        until_waiting(pool, 1)
        pool.dispose()
        successor = pool.recreate()
        successor.connect().close()
        held.close()
        waiting.result(10).close()
    assert pool.stats().total == 0, "connections of a disposed pool are closed when they come back"
    successor.dispose()
    assert database.open_now == 0


def test_connections_out_at_dispose_are_closed_on_return(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(2)
    held = [pool.connect(), pool.connect()]
    held.pop().close()
    pool.dispose()
    assert database.open_now == 1
    successor = pool.recreate()
    held.pop().close()
    assert database.open_now == 0
    assert successor.node is pool.node
    assert (successor.size(), successor._max_overflow, successor._timeout) == (2, 0, 10.0)


def test_counts_go_on_after_dispose(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=0)
    held = by_another(pool.connect)
    with pytest.raises(PoolTimeout):
        pool.connect()
    held.close()
    pool.dispose()
    stats = pool.recreate().stats()
    assert (stats.checkouts, stats.waited, stats.timeouts, stats.opened, stats.closed) == (1, 1, 1, 1, 1)
    assert (stats.total, stats.active, stats.idle) == (0, 0, 0)


# -- deadlines ----------------------------------------------------------------------------------------------------


def test_a_deadline_bounds_the_wait(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1)
    held = by_another(pool.connect)
    with rdb.deadline(0.05), pytest.raises(DeadlineExceeded, match=r"after 0\.\d+ s in line"):
        pool.connect()
    with rdb.deadline(0), pytest.raises(DeadlineExceeded):
        pool.connect()
    held.close()
    assert_whole(pool, database, 1)


@pytest.mark.parametrize("fails", [False, True], ids=["connects", "fails"])
def test_a_connect_that_outlives_its_caller_joins_the_pool(
    make_pool: MakePool, database: FakeDatabase, fails: bool
) -> None:
    pool = make_pool(1)
    database.gate = threading.Event()
    if fails:
        database.failures.append(ConnectionRefusedError("connection refused"))
    with rdb.deadline(0.05), pytest.raises(DeadlineExceeded):
        pool.connect()
    assert pool.stats().active == 1, "its slot is still in use"
    database.gate.set()
    until(lambda: pool.stats().active == 0, "the connect is adopted")
    assert pool.stats().idle == (0 if fails else 1)
    assert_whole(pool, database, 1)
    assert database.opened == 1


def test_a_stale_idle_connection_is_not_reopened_past_the_deadline(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    pool = make_pool(1)
    pool.connect().close()
    until(lambda: time.time() > pool._idle[0].starttime, "the clock moves")
    pool.distrust()
    database.gate = threading.Event()
    threading.Timer(0.5, database.gate.set).start()
    began = time.monotonic()
    with rdb.deadline(0.05), pytest.raises(DeadlineExceeded):
        pool.connect()
    assert time.monotonic() - began < 0.4
    until(lambda: pool.stats().active == 0, "the connect is adopted")
    assert_whole(pool, database, 1)
