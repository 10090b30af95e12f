"""Saying what an error means: what each failure costs on top of itself.

Real errors, as SQLAlchemy raises them, provoked once on the server; those of MySQL's drivers are made by hand, as
PyMySQL makes them. By the thread's own processor time, as in ``checkout``.
"""

from __future__ import annotations

import asyncio
from time import thread_time
from typing import TYPE_CHECKING, Any

import pymysql.err
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import resilientdb as rdb
from resilientdb.testing.processes import free_port

from .measure import pinned, race
from .report import Report, Row, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from .systems import Bench

__all__ = ["run"]

_WANTED = 20.0
"""Microseconds."""
_PROVOKED = {
    "unique violation": "DO $$ BEGIN RAISE unique_violation; END $$",
    "syntax error": "SELEC 1",
    "serialization failure": "DO $$ BEGIN RAISE serialization_failure; END $$",
    "backend terminated": "SELECT pg_terminate_backend(pg_backend_pid())",
}


def run(bench: Bench) -> Report:
    rows: list[Row] = []
    for driver, errors in _errors(bench).items():
        with pinned():
            laps = race({name: _classifying(error) for name, error in errors.items()}, bench.scale)
        rows += [
            Row(
                driver,
                f"{name}: {rdb.classify(errors[name]).name}",
                {"us": lap.seconds.median * 1e6},
                lap.ratio,
                (Target(f"{driver}: {name}, us", lap.seconds.median * 1e6, _WANTED),),
            )
            for name, lap in laps.items()
        ]
    return Report("classify", "what an error means", rows)


def _classifying(error: BaseException) -> Callable[[int], float]:
    def turn(times: int) -> float:
        begun = thread_time()
        for _ in range(times):
            rdb.classify(error)
        return thread_time() - begun

    return turn


def _errors(bench: Bench) -> dict[str, dict[str, BaseException]]:
    server = bench.server
    nowhere = free_port()
    found: dict[str, dict[str, BaseException]] = {}
    for driver in ("psycopg", "psycopg2"):
        found[driver] = {name: _raised(server.url(driver), sql) for name, sql in _PROVOKED.items()}
        found[driver]["refused"] = _raised(server.url(driver, port=nowhere), "SELECT 1")
    found["asyncpg"] = {
        name: asyncio.run(_raised_in_task(server.url("asyncpg"), sql)) for name, sql in _PROVOKED.items()
    }
    found["asyncpg"]["refused"] = asyncio.run(
        _raised_in_task(server.url("asyncpg", port=nowhere), "SELECT 1")
    )
    found["pymysql"] = {
        "unique violation": _wrapped(
            pymysql.err.IntegrityError(1062, "Duplicate entry '1' for key 'PRIMARY'")
        ),
        "deadlock": _wrapped(pymysql.err.OperationalError(1213, "Deadlock found when trying to get lock")),
        "connection lost": _wrapped(
            pymysql.err.OperationalError(2013, "Lost connection to MySQL server during query")
        ),
        "refused": _wrapped(
            pymysql.err.OperationalError(2003, "Can't connect to MySQL server on '127.0.0.1' (111)")
        ),
    }
    return found


def _raised(url: str, sql: str) -> BaseException:
    engine = sa.create_engine(url, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(sql)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is classified
        return error.with_traceback(None)
    raise AssertionError(f"nothing was raised by {sql}")


async def _raised_in_task(url: str, sql: str) -> BaseException:
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.exec_driver_sql(sql)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is classified
        return error.with_traceback(None)
    raise AssertionError(f"nothing was raised by {sql}")


def _wrapped(error: Any) -> BaseException:
    wrapped: BaseException = sa.exc.DBAPIError.instance("SELECT 1", {}, error, pymysql.err.Error)
    return wrapped
