"""A limiter's life: who may share it, how long it lives, a fork, and connections that are looked after."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import random
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.engine import shared
from resilientdb.engine.control import cluster_of
from resilientdb.errors import (
    ConfigurationError,
    PoolTimeout,
)
from tests.engine import sharing
from tests.engine.conftest import by_another
from tests.engine.sharing import (
    Gauge,
    LoopThread,
    Makers,
    assert_whole,
    give,
    give_back_one,
    in_thread,
    policy,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from resilientdb.testing import Postgres
    from tests.engine.conftest import FakeDatabase


own_limiters, make, loop = sharing.own_limiters, sharing.make, sharing.loop


# -- contradictions, names, lifetimes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "queue", "message"),
    [
        (3, {}, {}, r"pool_size \+ max_overflow is 2 in one and 3 in the other$"),
        (2, {"max_overflow": -1}, {}, r"pool_size \+ max_overflow is 2 in one and unlimited in the other$"),
        (2, {}, {"max_waiting": 7}, r"queue\.max_waiting is 50 in one and 7 in the other$"),
        (2, {}, {"target": 0.1}, r"queue\.target is 0\.05 in one and 0\.1 in the other$"),
        (2, {}, {"interval": 2.0}, r"queue\.interval is 1\.0 in one and 2\.0 in the other$"),
        (2, {}, {"sheddable_share": 0.1}, r"queue\.sheddable_share is 0\.25 in one and 0\.1 in the other$"),
    ],
)
def test_engines_that_disagree(
    make: Makers, size: int, options: dict[str, Any], queue: dict[str, Any], message: str
) -> None:
    one = make.threads(2)
    with pytest.raises(
        ConfigurationError, match=rf"the limiter 'app' \(queue\.limiter\).* at db.*{message}"
    ) as caught:
        make.threads(size, resilience=policy(**queue), **options)
    assert (caught.value.key, caught.value.value) == ("queue.limiter", "app")
    assert one.stats().limit == 2


def test_patience_is_of_the_line(tmp_path: Path) -> None:
    """An explicit pool_timeout says that nobody is sent away under overload: that cannot be half true."""
    options: dict[str, Any] = {"resilience": policy()}
    one = rdb.create_engine(f"sqlite:///{tmp_path}/a.db", **options)
    with pytest.raises(
        ConfigurationError, match="an explicit pool_timeout is not given in one and given in the"
    ):
        rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db", pool_timeout=30, **options)
    one.dispose()


def test_names_and_nodes_are_apart(make: Makers, loop: LoopThread) -> None:
    one, tasks = make.threads(1), make.tasks(1)
    apart = [make.threads(2, resilience=policy("reports")), make.threads(2, node="replica"),
             make.threads(2, resilience=policy(None))]  # fmt: skip
    held = one.connect()
    for pool in apart:
        taken = [by_another(pool.connect) for _ in range(2)]
        assert pool.stats().active == 2
        for connection in taken:
            connection.close()
    held.close()
    assert_whole(one, tasks, loop, 1)


def test_replicas_share_node_by_node() -> None:
    """An engine with replicas and one of the first replica alone have that node in common, and no other."""
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 1, "resilience": policy()}
    cluster = rdb.create_engine("postgresql+psycopg://app@a/db", replicas=["b", "c"], **options)
    single = rdb.create_engine("postgresql+psycopg://app@b/db", **options)
    nodes: Any = cluster_of(cluster).nodes
    lines = {node.name: node.pool._admission for node in nodes}
    assert len({id(line) for line in lines.values()}) == 3
    pool: Any = single.pool
    assert pool._admission is lines["b:5432"]
    cluster.dispose()
    single.dispose()


def test_a_limiter_ends_with_its_last_engine(make: Makers) -> None:
    one, other = make.threads(1), make.threads(1)
    alive = weakref.ref(one._slots._limiter)  # type: ignore[attr-defined]
    gc.disable()
    try:
        del one
        with pytest.raises(ConfigurationError):
            make.threads(2)
        del other
        assert make.threads(2).stats().limit == 2, "engines that are gone, collected or not, have no say"
    finally:
        gc.enable()
    assert alive() is None


def test_an_engine_that_is_dropped_leaves_the_limit_as_it_was(make: Makers, loop: LoopThread) -> None:
    """What lay idle in it was in nobody's use."""
    one, other, tasks = make.threads(2), make.threads(2), make.tasks(2)
    held = [other.connect(), other.connect()]
    for connection in held:
        connection.close()
    assert other.stats().idle == 2
    del held, connection, other
    gc.collect()
    assert one._admission.total == 0
    assert_whole(one, tasks, loop, 2)


def test_a_pool_that_is_replaced_keeps_its_part_until_it_comes_back(make: Makers, loop: LoopThread) -> None:
    old, tasks = make.threads(2), make.tasks(2)
    out = old.connect()
    old.connect().close()
    old.dispose()
    new = old.recreate()
    assert new._admission is old._admission
    assert new._admission.total == 1
    tasks._timeout = new._timeout = 0.0
    loop.run(give_back_one(tasks))
    one_more = by_another(new.connect)
    with pytest.raises(PoolTimeout):
        loop.run(tasks.take())
    out.close()
    assert old.stats().total == 0
    loop.run(give_back_one(tasks))
    one_more.close()
    assert_whole(new, tasks, loop, 2)


def test_switched_off(tmp_path: Path) -> None:
    """Plain SQLAlchemy, whatever the name and whatever the sizes."""
    off = rdb.Resilience(enabled=False, queue=rdb.SaturationQueue(limiter="app"))
    engines = [
        rdb.create_engine(f"sqlite:///{tmp_path}/off.db", pool_size=size, max_overflow=0, resilience=off)
        for size in (1, 2)
    ]
    with engines[0].connect(), engines[1].connect(), engines[1].connect():
        assert rdb.control(engines[0]).snapshot().nodes[0].pool is None
    for engine in engines:
        engine.dispose()


def test_a_second_loop_is_told_of_the_first(make: Makers) -> None:
    """Idle connections are enough to belong to a loop; what the other engine has in use is not."""
    one, other = make.threads(2), make.tasks(2)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def lose() -> None:
        connection = await other.take()
        connection.invalidate()
        await give(connection)

    held = one.connect()
    first.run_until_complete(lose())
    second.run_until_complete(give_back_one(other))
    held.close()
    assert (other.stats().idle, other._admission.total) == (1, 0)
    with pytest.raises(ConfigurationError, match="belong to another event loop"):
        first.run_until_complete(give_back_one(other))
    first.close()
    second.close()


# -- after a fork -----------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> str:
    """What ``work()`` returns in a child process, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "?"
        try:
            said = repr(work())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = repr(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        said = answers.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_begins_with_an_empty_limiter(make: Makers, loop: LoopThread, database: FakeDatabase) -> None:
    """Whatever the parent's threads and tasks hold, also in a pool that has been replaced, or wait for."""
    replaced, tasks = make.threads(3), make.tasks(3)
    out = [replaced.connect()]
    replaced.dispose()
    one = replaced.recreate()
    out.append(by_another(one.connect))
    theirs = loop.run(tasks.take())
    waiting = in_thread(one.connect)
    until(lambda: one.stats().waiting == 1)

    def work() -> object:
        seen = [one._admission.total, one.stats().waiting, one.stats().total, tasks.stats().total]
        one._timeout = tasks._timeout = 0.0
        opened = database.open_now
        own = [by_another(one.connect) for _ in range(3)]
        with pytest.raises(PoolTimeout):
            asyncio.run(tasks.take())
        for connection in (*out, *own):
            connection.close()
        return seen, one._admission.total, database.open_now - opened

    assert in_child(work) == "([0, 0, 0, 0], 0, 3)"
    loop.run(give(theirs))
    waiting.result(10).close()
    for connection in out:
        connection.close()
    assert_whole(one, tasks, loop, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_of_a_parent_that_was_making_an_engine(make: Makers) -> None:
    """The lock of the list is not the child's to wait for."""
    one = make.threads(2)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with shared._lock:
            held.set()
            release.wait(20)

    holder = in_thread(hold)
    assert held.wait(10)

    def work() -> object:
        with shared._lock if not shared._lock.locked() else contextlib.nullcontext():
            pass
        return shared._lock.locked(), one.stats().limit

    assert in_child(work) == "(False, 2)"
    release.set()
    holder.result(10)


# -- looking after the connections ------------------------------------------------------------------------------


def test_upkeep_loses_no_slot(resilientdb_postgres: Postgres, loop: LoopThread) -> None:
    """Warm-up, validation, pruning, retirement by age and by uses, a report on leaks: all at once, at work."""
    life = rdb.Lifecycle(
        min_size=2,
        idle_timeout=0.1,
        validate_idle=0.02,
        keepalive=0.05,
        max_age=0.3,
        max_uses=5,
        leak_threshold=0.2,
    )
    options: dict[str, Any] = {
        "pool_size": 3,
        "max_overflow": 1,
        "pool_timeout": 30,
        "resilience": policy(life=life),
    }
    one = rdb.create_engine(resilientdb_postgres.url("psycopg"), **options)
    other = rdb.create_async_engine(resilientdb_postgres.url("asyncpg"), **options)
    gauge = Gauge()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(40):
            with one.connect() as connection, gauge:
                assert connection.scalar(sa.text("SELECT 1")) == 1
            time.sleep(dice.choice([0, 0, 0.03]))

    async def task(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(40):
            async with other.connect() as connection:
                with gauge:
                    assert await connection.scalar(sa.text("SELECT 1")) == 1
            await asyncio.sleep(dice.choice([0, 0, 0.03]))

    running: list[Any] = [in_thread(functools.partial(work, seed)) for seed in range(5)]
    running += [loop.start(task(seed)) for seed in range(5)]
    for future in running:
        future.result(60)
    assert 1 < gauge.most <= 4
    pools: Any = (one.pool, other.sync_engine.pool)
    retired = {why for pool in pools for why in pool.stats().retired}
    assert "max_uses" in retired or "uses" in retired, retired
    until(lambda: all(pool.stats().total >= 2 for pool in pools), "warm again")
    until(lambda: pools[0]._admission.total == 0, "nothing in use")
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(one.connect())
        pools[1]._timeout = 0.0
        with pytest.raises(PoolTimeout):
            loop.run(other.connect().start())
    one.dispose()
    loop.run(other.dispose())
    until(lambda: pools[0]._admission.total == 0, "what was being looked after at that moment has come back")


def test_a_warm_up_takes_what_there_is(resilientdb_postgres: Postgres, loop: LoopThread) -> None:
    """A limit that the other engine uses up is not gone round; and nobody is kept busy by asking."""
    life = rdb.Lifecycle(min_size=2)
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "resilience": policy(life=life)}
    one = rdb.create_engine(resilientdb_postgres.url("psycopg"), **options)
    other = rdb.create_async_engine(resilientdb_postgres.url("asyncpg"), **options)
    pools: Any = (one.pool, other.sync_engine.pool)

    async def main() -> None:
        held = [await other.connect() for _ in range(2)]
        rdb.control(one).warm()
        assert pools[0].stats().total == 0
        began = time.thread_time()
        busy = time.process_time()
        pools[0]._upkeep.used()
        await asyncio.sleep(0.3)
        assert time.process_time() - busy < 0.2 + (time.thread_time() - began)
        for connection in held:
            await connection.close()

    loop.run(main())
    rdb.control(one).warm()
    assert pools[0].stats().idle == 2
    assert pools[0]._admission.total == 0
    one.dispose()
    loop.run(other.dispose())
