"""What people get wrong: one clear error, at once, that names the option and the remedy and never a password."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import pool as sa_pool

import resilientdb as rdb
from resilientdb.errors import ConfigurationError
from resilientdb.testing.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing.postgres import Postgres

SECRET = "hunter2-S3CRET"
URL = f"postgresql+psycopg://app:{SECRET}@127.0.0.1:1/app"


def everything_about(error: BaseException | None) -> Iterator[str]:
    """All that the error and whatever hangs on it could ever show."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield f"{link} {link!r} {link.args} {getattr(link, '__notes__', '')}"
        if isinstance(link, rdb.ResilienceError):
            yield str(vars(link))
        waiting += [link.__cause__, link.__context__, getattr(link, "orig", None)]
        waiting += getattr(link, "exceptions", ())


def assert_keeps_the_secret(error: BaseException) -> None:
    for text in everything_about(error):
        assert SECRET not in text


def refused(make: Callable[[], object], *words: str, key: str) -> None:
    """``make`` is refused at once, in ``words``, for ``key``."""
    began = time.monotonic()
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert time.monotonic() - began < 2
    error = caught.value
    assert isinstance(error, ValueError)
    assert isinstance(error, sa.exc.SQLAlchemyError)
    assert (error.key or "").startswith(key), error.key
    for word in words:
        assert word in str(error), str(error)
    assert_keeps_the_secret(error)


def create(url: str = URL, **options: Any) -> sa.Engine:
    return rdb.create_engine(url, **options)


# -- options --------------------------------------------------------------------------------------------------------


def test_an_unknown_option() -> None:
    refused(lambda: create(replica=["b:1"]), "'replica'", "did you mean 'replicas'", key="replica")
    refused(lambda: create(resilence=rdb.Resilience()), "did you mean 'resilience'", key="resilence")
    refused(
        lambda: rdb.SaturationQueue(max_wating=1),  # type: ignore[call-arg]
        "max_wating",
        "max_waiting",
        key="queue",
    )
    with pytest.raises(TypeError, match="pool_sise"):
        create(pool_sise=5)


@pytest.mark.parametrize(
    ("make", "key", "words"),
    [
        (lambda: rdb.SaturationQueue(max_waiting=-1), "queue.max_waiting", ["-1", "0 or more"]),
        (lambda: rdb.SaturationQueue(max_waiting=2.5), "queue.max_waiting", ["2.5", "an int"]),  # type: ignore[arg-type]
        (lambda: rdb.SaturationQueue(max_waiting=True), "queue.max_waiting", ["True", "an int"]),
        (lambda: rdb.SaturationQueue(timeout="5"), "queue.timeout", ["'5'", "seconds"]),  # type: ignore[arg-type]
        (lambda: rdb.SaturationQueue(timeout=-0.5), "queue.timeout", ["-0.5", "seconds"]),
        (lambda: rdb.Resilience(deadline=-1), "deadline", ["-1", "seconds"]),
        (lambda: rdb.RetryPolicy(attempts=0), "retry.attempts", ["0", "1 or more"]),
        (
            lambda: rdb.BreakerPolicy(failure_rate_threshold=50),
            "breaker.failure_rate_threshold",
            ["50", "at most 1"],
        ),
    ],
)
def test_a_wrong_value(make: Callable[[], object], key: str, words: list[str]) -> None:
    refused(make, key, *words, key=key)


def test_an_unknown_or_wrong_option_in_the_url() -> None:
    refused(
        lambda: create(f"{URL}?resilientdb_queue_max_wating=5"),
        "resilientdb_queue_max_wating",
        "resilientdb_queue_max_waiting",
        key="queue",
    )
    refused(lambda: create(f"{URL}?resilientdb_queue_timeout=soon"), "soon", "seconds", key="queue.timeout")
    refused(lambda: create(f"{URL}?resilientdb_profile=webb"), "webb", "'web'", key="profile")


def test_the_same_without_our_create_engine() -> None:
    url = f"{URL}?plugin=resilientdb&resilientdb_queue_timeout=-1"
    refused(lambda: sa.create_engine(url), "-1", key="queue.timeout")


# -- replicas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "words"),
    [
        (f"postgresql://app:{SECRET}@b/app", ["must be a list or tuple"]),
        ([f"mysql+pymysql://app:{SECRET}@b/app"], ["replicas[0]", "mysql", "same dialect"]),
        (["b:5432", f"postgresql+asyncpg://app:{SECRET}@c/app"], ["replicas[1]", "asyncpg", "psycopg"]),
        ([f"app:{SECRET}@b"], ["replicas[0]", "neither a URL", "host:port"]),
        ([f"app:{SECRET}@b:5432"], ["replicas[0]", "neither a URL", "host:port"]),
        ([f"postgresql://app:{SECRET}@b:port/app"], ["replicas[0]", "not a database URL"]),
        ([f"postgresql//:{SECRET}@b"], ["replicas[0]", "neither a URL"]),
        ([f"://app:{SECRET}@b"], ["replicas[0]", "not a database URL"]),
        ([5432], ["replicas[0]", "not a database URL"]),
        (["b:5432", "b:5432"], ["address of its own", "b:5432"]),
        (["127.0.0.1:1"], ["address of its own", "127.0.0.1:1"]),
    ],
)
def test_replicas_that_cannot_be(replicas: Any, words: list[str]) -> None:
    refused(lambda: create(replicas=replicas), *words, key="replicas")


def test_replicas_as_they_may_be() -> None:
    engine = create(replicas=["b", "c:5433", "[::1]:5434", f"postgresql://app:{SECRET}@d:5435/app"])
    # Without a port: the primary's.
    names = [node.name for node in rdb.control(engine).snapshot().nodes]
    assert names == ["127.0.0.1:1", "b:1", "c:5433", "::1:5434", "d:5435"]


# -- pools ----------------------------------------------------------------------------------------------------------


def test_a_finished_pool_or_an_own_creator() -> None:
    finished = sa_pool.QueuePool(lambda: None)  # type: ignore[arg-type]
    refused(lambda: create(pool=finished), "pool=", "poolclass=", key="pool")
    refused(
        lambda: create(creator=lambda: None, replicas=["b:1"]),
        "creator=",
        "one place only",
        "do_connect",
        key="creator",
    )


def test_a_foreign_engine_has_no_control() -> None:
    engine = sa.create_engine(URL)
    refused(lambda: rdb.control(engine), "was not made by resilientdb", "plugin=resilientdb", key="engine")
    refused(lambda: rdb.control("engine"), "was not made by resilientdb", key="engine")  # type: ignore[call-overload]
    refused(lambda: rdb.control(create()).breaker("b:1"), "no node 'b:1'", "127.0.0.1:1", key="node")


def test_an_async_engine_behind_wsgi_and_the_other_way_round() -> None:
    from resilientdb.middleware.asgi import ResilienceMiddleware as Asgi
    from resilientdb.middleware.wsgi import ResilienceMiddleware as Wsgi

    engine = rdb.create_async_engine(URL)
    app: Any = None
    refused(lambda: Wsgi(app, engine=engine), "create_engine()", "middleware.asgi", key="engine")
    Asgi(
        app, engine=create()
    )  # a sync engine used from an ASGI application's worker threads is a common thing
    with pytest.raises(sa.exc.ArgumentError, match=r"AsyncEngine|async"):
        rdb.create_async_engine(URL, poolclass=sa_pool.QueuePool)
    with pytest.raises(sa.exc.InvalidRequestError, match="not async"):
        rdb.create_async_engine(f"postgresql+psycopg2://app:{SECRET}@127.0.0.1:1/app")
    asyncio.run(engine.dispose())


# -- what only the server knows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
def test_nobody_there(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    port = free_port()
    url = f"postgresql+{driver}://app:{SECRET}@127.0.0.1:{port}/app"
    silent = rdb.Resilience(breaker=rdb.BreakerPolicy(probe_interval=None))
    make: Any = rdb.create_async_engine if driver == "asyncpg" else rdb.create_engine
    engine = make(url, resilience=silent)
    events: list[Any] = []
    control = rdb.control(engine)
    control.on_event(events.append)
    refused(
        lambda: control.validate(timeout=2),
        f"127.0.0.1:{port} failed",
        "is the server running",
        key="url",
    )
    if driver != "asyncpg":
        with pytest.raises(sa.exc.OperationalError) as caught:
            engine.connect()
        assert_keeps_the_secret(caught.value)
    assert SECRET not in f"{caplog.text} {events} {control.snapshot()} {engine!r} {control.resilience!r}"


def test_the_first_error_ever_is_the_real_one() -> None:
    """The prober finds out between the first attempt and its retry, and opens the circuit."""
    for _ in range(5):
        engine = create(f"postgresql+psycopg2://app:{SECRET}@127.0.0.1:{free_port()}/app")
        with pytest.raises(sa.exc.OperationalError, match="Connection refused"):
            engine.connect()
        engine.dispose()


@pytest.fixture
def locked(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    """The server asks one user for a password."""
    server = resilientdb_postgres
    hba = server.data / "pg_hba.conf"
    before = hba.read_text()
    server.query("CREATE ROLE locked LOGIN PASSWORD 'another one'")
    hba.write_text(f"host all locked all scram-sha-256\n{before}")
    server.reload()
    yield server
    hba.write_text(before)
    server.reload()
    server.query("DROP ROLE locked")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
def test_a_wrong_password(locked: Postgres, driver: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"postgresql+{driver}://locked:{SECRET}@{locked.host}:{locked.port}/postgres"
    engine: Any = rdb.create_async_engine(url) if driver == "asyncpg" else rdb.create_engine(url)
    control = rdb.control(engine)
    events: list[Any] = []
    control.on_event(events.append)
    refused(
        lambda: control.validate(timeout=5), "check the user, password and database in the URL", key="url"
    )

    async def connect() -> None:
        async with engine.connect():
            pass

    for _ in range(12):
        with pytest.raises(Exception, match="password authentication failed") as caught:
            asyncio.run(connect()) if driver == "asyncpg" else engine.connect()
        assert not isinstance(caught.value, rdb.ResilienceError), "the one message that says what to mend"
        assert_keeps_the_secret(caught.value)
    assert control.breaker().current_state == "closed", "a wrong password does not open the circuit"
    assert SECRET not in f"{caplog.text} {events} {control.snapshot()} {control.breaker().last_error!r}"
    assert SECRET not in f"{engine!r} {engine.pool!r} {engine.pool.status()} {control!r}"


def test_a_database_that_does_not_exist(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(resilientdb_postgres.url(database="nowhere"))
    refused(lambda: rdb.control(engine).validate(), "check the user, password and database", key="url")


def test_two_primaries(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(
        resilientdb_postgres.url(), replicas=[resilientdb_postgres.url(host="localhost")]
    )
    refused(
        lambda: rdb.control(engine).validate(),
        "replicas[0]",
        "is a primary, not a replica",
        "exchange the URLs",
        key="replicas[0]",
    )
    engine.dispose()
