"""The Toxiproxy server and its proxies: what an object here says is what the server says.

::

    with ToxiproxyServer() as toxiproxy, toxiproxy.proxy(primary.address) as proxy:
        engine = create_engine(primary.url(port=proxy.listen_port))
        with proxy.toxic("latency", stream="downstream", latency=200):
            ...

Every change is read back from the server and compared; a difference raises. Nothing is cached:
a proxy's state is asked for when it is asked for. The requests are made by toxiproxy-python.
Whole faults (:mod:`~resilientdb.testing.faults`) are made of these parts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import secrets
import threading
from typing import TYPE_CHECKING, Self

from resilientdb.testing._toxiproxy_client import Client, ProxyState, ToxicState
from resilientdb.testing.errors import FaultNotActive, ServiceFailed, ToxiproxyError
from resilientdb.testing.processes import ServerProcess, free_port, run_folder
from resilientdb.testing.services import ATTEMPTS, Service
from resilientdb.testing.toxics import Stream, ToxicType, check_attributes, check_toxicity
from resilientdb.testing.toxiproxy_binary import ToxiproxyBinary, locate_toxiproxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

__all__ = ["Proxy", "ProxyState", "Toxic", "ToxicState", "ToxiproxyServer"]

_ENVIRONMENT = {"GODEBUG": "randautoseed=0", "LOG_LEVEL": "info"}


class _PortTaken(ServiceFailed):
    """Somebody else took the control port first."""


class ToxiproxyServer(Service):
    """A Toxiproxy server of our own on 127.0.0.1. Several may run side by side.

    ``binary`` is found or built (:mod:`~resilientdb.testing.toxiproxy_binary`) at the first start
    if it is not given.

    ``seed`` is handed on, but version 2.12 throws it away. So the server also runs with Go's random
    numbers starting alike in every run; a toxicity below 1 then hits *nearly* the same connections
    (those that open at the same moment still draw in any order): do not count on a single one.
    """

    def __init__(self, *, seed: int = 1, binary: ToxiproxyBinary | None = None) -> None:
        super().__init__()
        self.seed = seed
        self._binary = binary
        self._client: Client | None = None
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------------------------- life cycle

    def start(self, *, timeout: float = 15.0) -> Self:
        """Start, and return when it answers. Does nothing if it runs already."""
        if self._process is not None and self._process.running:
            return self
        self.stop()
        if self._binary is None:
            self._binary = locate_toxiproxy()
        folder = run_folder().folder("toxiproxy")
        for attempt in range(ATTEMPTS):
            self.port = free_port()
            # A proxy that only our own server can have: on a taken port a stranger would answer.
            token = f"ours_{secrets.token_hex(8)}"
            marker = {
                "name": token,
                "listen": f"{self.host}:0",
                "upstream": f"{self.host}:1",
                "enabled": False,
            }
            config = folder / "config.json"
            config.write_text(json.dumps([marker]), encoding="utf-8")
            command: list[str | Path] = [self._binary.path, "-host", self.host, "-port", str(self.port)]
            command += ["-seed", str(self.seed), "-config", config]
            log = folder / f"server-{attempt}.log"
            self._process = ServerProcess("Toxiproxy", command, log=log, env=_ENVIRONMENT)
            self._client = Client(self.host, self.port)
            try:
                self._process.wait_ready(functools.partial(self._answers, token), timeout=timeout)
                self._client.delete(token)
            except BaseException as error:
                self.stop()
                if not isinstance(error, _PortTaken) or attempt == ATTEMPTS - 1:
                    raise
            else:
                break
        return self

    def stop(self) -> None:
        """Stop the server; its proxies are gone with it. May be called twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None:
            self._process.stop(timeout=5.0)
            self._process = None

    @property
    def client(self) -> Client:
        """The checked requests; :class:`ToxiproxyError` when the server was not started."""
        if self._client is None:
            raise ToxiproxyError("Toxiproxy is not running: start() it, or use it as a context manager")
        return self._client

    def version(self) -> str:
        """The server's own version."""
        return self.client.version()

    # ---------------------------------------------------------------------------------------- proxies

    def proxy(
        self,
        upstream: str | tuple[str, int],
        *,
        name: str | None = None,
        listen: str | None = None,
        enabled: bool = True,
    ) -> Proxy:
        """Make a proxy in front of ``upstream``; as a context manager it is deleted at the end.

        It listens on 127.0.0.1 on a free port, which it keeps over disable and enable, unless
        ``listen`` (``host:port``, port 0 for the system's choice) says otherwise.
        """
        target = upstream if isinstance(upstream, str) else f"{upstream[0]}:{upstream[1]}"
        _split(target, "upstream")
        name = name or f"proxy_{next(self._numbers)}"
        _check_name(name, "proxy")
        if name in self.client.names():
            raise ToxiproxyError(f"there is already a proxy {name!r}")
        attempts = 1 if listen is not None else ATTEMPTS
        for attempt in range(attempts):
            # Not port 0: the system would choose among the ports of outgoing connections, and there a
            # client that dials a disabled proxy over and over ends up connected to itself.
            wanted = listen or f"{self.host}:{free_port()}"
            host, port = _split(wanted, "listen")
            try:
                self.client.create(name, upstream=target, listen=wanted, enabled=enabled)
            except ToxiproxyError as error:
                if attempt == attempts - 1 or "address already in use" not in str(error):
                    raise
                continue
            break
        state = self.client.state(name)
        listens = _split(state.listen, "listen")
        kept_promise = listens == (host, port) or (port == 0 and not (enabled and listens[1] == 0))
        if state.upstream != target or state.enabled != enabled or state.toxics or not kept_promise:
            self.client.delete(name)
            raise ToxiproxyError(f"proxy {name!r} was made as {state}, asked for {wanted} → {target}")
        return Proxy(self, name, listens)

    def proxies(self) -> list[Proxy]:
        """All proxies of this server."""
        states = [self.client.state(name) for name in self.client.names()]
        return [Proxy(self, state.name, _split(state.listen, "listen")) for state in states]

    def reset(self) -> None:
        """Enable every proxy and remove every toxic; closes the connections that a timeout held."""
        self.client.reset()
        for name in self.client.names():
            state = self.client.state(name)
            if not state.enabled or state.toxics:
                raise ToxiproxyError(f"after a reset the server reports {state}")

    def _answers(self, token: str) -> bool:
        assert self._process is not None
        # With its control port taken it goes on without one.
        if "address already in use" in self._process.log_tail():
            raise _PortTaken(f"port {self.port} is taken\n{self._process.log_tail()}")
        try:
            return self.client.state(token).name == token
        except ToxiproxyError:
            return False


class Proxy:
    """One proxy. ``state()``, ``enabled`` and ``toxics()`` ask the server each time."""

    def __init__(self, server: ToxiproxyServer, name: str, listen: tuple[str, int]) -> None:
        self.server = server
        self.name = name
        self.listen_host, self.listen_port = listen
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards _numbers only

    @property
    def address(self) -> str:
        """``host:port`` on which it listens."""
        return f"{self.listen_host}:{self.listen_port}"

    def state(self) -> ProxyState:
        """What the server says about it now; :class:`ToxiproxyError` if it is gone."""
        return self.server.client.state(self.name)

    @property
    def upstream(self) -> str:
        """``host:port`` to which it leads."""
        return self.state().upstream

    @property
    def enabled(self) -> bool:
        """Whether it listens. Read-only: a change is a request, so it is ``enable()`` or ``disable()``."""
        return self.state().enabled

    def enable(self) -> None:
        """Listen (again), on the same port."""
        self._set_enabled(enabled=True)

    def disable(self) -> None:
        """Close every connection and refuse new ones."""
        self._set_enabled(enabled=False)

    def _set_enabled(self, *, enabled: bool) -> None:
        self.server.client.set_enabled(self.name, enabled)
        state = self.state()
        if state.enabled != enabled:
            raise ToxiproxyError(f"{self!r} was set to enabled={enabled}, the server reports {state}")
        if enabled:
            listens = _split(state.listen, "listen")
            if self.listen_port == 0:  # it was made disabled, with the port left to the system
                self.listen_host, self.listen_port = listens
            elif listens != (self.listen_host, self.listen_port):
                raise ToxiproxyError(f"{self!r} now listens on {state.listen}")

    def toxics(self) -> list[Toxic]:
        """The toxics on it."""
        return [Toxic(self, state) for state in self.state().toxics.values()]

    def add_toxic(
        self,
        type: ToxicType,  # noqa: A002 - Toxiproxy's own word
        *,
        stream: Stream,
        toxicity: float = 1.0,
        name: str | None = None,
        **attributes: int,
    ) -> Toxic:
        """Add a toxic and prove that it is there. Attributes are Toxiproxy's, in its units (ms, KB/s, bytes).

        The proxy may be disabled meanwhile, so that no connection escapes. Raises ``ValueError`` for
        a wrong type, attribute or range, :class:`FaultNotActive` if the server has something else
        afterwards.
        """
        checked = check_attributes(type, stream, attributes)
        share = check_toxicity(toxicity)
        if name is None:
            with self._lock:
                name = f"{type}_{stream}_{next(self._numbers)}"
        _check_name(name, "toxic")
        wanted = ToxicState(name, type, stream, share, checked)
        toxic = Toxic(self, wanted)
        self.server.client.add_toxic(self.name, wanted)
        try:
            toxic.assert_present()
        except ToxiproxyError:
            with contextlib.suppress(ToxiproxyError):
                self.server.client.remove_toxic(self.name, name)
            raise
        return toxic

    @contextlib.contextmanager
    def toxic(
        self,
        type: ToxicType,  # noqa: A002 - Toxiproxy's own word
        *,
        stream: Stream,
        toxicity: float = 1.0,
        name: str | None = None,
        **attributes: int,
    ) -> Iterator[Toxic]:
        """:meth:`add_toxic` for the length of a block, proven at its start and at its end."""
        toxic = self.add_toxic(type, stream=stream, toxicity=toxicity, name=name, **attributes)
        try:
            yield toxic
            toxic.assert_active()
        finally:
            toxic.remove(missing_ok=True)

    def delete(self) -> None:
        """Delete it; its connections are closed."""
        self.server.client.delete(self.name)
        if self.name in self.server.client.names():
            raise ToxiproxyError(f"{self!r} was deleted, the server still has it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.server.running and self.name in self.server.client.names():
            self.delete()

    def __repr__(self) -> str:
        return f"<Proxy {self.name} on {self.address}>"


class Toxic:
    """One toxic on a proxy, and what it was asked to be."""

    def __init__(self, proxy: Proxy, wanted: ToxicState) -> None:
        self.proxy = proxy
        self.wanted = wanted

    @property
    def name(self) -> str:
        """Its name on the server."""
        return self.wanted.name

    def state(self) -> ToxicState | None:
        """What the server says about it now; None if it is gone."""
        return self.proxy.state().toxics.get(self.name)

    def assert_present(self) -> ProxyState:
        """Raise :class:`FaultNotActive` unless the server has just this toxic; returns its proxy's state."""
        state = self.proxy.state()
        found = state.toxics.get(self.name)
        if found != self.wanted:
            raise FaultNotActive(
                f"toxic {self.name!r} on {self.proxy!r}: asked for {self.wanted}, found {found}"
            )
        return state

    def assert_active(self) -> None:
        """Like :meth:`assert_present`, and the proxy must be enabled, or nothing passes the toxic."""
        if not self.assert_present().enabled:
            raise FaultNotActive(f"toxic {self.name!r}: {self.proxy!r} is disabled")

    def update(self, *, toxicity: float | None = None, **attributes: int) -> None:
        """Change some attributes in place, on existing connections too."""
        before = self.wanted
        checked = check_attributes(before.type, before.stream, {**before.attributes, **attributes})
        share = before.toxicity if toxicity is None else check_toxicity(toxicity)
        self.proxy.server.client.update_toxic(self.proxy.name, self.name, toxicity=share, attributes=checked)
        self.wanted = ToxicState(before.name, before.type, before.stream, share, checked)
        self.assert_present()

    def remove(self, *, missing_ok: bool = False) -> None:
        """Remove it. Raises if it is still there afterwards or, unless ``missing_ok``, was gone before."""
        if missing_ok and self.state() is None:
            return
        self.proxy.server.client.remove_toxic(self.proxy.name, self.name)
        if self.state() is not None:
            raise ToxiproxyError(
                f"toxic {self.name!r} was removed from {self.proxy!r}, the server still has it"
            )

    def __repr__(self) -> str:
        return f"<Toxic {self.name} on {self.proxy.name}>"


def _split(address: str, what: str) -> tuple[str, int]:
    """Host and port; ``ValueError`` for what the server would only find unusable later, in silence."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{what}={address!r} is not host:port")
    return host.strip("[]"), int(port)


def _check_name(name: str, what: str) -> None:
    # It becomes part of a URL's path.
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"{what} name {name!r}: letters, digits, '_', '.' and '-' only")
