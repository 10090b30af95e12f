"""One connection of one driver, sync or async, on which faults are provoked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import resilientdb as rdb
from resilientdb.policy.faults import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.testing.mariadb import MariaDB
    from resilientdb.testing.postgres import Postgres
    from resilientdb.testing.toxiproxy import Proxy

ASYNC = {"psycopg_async", "asyncpg", "aiomysql", "asyncmy"}
SECRETS = ("postgres@", "user", "hunter2", "SELECT", "INSERT", "VALUES", "t_", "app")


class Client:
    """One connection, driven from one thread."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.engine = engine
        self.connection: Any = None

    def wait(self, result: Any) -> Any:
        return self.loop.run_until_complete(result) if self.loop else result

    def connect(self) -> None:
        self.connection = self.wait(self.engine.connect().start()) if self.loop else self.engine.connect()

    def run(self, sql: str) -> Any:
        return self.wait(self.connection.exec_driver_sql(sql))

    def value(self, sql: str) -> Any:
        return self.run(sql).scalar()

    def run_cancelled(self, sql: str) -> None:
        """In a task that is cancelled while it waits for the answer."""

        async def cancel() -> None:
            task = asyncio.ensure_future(self.connection.exec_driver_sql(sql))
            await asyncio.sleep(0.1)
            task.cancel()
            await task

        self.wait(cancel())

    def commit(self) -> None:
        self.wait(self.connection.commit())

    def rollback(self) -> None:
        self.wait(self.connection.rollback())

    def close(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(Exception):
                self.wait(self.connection.invalidate())
            with contextlib.suppress(Exception):
                self.wait(self.connection.close())
        self.wait(self.engine.dispose())
        if self.loop:
            self.loop.run_until_complete(asyncio.sleep(0.01))  # transports say goodbye
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


class Clients:
    """Makes clients of the driver under test, and closes them."""

    def __init__(self, server: Postgres | MariaDB, driver: str) -> None:
        self.server = server
        self.driver = driver
        self.made: list[Client] = []

    def new(self, url: str | None = None, **connect_args: Any) -> Client:
        make: Any = create_async_engine if self.driver in ASYNC else sa.create_engine
        return self.of(make(url or self.url(), poolclass=NullPool, connect_args=connect_args))

    def guarded(self, url: str | None = None, **options: Any) -> Client:
        """A client of an engine of this library."""
        make: Any = rdb.create_async_engine if self.driver in ASYNC else rdb.create_engine
        return self.of(make(url or self.url(), **options))

    def of(self, engine: Any) -> Client:
        """A client of an engine that is given."""
        client = Client(engine, asyncio.new_event_loop() if self.driver in ASYNC else None)
        self.made.append(client)
        return client

    def connected(self, url: str | None = None, **connect_args: Any) -> Client:
        client = self.new(url, **connect_args)
        client.connect()
        return client

    def url(self, **parts: Any) -> str:
        return self.server.url(self.driver, **parts)

    def close(self) -> None:
        while self.made:
            self.made.pop().close()

    def through(self, proxy: Proxy) -> str:
        return self.url(port=proxy.listen_port)


@contextlib.contextmanager
def two_rows(clients: Clients, options: str = "", **where: Any) -> Iterator[str]:
    """A table of two rows, 1 and 2."""
    query = clients.server.query
    name = f"t_{uuid.uuid4().hex[:12]}"
    query(f"CREATE TABLE {name} (k int PRIMARY KEY, n int NOT NULL DEFAULT 0) {options}", **where)
    query(f"INSERT INTO {name} VALUES (1, 0), (2, 0)", **where)
    yield name
    clients.close()  # their locks would keep it
    query(f"DROP TABLE {name}", **where)


def provoke(call: Callable[[], object]) -> BaseException:
    """The error that ``call`` raises, checked to be told without its secrets."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - cancellations are wanted too
        caught = error
    else:
        pytest.fail("nothing went wrong")
    line = describe(caught)
    assert "\n" not in line
    said = line.removeprefix("psycopg").removeprefix("asyncpg").removesuffix("max_user_connections")
    assert [secret for secret in SECRETS if secret in said] == []
    return caught


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def until(server: Postgres | MariaDB, question: str) -> None:
    """Wait until the server answers the question with true."""
    pause = threading.Event()
    for _ in range(500):
        rows = server.query(question)
        if rows and rows[0][0]:
            return
        pause.wait(0.01)
    pytest.fail(f"never true: {question}")
