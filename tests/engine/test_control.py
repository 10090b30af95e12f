"""The handle: what it counts, and who is told."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.engine.control import Control
from resilientdb.runtime.context import recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.stats import PoolStats
    from resilientdb.testing.postgres import Postgres

    MakePool = Callable[..., QueueDoor]


def test_statistics_are_by_node_and_since_the_engine_was_made(make_pool: MakePool) -> None:
    pool = make_pool(2)
    control = Control(pool.cluster)
    for _ in range(3):
        pool.connect().close()
    held = pool.connect()
    for _ in range(2):
        stats = control.get_stats()
        assert list(stats) == ["db"]
        assert (stats["db"].checkouts, stats["db"].opened, stats["db"].active) == (4, 1, 1)
    held.close()


def test_a_pop_tells_what_came_since_the_last_whoever_popped_it(make_pool: MakePool) -> None:
    pool = make_pool(2)
    first, second = Control(pool.cluster), Control(pool.cluster)
    pool.connect().close()
    assert first.pop_stats()["db"].checkouts == 1
    held = pool.connect()
    pool.connect().close()
    popped = second.pop_stats()["db"]
    assert (popped.checkouts, popped.opened) == (2, 1)
    assert (popped.total, popped.active, popped.idle) == (2, 1, 1), "these are as they are"
    assert first.pop_stats()["db"].checkouts == 0
    assert first.get_stats()["db"].checkouts == 3, "a pop changes nothing for those who do not pop"
    held.close()


def test_two_engines_do_not_share_what_was_popped(make_pool: MakePool) -> None:
    one, other = make_pool(1), make_pool(1)
    for pool in (one, other):
        pool.connect().close()
    assert Control(one.cluster).pop_stats()["db"].checkouts == 1
    assert Control(other.cluster).pop_stats()["db"].checkouts == 1


def test_a_pop_spans_the_pools_of_one_engine(make_pool: MakePool) -> None:
    pool = make_pool(2)
    control = Control(pool.cluster)
    pool.connect().close()
    control.pop_stats()
    pool.connect().close()
    pool.dispose()
    again = pool.recreate()
    again.connect().close()
    popped = control.pop_stats()["db"]
    assert (popped.checkouts, popped.opened, popped.closed) == (2, 1, 1)
    again.dispose()


def test_pops_at_once_tell_everything_once(make_pool: MakePool) -> None:
    pool = make_pool(2)
    control = Control(pool.cluster)
    popped: list[PoolStats] = []
    done = threading.Event()
    before = sys.getswitchinterval()

    def pop() -> None:
        while not done.is_set():
            popped.append(control.pop_stats()["db"])

    threads = [threading.Thread(target=pop) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(2_000):
            pool.connect().close()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    popped.append(control.pop_stats()["db"])
    assert sum(stats.checkouts for stats in popped) == control.get_stats()["db"].checkouts >= 2_000
    assert min(stats.checkouts for stats in popped) >= 0


def test_a_pop_in_the_middle_of_a_pop_tells_nothing_twice(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal handler, or a finalizer, may do it."""
    pool = make_pool(1)
    control = Control(pool.cluster)
    pool.connect().close()
    inner: list[int] = []
    look = pool.stats

    def look_again() -> Any:
        monkeypatch.setattr(pool, "stats", look)
        inner.append(control.pop_stats()["db"].checkouts)
        return look()

    monkeypatch.setattr(pool, "stats", look_again)
    outer = control.pop_stats()["db"].checkouts
    assert sorted([outer, *inner]) == [0, 1]


def test_a_pop_that_fails_loses_nothing(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(1)
    control = Control(pool.cluster)
    pool.connect().close()
    control.pop_stats()
    pool.connect().close()

    def fail() -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "stats", fail)
        with pytest.raises(KeyboardInterrupt):
            control.pop_stats()
    assert control.pop_stats()["db"].checkouts == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_forked_in_the_middle_of_a_pop_can_pop(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(1)
    control = Control(pool.cluster)
    pool.connect().close()
    inside, go_on = threading.Event(), threading.Event()
    look = pool.stats

    def linger() -> Any:
        inside.set()
        assert go_on.wait(20)
        return look()

    monkeypatch.setattr(pool, "stats", linger)
    thread = threading.Thread(target=control.pop_stats)
    thread.start()
    assert inside.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
        child = os.fork()
    if child == 0:
        good = False
        try:
            pool.stats = look  # type: ignore[method-assign]
            good = control.pop_stats()["db"].checkouts == 1 and control.pop_stats()["db"].checkouts == 0
        finally:
            os._exit(0 if good else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_pool_class_that_keeps_no_counts_is_left_out(tmp_path: Path) -> None:
    engine = rdb.create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=sa.NullPool)
    control = rdb.control(engine)
    with engine.connect():
        assert (control.get_stats(), control.pop_stats()) == ({}, {})


def test_the_kill_switch_breaks_no_start_up_code() -> None:
    engine = rdb.create_engine(
        "postgresql+psycopg://app@127.0.0.1:1/app", resilience=rdb.Resilience(enabled=False)
    )
    control = rdb.control(engine)
    control.validate()
    assert (control.get_stats(), control.pop_stats(), control.holders()) == ({}, {}, [])


def test_every_nodes_pool_is_counted(resilientdb_postgres: Postgres, resilientdb_standby: Postgres) -> None:
    engine = rdb.create_engine(resilientdb_postgres.url(), replicas=[resilientdb_standby.address])
    control = rdb.control(engine)
    try:
        with engine.connect():
            pass
        with rdb.read_only(), engine.connect(), engine.connect():
            pass
        checkouts = {name: stats.checkouts for name, stats in control.pop_stats().items()}
        assert checkouts == {resilientdb_postgres.address: 1, resilientdb_standby.address: 2}
        with rdb.read_only(), engine.connect():
            pass
        checkouts = {name: stats.checkouts for name, stats in control.pop_stats().items()}
        assert checkouts == {resilientdb_postgres.address: 0, resilientdb_standby.address: 1}
    finally:
        engine.dispose()


# -- who holds what -------------------------------------------------------------------------------------------------


def test_the_longest_holder_comes_first(make_pool: MakePool) -> None:
    pool = make_pool(3)
    control = Control(pool.cluster)
    assert control.holders() == []
    held = [pool.connect() for _ in range(3)]
    holders = control.holders()
    assert [holder.node for holder in holders] == ["db"] * 3
    assert [holder.seconds for holder in holders] == sorted((one.seconds for one in holders), reverse=True)
    assert all(holder.seconds >= 0 and holder.task is None for holder in holders)
    assert {holder.thread for holder in holders} == {threading.current_thread().name}
    held.pop().close()
    assert len(control.holders()) == 2
    for connection in held:
        connection.close()
    assert control.holders() == []


def test_a_holder_is_known_by_the_work_it_does(make_pool: MakePool) -> None:
    pool = make_pool(1)
    with recording("GET /orders/7"):
        connection = pool.connect()
    assert [holder.route for holder in Control(pool.cluster).holders()] == ["GET /orders/7"]
    connection.close()


def test_tasks_are_holders_by_their_name(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_async_engine(resilientdb_postgres.url("asyncpg"))

    async def main() -> None:
        async with engine.connect():
            (holder,) = rdb.control(engine).holders()
            assert (holder.node, holder.task, holder.thread) == (resilientdb_postgres.address, "orders", None)
        await engine.dispose()

    async def named() -> None:
        await asyncio.create_task(main(), name="orders")

    asyncio.run(named())
