"""A MariaDB of our own, where it differs from PostgreSQL in the life that both have in common."""

from __future__ import annotations

import socket

import pytest

from resilientdb.testing import MariaDB, ServiceFailed


def test_a_port_that_was_taken_meanwhile_is_replaced(resilientdb_mariadb: MariaDB) -> None:
    server = MariaDB(name="taken", binaries=resilientdb_mariadb.binaries)
    with socket.create_server(("127.0.0.1", server.port)) as taken, server:
        assert server.port != taken.getsockname()[1]
        assert server.query("SELECT 1") == [(1,)]


def test_it_keeps_its_port_and_its_data_and_says_when_it_cannot(resilientdb_mariadb: MariaDB) -> None:
    with MariaDB(name="kept", binaries=resilientdb_mariadb.binaries) as server:
        port, pid = server.port, server.pid
        server.query("CREATE TABLE app.entry (k int)")
        server.restart()
        assert (server.port, server.query("SELECT count(*) FROM app.entry")) == (port, [(0,)])
        assert server.pid not in {pid, None}
        server.stop()
        assert not server.running
        with pytest.raises(ServiceFailed, match="kept is not running"):
            server.wait_ready()
        with socket.create_server(("127.0.0.1", port)), pytest.raises(ServiceFailed, match="Bind on TCP"):
            server.start()
        data = server.data
    assert not data.exists()
