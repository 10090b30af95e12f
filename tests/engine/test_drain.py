"""The end of an engine's life: no new work, time for what has begun, then everything is closed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import pytest
from sqlalchemy.pool import NullPool

import resilientdb as rdb
from resilientdb.errors import PoolDraining
from resilientdb.events import DrainBegun
from resilientdb.health import HealthApp, WSGIHealthApp
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.middleware.wsgi import ResilienceMiddleware as WSGIResilienceMiddleware
from resilientdb.runtime.context import recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import sqlalchemy as sa

    from resilientdb.stats import PoolStats
    from resilientdb.testing.postgres import Postgres

    MakeEngine = Callable[..., sa.Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[sa.Engine] = []

    def make(**options: Any) -> sa.Engine:
        made.append(rdb.create_engine(f"sqlite:///{tmp_path}/{len(made)}.db", **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


class Drain:
    """``drain()`` in a thread of its own, begun when this is made."""

    def __init__(self, engine: sa.Engine, timeout: float = 20.0) -> None:
        self.answer: bool | None = None
        self._control = rdb.control(engine)
        self._thread = threading.Thread(target=self._run, args=(timeout,))
        self._thread.start()
        until(lambda: self._control.state == "draining")

    def _run(self, timeout: float) -> None:
        self.answer = self._control.drain(timeout)

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> bool | None:
        self._thread.join(20)
        return self.answer


class Worker(threading.Thread):
    """Does ``work`` and keeps what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


def by_another(work: Callable[[], object]) -> None:
    """Have ``work`` done by a thread that has nothing to do with the caller's; raises what it raises."""
    worker = Worker(work)
    worker.join()
    if worker.error is not None:
        raise worker.error


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds:g} s"
        time.sleep(0.002)


def ask(engine: sa.Engine) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT 1").scalar()


def stats_of(engine: Any) -> PoolStats:
    stats: list[PoolStats] = list(rdb.control(engine).get_stats().values())
    assert len(stats) == 1
    return stats[0]


def open_now(engine: Any) -> int:
    return stats_of(engine).opened - stats_of(engine).closed


# -- threads -----------------------------------------------------------------------------------------------------


def test_nothing_in_use_ends_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ask(engine)
    heard: list[object] = []
    control = rdb.control(engine)
    control.on_event(heard.append)
    assert control.drain(timeout=30.0)
    assert control.state == control.snapshot().state == "draining"
    assert open_now(engine) == 0
    with pytest.raises(PoolDraining, match="takes no new work") as refused:
        engine.connect()
    assert refused.value.reason == "draining"
    assert control.drain(timeout=30.0), "again: it stays so"
    assert heard == [DrainBegun()]


def test_an_engine_that_was_never_used(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert rdb.control(engine).drain()
    with pytest.raises(PoolDraining):
        ask(engine)


def test_what_has_begun_is_waited_for(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect() as connection:
        drain = Drain(engine)
        with pytest.raises(PoolDraining):
            by_another(lambda: ask(engine))
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
        assert not drain.over
    assert drain.join() is True
    assert open_now(engine) == 0


def test_a_request_that_came_before_gets_what_it_needs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    begun, go = threading.Event(), threading.Event()

    def request() -> None:
        with recording("GET /orders"):
            begun.set()
            go.wait(10)
            assert ask(engine) == 1
            assert ask(engine) == 1

    with engine.connect() as held:
        worker = Worker(request)
        begun.wait(10)
        drain = Drain(engine)
        with recording("GET /late"), pytest.raises(PoolDraining):
            by_another(lambda: ask(engine))
        go.set()
        worker.join()
        assert worker.error is None
        held.exec_driver_sql("SELECT 1")
    assert drain.join() is True


def test_who_holds_one_gets_another(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect() as connection:
        drain = Drain(engine)
        assert ask(engine) == 1
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert drain.join() is True
    with pytest.raises(PoolDraining):
        ask(engine)


def test_who_waits_is_served_while_there_is_time(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0)
    held = engine.connect()
    waiter = Worker(lambda: ask(engine))
    until(lambda: stats_of(engine).waiting == 1)
    drain = Drain(engine)
    held.close()
    waiter.join()
    assert waiter.error is None
    assert drain.join() is True


def test_at_the_limit_who_waits_is_sent_away_and_what_is_out_is_closed_later(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=2, max_overflow=0)
    out = [engine.connect() for _ in range(2)]
    waiter = Worker(lambda: ask(engine))
    until(lambda: stats_of(engine).waiting == 1)
    began = time.monotonic()
    assert rdb.control(engine).drain(timeout=0.1) is False
    assert time.monotonic() - began < 5.0
    waiter.join()
    assert isinstance(waiter.error, PoolDraining)
    assert open_now(engine) == 2
    for connection in out:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1, "whoever has one may go on"
        connection.close()
    assert open_now(engine) == 0
    assert rdb.control(engine).drain(timeout=0.1) is True


def test_no_time_is_a_limit_too(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect():
        assert rdb.control(engine).drain(timeout=0) is False
    assert open_now(engine) == 0


def test_it_stays_so_through_dispose(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect():
        drain = Drain(engine)
        engine.dispose()
        with pytest.raises(PoolDraining):
            by_another(lambda: ask(engine))
    drain.join()
    engine.dispose()
    with pytest.raises(PoolDraining):
        ask(engine)
    assert rdb.control(engine).state == "draining"
    with pytest.raises(PoolDraining):
        rdb.control(engine).warm(1)


def test_connections_of_a_pool_that_was_replaced_are_waited_for(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect():
        engine.dispose()
        assert rdb.control(engine).drain(timeout=0.05) is False
    assert rdb.control(engine).drain(timeout=0.05) is True


def test_an_engine_without_a_pool(make_engine: MakeEngine) -> None:
    engine = make_engine(poolclass=NullPool)
    with engine.connect() as connection:
        drain = Drain(engine)
        with pytest.raises(PoolDraining):
            by_another(lambda: ask(engine))
        assert not drain.over
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert drain.join() is True
    with pytest.raises(PoolDraining):
        ask(engine)


def test_a_pool_less_engine_at_the_limit(make_engine: MakeEngine) -> None:
    engine = make_engine(poolclass=NullPool)
    with engine.connect():
        assert rdb.control(engine).drain(timeout=0.05) is False
    assert rdb.control(engine).drain(timeout=0.05) is True


def test_nodes_of_one_engine_end_together(resilientdb_postgres: Postgres) -> None:
    """The second address is the same server's: who serves a read is told by where it comes from."""
    engine = rdb.create_engine(
        resilientdb_postgres.url("psycopg"),
        replicas=[f"localhost:{resilientdb_postgres.port}"],
        resilience=rdb.Resilience(breaker=rdb.BreakerPolicy(probe_interval=None)),
    )
    control = rdb.control(engine)
    with rdb.read_only():
        reader = engine.connect()
    with reader:
        engine.dispose()  # what is out is waited for all the same
        drain = Drain(engine)
        for late in (lambda: ask(engine), rdb.read_only()(lambda: ask(engine))):
            with pytest.raises(PoolDraining):
                by_another(late)
        assert ask(engine) == 1, "who holds a replica's connection may have the primary's"
        assert not drain.over
        assert reader.exec_driver_sql("SELECT 1").scalar() == 1
        reader.rollback()
    assert drain.join() is True
    stats = control.get_stats().values()
    assert [one.total for one in stats] == [0, 0]
    assert [one.opened for one in stats] == [one.closed for one in stats] == [1, 1]


def test_upkeep_opens_no_more(resilientdb_postgres: Postgres) -> None:
    engine = rdb.create_engine(
        resilientdb_postgres.url("psycopg"),
        resilience=rdb.Resilience(
            lifecycle=rdb.Lifecycle(min_size=3, validate_idle=0.02),
            breaker=rdb.BreakerPolicy(probe_interval=None),
        ),
    )
    ask(engine)
    until(lambda: open_now(engine) == 3)
    with engine.connect():
        assert rdb.control(engine).drain(timeout=0) is False
        engine.dispose()
        assert ask(engine) == 1, "who holds one of the old pool's gets one of the new one's"
        time.sleep(0.2)  # nothing is to happen
        assert open_now(engine) <= 2
    engine.dispose()
    assert open_now(engine) == 0


# -- tasks -------------------------------------------------------------------------------------------------------


async def _ask(engine: Any) -> Any:
    async with engine.connect() as connection:
        return (await connection.exec_driver_sql("SELECT 1")).scalar()


@pytest.fixture(params=["sqlite+aiosqlite", "psycopg_async", "asyncpg"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param.startswith("sqlite"):
        return f"{request.param}:///{tmp_path}/a.db"
    postgres: Postgres = request.getfixturevalue("resilientdb_postgres")
    return postgres.url(request.param)


def test_tasks_finish_and_new_ones_are_refused(url: str) -> None:
    async def main() -> None:
        engine = rdb.create_async_engine(url, pool_size=2, max_overflow=0)
        control = rdb.control(engine)
        holding, go = asyncio.Event(), asyncio.Event()

        async def request() -> Any:
            with recording("GET /orders"):
                async with engine.connect() as connection:
                    holding.set()
                    await go.wait()
                    await connection.exec_driver_sql("SELECT 1")
                return await _ask(engine)

        begun = asyncio.create_task(request())
        await holding.wait()
        drain = asyncio.create_task(control.drain())
        await asyncio.sleep(0)
        assert control.state == "draining"
        with pytest.raises(PoolDraining):
            await asyncio.create_task(_ask(engine))
        assert not drain.done()
        go.set()
        assert await begun == 1
        assert await drain is True
        assert await control.drain() is True
        with pytest.raises(PoolDraining):
            await _ask(engine)
        assert stats_of(engine).total == open_now(engine) == 0
        await engine.dispose()
        with pytest.raises(PoolDraining):
            await _ask(engine)

    asyncio.run(main())


def test_tasks_at_the_limit(url: str) -> None:
    async def main() -> None:
        engine = rdb.create_async_engine(url, pool_size=1, max_overflow=0)
        control = rdb.control(engine)
        held = await engine.connect()
        waiter = asyncio.create_task(_ask(engine))
        while not stats_of(engine).waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await control.drain(timeout=0.05) is False
        with pytest.raises(PoolDraining):
            await waiter
        await held.exec_driver_sql("SELECT 1")
        await held.close()
        assert stats_of(engine).total == open_now(engine) == 0
        assert await control.drain(timeout=0) is True
        await engine.dispose()

    asyncio.run(main())


# -- at the web edge ---------------------------------------------------------------------------------------------


def call_wsgi(app: Any, path: str = "/") -> tuple[str, dict[str, str], bytes]:
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    started: list[tuple[str, dict[str, str]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], _info: Any = None) -> Any:
        started.append((status, dict(headers)))

    content = app(environ, start_response)
    try:
        body = b"".join(content)
    finally:
        with contextlib.suppress(AttributeError):
            content.close()
    return *started[-1], body


async def call_asgi(app: Any, path: str = "/") -> tuple[int, dict[str, str], bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(b"accept", b"application/json")],
    }
    await app(scope, receive, send)
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def test_a_wsgi_service_ends_gracefully(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0)
    inside, go = threading.Event(), threading.Event()

    def app(_environ: Any, start_response: Any) -> Any:
        inside.set()
        go.wait(10)
        ask(engine)  # its first: it has held nothing so far
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    service = WSGIResilienceMiddleware(app, engine=engine)
    health = WSGIHealthApp(engine)
    assert call_wsgi(health, "/readyz")[0].startswith("200")
    replies: list[tuple[str, dict[str, str], bytes]] = []
    held = engine.connect()  # so that the drain has something to wait for
    old = Worker(lambda: replies.append(call_wsgi(service)))
    inside.wait(10)
    drain = Drain(engine)
    status, headers, _ = call_wsgi(service)
    assert status.startswith("503")
    assert "Retry-After" in headers
    assert call_wsgi(health, "/readyz")[0].startswith("503")
    assert call_wsgi(health, "/livez")[0].startswith("200")
    go.set()
    until(lambda: stats_of(engine).waiting == 1)
    held.close()
    old.join()
    assert old.error is None
    assert replies[0][0] == "200 OK"
    assert replies[0][2] == b"done"
    assert drain.join() is True


def test_an_asgi_service_ends_gracefully(url: str) -> None:
    async def main() -> None:
        engine = rdb.create_async_engine(url)
        control = rdb.control(engine)
        inside, go = asyncio.Event(), asyncio.Event()

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            async with engine.connect() as connection:
                inside.set()
                await go.wait()
                await connection.exec_driver_sql("SELECT 1")
            assert await _ask(engine) == 1
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        service = ResilienceMiddleware(app, engine=engine)
        health = HealthApp(engine)
        assert (await call_asgi(health, "/readyz"))[0] == 200
        old = asyncio.create_task(call_asgi(service))
        await inside.wait()
        drain = asyncio.create_task(control.drain())
        await asyncio.sleep(0)
        status, headers, body = await call_asgi(service)
        assert status == 503
        assert headers["connection"] == "close"
        assert "retry-after" in headers
        assert json.loads(body)["status"] == 503
        assert (await call_asgi(health, "/readyz"))[0] == 503
        assert (await call_asgi(health, "/livez"))[0] == 200
        assert not drain.done()
        go.set()
        assert (await old)[0] == 200
        assert await drain is True
        await engine.dispose()

    asyncio.run(main())
