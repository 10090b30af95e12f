"""Flask applications over real engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask
import pytest
import sqlalchemy
from flask import stream_with_context
from sqlalchemy.orm import Session

import resilientdb as rdb
from resilientdb.middleware.flask import install
from resilientdb.runtime.context import current_deadline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    """One connection, and nobody may wait for it."""
    engine = rdb.create_engine(
        f"sqlite:///{tmp_path}/shop.db",
        pool_size=1,
        max_overflow=0,
        resilience=rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=0)),
    )
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE item (id INTEGER PRIMARY KEY)"))
        connection.execute(sqlalchemy.text("INSERT INTO item VALUES (1), (2), (3)"))
    yield engine
    engine.dispose()


@pytest.fixture
def app(engine: sqlalchemy.Engine) -> flask.Flask:
    app = flask.Flask("shop")

    @app.get("/items")
    def items() -> str:
        with Session(engine) as session:
            return str(session.scalar(sqlalchemy.text("SELECT count(*) FROM item")))

    @app.post("/items")
    def insert() -> str:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("INSERT INTO item VALUES (1)"))
        return "inserted"

    @app.get("/other-service")
    def other_service() -> str:
        raise ConnectionRefusedError("some other service")

    @app.get("/stream")
    def stream() -> flask.Response:
        def rows() -> Iterator[str]:
            limit = current_deadline()
            yield f"{limit and limit.seconds}:"
            with engine.connect() as connection:
                for row in connection.execute(sqlalchemy.text("SELECT id FROM item ORDER BY id")):
                    yield str(row.id)

        return flask.Response(stream_with_context(rows()))

    return app


def busy(app: flask.Flask, engine: sqlalchemy.Engine, method: str = "GET", **options: Any) -> Any:
    """The answer while the one connection is out."""
    with engine.connect():
        return app.test_client().open("/items", method=method, **options)


def test_a_full_pool_is_a_503_problem(app: flask.Flask, engine: sqlalchemy.Engine) -> None:
    install(app, engine)
    assert app.test_client().get("/items").text == "3"
    response = busy(app, engine)
    assert (response.status_code, response.json["reason"]) == (503, "pool-saturated")
    assert response.content_type == "application/problem+json"
    assert int(response.headers["Retry-After"]) >= 1
    assert response.headers["Cache-Control"] == "no-store"


def test_a_browser_gets_html_and_head_no_body(app: flask.Flask, engine: sqlalchemy.Engine) -> None:
    install(app, engine)
    assert "<h1>Service busy</h1>" in busy(app, engine, headers={"Accept": "text/html"}).text
    response = busy(app, engine, "HEAD")
    assert (response.status_code, response.data) == (503, b"")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_an_unreachable_server_is_a_503_that_names_nothing(driver: str) -> None:
    engine = rdb.create_engine(f"postgresql+{driver}://app:hunter2@127.0.0.1:1/shop")
    app = flask.Flask("shop")
    install(app, engine)

    @app.get("/")
    def view() -> str:
        with Session(engine) as session:
            return str(session.scalar(sqlalchemy.text("SELECT 1")))

    response = app.test_client().get("/")
    assert response.status_code == 503
    for secret in ("hunter2", "127.0.0.1", "SELECT", "psycopg"):
        assert secret not in response.text
    engine.dispose()


def test_other_errors_keep_flasks_500(app: flask.Flask, engine: sqlalchemy.Engine) -> None:
    install(app, engine)
    for method, path in (("POST", "/items"), ("GET", "/other-service")):
        response = app.test_client().open(path, method=method)
        assert (response.status_code, response.content_type) == (500, "text/html; charset=utf-8")
    assert app.test_client().get("/nowhere").status_code == 404


@pytest.mark.parametrize("cls", [sqlalchemy.exc.IntegrityError, sqlalchemy.exc.SQLAlchemyError, Exception])
@pytest.mark.parametrize("before", [True, False])
def test_error_handlers_of_the_application_still_get_what_is_not_ours(
    app: flask.Flask, engine: sqlalchemy.Engine, cls: type[Exception], before: bool
) -> None:
    if not before:
        install(app, engine)

    @app.errorhandler(cls)
    def answer(error: Exception) -> tuple[str, int]:
        assert isinstance(error, sqlalchemy.exc.IntegrityError)
        return "already there", 409

    if before:
        install(app, engine)
    response = app.test_client().post("/items")
    assert (response.status_code, response.text) == (409, "already there")
    assert busy(app, engine).status_code == 503


def test_an_unhandled_error_still_reaches_the_test_client(
    app: flask.Flask, engine: sqlalchemy.Engine
) -> None:
    app.testing = True
    install(app, engine)
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        app.test_client().post("/items")
    assert busy(app, engine).status_code == 503


def test_a_stream_has_its_deadline_and_gives_its_connection_back_when_the_client_goes_away(
    app: flask.Flask, engine: sqlalchemy.Engine
) -> None:
    install(app, engine, deadline=7.0)
    response = app.test_client().get("/stream")
    assert response.text == "7.0:123"
    response = app.test_client().get("/stream")
    chunks = response.iter_encoded()
    assert [next(chunks), next(chunks)] == [b"7.0:", b"1"]
    assert busy_now(engine)
    response.close()
    assert not busy_now(engine)
    assert app.test_client().get("/items").text == "3"


def busy_now(engine: sqlalchemy.Engine) -> bool:
    (node,) = rdb.control(engine).snapshot().nodes
    assert node.pool is not None
    return node.pool.active == 1


def test_teardown_functions_run_after_a_503(app: flask.Flask, engine: sqlalchemy.Engine) -> None:
    torn_down: list[object] = []
    app.teardown_request(torn_down.append)
    install(app, engine)
    assert busy(app, engine).status_code == 503
    assert torn_down == [None]


def test_options_reach_the_middleware(app: flask.Flask, engine: sqlalchemy.Engine) -> None:
    install(app, engine, deadline_header="X-Deadline", server_timing=True)
    response = app.test_client().get("/stream", headers={"X-Deadline": "4"})
    assert response.text == "4.0:123"
    assert "Server-Timing" in response.headers


def test_an_async_engine_is_refused(app: flask.Flask) -> None:
    engine = rdb.create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(rdb.ConfigurationError, match=r"create_engine\(\)"):
        install(app, engine)
