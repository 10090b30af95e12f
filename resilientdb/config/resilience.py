"""All options of one engine, and the ways to come by them.

Like ``options``, without ``from __future__ import annotations``: annotations are read at run time.
"""

import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Annotated, Self

from resilientdb.config.base import Options, below, leaves, options_of
from resilientdb.config.fields import Flag, Seconds
from resilientdb.config.options import BreakerPolicy, Lifecycle, RetryPolicy, Routing, SaturationQueue
from resilientdb.config.profiles import PROFILES, ProfileName, find_profile
from resilientdb.config.sources import ENV_PREFIX, Layer, read_env, read_table

__all__ = ["Resilience"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Resilience(Options):
    """How an engine behaves when its database does not. The defaults protect an unchanged application.

    Only the fields that are named count as set: ``Resilience(queue=SaturationQueue(max_waiting=10))`` leaves
    ``queue.timeout`` to the environment, the URL, the profile and the default, in this order.
    """

    queue: SaturationQueue = field(default_factory=SaturationQueue)
    """Waiting for a connection."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """Trying again."""

    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    """Leaving a failing node alone."""

    routing: Routing = field(default_factory=Routing)
    """Choosing a node."""

    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    """Sockets and connections."""

    deadline: Annotated[float | None, Seconds()] = None
    """Default deadline, in seconds, 0 or more, of a request at the web edge and of ``run_transaction``, where
    no ``deadline()`` is in force. None: how long an answer is worth waiting for only the application knows;
    the waits have limits of their own."""

    enabled: Annotated[bool, Flag()] = True
    """False = plain SQLAlchemy: no queue, breaker, retry or routing. ``RESILIENTDB_ENABLED=false`` is the
    operator's switch, and the one variable that code cannot overrule. True: importing the library is
    asking for it."""

    # Not a field; the profile that fills in what nobody gave.
    _profile: InitVar[ProfileName | None] = None

    def __post_init__(self, _ungiven: Mapping[str, object] | None, _profile: ProfileName | None) -> None:
        super().__post_init__(_ungiven)
        vars(self)["_profile"] = _profile
        background = find_profile(_profile).values() if _profile is not None else {}
        given, values = self.given(), self.values()
        # A table taken from elsewhere brings that profile's values along: here they count as given.
        brought = {
            key: values[key]
            for key, option in leaves(type(self))
            if key not in given and values[key] not in (option.default, background.get(key, option.default))
        }
        if background or brought:
            self._fill(given | brought, background)

    def _fill(self, given: Mapping[str, object], background: Mapping[str, object]) -> None:
        """Let the profile show through wherever nobody gave a value."""
        state = vars(self)
        ungiven: dict[str, object] = {}
        for name, option in options_of(type(self)).items():
            if isinstance(state[name], Options):
                state[name] = type(state[name]).assemble(below(given, name), below(background, name))
            elif name not in given:
                state[name] = ungiven[name] = background.get(name, option.default)
        state["_ungiven"] = ungiven

    @classmethod
    def profile(cls, name: ProfileName) -> Self:
        """The named set of options (``resilientdb.config.profiles`` says what it sets and why). Everything in
        it may still be overridden, in code by ``dataclasses.replace``."""
        return cls(_profile=find_profile(name).name)

    @classmethod
    def from_env(cls, prefix: str = ENV_PREFIX, environ: Mapping[str, str] | None = None) -> Self:
        """From variables such as ``RESILIENTDB_QUEUE_TIMEOUT=2.5``; None = ``os.environ``, read now."""
        return cls._from_layer(read_env(cls, os.environ if environ is None else environ, prefix))

    @classmethod
    def from_mapping(cls, table: Mapping[str, object]) -> Self:
        """From nested tables as TOML holds them, ``{"profile": "web", "queue": {"timeout": 2.5}}``; flat keys
        (``queue_timeout``) and values as text are understood too."""
        return cls._from_layer(read_table(cls, table))

    @classmethod
    def _from_layer(cls, layer: Layer) -> Self:
        background = PROFILES[layer.profile].values() if layer.profile else {}
        return cls.assemble(layer.values, background, _profile=layer.profile)

    def _private(self) -> dict[str, object]:
        return {"_profile": vars(self)["_profile"]}
