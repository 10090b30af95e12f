"""An engine that nobody disposes of: its process ends at once and in silence, forks, or just forgets it."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

import resilientdb as rdb

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.testing.postgres import Postgres

BUSY = """
    resilience = rdb.Resilience(
        lifecycle=rdb.Lifecycle(
            min_size=3, validate_idle=0.02, idle_timeout=0.1, keepalive=0.03, max_age=0.5, leak_threshold=0.05
        ),
        breaker=rdb.BreakerPolicy(probe_interval=0.02),
    )
"""
"""Everything that goes on in the background, and all the time."""

# A slow machine would make every checkout a leak.
CALM = BUSY.replace(", leak_threshold=0.05", "")


def run(script: str, *arguments: str) -> str:
    """What a script prints that ends well, within a bounded time and without a word on stderr."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert time.monotonic() - began < 15.0
    return done.stdout


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds:g} s"
        time.sleep(0.005)


# -- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_threads(resilientdb_postgres: Postgres, driver: str) -> None:
    """With a connection out, one in line and the background at work."""
    script = f"""
    import logging, sys, threading, time
    import resilientdb as rdb
    logging.getLogger("resilientdb").addHandler(logging.NullHandler())  # the leak is meant
    {BUSY.strip()}
    engine = rdb.create_engine(sys.argv[1], pool_size=3, max_overflow=0, resilience=resilience)
    held = [engine.connect() for _ in range(3)]
    threading.Thread(target=engine.connect, daemon=True).start()
    stats = lambda: rdb.control(engine).get_stats().popitem()[1]
    while not stats().waiting or not stats().leaks:
        time.sleep(0.01)
    print("ends", time.monotonic())
    """
    began = float(run(script, resilientdb_postgres.url(driver)).split()[1])
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_threads_in_the_middle_of_opening(resilientdb_postgres: Postgres, driver: str) -> None:
    script = f"""
    import sys
    import resilientdb as rdb
    {CALM.strip()}
    engine = rdb.create_engine(sys.argv[1], resilience=resilience)
    engine.connect().close()
    """
    for _ in range(3):
        run(script, resilientdb_postgres.url(driver))


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
@pytest.mark.parametrize("seconds", ["0", "0.2"])
def test_tasks(resilientdb_postgres: Postgres, driver: str, seconds: str) -> None:
    """The loop ends while the background is at work in it, and nobody has disposed of the engine."""
    script = f"""
    import asyncio, sys, time
    import resilientdb as rdb
    {CALM.strip()}
    async def main():
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
        await asyncio.sleep(float(sys.argv[2]))
    engine = rdb.create_async_engine(sys.argv[1], resilience=resilience)
    asyncio.run(main())
    time.sleep(0.2)  # the keeper goes on, and finds the loop closed
    """
    run(script, resilientdb_postgres.url(driver), seconds)


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
def test_tasks_that_disposed(resilientdb_postgres: Postgres, driver: str) -> None:
    script = f"""
    import asyncio, sys
    import resilientdb as rdb
    {CALM.strip()}
    async def main():
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
        await asyncio.sleep(0.1)
        await engine.dispose()
    engine = rdb.create_async_engine(sys.argv[1], resilience=resilience)
    for _ in range(3):
        asyncio.run(main())
    """
    run(script, resilientdb_postgres.url(driver))


# -- forks -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_begins_anew(resilientdb_postgres: Postgres) -> None:
    """As with a server that loads the application, and uses its engine, before it forks its workers."""
    script = f"""
    import os, sys, time
    import resilientdb as rdb
    {CALM.strip()}
    engine = rdb.create_engine(sys.argv[1], pool_size=4, max_overflow=0, resilience=resilience)
    pid = lambda connection: connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    stats = lambda: rdb.control(engine).get_stats().popitem()[1]
    def until(condition):
        ends = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < ends, stats()
            time.sleep(0.01)
    held = engine.connect()
    mine = pid(held)
    until(lambda: stats().total >= 3)
    child = os.fork()
    if not child:
        with engine.connect() as connection:
            assert pid(connection) != mine
        until(lambda: stats().total >= 3)            # opened ahead
        until(lambda: "age" in stats().retired)      # retired
        held = [engine.connect() for _ in range(4)]  # and all slots are there
        print("child", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pid(held) == mine
    held.rollback()
    held.close()
    with engine.connect() as connection:
        pid(connection)
    until(lambda: stats().total >= 3)
    print("parent", flush=True)
    """
    # The parent, too, retires connections by age before it forks; the child counts its own.
    assert run(script, resilientdb_postgres.url("psycopg")).split() == ["child", "parent"]


# -- forgotten ---------------------------------------------------------------------------------------------------


def probers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("resilientdb-prober")]


def _is_at_work(pool: Any, before: list[str]) -> bool:
    return pool.stats().total == 3 and len(probers()) > len(before)


@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
def test_a_forgotten_engine_is_gone_with_all_it_had(resilientdb_postgres: Postgres) -> None:
    url = resilientdb_postgres.url("psycopg")
    before = probers()
    engine = rdb.create_engine(
        url,
        connect_args={"application_name": "forgotten"},
        resilience=rdb.Resilience(
            lifecycle=rdb.Lifecycle(min_size=3, validate_idle=0.02, keepalive=0.05, leak_threshold=5.0)
        ),
    )
    engine.connect().close()
    pool: Any = engine.pool
    cluster = pool.cluster
    until(functools.partial(_is_at_work, pool, before))
    left: list[Any] = [
        weakref.ref(thing) for thing in (engine, pool, cluster, cluster.nodes[0], pool._upkeep)
    ]
    del engine, pool, cluster

    def forgotten() -> bool:
        gc.collect()
        return not any(reference() is not None for reference in left)

    until(forgotten)
    until(lambda: probers() == before)
    until(
        lambda: (
            resilientdb_postgres.query(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'forgotten'"
            )
            == [(0,)]
        )
    )


def test_so_is_one_that_drained(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(resilientdb_postgres.url("psycopg"))
    engine.connect().close()
    engine.dispose()
    assert rdb.control(engine).drain(timeout=0)
    left: list[Any] = [weakref.ref(engine), weakref.ref(engine.pool)]
    del engine

    def forgotten() -> bool:
        gc.collect()
        return not any(reference() is not None for reference in left)

    until(forgotten)
