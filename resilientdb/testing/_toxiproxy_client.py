"""toxiproxy-python, one copy a server, with an HTTP layer that tells what went wrong.

toxiproxy-python does the work: its ``Toxiproxy``, ``Proxy`` and ``APIConsumer`` make every request.
But it keeps the server's address in a *class* attribute, so that a second client moves the first
one and all its proxies; it has no timeouts, honours ``HTTP_PROXY`` for loopback, and takes a 500
for success. So each server gets its own copy of the package's modules (the installed package, and
whoever else uses it, is untouched), whose ``requests`` is replaced by a session that checks.

This module is where the package's missing types end: nothing outside sees ``Any``.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from resilientdb.testing.errors import ServiceUnavailable, ToxiproxyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

__all__ = ["Client", "ProxyState", "ToxicState"]

_PACKAGE = "toxiproxy"
_TIMEOUT = (3.0, 10.0)  # seconds to connect, to read; removing a toxic may wait 5 s for blocked data
_copies = itertools.count(1)


@dataclass(frozen=True, slots=True)
class ToxicState:
    """One toxic as the server reports it."""

    name: str
    type: str
    stream: str
    toxicity: float
    attributes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ProxyState:
    """One proxy as the server reports it."""

    name: str
    listen: str
    upstream: str
    enabled: bool
    toxics: Mapping[str, ToxicState]


class _CheckedRequests:
    """Stands in for the ``requests`` module in one copy: same calls, but every failure raises.

    ``lock`` serialises the calls: a ``requests.Session`` is not promised to be safe for threads.
    """

    def __init__(self) -> None:
        import requests

        self._errors = requests.RequestException
        self._session = requests.Session()
        self._session.trust_env = False  # no HTTP_PROXY, no .netrc on the way to our own loopback
        # The server drops idle connections; one that it drops while we write to it would be a failure.
        self._session.headers["Connection"] = "close"
        self._lock = threading.Lock()

    def get(self, url: str, params: Any = None, **options: Any) -> requests.Response:
        return self._send("GET", url, params=params, **options)

    def post(self, url: str, data: Any = None, json: Any = None, **options: Any) -> requests.Response:
        return self._send("POST", url, data=data, json=json, **options)

    def delete(self, url: str, **options: Any) -> requests.Response:
        return self._send("DELETE", url, **options)

    def close(self) -> None:
        self._session.close()

    def _send(self, method: str, url: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", _TIMEOUT)
        try:
            with self._lock:
                response = self._session.request(method, url, **options)
        except self._errors as error:
            raise ToxiproxyError(f"Toxiproxy does not answer {method} {url}: {error}") from error
        if response.status_code >= 400:
            raise ToxiproxyError(
                f"Toxiproxy answered {response.status_code} to {method} {url}: {_reason(response)}"
            )
        return response


def _reason(response: requests.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()


def _load_copy() -> tuple[str, ModuleType, ModuleType]:
    """A private copy of the package; returns its name, the package and its ``api`` module."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ServiceUnavailable("Toxiproxy is driven by toxiproxy-python: pip install toxiproxy-python")
    name = f"_resilientdb_{_PACKAGE}_{next(_copies)}"
    spec = importlib.util.spec_from_file_location(
        name, found.origin, submodule_search_locations=list(found.submodule_search_locations or ())
    )
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    try:
        spec.loader.exec_module(package)
    except ImportError as error:
        _unload_copy(name)
        raise ServiceUnavailable(f"toxiproxy-python cannot be imported: {error}") from error
    return name, package, sys.modules[f"{name}.api"]


def _unload_copy(name: str) -> None:
    for module in [name, *(key for key in sys.modules if key.startswith(f"{name}."))]:
        sys.modules.pop(module, None)


class Client:
    """The requests to one server. Every failure is a :class:`ToxiproxyError`; threads may share it."""

    def __init__(self, host: str, port: int) -> None:
        self._name, package, api = _load_copy()
        self._requests = _CheckedRequests()
        vars(api)["requests"] = self._requests
        self._api: Any = api.APIConsumer
        self._toxiproxy: Any = package.Toxiproxy()
        self._toxiproxy.update_api_consumer(host, port)
        self._proxy_class: Any = package.Proxy

    def close(self) -> None:
        """Close the connections and drop the copy."""
        self._requests.close()
        _unload_copy(self._name)

    def version(self) -> str:
        """The server's version, as ``2.12.0``."""
        content = self._toxiproxy.version()  # raw bytes: JSON since 2.6, plain text before
        if content is None:
            raise ToxiproxyError("Toxiproxy does not answer")
        match = re.search(rb"\d+\.\d+[\w.+-]*|git", content)
        return match[0].decode() if match is not None else ""

    def names(self) -> list[str]:
        """The names of all proxies."""
        return sorted(self._toxiproxy.proxies())

    def create(self, name: str, *, upstream: str, listen: str, enabled: bool) -> None:
        """Make a proxy. A name that is taken, or an address in use, raises."""
        try:
            self._toxiproxy.create(upstream, name, listen=listen, enabled=enabled)
        except ToxiproxyError:
            raise
        except Exception as error:  # the copy's own exception classes; each call has another copy's
            raise ToxiproxyError(f"proxy {name!r} cannot be made: {error}") from error

    def state(self, name: str) -> ProxyState:
        """A proxy and its toxics in one consistent reading."""
        return _proxy_state(self._api.get(f"/proxies/{name}").json())

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Enable or disable a proxy."""
        proxy = self._handle(name)
        proxy.enable() if enabled else proxy.disable()

    def delete(self, name: str) -> None:
        """Delete a proxy; its connections are closed."""
        self._handle(name).destroy()

    def add_toxic(self, proxy: str, toxic: ToxicState) -> None:
        """Add a toxic to a proxy's new and existing connections."""
        self._handle(proxy).add_toxic(
            name=toxic.name,
            type=toxic.type,
            stream=toxic.stream,
            toxicity=toxic.toxicity,
            attributes=dict(toxic.attributes),
        )

    def update_toxic(self, proxy: str, name: str, *, toxicity: float, attributes: Mapping[str, int]) -> None:
        """Change a toxic in place (the package has no call for it, the server takes a POST)."""
        body = {"toxicity": toxicity, "attributes": dict(attributes)}
        self._api.post(f"/proxies/{proxy}/toxics/{name}", json=body)

    def remove_toxic(self, proxy: str, name: str) -> None:
        """Remove a toxic."""
        self._handle(proxy).destroy_toxic(name)

    def reset(self) -> None:
        """Enable every proxy and remove every toxic."""
        self._toxiproxy.reset()

    def _handle(self, name: str) -> Any:
        # The package's handles keep what they once read and grow stale; its calls only use the name.
        return self._proxy_class(name=name, upstream="", enabled=True, listen="")


def _proxy_state(values: Mapping[str, Any]) -> ProxyState:
    toxics = [
        ToxicState(
            name=str(toxic["name"]),
            type=str(toxic["type"]),
            stream=str(toxic["stream"]),
            toxicity=round(float(toxic["toxicity"]), 6),
            attributes=MappingProxyType({key: int(value) for key, value in toxic["attributes"].items()}),
        )
        for toxic in values["toxics"]
    ]
    return ProxyState(
        name=str(values["name"]),
        listen=str(values["listen"]),
        upstream=str(values["upstream"]),
        enabled=bool(values["enabled"]),
        toxics=MappingProxyType({toxic.name: toxic for toxic in toxics}),
    )
