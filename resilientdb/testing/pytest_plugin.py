"""Fixtures for chaos tests of your own; registered by the ``pytest11`` entry point.

==============================  ========  ====================================================
``resilientdb_postgres``        session   a running primary (:class:`~.postgres.Postgres`)
``resilientdb_standby``         session   its streaming hot standby
``resilientdb_toxiproxy``       session   a fault-injection server (:class:`~.toxiproxy.ToxiproxyServer`)
``resilientdb_proxy``           function  a fresh proxy in front of the primary
``resilientdb_standby_proxy``   function  a fresh proxy in front of the standby
``resilientdb_mariadb``         session   a running MariaDB (:class:`~.mariadb.MariaDB`)
``resilientdb_mariadb_proxy``   function  a fresh proxy in front of it
==============================  ========  ====================================================

::

    def test_survives_a_silent_database(resilientdb_postgres, resilientdb_proxy):
        engine = make_my_engine(resilientdb_postgres.url(port=resilientdb_proxy.listen_port))
        with faults.hang(resilientdb_proxy):
            ...

The session's servers are shared: a test that promotes, crashes or stops one makes its own with
:class:`~.postgres.Postgres` or :class:`~.mariadb.MariaDB`. A service that is missing skips the test
with a reason that says how to get it, except in CI (the environment has ``CI``), where it fails: a
green run there means that the tests ran.

The services are imported inside the fixtures, so an unused plugin starts and imports nothing.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing.mariadb import MariaDB
    from resilientdb.testing.postgres import Postgres
    from resilientdb.testing.toxiproxy import Proxy, ToxiproxyServer


@contextmanager
def _needs(service: str) -> Iterator[None]:
    """Turn "not installed" into a skip, or in CI into a failure. Anything else stays an error."""
    from resilientdb.testing.errors import ServiceUnavailable

    try:
        yield
    except ServiceUnavailable as error:
        reason = f"{service} is not available: {error}"
        if os.environ.get("CI", "").lower() not in {"", "0", "false", "no"}:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def resilientdb_postgres() -> Iterator[Postgres]:
    """A PostgreSQL primary, shared by the session."""
    with _needs("PostgreSQL"):
        from resilientdb.testing.postgres import Postgres

        server = Postgres().start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def resilientdb_standby(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    """A streaming hot standby of ``resilientdb_postgres``, shared by the session."""
    with _needs("PostgreSQL"):
        server = type(resilientdb_postgres).standby(resilientdb_postgres).start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def resilientdb_toxiproxy() -> Iterator[ToxiproxyServer]:
    """A Toxiproxy server, shared by the session; built once if it is nowhere to be found."""
    with _needs("Toxiproxy"):
        from resilientdb.testing.toxiproxy import ToxiproxyServer

        server = ToxiproxyServer().start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def resilientdb_proxy(
    resilientdb_toxiproxy: ToxiproxyServer, resilientdb_postgres: Postgres
) -> Iterator[Proxy]:
    """A fresh proxy in front of the primary, deleted after the test."""
    with resilientdb_toxiproxy.proxy(resilientdb_postgres.address) as proxy:
        yield proxy


@pytest.fixture
def resilientdb_standby_proxy(
    resilientdb_toxiproxy: ToxiproxyServer, resilientdb_standby: Postgres
) -> Iterator[Proxy]:
    """A fresh proxy in front of the standby, deleted after the test."""
    with resilientdb_toxiproxy.proxy(resilientdb_standby.address) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def resilientdb_mariadb() -> Iterator[MariaDB]:
    """A MariaDB primary, shared by the session."""
    with _needs("MariaDB"):
        from resilientdb.testing.mariadb import MariaDB

        server = MariaDB().start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def resilientdb_mariadb_proxy(
    resilientdb_toxiproxy: ToxiproxyServer, resilientdb_mariadb: MariaDB
) -> Iterator[Proxy]:
    """A fresh proxy in front of the MariaDB primary, deleted after the test."""
    with resilientdb_toxiproxy.proxy(resilientdb_mariadb.address) as proxy:
        yield proxy
