"""The one clock: monotonic seconds. Everything that decides by time takes ``now`` or a ``Clock`` instead of
asking for it, so that tests can hand it a fake one. Nothing that is decided in a process asks the wall clock, only
what outlives it: the age of a transaction's key."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock", "monotonic", "wall"]

Clock = Callable[[], float]

monotonic: Clock = time.monotonic
wall: Clock = time.time
"""Seconds since 1970; may jump."""
