"""The toxics of Toxiproxy 2: their attributes, units and ranges, checked before anything is sent.

The server itself takes a misspelt attribute for 0 and a toxicity of 5 for granted, so a typing
error would be a test without its fault. Units here are the server's own; the blocks in
:mod:`~resilientdb.testing.faults` take seconds.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Stream", "ToxicType", "check_attributes", "check_toxicity", "milliseconds"]

Stream = Literal["upstream", "downstream"]
ToxicType = Literal["latency", "bandwidth", "slow_close", "timeout", "reset_peer", "slicer", "limit_data"]

# Attribute -> (default or None if it must be given, least value, unit).
_ATTRIBUTES: dict[str, dict[str, tuple[int | None, int, str]]] = {
    "latency": {"latency": (None, 0, "ms"), "jitter": (0, 0, "ms")},
    "bandwidth": {"rate": (None, 0, "KB/s")},
    "slow_close": {"delay": (None, 0, "ms")},
    "timeout": {"timeout": (None, 0, "ms, 0 = for ever")},
    "reset_peer": {"timeout": (0, 0, "ms")},
    "slicer": {"average_size": (None, 1, "bytes"), "size_variation": (0, 0, "bytes"), "delay": (0, 0, "µs")},
    "limit_data": {"bytes": (None, 0, "bytes")},
}


def check_attributes(kind: str, stream: str, attributes: Mapping[str, object]) -> dict[str, int]:
    """The attributes, defaults filled in; ``ValueError`` names what is wrong and what is valid."""
    if kind not in _ATTRIBUTES:
        raise ValueError(
            f"unknown toxic type {kind!r}{_nearest(kind, _ATTRIBUTES)}; known: {', '.join(_ATTRIBUTES)}"
        )
    if stream not in get_args(Stream):
        raise ValueError(f"stream is {stream!r}, it must be 'upstream' or 'downstream'")
    known = _ATTRIBUTES[kind]
    for name in attributes:
        if name not in known:
            raise ValueError(
                f"{kind} has no attribute {name!r}{_nearest(name, known)}; known: {', '.join(known)}"
            )
    checked: dict[str, int] = {}
    for name, (default, least, unit) in known.items():
        value = attributes.get(name, default)
        if value is None:
            raise ValueError(f"{kind} needs the attribute {name!r} ({unit})")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{kind}: {name}={value!r} must be a whole number of {unit}, {least} or more")
        checked[name] = value
    # More variation than size makes the server cut a slice outside of its data, and stop.
    if kind == "slicer" and checked["size_variation"] >= checked["average_size"]:
        raise ValueError(f"slicer: size_variation={checked['size_variation']} must be below average_size")
    return checked


def check_toxicity(toxicity: float) -> float:
    """The share of connections that a toxic hits; ``ValueError`` outside of 0 < toxicity <= 1."""
    # A toxicity of 0 is a fault that never happens, so it is refused along with the senseless ones.
    share = round(float(toxicity), 6)  # the server keeps 32 bits, and it must compare equal later
    if isinstance(toxicity, bool) or not 0 < share <= 1:
        raise ValueError(f"toxicity={toxicity!r} must be above 0 and at most 1")
    return share


def milliseconds(seconds: float, what: str) -> int:
    """Seconds as Toxiproxy's whole milliseconds; ``ValueError`` for what cannot be one."""
    if isinstance(seconds, bool) or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{what}={seconds!r} must be a number of seconds, 0 or more")
    rounded = round(seconds * 1000)
    if seconds > 0 and rounded == 0:
        raise ValueError(f"{what}={seconds!r} s is below the injector's resolution of 1 ms")
    return rounded


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
