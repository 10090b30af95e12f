"""Start-up validation of what only the server knows: how many connections it takes, and how old it is.

Servers that are not to be had here (an old one, one behind a pooler, one that only speaks the language) are a real
one whose functions are shadowed: ``search_path`` puts a schema of ours before the system's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.errors import ConfigurationError
from resilientdb.testing.postgres import Postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DRIVERS = ["psycopg", "psycopg2", "asyncpg", "psycopg_async"]
ROOM = 97
"""max_connections 100, less 3 for the superuser."""


def engine_for(server: Postgres, driver: str = "psycopg", **options: Any) -> Any:
    make: Any = rdb.create_async_engine if "async" in driver else rdb.create_engine
    return make(server.url(driver), **options)


def refusal(engine: Any, *, processes: int | None = 1) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        rdb.control(engine).validate(processes=processes)
    return caught.value


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_full_pools_of_all_processes_must_fit(resilientdb_postgres: Postgres, driver: str) -> None:
    engine = engine_for(resilientdb_postgres, driver, pool_size=5, max_overflow=10)
    rdb.control(engine).validate(processes=6)
    error = refusal(engine, processes=7)
    assert error.key == "pool_size"
    for words in (
        f"{resilientdb_postgres.address} has room for {ROOM} connections (max_connections 100, 3 of them reserved)",
        "7 processes x (pool_size 5 + max_overflow 10) may ask for 105",
        "lower pool_size or max_overflow, run fewer processes, or raise max_connections",
    ):
        assert words in str(error)


def test_exactly_as_many_as_there_are_fit(resilientdb_postgres: Postgres) -> None:
    rdb.control(engine_for(resilientdb_postgres, pool_size=ROOM, max_overflow=0)).validate()
    error = refusal(engine_for(resilientdb_postgres, pool_size=1, max_overflow=ROOM))
    assert f"1 process x (pool_size 1 + max_overflow {ROOM}) may ask for {ROOM + 1}" in str(error)


def test_every_replica_is_asked_too(resilientdb_postgres: Postgres, resilientdb_standby: Postgres) -> None:
    engine = engine_for(resilientdb_postgres, replicas=[resilientdb_standby.address], pool_size=ROOM + 1)
    text = str(refusal(engine))
    for server in (resilientdb_postgres, resilientdb_standby):
        assert f"{server.address} has room for {ROOM} connections" in text


@pytest.mark.parametrize(
    ("options", "key", "unlimited"),
    [
        ({"max_overflow": -1}, "max_overflow", "max_overflow=-1"),
        ({"pool_size": 0}, "pool_size", "pool_size=0"),
    ],
)
def test_an_unlimited_pool_is_told_apart(
    resilientdb_postgres: Postgres, options: dict[str, Any], key: str, unlimited: str
) -> None:
    engine = engine_for(resilientdb_postgres, **options)
    error = refusal(engine, processes=2)
    assert error.key == key
    assert f"the pool is unlimited ({unlimited})" in str(error)
    assert f"2 processes x (pool_size + max_overflow) is at most {ROOM}" in str(error)
    rdb.control(engine).validate(processes=None)


def test_sizes_are_left_alone_on_request(resilientdb_postgres: Postgres) -> None:
    rdb.control(engine_for(resilientdb_postgres, pool_size=1_000)).validate(processes=None)


def test_a_pool_class_of_ones_own_is_left_alone(resilientdb_postgres: Postgres) -> None:
    engine = engine_for(resilientdb_postgres, poolclass=sa.NullPool)
    rdb.control(engine).validate(processes=1_000)


def test_what_is_reserved_for_others_counts_too() -> None:
    settings = {"max_connections": "20", "superuser_reserved_connections": "4"}
    server = Postgres(name="reserved", settings=settings)
    free = 16
    if server.binaries.major >= 16:
        server.settings["reserved_connections"] = "5"
        free = 11
    with server:
        rdb.control(engine_for(server, pool_size=free, max_overflow=0)).validate()
        error = refusal(engine_for(server, pool_size=free, max_overflow=1))
    assert f"room for {free} connections (max_connections 20, {20 - free} of them reserved)" in str(error)


@pytest.mark.parametrize("processes", [0, -1, True, 1.5, "2"])
def test_processes_is_a_number_of_processes(processes: Any) -> None:
    error = refusal(rdb.create_engine("sqlite://"), processes=processes)
    assert (error.key, error.value) == ("processes", processes)
    rdb.control(rdb.create_engine("sqlite://")).validate(processes=8)


# -- other servers --------------------------------------------------------------------------------------------------


@pytest.fixture
def pretending(resilientdb_postgres: Postgres) -> Iterator[Callable[..., Any]]:
    """``pretending(driver, "current_setting(text)", "SELECT '120022'")``: an engine whose pool is far too large,
    on a server where that function does that."""
    server = resilientdb_postgres
    server.query("CREATE SCHEMA pretended")

    def make(driver: str, function: str, body: str) -> Any:
        returns = "integer" if "pid" in function else "text"
        server.query(f"CREATE FUNCTION pretended.{function} RETURNS {returns} AS $${body}$$ LANGUAGE sql")
        path = "pretended, pg_catalog"
        arguments = (
            {"server_settings": {"search_path": path}}
            if driver == "asyncpg"
            else {"options": f"-csearch_path={path.replace(' ', '')}"}
        )
        return engine_for(server, driver, pool_size=1_000, connect_args=arguments)

    yield make
    server.query("DROP SCHEMA pretended CASCADE")


@pytest.mark.parametrize(("number", "name"), [("120022", "12.22"), ("90624", "9.6.24")])
def test_a_server_too_old_is_said_to_be(
    pretending: Callable[..., Any], resilientdb_postgres: Postgres, number: str, name: str
) -> None:
    error = refusal(pretending("psycopg", "current_setting(text)", f"SELECT '{number}'::text"))
    assert error.key == "url"
    assert f"{resilientdb_postgres.address} is PostgreSQL {name}; 13 or newer is needed" in str(error)
    assert "has room" not in str(error), "what it says of itself is not relied on"


def test_the_oldest_that_is_good_enough(pretending: Callable[..., Any]) -> None:
    error = refusal(pretending("psycopg", "current_setting(text)", "SELECT '130000'::text"))
    assert "newer is needed" not in str(error)


@pytest.mark.parametrize("driver", DRIVERS)
def test_behind_a_pooler_the_servers_limit_is_not_ours(pretending: Callable[..., Any], driver: str) -> None:
    """PgBouncer, PgDog and Odyssey tell the client a process number of their own making."""
    rdb.control(pretending(driver, "pg_backend_pid()", "SELECT 1")).validate()


@pytest.mark.parametrize(
    "function", ["current_setting(text)", "current_setting(text, boolean)", "pg_backend_pid()"]
)
def test_a_server_that_does_not_know_the_question_is_taken_as_it_is(
    pretending: Callable[..., Any], function: str
) -> None:
    rdb.control(pretending("psycopg", function, "SELECT (1 / 0)")).validate()


def test_a_setting_that_is_not_there_is_no_limit(pretending: Callable[..., Any]) -> None:
    rdb.control(pretending("psycopg", "current_setting(text, boolean)", "SELECT NULL::text")).validate()


def test_a_server_that_goes_away_in_the_middle_is_a_failure(pretending: Callable[..., Any]) -> None:
    body = "SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())::int"
    engine = pretending("psycopg", "pg_backend_pid()", body)
    error = refusal(engine)
    assert error.key == "url"
    assert "failed" in str(error)
