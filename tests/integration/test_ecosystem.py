"""What people put on top of SQLAlchemy works as before when ``?plugin=resilientdb`` is added to the URL.

Nearly every test runs twice, on a plain engine and on a guarded one, and expects the very same.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, NullPool, QueuePool, StaticPool, event, text
from sqlalchemy.ext.asyncio import (
    AsyncAttrs,
    AsyncEngine,
    AsyncSession,
    async_engine_from_config,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    selectinload,
    sessionmaker,
)
from sqlmodel import Field, SQLModel
from sqlmodel import Session as SQLModelSession
from sqlmodel import create_engine as sqlmodel_create_engine
from sqlmodel import select as sqlmodel_select

import resilientdb as rdb

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from resilientdb.testing import Postgres

PLUGIN = "?plugin=resilientdb"
GUARDS = ["", PLUGIN]
_numbers = itertools.count(1)


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    books: Mapped[list[Book]] = relationship(back_populates="author", cascade="all, delete-orphan")


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(sa.ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


@pytest.fixture
def url(resilientdb_postgres: Postgres) -> Iterator[Callable[..., str]]:
    """``url(driver, query)``, of a database of this test's own."""
    name = f"ecosystem_{next(_numbers)}"
    resilientdb_postgres.query(f"CREATE DATABASE {name}")

    def make(driver: str = "psycopg", query: str = "") -> str:
        return resilientdb_postgres.url(driver, name) + query

    yield make
    resilientdb_postgres.query(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=GUARDS, ids=["plain", "guarded"])
def guard(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def engine(url: Callable[..., str], guard: str) -> Iterator[Engine]:
    made = sa.create_engine(url("psycopg", guard))
    assert_guarded(made, guard)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def assert_guarded(engine: Engine | AsyncEngine, guard: str) -> None:
    """The guarded half of a test is guarded, and the plain half is not."""
    if guard:
        assert rdb.control(engine).state == "healthy"
    else:
        with pytest.raises(rdb.ConfigurationError):
            rdb.control(engine)


# ----------------------------------------------------------------------------------------------- ORM


def test_session(engine: Engine) -> None:
    make = sessionmaker(engine)
    with make.begin() as session:
        session.add(Author(name="Le Guin", books=[Book(title="The Dispossessed"), Book(title="Lavinia")]))
    with make() as session:
        author = session.scalars(sa.select(Author).options(selectinload(Author.books))).one()
        assert [book.title for book in author.books] == ["The Dispossessed", "Lavinia"]
        assert session.get(Author, author.id) is author
        savepoint = session.begin_nested()
        session.add(Author(name="Le Guin"))
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()
        savepoint.rollback()
        author.books.pop()
        session.commit()
        assert len(author.books) == 1
        assert session.scalar(sa.select(sa.func.count()).select_from(Book)) == 1
        session.rollback()
    with make() as session:
        assert session.connection().engine is engine
        names = session.execute(
            sa.insert(Author).returning(Author.name), [{"name": str(n)} for n in range(2500)]
        )
        assert len(names.all()) == 2500
        stream = session.scalars(sa.select(Author.name), execution_options={"yield_per": 500})
        assert sum(len(part) for part in stream.partitions()) == 2501
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_scoped_session(engine: Engine) -> None:
    session = scoped_session(sessionmaker(engine))
    others: list[Session] = []

    def work() -> None:
        others.append(session())
        session.remove()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    session.add(Author(name="Mishima"))
    session.commit()
    assert session() not in others
    assert session.query(Author).filter_by(name="Mishima").count() == 1
    session.remove()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_async_session(url: Callable[..., str], guard: str, driver: str) -> None:
    import asyncio

    async def main() -> None:
        engine = create_async_engine(url(driver, guard))
        assert_guarded(engine, guard)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        make = async_sessionmaker(engine, expire_on_commit=False)
        async with make.begin() as session:
            session.add(Author(name="Szabó", books=[Book(title="The Door")]))
        async with make() as session:
            author = (await session.scalars(sa.select(Author))).one()
            assert [book.title for book in await author.awaitable_attrs.books] == ["The Door"]
            with pytest.raises(sa.exc.IntegrityError):
                async with session.begin_nested():
                    session.add(Author(name="Szabó"))
            titles = [row.title async for row in await session.stream(sa.select(Book.title))]
            assert titles == ["The Door"]
            assert await session.run_sync(lambda sync: sync.query(Author).count()) == 1

        current: Callable[[], asyncio.Task[Any] | None] = asyncio.current_task
        scoped = async_scoped_session(make, scopefunc=current)
        assert isinstance(scoped(), AsyncSession)
        assert await scoped.scalar(sa.select(Author.name)) == "Szabó"
        await scoped.remove()
        assert "Pool size: 5" in engine.pool.status()
        await engine.dispose()

    asyncio.run(main())


# ------------------------------------------------------------------------------------- engine and pool


def test_events_come_in_the_same_order(url: Callable[..., str]) -> None:
    heard = {guard: _events_of_a_workload(url("psycopg", guard)) for guard in GUARDS}
    assert heard[""] == heard[PLUGIN]
    for name in ("do_connect", "connect", "first_connect", "checkout", "checkin", "close", "handle_error"):
        assert name in heard[PLUGIN]


def _events_of_a_workload(address: str) -> list[str]:
    heard: list[str] = []
    engine = sa.create_engine(address, pool_size=1, max_overflow=1)
    me = threading.current_thread()

    def hear(name: str, *_args: object, **_named: object) -> None:
        if threading.current_thread() is me:  # the prober connects, too, in a thread of its own
            heard.append(name)

    names = {
        "do_connect": 4,
        "first_connect": 2,
        "connect": 2,
        "checkout": 3,
        "checkin": 2,
        "reset": 3,
        "invalidate": 3,
        "close": 1,
        "detach": 2,
        "engine_connect": 1,
        "begin": 1,
        "commit": 1,
        "rollback": 1,
        "savepoint": 2,
        "before_execute": 5,
        "before_cursor_execute": 6,
        "after_cursor_execute": 6,
        "set_connection_execution_options": 2,
        "handle_error": 1,
        "engine_disposed": 1,
    }
    for name in names:
        event.listen(engine, name, functools.partial(hear, name))
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
    with engine.connect() as one, engine.connect() as two:  # the second one is overflow
        one.execute(text("SELECT 1"))
        two.execution_options(isolation_level="AUTOCOMMIT").execute(text("SELECT 1"))
    with engine.connect() as connection:
        connection.begin()
        connection.begin_nested().rollback()
        with pytest.raises(sa.exc.ProgrammingError):
            connection.execute(text("SELECT nonsense"))
        connection.rollback()
        connection.invalidate()
        connection.rollback()
        connection.execute(text("SELECT 1"))
        connection.detach()
    engine.dispose()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    engine.dispose()
    return heard


def test_raw_connection(engine: Engine) -> None:
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("SELECT 40 + 2")
        assert cursor.fetchone() == (42,)
        cursor.close()
        assert type(raw.driver_connection).__module__ == "psycopg"
        assert raw.dbapi_connection is not None
        raw.info["mine"] = True
        raw.commit()
    finally:
        raw.close()
    raw = engine.raw_connection()
    assert raw.info == {"mine": True}, "the same connection comes back"
    raw.detach()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    raw.close()


def test_inspect(engine: Engine) -> None:
    inspector = sa.inspect(engine)
    assert set(inspector.get_table_names()) == {"author", "book"}
    assert inspector.get_foreign_keys("book")[0]["referred_table"] == "author"
    reflected = sa.MetaData()
    reflected.reflect(engine)
    assert set(reflected.tables) == {"author", "book"}
    with engine.connect() as connection:
        assert sa.inspect(connection).has_table("author")


def test_engine_from_config(url: Callable[..., str], guard: str) -> None:
    options = {
        "sqlalchemy.url": url("psycopg", guard),
        "sqlalchemy.pool_size": "3",
        "sqlalchemy.echo": "false",
    }
    engine = sa.engine_from_config(options, pool_pre_ping=True)
    assert_guarded(engine, guard)
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.size() == 3
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()

    async_engine = async_engine_from_config({"sqlalchemy.url": url("asyncpg", guard)})
    assert_guarded(async_engine, guard)


def test_urls_and_options(url: Callable[..., str], guard: str) -> None:
    engine = sa.create_engine(
        url("psycopg", guard), pool_timeout=30, max_overflow=2, isolation_level="AUTOCOMMIT"
    )
    assert engine.url == sa.make_url(url())
    assert engine.dialect.name == "postgresql"
    assert engine.pool.timeout() == 30  # type: ignore[attr-defined]
    assert "Pool size: 5" in engine.pool.status()
    other = engine.execution_options(isolation_level="SERIALIZABLE")
    assert other.pool is engine.pool
    with engine.connect() as one, other.connect() as two:
        assert one.connection.driver_connection.autocommit  # type: ignore[union-attr]
        assert two.get_isolation_level() == "SERIALIZABLE"
    before = engine.pool
    engine.dispose()
    assert engine.pool is not before
    assert type(engine.pool) is type(before)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


@pytest.mark.parametrize("pool_class", [NullPool, StaticPool, QueuePool])
def test_an_explicit_pool_class_is_kept(
    url: Callable[..., str], guard: str, pool_class: type[sa.Pool]
) -> None:
    engine = sa.create_engine(url("psycopg", guard), poolclass=pool_class)
    assert_guarded(engine, guard)
    assert isinstance(engine.pool, pool_class)
    with engine.connect() as connection:
        first = connection.scalar(text("SELECT pg_backend_pid()"))
    with engine.connect() as connection:
        second = connection.scalar(text("SELECT pg_backend_pid()"))
    assert (first != second) == (pool_class is NullPool)
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_driver_errors_keep_their_names(url: Callable[..., str], guard: str, driver: str) -> None:
    engine = sa.create_engine(url(driver, guard))
    with engine.connect() as connection:
        with pytest.raises(sa.exc.DataError) as caught:
            connection.execute(text("SELECT 1 / 0"))
        assert type(caught.value.orig).__module__.startswith(driver)
        assert type(caught.value.orig).__name__ == "DivisionByZero"
    engine.dispose()


# ---------------------------------------------------------------------------------------- other people


def test_pandas(engine: Engine) -> None:
    import pandas as pd

    frame = pd.DataFrame({"name": ["a", "b", "c"], "amount": [1.5, 2.5, 3.5]})
    frame.to_sql("sales", engine, index=False)
    frame.to_sql("sales", engine, index=False, if_exists="append", method="multi", chunksize=2)
    read = pd.read_sql("SELECT * FROM sales ORDER BY name", engine)
    assert read["amount"].sum() == 15.0
    with engine.connect() as connection:
        assert (
            len(pd.read_sql(text("SELECT * FROM sales WHERE name = :n"), connection, params={"n": "a"})) == 2
        )
    parts = pd.read_sql_query("SELECT * FROM sales", engine, chunksize=4)
    assert [len(part) for part in parts] == [4, 2]
    assert len(pd.read_sql_table("sales", engine)) == 6
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str


def test_sqlmodel(url: Callable[..., str], guard: str) -> None:
    engine = sqlmodel_create_engine(url("psycopg", guard))
    assert_guarded(engine, guard)
    SQLModel.metadata.create_all(engine)
    with SQLModelSession(engine) as session:
        hero = Hero(name="Deadpond")
        session.add(hero)
        session.commit()
        session.refresh(hero)
        assert hero.id == 1
        assert session.exec(sqlmodel_select(Hero).where(Hero.name == "Deadpond")).one() == hero
    engine.dispose()


_REVISION = '''
"""A table."""
import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

def upgrade() -> None:
    op.create_table("thing", sa.Column("id", sa.Integer, primary_key=True))

def downgrade() -> None:
    op.drop_table("thing")
'''


@pytest.mark.parametrize(("template", "driver"), [("generic", "psycopg"), ("async", "asyncpg")])
def test_alembic(
    url: Callable[..., str],
    tmp_path: Path,
    template: str,
    driver: str,
    resilientdb_postgres: Postgres,
) -> None:
    """The project is the one that ``alembic init`` makes, NullPool and all; only the URL is filled in."""
    _alembic(tmp_path, "init", "--template", template, "migrations")
    (tmp_path / "migrations" / "versions" / "0001.py").write_text(_REVISION)
    ini = tmp_path / "alembic.ini"
    as_made = ini.read_text()

    def fill_in(query: str) -> None:
        address = "sqlalchemy.url = " + url(driver, query).replace("%", "%%")
        ini.write_text(as_made.replace("sqlalchemy.url = driver://user:pass@localhost/dbname", address))
        assert address in ini.read_text()

    def tables() -> list[str]:
        database = sa.make_url(url()).database or ""
        rows = resilientdb_postgres.query(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1", database=database
        )
        return [name for (name,) in rows]

    fill_in(f"{PLUGIN}&resilientdb_profile=batch")
    _alembic(tmp_path, "upgrade", "head")
    assert tables() == ["alembic_version", "thing"]
    if template == "async":
        return
    assert "0001 (head)" in _alembic(tmp_path, "current")
    _alembic(tmp_path, "downgrade", "base")
    assert tables() == ["alembic_version"]

    fill_in(f"{PLUGIN}&resilientdb_profle=batch")  # so it is really the plugin that has been at work
    assert "did you mean resilientdb_profile" in _alembic(tmp_path, "upgrade", "head", expected=1)


def _alembic(folder: Path, *arguments: str, expected: int = 0) -> str:
    # In a process of its own, because its logging configuration disables the loggers of this one.
    result = subprocess.run(
        [sys.executable, "-m", "alembic.config", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == expected, output
    return output
