"""The state in a real Valkey, by pybreaker's own storage: there, stopped, silent, and there again."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pybreaker
import pytest

import resilientdb as rdb
from resilientdb.errors import CircuitOpen
from resilientdb.runtime.breaker import CircuitBreaker
from resilientdb.testing import ServiceUnavailable, Valkey
from tests.engine.conftest import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing import ToxiproxyServer

redis: Any = pytest.importorskip("redis")

AT_ONCE = 0.5
"""Seconds that no caller takes; there is no I/O, and a loaded machine is given some time."""


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    try:
        server = Valkey().start()
    except ServiceUnavailable as error:
        pytest.skip(str(error))
    with server:
        yield server


class Stored:
    """A breaker that is stored in the server at ``port``. ``look`` asks the server itself."""

    def __init__(self, port: int, valkey: Valkey, **options: Any) -> None:
        self.client = redis.Redis(port=port, **options)
        self.direct = redis.Redis(port=valkey.port)
        self.breaker = CircuitBreaker(
            rdb.BreakerPolicy(minimum_calls=1, storage=self.storage), name="db:5432"
        )

    def storage(self, node: str) -> pybreaker.CircuitBreakerStorage:
        return pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, self.client, namespace=node)

    def look(self) -> str | None:
        try:
            found = self.direct.get("db:5432:pybreaker:state")
        except redis.RedisError:
            return None
        return None if found is None else found.decode()

    def move_about(self) -> None:
        """All that callers do, and none of it waits."""
        begun = time.monotonic()
        for _ in range(20):
            self.breaker.open()
            with pytest.raises(CircuitOpen):
                self.breaker.call(int)
            self.breaker.close()
            self.breaker.call(int)
        self.breaker.open()
        assert time.monotonic() - begun < AT_ONCE

    def close(self) -> None:
        self.breaker._writer.stop()  # type: ignore[union-attr]
        self.client.close()
        self.direct.close()


@pytest.fixture
def stored(valkey: Valkey) -> Iterator[Stored]:
    stored = Stored(valkey.port, valkey)
    yield stored
    stored.close()


PEER = """
import sys, pybreaker, redis
client = redis.Redis(port=int(sys.argv[1]))
storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, client, namespace="db:5432")
breaker = pybreaker.CircuitBreaker(state_storage=storage, reset_timeout=3600)
try:
    breaker.call(int)
    print(breaker.current_state, "let through")
except pybreaker.CircuitBreakerError:
    print(breaker.current_state, "refused")
"""


def ask_peer(valkey: Valkey) -> str:
    """What a program with pybreaker alone finds there."""
    done = subprocess.run(
        [sys.executable, "-c", PEER, str(valkey.port)], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_another_process_sees_our_state(stored: Stored, valkey: Valkey) -> None:
    until(lambda: stored.look() == "closed", "stored from the start")
    assert ask_peer(valkey) == "closed let through"
    stored.breaker.open()
    until(lambda: stored.look() == "open", "stored")
    assert ask_peer(valkey) == "open refused"
    stored.breaker.close()
    until(lambda: stored.look() == "closed", "stored")
    assert ask_peer(valkey) == "closed let through"


def test_what_another_process_stores_does_not_move_ours(stored: Stored) -> None:
    until(lambda: stored.look() == "closed", "stored from the start")
    stored.direct.set("db:5432:pybreaker:state", "open")
    assert stored.breaker.call(int) == 0
    assert (stored.breaker.current_state, stored.breaker.state.name) == ("closed", "closed")


def test_a_server_that_is_stopped_and_comes_back(
    stored: Stored, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    until(lambda: stored.look() == "closed", "stored from the start")
    valkey.stop()
    stored.move_about()
    until(lambda: "cannot be stored" in caplog.text, "said")
    valkey.start()
    assert stored.look() is None, "it has forgotten everything"
    until(lambda: stored.look() == "open", "told as soon as it is back")
    assert caplog.text.count("cannot be stored") == 1


def test_a_server_that_is_not_there_at_first(valkey: Valkey) -> None:
    valkey.stop()
    stored = Stored(valkey.port, valkey)
    stored.move_about()
    valkey.start()
    until(lambda: stored.look() == "open", "told as soon as it is there")
    stored.close()


@pytest.mark.parametrize("patience", [0.2, None])
def test_a_server_that_is_silent(
    valkey: Valkey, resilientdb_toxiproxy: ToxiproxyServer, patience: float | None
) -> None:
    """None: a client without timeouts hangs for as long as the server does."""
    with resilientdb_toxiproxy.proxy(valkey.address) as proxy:
        stored = Stored(proxy.listen_port, valkey, socket_timeout=patience)
        until(lambda: stored.look() == "closed", "stored from the start")
        with proxy.toxic("timeout", stream="downstream", timeout=0):
            stored.move_about()
        until(lambda: stored.look() == "open", "told as soon as it answers")
        stored.breaker.close()
        until(lambda: stored.look() == "closed", "and from then on")
        stored.close()
