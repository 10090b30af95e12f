"""One breaker for several engines of a process: what one learns, the other knows."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

import resilientdb as rdb
from resilientdb.errors import CircuitOpen, ConfigurationError
from resilientdb.events import CircuitStateChanged
from tests.engine.conftest import until, until_async

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.testing import Postgres
    from tests.engine.conftest import AsyncPool, FakeDatabase

    MakePool = Callable[..., QueueDoor]
    MakeAsyncPool = Callable[..., AsyncPool]


@pytest.fixture(autouse=True)
def forget_the_engines_of_earlier_tests() -> None:
    """A breaker lives until the last engine that shares it is collected."""
    gc.collect()


def sharing(name: str | None, **options: Any) -> rdb.Resilience:
    options = {"minimum_calls": 2, "slow_start_calls": 0, **options}
    return rdb.Resilience(
        retry=rdb.RetryPolicy(attempts=1), breaker=rdb.BreakerPolicy(shared=name, **options)
    )


def fail_to_connect(pool: QueueDoor, database: FakeDatabase, times: int) -> None:
    for _ in range(times):
        database.failures.append(ConnectionRefusedError("refused"))
        with pytest.raises(ConnectionRefusedError):
            pool.connect()


def test_what_opens_in_one_refuses_in_the_other(
    make_pool: MakePool, make_async_pool: MakeAsyncPool, database: FakeDatabase
) -> None:
    pool, other = make_pool(2, resilience=sharing("app")), make_async_pool(2, resilience=sharing("app"))
    assert pool.node.breaker is other.node.breaker
    told: list[tuple[str, Any]] = []
    pool.cluster.listen(lambda event: told.append(("one", event)))
    other.cluster.listen(lambda event: told.append(("other", event)))
    fail_to_connect(pool, database, 2)

    async def main() -> None:
        with pytest.raises(CircuitOpen):
            await other.take()
        pool.node.breaker.close()
        await other.give(await other.take())

    asyncio.run(main())
    assert [(who, event.new) for who, event in told if isinstance(event, CircuitStateChanged)] == [
        ("one", "open"),
        ("other", "open"),
        ("one", "closed"),
        ("other", "closed"),
    ]


def test_failures_of_both_add_up(make_pool: MakePool, database: FakeDatabase) -> None:
    one, other = make_pool(2, resilience=sharing("app")), make_pool(2, resilience=sharing("app"))
    fail_to_connect(one, database, 1)
    assert other.node.available
    fail_to_connect(other, database, 1)
    assert not one.node.available
    assert not other.node.available


def test_who_waits_at_the_other_is_sent_away(
    make_pool: MakePool, make_async_pool: MakeAsyncPool, database: FakeDatabase
) -> None:
    pool, other = make_pool(1, resilience=sharing("app")), make_async_pool(1, resilience=sharing("app"))

    async def main() -> None:
        held = await other.take()
        waiting = asyncio.create_task(other.take())
        await until_async(lambda: other.stats().waiting == 1)
        await asyncio.to_thread(fail_to_connect, pool, database, 2)
        with pytest.raises(CircuitOpen):
            await waiting
        await other.give(held)

    asyncio.run(main())


@pytest.mark.parametrize("names", [("app", "jobs"), (None, None), ("app", None)])
def test_other_names_are_other_breakers(make_pool: MakePool, names: tuple[str | None, str | None]) -> None:
    one, other = (make_pool(1, resilience=sharing(name)) for name in names)
    assert one.node.breaker is not other.node.breaker


def test_they_must_agree(make_pool: MakePool) -> None:
    one = make_pool(1, resilience=sharing("app", window=5.0))
    with pytest.raises(
        ConfigurationError,
        match=r"circuit breakers 'app' \(breaker\.shared\) have one circuit for db, and must agree about it: "
        r"breaker\.window is 5\.0 in one and 10\.0 in the other; breaker\.storage is None in one and something else",
    ) as caught:
        make_pool(1, resilience=sharing("app", storage=lambda _name: None))
    assert caught.value.key == "breaker.shared"
    make_pool(1, resilience=sharing("app", window=5.0))
    assert one.node.breaker.policy.window == 5.0


def test_a_forgotten_engine_binds_nobody_and_is_kept_by_nobody(make_pool: MakePool) -> None:
    gone = make_pool(1, resilience=sharing("app", window=5.0))
    stays = make_pool(1, resilience=sharing("app", window=5.0))
    node = weakref.ref(gone.node)
    del gone
    gc.collect()
    assert node() is None, "the breaker that it shared does not keep it"
    stays.node.breaker.open()
    del stays
    assert make_pool(1, resilience=sharing("app", window=7.0)).node.breaker.policy.window == 7.0


def test_engines_made_at_the_same_time_share_one(make_pool: MakePool) -> None:
    start = threading.Barrier(8)
    pools: list[QueueDoor] = []

    def make() -> None:
        start.wait(10)
        pools.append(make_pool(1, resilience=sharing("crowd")))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len({id(pool.node.breaker) for pool in pools}) == 1
    assert len(pools) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_has_one_of_its_own(make_pool: MakePool) -> None:
    one, other = make_pool(1, resilience=sharing("app")), make_pool(1, resilience=sharing("app"))
    reader, writer = os.pipe()
    with one.node.breaker._guard:
        child = os.fork()
        if child == 0:
            one.node.breaker.open()
            os.write(writer, b"refuses" if not other.node.available else b"does not")
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert answer.read() == "refuses"
    assert one.node.available


def test_an_engine_and_an_async_engine_of_one_server(resilientdb_postgres: Postgres) -> None:
    policy = sharing("real", slow_start_calls=8)
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"), resilience=policy)
    other = rdb.create_async_engine(resilientdb_postgres.url("asyncpg"), resilience=policy)
    breaker = rdb.control(engine).breaker()
    assert rdb.control(other).breaker() is breaker

    async def ask() -> int:
        async with other.connect() as connection:
            return int((await connection.exec_driver_sql("SELECT 1")).scalar_one())

    async def main() -> None:
        assert await ask() == 1
        breaker.mode = "forced_open"
        with pytest.raises(CircuitOpen):
            await ask()
        breaker.mode = "normal"
        for _ in range(8):
            assert await ask() == 1
        assert breaker.permit is not None, "eight have succeeded"
        await other.dispose()

    asyncio.run(main())
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    engine.dispose()
    until(lambda: breaker.rate > 0, "counted")
