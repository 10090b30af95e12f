"""The checked layer over toxiproxy-python: that client's known defects cannot bite here."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import psycopg
import pytest
import toxiproxy.api as installed_client

from resilientdb.testing import FaultNotActive, Postgres, Proxy, ToxiproxyError, ToxiproxyServer, wire
from resilientdb.testing import _toxiproxy_client as client_module
from resilientdb.testing import toxiproxy as toxiproxy_module
from resilientdb.testing._toxiproxy_client import Client
from resilientdb.testing.processes import free_port
from resilientdb.testing.toxiproxy_binary import locate_toxiproxy

if TYPE_CHECKING:
    from collections.abc import Iterator


def _works(proxy: Proxy) -> bool:
    return wire.ask(proxy.listen_host, proxy.listen_port, wait=2.0).answer is wire.Answer.REPLIED


@pytest.fixture(scope="module")
def second(resilientdb_toxiproxy: ToxiproxyServer) -> Iterator[ToxiproxyServer]:
    """Another server beside the session's."""
    assert resilientdb_toxiproxy.running
    with ToxiproxyServer(seed=7) as server:
        yield server


def test_a_proxy_leads_to_its_upstream(resilientdb_proxy: Proxy, resilientdb_postgres: Postgres) -> None:
    assert resilientdb_proxy.upstream == resilientdb_postgres.address
    assert resilientdb_proxy.listen_port != resilientdb_postgres.port
    with psycopg.connect(resilientdb_postgres.url("", port=resilientdb_proxy.listen_port)) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_two_servers_side_by_side(
    resilientdb_toxiproxy: ToxiproxyServer, second: ToxiproxyServer, resilientdb_proxy: Proxy
) -> None:
    """The client's address is a class attribute: a second one would move the first and all its proxies."""
    with second.proxy(resilientdb_proxy.upstream, name=resilientdb_proxy.name) as other:
        resilientdb_proxy.disable()
        assert other.enabled
        assert not resilientdb_proxy.enabled
        resilientdb_proxy.enable()
        assert resilientdb_toxiproxy.address != second.address
    assert installed_client.APIConsumer.port == 8474  # nor is anybody else's client moved


def test_enable_with_the_port_taken_raises(resilientdb_proxy: Proxy) -> None:
    """The server answers 500; the client returns None and says enabled=True."""
    resilientdb_proxy.disable()
    with socket.create_server(("127.0.0.1", resilientdb_proxy.listen_port)):
        with pytest.raises(ToxiproxyError, match=r"answered 500 .*address already in use"):
            resilientdb_proxy.enable()
        assert not resilientdb_proxy.enabled
    resilientdb_proxy.enable()
    assert _works(resilientdb_proxy)


def test_create_on_a_taken_port_raises(second: ToxiproxyServer) -> None:
    """The client says KeyError: 'name'."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ToxiproxyError, match="address already in use"):
            second.proxy("127.0.0.1:1", listen=f"127.0.0.1:{port}")
    assert second.proxies() == []


def test_a_name_is_used_once(second: ToxiproxyServer) -> None:
    with second.proxy("127.0.0.1:1", name="once"):
        with pytest.raises(ToxiproxyError, match="already a proxy 'once'"):
            second.proxy("127.0.0.1:1", name="once")
        assert [proxy.name for proxy in second.proxies()] == ["once"]


def test_enabled_cannot_be_assigned(resilientdb_proxy: Proxy) -> None:
    """In the client it is an attribute like any other: nothing is sent, and queries go on."""
    with pytest.raises(AttributeError):
        resilientdb_proxy.enabled = False  # type: ignore[misc]
    assert _works(resilientdb_proxy)


def test_handles_never_grow_stale(second: ToxiproxyServer, resilientdb_postgres: Postgres) -> None:
    with second.proxy(resilientdb_postgres.address) as proxy:
        (other,) = second.proxies()
        other.disable()
        assert not proxy.state().enabled
        toxic = proxy.add_toxic("latency", stream="upstream", latency=1)
        assert [found.name for found in other.toxics()] == [toxic.name]
        second.reset()
        assert proxy.state().enabled
        assert proxy.toxics() == []
        assert toxic.state() is None
        assert other.address == proxy.address


def test_a_change_that_the_server_ignored_raises(
    resilientdb_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: the state is read back."""
    with monkeypatch.context() as patch:
        for name in ("set_enabled", "add_toxic", "remove_toxic", "delete"):
            patch.setattr(Client, name, lambda *_, **__: None)
        with pytest.raises(ToxiproxyError, match="was set to enabled=False, the server reports"):
            resilientdb_proxy.disable()
        with pytest.raises(FaultNotActive, match="found None"):
            resilientdb_proxy.add_toxic("timeout", stream="upstream", timeout=0)
        with pytest.raises(ToxiproxyError, match="the server still has it"):
            resilientdb_proxy.delete()
    toxic = resilientdb_proxy.add_toxic("latency", stream="upstream", latency=1)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "remove_toxic", lambda *_, **__: None)
        with pytest.raises(ToxiproxyError, match="the server still has it"):
            toxic.remove()
    toxic.remove()


def test_toxics_have_handles_and_can_be_changed(resilientdb_proxy: Proxy) -> None:
    """The client returns None for a new toxic, and cannot change one."""
    with resilientdb_proxy.toxic("latency", stream="downstream", toxicity=0.3, latency=10) as toxic:
        state = toxic.state()
        assert state is not None
        assert (state.type, state.stream, state.toxicity) == ("latency", "downstream", 0.3)
        assert dict(state.attributes) == {"latency": 10, "jitter": 0}
        toxic.update(latency=20, toxicity=1.0)
        state = toxic.state()
        assert state is not None
        assert (state.attributes["latency"], state.toxicity) == (20, 1.0)
    assert resilientdb_proxy.toxics() == []
    with pytest.raises(ToxiproxyError, match="toxic not found"):
        toxic.remove()


def test_two_toxics_of_a_kind_can_be_stacked(resilientdb_proxy: Proxy) -> None:
    with (
        resilientdb_proxy.toxic("latency", stream="downstream", latency=10),
        resilientdb_proxy.toxic("latency", stream="downstream", latency=20),
    ):
        assert len(resilientdb_proxy.toxics()) == 2


def test_a_toxic_is_removed_when_the_body_raises(resilientdb_proxy: Proxy) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        resilientdb_proxy.toxic("timeout", stream="upstream", timeout=0),
    ):
        raise ZeroDivisionError
    assert resilientdb_proxy.toxics() == []


def test_a_toxic_removed_behind_our_back_is_noticed(resilientdb_proxy: Proxy) -> None:
    with (
        pytest.raises(FaultNotActive, match="found None"),
        resilientdb_proxy.toxic("timeout", stream="upstream", timeout=0, name="mine"),
    ):
        resilientdb_proxy.toxics()[0].remove()


def test_what_the_server_would_take_for_granted_is_refused(resilientdb_toxiproxy: ToxiproxyServer) -> None:
    with resilientdb_toxiproxy.proxy("127.0.0.1:1") as proxy:
        with pytest.raises(ValueError, match="did you mean 'latency'"):
            proxy.add_toxic("latency", stream="upstream", latancy=10)
        with pytest.raises(ValueError, match="toxicity=5"):
            proxy.add_toxic("latency", stream="upstream", toxicity=5, latency=10)
        with pytest.raises(ValueError, match="toxic name"):
            proxy.add_toxic("latency", stream="upstream", name="a/b", latency=10)
        assert proxy.toxics() == []
    for nonsense in ("nonsense", "host:port", "host:99999", ":5432"):
        with pytest.raises(ValueError, match="not host:port"):
            resilientdb_toxiproxy.proxy(nonsense)


def test_the_port_is_kept_and_can_be_left_to_the_system(
    resilientdb_toxiproxy: ToxiproxyServer, resilientdb_postgres: Postgres
) -> None:
    upstream = (resilientdb_postgres.host, resilientdb_postgres.port)
    with resilientdb_toxiproxy.proxy(upstream, listen="127.0.0.1:0") as proxy:
        port = proxy.listen_port
        assert port != 0
        proxy.disable()
        proxy.enable()
        assert proxy.listen_port == port
        assert _works(proxy)
    with resilientdb_toxiproxy.proxy(upstream, enabled=False) as proxy:
        assert not _works(proxy)
        proxy.enable()
        assert _works(proxy)


def test_a_proxy_environment_is_not_for_loopback(
    resilientdb_toxiproxy: ToxiproxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with resilientdb_toxiproxy.proxy("127.0.0.1:1") as proxy:
        assert proxy.enabled


def test_a_mute_control_port_does_not_block_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_TIMEOUT", (0.1, 0.1))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = Client("127.0.0.1", mute.getsockname()[1])
        try:
            with pytest.raises(ToxiproxyError, match="does not answer GET"):
                client.state("any")
        finally:
            client.close()


def test_errors_are_readable(resilientdb_toxiproxy: ToxiproxyServer) -> None:
    """Not the representation of bytes of JSON."""
    with pytest.raises(ToxiproxyError, match=r"answered 404 to GET .*/proxies/ghost: proxy not found$"):
        resilientdb_toxiproxy.client.state("ghost")
    assert resilientdb_toxiproxy.version()[0].isdigit()


def test_threads_may_share_a_server(resilientdb_toxiproxy: ToxiproxyServer) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                with (
                    resilientdb_toxiproxy.proxy("127.0.0.1:1") as proxy,
                    proxy.toxic("latency", stream="upstream", latency=1),
                ):
                    pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the main thread must see it
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_share_of_connections_is_hit_and_nearly_the_same_in_each_run(
    resilientdb_postgres: Postgres,
) -> None:
    """Version 2.12 throws its -seed away, so without help two runs agree on half of their connections."""

    def hits() -> list[bool]:
        with (
            ToxiproxyServer(seed=42) as server,
            server.proxy(resilientdb_postgres.address) as proxy,
            proxy.toxic("limit_data", stream="downstream", toxicity=0.5, bytes=0),
        ):
            return [not _works(proxy) for _ in range(60)]

    first, second = hits(), hits()
    assert 10 < sum(first) < 50
    assert sum(one == other for one, other in zip(first, second, strict=True)) > 42


def test_a_server_that_was_not_started_says_so() -> None:
    server = ToxiproxyServer()
    with pytest.raises(ToxiproxyError, match=r"not running: start\(\) it"):
        server.proxy("127.0.0.1:1")
    server.stop()


def test_start_survives_a_control_port_that_is_taken(
    resilientdb_toxiproxy: ToxiproxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even by another Toxiproxy, which answers all questions just as ours would."""
    ports: list[int] = []

    def unlucky() -> int:
        ports.append(free_port() if ports else resilientdb_toxiproxy.port)
        return ports[-1]

    monkeypatch.setattr(toxiproxy_module, "free_port", unlucky)
    with ToxiproxyServer(binary=locate_toxiproxy()) as server:
        assert server.port == ports[1] != resilientdb_toxiproxy.port
        assert server.running
        assert server.proxies() == []
