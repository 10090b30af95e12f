"""What users rely on in SQLAlchemy's pools, on real SQLite files: the same with the library as without.

Each test runs twice, on a plain engine and on one of the library's, so that what it expects is known to be
SQLAlchemy's behaviour and not a reading of it. The few that run once say what the library does better.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import sqlite3
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, text
from sqlalchemy.pool import AssertionPool, NullPool, QueuePool, SingletonThreadPool, StaticPool, base

import resilientdb as rdb
from resilientdb.engine.door import Door

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    MakeEngine = Callable[..., sa.Engine]

EVENTS = (
    "connect",
    "first_connect",
    "checkout",
    "checkin",
    "reset",
    "invalidate",
    "soft_invalidate",
    "detach",
    "close",
    "close_detached",
)


def _engines(create: MakeEngine, folder: Path) -> Iterator[MakeEngine]:
    made: list[sa.Engine] = []

    def make(url: str | None = None, **options: Any) -> sa.Engine:
        made.append(create(url or f"sqlite:///{folder}/{len(made)}.db", **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


@pytest.fixture(params=[sa.create_engine, rdb.create_engine], ids=["sqlalchemy", "resilientdb"])
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEngine]:
    yield from _engines(request.param, tmp_path)


@pytest.fixture
def make_guarded(tmp_path: Path) -> Iterator[MakeEngine]:
    yield from _engines(rdb.create_engine, tmp_path)


class Happened(list[str]):
    """The names of the engine's pool events since last asked."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__()
        for name in EVENTS:
            event.listen(engine, name, lambda *_, name=name: self.append(name))

    def take(self) -> list[str]:
        taken = list(self)
        self.clear()
        return taken


def pool_of(engine: sa.Engine) -> QueuePool:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool


def counts(engine: sa.Engine) -> tuple[int, int, int, int]:
    """Size, in the pool, checked out, overflow; and ``status()`` says the same."""
    pool = pool_of(engine)
    found = pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow()
    size, idle, out, overflow = found
    assert pool.status() == (
        f"Pool size: {size}  Connections in pool: {idle} Current Overflow: {overflow} "
        f"Current Checked out connections: {out}"
    )
    return found


def raw(connection: sa.Connection) -> Any:
    """The driver's own connection."""
    return connection.connection.driver_connection


def assert_whole(engine: sa.Engine) -> None:
    """Every slot can be taken: ``pool_size`` and ``max_overflow`` connections at once, and no more."""
    pool: Any = pool_of(engine)
    held = [engine.connect() for _ in range(pool.size() + pool._max_overflow)]
    with pytest.raises(exc.TimeoutError):
        engine.connect()
    for connection in held:
        connection.close()
    assert pool.checkedout() == 0


# -- events -----------------------------------------------------------------------------------------------------


def test_events_of_ordinary_use(make_engine: MakeEngine) -> None:
    engine = make_engine()
    happened = Happened(engine)
    connection = engine.connect()
    assert happened.take() == ["first_connect", "connect", "checkout"]
    connection.close()
    assert happened.take() == ["reset", "checkin"]
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
    assert happened.take() == ["checkout", "reset", "checkin"]


def test_events_of_an_invalidated_connection(make_engine: MakeEngine) -> None:
    engine = make_engine()
    happened = Happened(engine)
    with engine.connect() as connection:
        happened.clear()
        connection.invalidate()
        assert happened.take() == ["invalidate", "close", "checkin"]
        assert connection.invalidated
        connection.execute(text("SELECT 1"))
        assert happened.take() == ["connect", "checkout"]
    assert happened.take() == ["reset", "checkin"]


def test_events_of_a_softly_invalidated_connection(make_engine: MakeEngine) -> None:
    engine = make_engine()
    happened = Happened(engine)
    with engine.connect() as connection:
        first = raw(connection)
        happened.clear()
        connection.connection.invalidate(soft=True)
        assert happened.take() == ["soft_invalidate"]
        connection.execute(text("SELECT 1"))
    assert happened.take() == ["reset", "checkin"]
    with engine.connect() as connection:
        assert happened.take() == ["close", "connect", "checkout"]
        assert raw(connection) is not first


def test_events_of_a_detached_connection(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0)
    happened = Happened(engine)
    connection = engine.connect()
    happened.clear()
    connection.detach()
    assert happened.take() == ["detach"]
    assert counts(engine) == (1, 1, 0, 0)
    with engine.connect() as other:
        assert raw(other) is not raw(connection)
        assert happened.take() == ["connect", "checkout"]
        connection.close()
        assert happened.take() == ["reset", "close_detached"]
        assert counts(engine) == (1, 0, 1, 0)


def test_events_of_overflow_and_dispose(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=1)
    happened = Happened(engine)
    held = [engine.connect(), engine.connect()]
    happened.clear()
    held[0].close()
    assert happened.take() == ["reset", "checkin"]
    held[1].close()
    assert happened.take() == ["reset", "checkin", "close"]
    engine.dispose()
    assert happened.take() == ["close"]
    engine.connect().close()
    assert happened.take() == ["first_connect", "connect", "checkout", "reset", "checkin"]


def test_what_listeners_are_given(make_engine: MakeEngine) -> None:
    engine = make_engine()
    seen: dict[str, tuple[Any, ...]] = {}
    for name in EVENTS:
        event.listen(engine, name, lambda *arguments, name=name: seen.__setitem__(name, arguments))
    with engine.connect() as connection:
        proxy = connection.connection
        record = seen["connect"][1]
        assert seen["checkout"] == (proxy.dbapi_connection, record, proxy)
        assert record.in_use
        connection.execute(text("SELECT 1"))
        dbapi_connection = proxy.dbapi_connection
    assert seen["checkin"] == (dbapi_connection, record)
    reset = seen["reset"][2]
    assert (reset.transaction_was_reset, reset.terminate_only, reset.asyncio_safe) == (True, False, True)
    assert not record.in_use
    with engine.connect() as connection:
        failure = ValueError("no good")
        dbapi_connection = connection.connection.dbapi_connection
        connection.invalidate(failure)
    assert seen["invalidate"] == (dbapi_connection, record, failure)


# -- counts -----------------------------------------------------------------------------------------------------


def test_counts(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=2, max_overflow=1, pool_timeout=0)
    assert counts(engine) == (2, 0, 0, -2)
    held = [engine.connect()]
    assert counts(engine) == (2, 0, 1, -1)
    held += [engine.connect(), engine.connect()]
    assert counts(engine) == (2, 0, 3, 1)
    with pytest.raises(exc.TimeoutError, match="QueuePool limit of size 2 overflow 1 reached"):
        engine.connect()
    held.pop().close()
    assert counts(engine) == (2, 1, 2, 1)
    held.pop().close()
    assert counts(engine) == (2, 2, 1, 1)
    held.pop().close()
    assert counts(engine) == (2, 2, 0, 0)
    engine.dispose()
    assert counts(engine) == (2, 0, 0, -2)


def test_a_lost_connection_counts_as_in_the_pool(make_engine: MakeEngine) -> None:
    """Its place is: the next checkout opens it again."""
    engine = make_engine(pool_size=2, max_overflow=1)
    held = [engine.connect() for _ in range(3)]
    for number, connection in enumerate(held):
        connection.invalidate()
        assert counts(engine)[2] == 2 - number
    assert counts(engine)[1:3] == (2, 0)
    for connection in held:
        connection.close()
    assert counts(engine)[1:3] == (2, 0)
    pool_of(engine)._timeout = 0
    assert_whole(engine)
    assert counts(engine) == (2, 2, 0, 0)


@pytest.mark.parametrize("options", [{"max_overflow": -1}, {"pool_size": 0}], ids=str)
def test_without_a_limit(make_engine: MakeEngine, options: dict[str, int]) -> None:
    engine = make_engine(pool_timeout=0, **options)
    held = [engine.connect() for _ in range(40)]
    assert pool_of(engine).checkedout() == 40
    for connection in held:
        connection.close()
    # pool_size=0 is a pool of any size; max_overflow=-1 keeps its size and opens any number beyond.
    assert pool_of(engine).checkedin() == (5 if "max_overflow" in options else 40)
    assert pool_of(engine).checkedout() == 0


def test_limits_may_be_changed_on_a_live_pool(make_engine: MakeEngine) -> None:
    """Private, but SQLAlchemy's own testing tools and many applications do it."""
    engine = make_engine(pool_size=1, max_overflow=4, pool_timeout=20)
    pool: Any = engine.pool
    assert (pool._timeout, pool._max_overflow, pool.timeout()) == (20, 4, 20)
    pool._timeout, pool._max_overflow = 0, 0
    with engine.connect(), pytest.raises(exc.TimeoutError):
        engine.connect()


def test_options_are_spelt_and_read_as_ever(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=3, max_overflow=2, pool_timeout=7.5, pool_use_lifo=True, pool_recycle=60)
    pool: Any = engine.pool
    assert (pool.size(), pool._max_overflow, pool.timeout(), pool._recycle) == (3, 2, 7.5, 60)
    assert pool._pool.use_lifo
    with pytest.raises(TypeError, match="Invalid argument"):
        make_engine(pool_sise=3)


# -- which connection is handed out --------------------------------------------------------------------------------


@pytest.mark.parametrize("lifo", [False, True])
def test_order_of_idle_connections(make_engine: MakeEngine, *, lifo: bool) -> None:
    engine = make_engine(pool_size=3, pool_use_lifo=lifo)
    held = [engine.connect() for _ in range(3)]
    order = [raw(connection) for connection in held]
    for connection in held:
        connection.close()
    for _ in range(2):
        used = []
        for _ in range(3):
            with engine.connect() as connection:
                used.append(raw(connection))
        assert used == ([order[2]] * 3 if lifo else order)


@pytest.mark.parametrize("ping", [False, True])
def test_pre_ping(make_engine: MakeEngine, *, ping: bool) -> None:
    engine = make_engine(pool_pre_ping=ping, pool_size=2)
    seen: list[bool] = []
    event.listen(engine, "handle_error", lambda context: seen.append(context.is_pre_ping))
    with engine.connect() as connection, engine.connect() as other:
        also_stale, dead = raw(connection), raw(other)  # the inner one comes back first
    dead.close()
    with engine.connect() as connection:
        if ping:
            assert raw(connection) is not dead
            assert connection.execute(text("SELECT 1")).scalar() == 1
        else:
            with pytest.raises(exc.ProgrammingError, match="closed database") as caught:
                connection.execute(text("SELECT 1"))
            assert caught.value.connection_invalidated
    assert seen == [ping]
    # One that is dead casts doubt on all that are as old.
    with engine.connect() as connection, engine.connect() as other:
        assert also_stale not in {raw(connection), raw(other)}


def test_a_listener_may_refuse_a_connection_at_checkout(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0)
    refused: list[Any] = []

    @event.listens_for(engine, "checkout")
    def refuse_once(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
        if not refused:
            refused.append(dbapi_connection)
            raise exc.DisconnectionError

    with engine.connect() as connection:
        assert connection.connection.dbapi_connection is not refused[0]
    assert counts(engine) == (1, 1, 0, 0)


def test_recycle(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(base, "time", SimpleNamespace(time=lambda: now))
    engine = make_engine(pool_recycle=60, pool_size=1)
    happened = Happened(engine)

    def use() -> Any:
        with engine.connect() as connection:
            return raw(connection)

    first = use()
    now += 59
    assert use() is first
    happened.clear()
    now += 2
    second = use()
    assert second is not first
    assert happened.take() == ["close", "connect", "checkout", "reset", "checkin"]
    now += 59
    assert use() is second


# -- what happens on return -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "rows", "left_open"),
    [("rollback", 0, False), (True, 0, False), ("commit", 1, False), (None, 1, True)],
)
def test_reset_on_return(make_engine: MakeEngine, option: Any, rows: int, *, left_open: bool) -> None:
    engine = make_engine(pool_reset_on_return=option, pool_size=1, max_overflow=0)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (i int)"))
    unclean = engine.raw_connection()
    unclean.cursor().execute("INSERT INTO t VALUES (1)")
    unclean.close()
    again = engine.raw_connection()
    driver_connection: Any = again.driver_connection
    assert driver_connection.in_transaction is left_open
    assert again.cursor().execute("SELECT count(*) FROM t").fetchone() == (rows,)
    again.rollback()
    again.close()


def test_info_is_the_connections_and_record_info_its_places(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0)
    with engine.connect() as connection:
        assert connection.connection.record_info is not None
        connection.connection.info["of"] = "the connection"
        connection.connection.record_info["of"] = "the place"
    with engine.connect() as connection:
        assert connection.connection.info == {"of": "the connection"}
        connection.invalidate()
    for _ in range(2):
        with engine.connect() as connection:
            assert connection.connection.info == {}
            assert connection.connection.record_info == {"of": "the place"}
            assert connection.info is connection.connection.info
            connection.connection.invalidate(soft=True)


def test_a_disconnect_renews_every_connection(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect() as connection, engine.connect() as other, engine.connect() as held:
        old = {raw(connection), raw(other), raw(held)}
        raw(connection).close()
        with pytest.raises(exc.DBAPIError) as caught:
            connection.execute(text("SELECT 1"))
        assert caught.value.connection_invalidated
        connection.rollback()
        assert raw(connection) not in old
        other.close()
        # One in use is left alone until it comes back.
        assert held.execute(text("SELECT 1")).scalar() == 1
    with engine.connect() as one, engine.connect() as two, engine.connect() as three:
        assert not old & {raw(one), raw(two), raw(three)}


# -- dispose and recreate --------------------------------------------------------------------------------------------


def test_dispose_keeps_settings_listeners_and_class(make_engine: MakeEngine) -> None:
    engine = make_engine(
        pool_size=2, max_overflow=3, pool_timeout=4, pool_recycle=50, pool_use_lifo=True, pool_pre_ping=True
    )
    before: Any = engine.pool
    connects: list[object] = []
    event.listen(engine, "connect", lambda connection, _record: connects.append(connection))
    engine.connect().close()
    for close in (True, False):
        engine.dispose(close=close)
        after: Any = engine.pool
        assert after is not before
        assert type(after) is type(before)
        assert (after.size(), after._max_overflow, after.timeout()) == (2, 3, 4)
        assert (after._recycle, after._pre_ping, after._pool.use_lifo) == (50, True, True)
        connects.clear()
        engine.connect().close()
        assert len(connects) == 1


def test_dispose_without_close_leaves_connections_open(make_engine: MakeEngine) -> None:
    """What a forked child does with its parent's."""
    engine = make_engine()
    with engine.connect() as connection:
        parents = raw(connection)
    kept = engine.pool
    engine.dispose(close=False)
    assert parents.execute("SELECT 1").fetchone() == (1,)
    kept.dispose()
    with pytest.raises(sqlite3.ProgrammingError):
        parents.execute("SELECT 1")


def test_a_connection_that_comes_back_after_dispose_is_closed(make_guarded: MakeEngine) -> None:
    """A plain ``QueuePool`` keeps it open, out of anybody's reach."""
    engine = make_guarded()
    connection = engine.connect()
    late = raw(connection)
    engine.dispose()
    assert connection.execute(text("SELECT 1")).scalar() == 1
    connection.close()
    with pytest.raises(sqlite3.ProgrammingError):
        late.execute("SELECT 1")


# -- nothing costs a slot --------------------------------------------------------------------------------------------


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, connection: object) -> None:
        self.connection = connection
        self.myself = self


def forget(engine: sa.Engine) -> None:
    Cycle(engine.raw_connection())


def test_a_forgotten_connection_comes_back(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0)
    happened = Happened(engine)
    gc.disable()
    try:
        forget(engine)
        assert counts(engine) == (1, 0, 1, 0)
        gc.collect()
    finally:
        gc.enable()
    assert counts(engine) == (1, 1, 0, 0)
    assert happened.take() == ["first_connect", "connect", "checkout", "reset", "checkin"]
    assert_whole(engine)


@pytest.mark.parametrize("name", ["connect", "checkout", "reset", "checkin", "close", "invalidate"])
def test_a_collection_in_the_middle_of_an_event(make_engine: MakeEngine, name: str) -> None:
    engine = make_engine(pool_size=2, max_overflow=1, pool_timeout=0)
    collected: list[int] = []
    event.listen(engine, name, lambda *_: collected.append(gc.collect()))
    gc.disable()
    try:
        for _ in range(3):
            engine.connect().close()
            forget(engine)
            with engine.connect(), engine.connect() as connection:
                connection.invalidate()
            engine.connect().close()
    finally:
        gc.enable()
    assert collected
    gc.collect()
    assert_whole(engine)


@pytest.mark.parametrize("size", [1, 2])
def test_a_collection_at_any_point(make_engine: MakeEngine, size: int) -> None:
    """Also inside the pool's own lock: the finalizer then runs in the thread that holds it."""
    engine = make_engine(pool_size=size, max_overflow=0, pool_timeout=0)
    engine.connect().close()
    calls = 0

    def collect_at(point: int) -> Callable[..., None]:
        def on_call(frame: FrameType, what: str, _argument: object) -> None:
            nonlocal calls
            if what == "call" and frame.f_globals["__name__"].startswith(("sqlalchemy", "resilientdb")):
                calls += 1
                if calls == point:
                    gc.collect()

        return on_call

    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        for point in itertools.count(1):
            forget(engine)
            calls = 0
            sys.setprofile(collect_at(point))
            try:
                with contextlib.suppress(exc.TimeoutError), engine.connect() as connection:
                    connection.invalidate()
            finally:
                sys.setprofile(None)
            gc.collect()
            assert pool_of(engine).checkedout() == 0, point
            if calls < point:
                break
    finally:
        gc.unfreeze()
        gc.enable()
    assert point > 10
    assert_whole(engine)


class Interruption(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("error", [LookupError, Interruption])
@pytest.mark.parametrize("name", ["connect", "checkout", "reset", "invalidate", "soft_invalidate", "detach"])
def test_a_listener_that_raises_costs_no_slot(
    make_engine: MakeEngine, name: str, error: type[BaseException]
) -> None:
    _raise_in(make_engine, name, error)


@pytest.mark.parametrize("error", [LookupError, Interruption])
@pytest.mark.parametrize("name", ["checkin", "close"])
def test_not_even_one_at_checkin_or_close(
    make_guarded: MakeEngine, name: str, error: type[BaseException]
) -> None:
    """With a plain ``QueuePool`` the first costs the slot for good."""
    _raise_in(make_guarded, name, error)


def _raise_in(make: MakeEngine, name: str, error: type[BaseException]) -> None:
    engine = make(pool_size=1, max_overflow=1, pool_timeout=0)
    with engine.connect():
        pass
    raised = 0

    def fail(*_: object) -> None:
        nonlocal raised
        raised += 1
        raise error("the listener's own mistake")

    def use(how: Callable[[sa.Connection], object]) -> None:
        with engine.connect() as one, engine.connect() as other:
            how(one)
            other.execute(text("SELECT 1"))

    event.listen(engine, name, fail)
    for how in (
        sa.Connection.get_isolation_level,
        sa.Connection.invalidate,
        sa.Connection.detach,
        lambda connection: connection.connection.invalidate(soft=True),
    ):
        with contextlib.suppress(error, exc.ResourceClosedError):
            use(how)
        gc.collect()
    event.remove(engine, name, fail)
    assert raised
    gc.collect()
    assert_whole(engine)


def test_a_connect_that_fails_costs_no_slot(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0)
    failures = itertools.chain([LookupError(), Interruption()], itertools.repeat(None))

    @event.listens_for(engine, "do_connect")
    def fail(*_: object) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure

    for expected in (LookupError, Interruption):
        with pytest.raises(expected):
            engine.connect()
        assert counts(engine) == (1, 0, 0, -1)
    assert_whole(engine)


# -- pool classes and logging ----------------------------------------------------------------------------------------


def test_the_default_pool_is_a_queue_pool(make_engine: MakeEngine) -> None:
    assert isinstance(make_engine().pool, QueuePool)


@pytest.mark.parametrize("pool_class", [NullPool, StaticPool, SingletonThreadPool, AssertionPool])
def test_an_explicit_pool_class_is_respected(make_engine: MakeEngine, pool_class: type[sa.Pool]) -> None:
    engine = make_engine(poolclass=pool_class)
    assert isinstance(engine.pool, pool_class)
    assert not isinstance(engine.pool, QueuePool)
    engine.dispose()
    assert isinstance(engine.pool, pool_class)
    happened = Happened(engine)
    with engine.connect() as connection:
        first = raw(connection)
        if pool_class is AssertionPool:
            with pytest.raises(AssertionError):
                engine.connect()
        elif pool_class is not NullPool:
            with engine.connect() as other:
                assert raw(other) is first
    with engine.connect() as connection:
        assert (raw(connection) is first) is (pool_class is not NullPool)
    assert ("close" in happened.take()) is (pool_class is NullPool)


def test_one_connection_a_thread(make_engine: MakeEngine) -> None:
    engine = make_engine(poolclass=SingletonThreadPool)
    seen: list[Any] = []

    def use() -> None:
        for _ in range(2):
            with engine.connect() as connection:
                seen.append(raw(connection))

    use()
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen[0] is seen[1] is not seen[2] is seen[3]


def test_memory_databases_keep_their_kind_of_pool(tmp_path: Path) -> None:
    for url in ("sqlite://", "sqlite:///:memory:", f"sqlite:///{tmp_path}/file.db"):
        plain, guarded = sa.create_engine(url), rdb.create_engine(url)
        assert isinstance(guarded.pool, type(plain.pool))
        assert isinstance(guarded.pool, Door)
        with guarded.begin() as connection:
            connection.execute(text("CREATE TABLE t (i int)"))
        with guarded.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0
        plain.dispose()
        guarded.dispose()


@pytest.mark.parametrize("pool_class", [None, NullPool, StaticPool])
@pytest.mark.parametrize("named", [None, "orders"])
def test_logs_where_sqlalchemy_does(
    make_engine: MakeEngine,
    caplog: pytest.LogCaptureFixture,
    pool_class: type[sa.Pool] | None,
    named: str | None,
) -> None:
    options = {} if pool_class is None else {"poolclass": pool_class}
    caplog.set_level(logging.DEBUG, logger="sqlalchemy.pool")
    engine = make_engine(pool_logging_name=named, **options)
    engine.connect().close()
    engine.dispose()
    name = f"sqlalchemy.pool.impl.{(pool_class or QueuePool).__name__}{f'.{named}' if named else ''}"
    messages = [record.getMessage() for record in caplog.records if record.name == name]
    assert len(messages) == len(caplog.records)
    for start in ("Created new connection", "Connection <", "Closing connection"):
        assert any(message.startswith(start) for message in messages), (start, messages)
