"""Each fault has its effect on a real PostgreSQL, ends with its block, and notices when it is gone."""

# ruff: noqa: PT012 - a fault's block is what raises, at its end

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import psycopg
import pytest

from resilientdb.testing import FaultNotActive, Postgres, Proxy, ToxiproxyError, ToxiproxyServer, faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from resilientdb.testing.faults import ActiveFault

    Connection = psycopg.Connection[tuple[object, ...]]
    Block = Callable[[Proxy], AbstractContextManager[ActiveFault]]

_LATENCY = 0.15
_BLOCKS: dict[str, Block] = {
    "down": faults.down,
    "hang": faults.hang,
    "pause": faults.pause,
    "reset": faults.reset,
    "reply_lost": faults.reply_lost,
    "request_lost": faults.request_lost,
    "latency": lambda proxy: faults.latency(proxy, _LATENCY),
    "slow_link": faults.slow_link,
    "slow_close": lambda proxy: faults.slow_close(proxy, 0.2),
    "sliced": faults.sliced,
}


@pytest.fixture
def through(resilientdb_postgres: Postgres, resilientdb_proxy: Proxy) -> Callable[[], Connection]:
    """Opens a connection through the proxy, in autocommit."""
    url = resilientdb_postgres.url("", port=resilientdb_proxy.listen_port)
    return lambda: psycopg.connect(url, autocommit=True, connect_timeout=5)


@pytest.fixture
def connection(through: Callable[[], Connection]) -> Iterator[Connection]:
    """A connection through the proxy that was open before the fault."""
    with closing(through()) as opened:
        yield opened


@pytest.fixture
def ledger(resilientdb_postgres: Postgres) -> str:
    """An empty table."""
    resilientdb_postgres.query("DROP TABLE IF EXISTS fault_ledger")
    resilientdb_postgres.query("CREATE TABLE fault_ledger (k text)")
    return "fault_ledger"


def _send(connection: Connection) -> None:
    """Send a query and do not wait for its reply."""
    connection.pgconn.send_query(b"SELECT 1")
    connection.pgconn.flush()


def _answered(connection: Connection, within: float) -> bool:
    """Whether a byte (or the end) came within so many seconds."""
    return bool(select.select([connection.fileno()], [], [], within)[0])


def _select_one(connection: Connection) -> float:
    begun = time.monotonic()
    assert connection.execute("SELECT 1").fetchone() == (1,)
    return time.monotonic() - begun


# ---------------------------------------------------------------------------------- what a block promises


@pytest.mark.parametrize("name", _BLOCKS)
def test_it_is_over_after_its_block(
    name: str, resilientdb_proxy: Proxy, through: Callable[[], Connection]
) -> None:
    begun = time.monotonic()
    with _BLOCKS[name](resilientdb_proxy) as fault:
        assert fault.name == name
        assert fault.seconds >= 0
        fault.check()
    assert time.monotonic() - begun < 2.0
    assert resilientdb_proxy.enabled
    assert resilientdb_proxy.toxics() == []
    with through() as opened:
        assert _select_one(opened) < 1.0
    assert not [thread for thread in threading.enumerate() if thread.name == "resilientdb-fault-proof"]


@pytest.mark.parametrize("name", _BLOCKS)
def test_it_is_over_when_the_body_raises(name: str, resilientdb_proxy: Proxy) -> None:
    with pytest.raises(ZeroDivisionError), _BLOCKS[name](resilientdb_proxy):
        raise ZeroDivisionError
    assert resilientdb_proxy.enabled
    assert resilientdb_proxy.toxics() == []


@pytest.mark.parametrize("name", _BLOCKS)
def test_removed_behind_its_back_it_is_noticed(
    name: str, resilientdb_toxiproxy: ToxiproxyServer, resilientdb_proxy: Proxy
) -> None:
    with pytest.raises(FaultNotActive), _BLOCKS[name](resilientdb_proxy) as fault:
        resilientdb_toxiproxy.reset()
        with pytest.raises(FaultNotActive):
            fault.check()
    assert resilientdb_proxy.enabled
    assert resilientdb_proxy.toxics() == []


@pytest.mark.parametrize("name", ["hang", "latency"])
def test_changed_behind_its_back_it_is_noticed(name: str, resilientdb_proxy: Proxy) -> None:
    with pytest.raises(FaultNotActive, match="asked for"), _BLOCKS[name](resilientdb_proxy):
        toxic = resilientdb_proxy.toxics()[0]
        toxic.update(**{"timeout" if name == "hang" else "latency": 1})
    assert resilientdb_proxy.toxics() == []


def test_the_bodys_error_comes_first_and_the_fault_is_a_note(resilientdb_proxy: Proxy) -> None:
    with pytest.raises(ZeroDivisionError) as caught, faults.hang(resilientdb_proxy):
        resilientdb_proxy.toxics()[0].remove()
        raise ZeroDivisionError
    assert "no longer as it was made" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["hang", "pause", "reset", "reply_lost", "request_lost", "latency"])
def test_a_fault_without_effect_is_noticed(
    name: str,
    resilientdb_toxiproxy: ToxiproxyServer,
    resilientdb_postgres: Postgres,
    resilientdb_proxy: Proxy,
) -> None:
    """The server reports it as active, but the clients' way does not lead through it."""
    bypass = Proxy(
        resilientdb_toxiproxy, resilientdb_proxy.name, (resilientdb_postgres.host, resilientdb_postgres.port)
    )
    with pytest.raises(FaultNotActive, match="was replied after"), _BLOCKS[name](bypass):
        pass
    assert resilientdb_proxy.toxics() == []


@pytest.mark.parametrize("name", [name for name in _BLOCKS if name != "down"])
def test_on_a_disabled_proxy_nothing_is_active(name: str, resilientdb_proxy: Proxy) -> None:
    resilientdb_proxy.disable()
    with pytest.raises(FaultNotActive, match="disabled"), _BLOCKS[name](resilientdb_proxy):
        pytest.fail("the block was entered")
    assert resilientdb_proxy.toxics() == []


def test_blocks_nest(resilientdb_proxy: Proxy, through: Callable[[], Connection]) -> None:
    with faults.latency(resilientdb_proxy, 0.05), faults.latency(resilientdb_proxy, 0.05):
        with faults.down(resilientdb_proxy), pytest.raises(psycopg.OperationalError):
            through()
        with faults.reply_lost(resilientdb_proxy), pytest.raises(psycopg.OperationalError):
            through()
        with through() as opened:
            assert _select_one(opened) >= 0.09
    assert resilientdb_proxy.toxics() == []


# ------------------------------------------------------------------------------------ what a client sees


def test_down_cuts_and_refuses(
    resilientdb_proxy: Proxy, connection: Connection, through: Callable[[], Connection]
) -> None:
    with faults.down(resilientdb_proxy):
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="refused"):
            through()


def test_down_leaves_a_disabled_proxy_disabled(resilientdb_proxy: Proxy) -> None:
    resilientdb_proxy.disable()
    with faults.down(resilientdb_proxy):
        pass
    assert not resilientdb_proxy.enabled


def test_dead_accepts_and_closes(
    resilientdb_toxiproxy: ToxiproxyServer, resilientdb_postgres: Postgres
) -> None:
    with (
        Postgres(name="mortal", binaries=resilientdb_postgres.binaries) as server,
        resilientdb_toxiproxy.proxy(server.address) as proxy,
    ):
        url = server.url("", port=proxy.listen_port)
        with faults.dead(server, proxy=proxy):
            with pytest.raises(psycopg.OperationalError) as caught:
                psycopg.connect(url)
            assert "refused" not in str(caught.value)
            with pytest.raises(FaultNotActive, match="does not run in the first place"), faults.dead(server):
                pass
        with psycopg.connect(url) as connection:
            _select_one(connection)
        with pytest.raises(FaultNotActive, match="dead"), faults.dead(server):
            server.start()
        assert server.running


def test_hang_is_silence_and_healing_cuts(resilientdb_proxy: Proxy, connection: Connection) -> None:
    with faults.hang(resilientdb_proxy):
        _send(connection)
        assert not _answered(connection, 0.3)
    assert _answered(connection, 5.0)
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")


def test_pause_is_silence_and_healing_delivers(resilientdb_proxy: Proxy, connection: Connection) -> None:
    with faults.pause(resilientdb_proxy):
        _send(connection)
        assert not _answered(connection, 0.3)
    assert _answered(connection, 5.0)
    result = connection.pgconn.get_result()
    assert result is not None
    assert result.get_value(0, 0) == b"1"
    assert connection.pgconn.get_result() is None
    _select_one(connection)


def test_pause_upstream_makes_zombies(
    resilientdb_postgres: Postgres, resilientdb_proxy: Proxy, connection: Connection, ledger: str
) -> None:
    """A write whose client has long gone arrives all the same."""
    with faults.pause(resilientdb_proxy, streams=["upstream"]):
        connection.pgconn.send_query(f"INSERT INTO {ledger} VALUES ('zombie')".encode())
        connection.pgconn.flush()
        connection.close()
        assert resilientdb_postgres.query(f"TABLE {ledger}") == []
    deadline = time.monotonic() + 10
    while resilientdb_postgres.query(f"TABLE {ledger}") != [("zombie",)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_latency_delays_each_round_trip(resilientdb_proxy: Proxy, connection: Connection) -> None:
    before = _select_one(connection)
    with faults.latency(resilientdb_proxy, _LATENCY):
        assert _select_one(connection) >= _LATENCY * 0.95
    with faults.latency(resilientdb_proxy, _LATENCY, jitter=0.05, stream="upstream"):
        assert _select_one(connection) >= (_LATENCY - 0.05) * 0.95
    assert before < _LATENCY


def test_reset_kills_open_and_new_connections(
    resilientdb_proxy: Proxy, connection: Connection, through: Callable[[], Connection]
) -> None:
    with faults.reset(resilientdb_proxy):
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError):
            through()


@pytest.mark.parametrize(
    ("block", "survivors"),
    [(faults.reply_lost, [("x",)]), (faults.request_lost, []), (faults.commit_lost, [])],
)
def test_a_commit_in_doubt(
    block: Block,
    survivors: list[tuple[str]],
    resilientdb_postgres: Postgres,
    resilientdb_proxy: Proxy,
    through: Callable[[], Connection],
    ledger: str,
) -> None:
    """The client sees the same error both times; only one of the two transactions exists."""
    connection = through()
    connection.autocommit = False
    connection.execute(f"INSERT INTO {ledger} VALUES ('x')".encode())
    with block(resilientdb_proxy), pytest.raises(psycopg.OperationalError):
        connection.commit()
    connection.close()
    deadline = time.monotonic() + 10  # the server may still be busy with the end of the transaction
    busy = "SELECT 1 FROM pg_stat_activity WHERE state <> 'idle' AND query LIKE 'INSERT INTO fault_ledger%'"
    while resilientdb_postgres.query(f"{busy} AND pid <> pg_backend_pid()"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert resilientdb_postgres.query(f"TABLE {ledger}") == survivors


def test_a_slow_link_takes_long_for_much(resilientdb_proxy: Proxy, connection: Connection) -> None:
    with faults.slow_link(resilientdb_proxy, 50):
        begun = time.monotonic()
        row = connection.execute("SELECT repeat('x', 20000)").fetchone()
        assert row is not None
        assert len(str(row[0])) == 20_000
        assert time.monotonic() - begun >= 0.3
    with pytest.raises(ValueError, match="1 or more"):
        faults.slow_link(resilientdb_proxy, 0)


def test_sliced_data_arrives_whole(resilientdb_proxy: Proxy, connection: Connection) -> None:
    with faults.sliced(resilientdb_proxy, average=4, variation=3, delay=0.00001):
        assert connection.execute("SELECT %s::text", ["y" * 500]).fetchone() == ("y" * 500,)


def test_slow_close_delays_the_end(resilientdb_proxy: Proxy) -> None:
    cancel_request = struct.pack("!iiii", 16, 80877102, 0, 0)  # the server closes on it without a word

    def end() -> float:
        with socket.create_connection((resilientdb_proxy.listen_host, resilientdb_proxy.listen_port)) as raw:
            begun = time.monotonic()
            raw.sendall(cancel_request)
            assert raw.recv(1) == b""
            return time.monotonic() - begun

    assert end() < 0.2
    with faults.slow_close(resilientdb_proxy, 0.2):
        assert end() >= 0.19


def test_a_share_of_connections_is_hit(resilientdb_proxy: Proxy, through: Callable[[], Connection]) -> None:
    failures = 0
    with faults.reset(resilientdb_proxy, toxicity=0.3):
        for _ in range(30):
            try:
                through().close()
            except psycopg.OperationalError:
                failures += 1
    assert 3 < failures < 30  # the toxics of both directions draw apart: about half


@pytest.mark.parametrize("seconds", [-1.0, 0.0001, float("nan")])
def test_senseless_seconds_are_refused(seconds: float, resilientdb_proxy: Proxy) -> None:
    with pytest.raises(ValueError, match="seconds="):
        faults.latency(resilientdb_proxy, seconds)


def test_promote_is_proven(resilientdb_postgres: Postgres) -> None:
    with Postgres.standby(resilientdb_postgres, name="heir") as standby:
        assert faults.promote(standby) > 0
        assert not standby.in_recovery()
        with pytest.raises(FaultNotActive, match="is no standby"):
            faults.promote(standby)


def test_a_failover_by_a_cut_of_replication(
    resilientdb_toxiproxy: ToxiproxyServer, resilientdb_postgres: Postgres
) -> None:
    """A standby may replicate through a proxy, so that it can be made to lag."""
    with (
        resilientdb_toxiproxy.proxy(resilientdb_postgres.address) as link,
        Postgres.standby(
            resilientdb_postgres, name="laggard", via=(link.listen_host, link.listen_port)
        ) as standby,
    ):
        standby.wait_caught_up(resilientdb_postgres)
        resilientdb_postgres.query("DROP TABLE IF EXISTS lagging")
        with faults.pause(link):
            resilientdb_postgres.query("CREATE TABLE lagging (i int)")
            assert standby.query("SELECT to_regclass('lagging')") == [(None,)]
        standby.wait_caught_up(resilientdb_postgres)
        assert standby.query("SELECT to_regclass('lagging')::text") == [("lagging",)]


def test_a_proxy_that_is_gone_is_an_error(resilientdb_toxiproxy: ToxiproxyServer) -> None:
    proxy = resilientdb_toxiproxy.proxy("127.0.0.1:1")
    proxy.delete()
    for block in _BLOCKS.values():
        with pytest.raises(ToxiproxyError, match="proxy not found"), block(proxy):
            pytest.fail("the block was entered")
