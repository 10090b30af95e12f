"""One breaker for several engines of a process: found by the name that they share, and the node's."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING

from resilientdb.errors import ConfigurationError
from resilientdb.runtime.breaker import CircuitBreaker

if TYPE_CHECKING:
    from resilientdb.config import BreakerPolicy

__all__ = ["shared_breaker"]

_breakers: weakref.WeakValueDictionary[tuple[str, str], CircuitBreaker] = weakref.WeakValueDictionary()
_lock = threading.RLock()
"""Guards ``_breakers``; re-entrant, since a collection in the middle of it may end an engine."""


def shared_breaker(shared: str, policy: BreakerPolicy, *, name: str, probed: bool) -> CircuitBreaker:
    """The breaker of that name for the node ``name``, made with ``policy`` if it is new. Lives as long as an engine
    that uses it.

    Raises ``ConfigurationError`` when another engine has made it by other rules: there is one circuit, and it goes
    by one set of them.
    """
    known = _known_or_new(shared, policy, name, probed)
    if _differences(known.policy, policy):
        # The other engine may be one that was dropped, and only not collected yet.
        del known
        gc.collect()
        known = _known_or_new(shared, policy, name, probed)
    if differences := _differences(known.policy, policy):
        raise ConfigurationError(
            f"engines that share the circuit breakers {shared!r} (breaker.shared) have one circuit for {name}, and "
            f"must agree about it: {'; '.join(differences)}",
            key="breaker.shared",
            value=shared,
        )
    return known


def _known_or_new(shared: str, policy: BreakerPolicy, name: str, probed: bool) -> CircuitBreaker:
    with _lock:
        known = _breakers.get((shared, name))
        if known is None:
            known = _breakers[shared, name] = CircuitBreaker(policy, name=name, probed=probed)
    return known


def _differences(ours: BreakerPolicy, theirs: BreakerPolicy) -> list[str]:
    values, others = ours.values(), theirs.values()
    return [
        f"breaker.{option} is {_in_words(values[option])} in one and {_in_words(others[option])} in the other"
        for option in values
        if values[option] != others[option]
    ]


def _in_words(value: object) -> str:
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return "something else"  # the repr of an object may hold anything


def _after_fork() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()  # it may be held by a thread that does not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
