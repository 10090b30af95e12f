"""The life of connections on a real server, with threads and with tasks: opened ahead, asked, retired, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

import resilientdb as rdb
from resilientdb.errors import DeadlineExceeded
from resilientdb.events import ConnectionLeaked
from resilientdb.testing import faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.stats import PoolStats
    from resilientdb.testing.postgres import Postgres
    from resilientdb.testing.toxiproxy import Proxy

    Make = Callable[..., "Live"]

DRIVERS = ["psycopg", "psycopg_async", "asyncpg"]
SOON = 0.05
"""Seconds unused after which a connection is in doubt."""

_serial = itertools.count()


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds:g} s"
        time.sleep(0.005)


class Live:
    """An engine of either kind, used from the test's thread. An asynchronous one has a loop that never stops."""

    def __init__(
        self,
        postgres: Postgres,
        driver: str,
        *,
        proxy: Proxy | None = None,
        policy: dict[str, Any],
        **options: Any,
    ) -> None:
        self.postgres = postgres
        self.name = f"life-{next(_serial)}"
        self.loop: asyncio.AbstractEventLoop | None = None
        # The prober's connection would be among those looked at.
        policy.setdefault("breaker", rdb.BreakerPolicy(probe_interval=None))
        named: dict[str, Any] = {"application_name": self.name}
        options["connect_args"] = {"server_settings": named} if driver == "asyncpg" else named
        options["resilience"] = rdb.Resilience(**policy)
        url = postgres.url(driver, port=proxy.listen_port if proxy is not None else None)
        self.engine: Any
        if driver == "psycopg":
            self.engine = rdb.create_engine(url, **options)
        else:
            self.loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self.loop.run_forever)
            self._thread.start()
            self.engine = rdb.create_async_engine(url, **options)
        self.control: Any = rdb.control(self.engine)

    def wait(self, result: Any) -> Any:
        if self.loop is None:
            return result
        return asyncio.run_coroutine_threadsafe(result, self.loop).result(30)

    def stats(self) -> PoolStats:
        (stats,) = self.control.get_stats().values()
        return stats  # type: ignore[no-any-return]

    def value(self, sql: str = "SELECT 1", *, deadline: float | None = None) -> Any:
        """One checkout, one statement."""
        with contextlib.ExitStack() as stack:
            if self.loop is None:
                stack.enter_context(rdb.deadline(deadline))
                return stack.enter_context(self.engine.connect()).exec_driver_sql(sql).scalar()

        async def ask() -> Any:
            with rdb.deadline(deadline):
                async with self.engine.connect() as connection:
                    return (await connection.exec_driver_sql(sql)).scalar()

        return self.wait(ask())

    def use(self, connections: int = 1) -> list[int]:
        """Check so many out at once and give them back; the server's ids of them."""
        sql = "SELECT pg_backend_pid()"
        if self.loop is None:
            with contextlib.ExitStack() as stack:
                held = [stack.enter_context(self.engine.connect()) for _ in range(connections)]
                return [connection.exec_driver_sql(sql).scalar() for connection in held]

        async def use() -> list[int]:
            async with contextlib.AsyncExitStack() as stack:
                held = [await stack.enter_async_context(self.engine.connect()) for _ in range(connections)]
                return [(await connection.exec_driver_sql(sql)).scalar() for connection in held]

        return self.wait(use())  # type: ignore[no-any-return]

    def touch(self) -> None:
        """One checkout, no statement."""
        if self.loop is None:
            self.engine.connect().close()
            return

        async def touch() -> None:
            async with self.engine.connect():
                pass

        self.wait(touch())

    def sessions(self) -> dict[int, Any]:
        """The server's view: the sessions of this engine, and when each was last asked anything."""
        rows = self.postgres.query(
            f"SELECT pid, query_start FROM pg_stat_activity WHERE application_name = '{self.name}'"
        )
        return dict(rows)

    def kill(self) -> set[int]:
        """The server ends all sessions; returns when they are gone."""
        pids = set(self.sessions())
        for pid in pids:
            self.postgres.query(f"SELECT pg_terminate_backend({pid})")
        until(lambda: not pids & set(self.sessions()))
        return pids

    def doze(self, connections: int = 1) -> None:
        """Wait until so many have been unused for ``validate_idle``, and the pool has seen it."""
        pool = getattr(self.engine, "sync_engine", self.engine).pool
        until(lambda: len(pool._slots.dozing) >= connections)

    def close(self) -> None:
        self.wait(self.engine.dispose())
        if self.loop is not None:
            self.wait(asyncio.sleep(0.01))  # transports say goodbye
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


@pytest.fixture(params=DRIVERS)
def make(request: pytest.FixtureRequest, resilientdb_postgres: Postgres) -> Iterator[Make]:
    """``make(proxy=None, breaker=..., retry=..., pool_size=..., min_size=...)``: the rest is ``Lifecycle``'s."""
    made: list[Live] = []

    def make(*, proxy: Proxy | None = None, **options: Any) -> Live:
        policy: dict[str, Any] = {key: options.pop(key) for key in ("breaker", "retry") if key in options}
        pool = {key: options.pop(key) for key in tuple(options) if key.startswith(("pool_", "max_over"))}
        policy["lifecycle"] = rdb.Lifecycle(**{"validate_idle": SOON, **options})
        made.append(Live(resilientdb_postgres, request.param, proxy=proxy, policy=policy, **pool))
        return made[-1]

    yield make
    for live in made:
        live.close()


# -- asked before they are used ----------------------------------------------------------------------------------


def test_a_connection_that_died_unseen_is_never_handed_out(make: Make) -> None:
    live = make()
    live.use(3)
    live.doze(3)
    killed = live.kill()
    assert not killed & set(live.use(3))
    assert live.stats().retired == {"validation": 3}


def test_so_is_one_that_was_opened_ahead_and_never_used(make: Make) -> None:
    live = make()
    live.wait(live.control.warm(1))
    live.doze()
    live.kill()
    assert live.value() == 1


def test_with_no_time_allowed_every_idle_connection_is_in_doubt(make: Make) -> None:
    live = make(validate_idle=0)
    for _ in range(3):
        live.touch()
        live.kill()
    assert live.value() == 1
    assert live.stats().retired == {"validation": 3}


def test_a_busy_connection_is_not_asked(make: Make) -> None:
    live = make(validate_idle=60)
    live.value()
    asked = live.sessions()
    for _ in range(5):
        live.touch()
    assert live.sessions() == asked
    assert len(asked) == 1


def test_an_idle_one_is_asked_once(make: Make) -> None:
    live = make()
    live.value()
    asked = live.sessions()
    live.doze()
    assert live.sessions() == asked, "nobody asks while nobody uses it"
    live.touch()
    again = live.sessions()
    assert again.keys() == asked.keys()
    assert again != asked


def test_silence_is_an_answer(make: Make, resilientdb_proxy: Proxy) -> None:
    """The connection is given up after ``validation_timeout``, and another is opened for who waits."""
    live = make(proxy=resilientdb_proxy, validation_timeout=0.2)
    before = live.use()
    live.doze()
    found: list[list[int]] = []
    caller = threading.Thread(target=lambda: found.append(live.use()))
    with faults.hang(resilientdb_proxy):
        began = time.monotonic()
        caller.start()
        until(lambda: live.stats().retired == {"validation": 1})
        assert time.monotonic() - began < 2.0
    caller.join()
    assert len(found) == 1
    assert found[0] != before


def test_the_question_ends_with_the_deadline(make: Make, resilientdb_proxy: Proxy) -> None:
    live = make(proxy=resilientdb_proxy, validation_timeout=30.0)
    live.use()
    live.doze()
    with faults.hang(resilientdb_proxy):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            live.value(deadline=0.3)
        assert time.monotonic() - began < 2.0
    assert live.value() == 1


def test_the_question_of_pre_ping_ends_too(make: Make, resilientdb_proxy: Proxy) -> None:
    live = make(proxy=resilientdb_proxy, validation_timeout=0.2, pool_pre_ping=True)
    before = live.use()
    found: list[list[int]] = []
    caller = threading.Thread(target=lambda: found.append(live.use()))
    with faults.hang(resilientdb_proxy):
        began = time.monotonic()
        caller.start()
        until(lambda: live.stats().closed == 1)
        assert time.monotonic() - began < 2.0
    caller.join()
    assert len(found) == 1
    assert found[0] != before


def test_pre_ping_finds_the_dead(make: Make) -> None:
    live = make(pool_pre_ping=True)
    live.use(2)
    killed = live.kill()
    assert not killed & set(live.use(2))


# -- opened ahead ------------------------------------------------------------------------------------------------


def test_the_first_use_brings_the_rest(make: Make) -> None:
    live = make(min_size=4)
    live.value()
    until(lambda: len(live.sessions()) == 4)
    assert live.stats().total == live.stats().idle == 4
    assert live.stats().opened == 4


def test_warm_at_once_and_up_to_the_size(make: Make) -> None:
    live = make(min_size=2, pool_size=3, max_overflow=1)
    live.wait(live.control.warm())
    assert len(live.sessions()) == 2
    live.wait(live.control.warm(3))
    live.wait(live.control.warm(1))
    assert len(live.sessions()) == 3
    live.wait(live.control.warm(50))
    assert live.stats().opened == 3, "more than pool_size would not be kept"


def test_warm_raises_as_connecting_does(make: Make, resilientdb_proxy: Proxy) -> None:
    live = make(proxy=resilientdb_proxy, min_size=1, retry=rdb.RetryPolicy(attempts=1))
    heard: list[Any] = []
    event.listen(getattr(live.engine, "sync_engine", live.engine), "handle_error", heard.append)
    kinds: list[type] = []
    with faults.down(resilientdb_proxy):
        for warm in (False, True):
            with pytest.raises((sa.exc.OperationalError, OSError)) as caught:
                _ = live.wait(live.control.warm()) if warm else live.value()
            kinds.append(type(caught.value))
    assert kinds[0] is kinds[1]
    assert len(heard) in {0, 2}, (
        "listeners hear of both or, where the driver's error is none of its own, of neither"
    )
    live.wait(live.control.warm())
    assert live.stats().total == 1


def test_what_the_server_ended_is_replaced(make: Make) -> None:
    live = make(min_size=3, keepalive=0.1)
    live.value()
    until(lambda: len(live.sessions()) == 3)
    killed = live.kill()
    until(lambda: len(live.sessions()) == 3)
    assert not killed & set(live.sessions())
    assert live.stats().retired == {"keepalive": 3}


def test_an_outage_is_waited_out(make: Make, resilientdb_proxy: Proxy) -> None:
    live = make(proxy=resilientdb_proxy, min_size=2, keepalive=0.05, breaker=rdb.BreakerPolicy(enabled=False))
    live.value()
    until(lambda: live.stats().idle == 2)
    with faults.down(resilientdb_proxy):
        began = time.monotonic()
        until(lambda: live.stats().connect_failures >= 6)
        lasted = time.monotonic() - began
        attempts = live.stats().connect_failures
        assert live.stats().total <= 2
    # Pauses of 0.05 s on average would be the shortest of all.
    assert attempts <= 2 * (2 + lasted / 0.01)
    until(lambda: len(live.sessions()) == 2)
    assert live.value() == 1


def test_the_circuit_keeps_the_background_out(make: Make, resilientdb_proxy: Proxy) -> None:
    live = make(proxy=resilientdb_proxy, min_size=2, keepalive=0.05)
    live.value()
    until(lambda: live.stats().idle == 2)
    live.control.breaker().open()
    live.kill()
    until(lambda: live.stats().total == 0)
    opened = live.stats().opened
    time.sleep(0.3)  # nothing is to happen
    assert live.stats().opened == opened
    live.control.breaker().close()
    until(lambda: len(live.sessions()) == 2)


# -- kept alive --------------------------------------------------------------------------------------------------


def test_a_server_that_ends_idle_sessions_finds_none(make: Make, resilientdb_postgres: Postgres) -> None:
    """As a pooler or a firewall does that drops what is silent."""
    live = make(min_size=2, keepalive=0.1, max_age=None)
    event.listen(
        getattr(live.engine, "sync_engine", live.engine),
        "connect",
        lambda connection, _record: _run(connection, "SET idle_session_timeout = '800ms'"),
    )
    live.value()
    until(lambda: live.stats().idle == 2)
    asked = live.sessions()
    time.sleep(1.2)  # nothing is to happen to them
    assert live.sessions().keys() == asked.keys()
    assert live.stats().retired == {}


def _run(connection: Any, sql: str) -> None:
    cursor = connection.cursor()
    cursor.execute(sql)
    cursor.close()
    connection.commit()


# -- no longer wanted --------------------------------------------------------------------------------------------


def test_they_end_by_age_and_by_disuse_and_by_use(make: Make) -> None:
    old = make(max_age=0.3, validate_idle=0.05)
    old.use(3)
    until(lambda: not old.sessions())
    assert old.stats().retired == {"age": 3}
    unused = make(idle_timeout=0.2, min_size=1)
    unused.use(3)
    until(lambda: len(unused.sessions()) == 1)
    assert unused.stats().retired == {"idle": 2}
    spent = make(max_uses=3)
    pids = [spent.use()[0] for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    assert spent.stats().retired == {"uses": 2}


# -- not given back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS[1:])
def test_a_leak_in_a_task_is_told_with_its_place(resilientdb_postgres: Postgres, driver: str) -> None:
    engine = rdb.create_async_engine(
        resilientdb_postgres.url(driver),
        resilience=rdb.Resilience(lifecycle=rdb.Lifecycle(leak_threshold=0.1)),
    )
    control = rdb.control(engine)
    told: list[Any] = []
    control.on_event(told.append)

    async def forgetful() -> Any:
        return await engine.connect()  # the line that the report is to show

    async def main() -> None:
        task = asyncio.create_task(forgetful(), name="orders-7")
        held = await task
        async with asyncio.timeout(10):
            while not told:  # noqa: ASYNC110 - it is told from a thread
                await asyncio.sleep(0.01)
        (holder,) = control.holders()
        for said in (told[0].holder, holder):
            assert (said.task, said.thread) == ("orders-7", None)
            assert any("the line that the report is to show" in line for line in said.stack)
        await held.close()
        assert control.holders() == []
        await engine.dispose()

    asyncio.run(main())
    assert [type(event) for event in told] == [ConnectionLeaked]


# -- what can be seen meanwhile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS[1:])
def test_the_counts_agree_while_tasks_are_cancelled(resilientdb_postgres: Postgres, driver: str) -> None:
    lifecycle = rdb.Lifecycle(min_size=2, max_uses=9, idle_timeout=0.05, keepalive=0.02, validate_idle=0.01)
    engine = rdb.create_async_engine(
        resilientdb_postgres.url(driver),
        pool_size=4,
        max_overflow=0,
        resilience=rdb.Resilience(lifecycle=lifecycle, breaker=rdb.BreakerPolicy(probe_interval=None)),
    )
    control = rdb.control(engine)
    wrong: list[object] = []
    ends = threading.Event()

    def watch() -> None:
        while not ends.is_set():
            (stats,) = control.get_stats().values()
            if stats.active + stats.idle != stats.total or stats.active < 0 or stats.total > 4:
                wrong.append(stats)

    async def use(turn: int) -> None:
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT pg_sleep(0.002)")
            if turn % 5 == 0:
                await connection.invalidate()
            await asyncio.sleep(0.001 * (turn % 3))

    async def work(number: int) -> None:
        for turn in range(number, number + 25):
            with contextlib.suppress(TimeoutError, rdb.PoolSaturated):
                async with asyncio.timeout(0.003 if turn % 4 == 0 else None):
                    await use(turn)

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(8)))
        for _ in range(2):
            held = [await engine.connect() for _ in range(4)]
            (stats,) = control.get_stats().values()
            assert (stats.total, stats.active, stats.idle) == (4, 4, 0)
            for connection in held:
                await connection.close()
            await engine.dispose()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        asyncio.run(main())
    finally:
        ends.set()
        watcher.join()
    assert not wrong, wrong[:3]


# -- one loop ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=DRIVERS[1:])
def url(request: pytest.FixtureRequest, resilientdb_postgres: Postgres) -> str:
    return resilientdb_postgres.url(request.param)


async def _ask(engine: Any) -> None:
    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("SELECT 1")).scalar() == 1


async def _ask_and_end(engine: Any) -> None:
    await _ask(engine)
    await engine.dispose()


def test_a_second_loop_is_refused_by_name(url: str) -> None:
    engine = rdb.create_async_engine(url)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        first.run_until_complete(_ask(engine))
        with pytest.raises(
            rdb.ConfigurationError, match="another event loop: an AsyncEngine serves one loop"
        ):
            second.run_until_complete(_ask(engine))
        first.run_until_complete(_ask_and_end(engine))
        second.run_until_complete(_ask_and_end(engine))
    finally:
        for loop in (first, second):
            _end(loop)


def test_a_closed_loop_is_named(url: str) -> None:
    engine = rdb.create_async_engine(url)
    first = asyncio.new_event_loop()
    first.run_until_complete(_ask(engine))
    keep: list[Any] = []

    async def steal() -> None:  # so that nothing is left to complain of the loop that is gone
        async with engine.connect() as connection:
            keep.append((await connection.get_raw_connection()).driver_connection)

    first.run_until_complete(steal())
    _end(first, keep[0])

    async def later() -> None:
        with pytest.raises(rdb.ConfigurationError, match="another event loop, which has been closed"):
            await _ask(engine)
        await engine.dispose(close=False)
        await _ask_and_end(engine)

    asyncio.run(later())


def test_one_run_after_another(url: str) -> None:
    engine = rdb.create_async_engine(
        url, resilience=rdb.Resilience(lifecycle=rdb.Lifecycle(min_size=2, validate_idle=SOON))
    )
    for _ in range(2):
        asyncio.run(_ask_and_end(engine))


def _end(loop: asyncio.AbstractEventLoop, connection: Any = None) -> None:
    if connection is not None:
        loop.run_until_complete(connection.close())

    async def goodbye() -> None:
        await asyncio.sleep(0.01)

    loop.run_until_complete(goodbye())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
