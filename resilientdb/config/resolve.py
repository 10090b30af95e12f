"""Merges what code, environment, URL and profile say, field by field, and remembers who said it.

Precedence: call > environment > URL > profile > default. One exception, on purpose:
``RESILIENTDB_ENABLED=false`` also beats the call, because an operator's emergency switch that a constant in
the code disarms is none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from resilientdb.config.base import leaves
from resilientdb.config.profiles import PROFILES, find_profile
from resilientdb.config.resilience import Resilience
from resilientdb.config.sources import ENV_PREFIX, read_env, read_url
from resilientdb.config.wording import as_text, wrong_value
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from resilientdb.config.profiles import ProfileName

__all__ = ["Explanation", "Resolved", "resolve"]

DEFAULT = "default"


class Explanation(NamedTuple):
    """One line of ``config explain``; ``value`` is text as the environment would spell it."""

    key: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The options in force."""

    resilience: Resilience
    sources: Mapping[str, str]
    """By dotted key: ``call``, ``env RESILIENTDB_…``, ``url resilientdb_…``, ``profile web`` or ``default``;
    also for ``profile`` itself."""
    profile: ProfileName | None

    def explain(self) -> tuple[Explanation, ...]:
        """Every option, its value and where that came from; objects by name, so nothing secret."""
        rows = {"profile": self.profile, **self.resilience.values()}
        return tuple(Explanation(key, as_text(value), self.sources[key]) for key, value in rows.items())


def resolve(
    *,
    call: Resilience | None = None,
    environ: Mapping[str, str] | None = None,
    url_options: Mapping[str, str | Sequence[str]] | None = None,
    profile: ProfileName | None = None,
    prefix: str = ENV_PREFIX,
) -> Resolved:
    """The options of one engine.

    ``call`` is the ``resilience=`` argument; ``profile`` names a profile on behalf of the call and beats one
    that ``call`` was made from. ``environ`` None = ``os.environ``. ``url_options`` come without their
    ``resilientdb_``. Raises ``ConfigurationError`` for anything unknown, out of range or contradictory, even
    where a higher source would hide it.
    """
    env = read_env(Resilience, os.environ if environ is None else environ, prefix)
    url = read_url(Resilience, url_options or {})
    if call is not None and not isinstance(call, Resilience):
        raise wrong_value("resilience", call, "a Resilience(...)")
    spoken = call.given() if call is not None else {}
    named_by_call: ProfileName | None = None
    if profile is not None:
        named_by_call = find_profile(profile).name
    elif call is not None:
        named_by_call = vars(call)["_profile"]
    chosen = named_by_call or env.profile or url.profile

    values: dict[str, object] = {}
    sources: dict[str, str] = dict.fromkeys(["profile", *(key for key, _ in leaves(Resilience))], DEFAULT)
    background = PROFILES[chosen].values() if chosen else {}
    sources |= dict.fromkeys(background, f"profile {chosen}")
    for layer in (url, env):
        values |= layer.values
        sources |= layer.names
    values |= spoken
    sources |= dict.fromkeys(spoken, "call")
    if named_by_call:
        sources["profile"] = "call"
    if env.values.get("enabled") is False:
        values["enabled"], sources["enabled"] = False, env.names["enabled"]

    try:
        merged = Resilience.assemble(values, background, _profile=chosen)
    except ConfigurationError as error:
        # Each value was checked on its own, so two of them contradict each other: say where they came from.
        raise _attributed(error, sources) from None
    return Resolved(resilience=merged, sources=MappingProxyType(sources), profile=chosen)


def _attributed(error: ConfigurationError, sources: Mapping[str, str]) -> ConfigurationError:
    table = (error.key or "").rpartition(".")[0]
    involved = [
        f"{key} from {source}"
        for key, source in sources.items()
        if key.startswith(f"{table}.") and source != DEFAULT
    ]
    return ConfigurationError(f"{error} ({'; '.join(involved)})", key=error.key, value=error.value)
