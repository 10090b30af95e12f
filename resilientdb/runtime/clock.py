"""The one clock: monotonic seconds. Everything that decides by time takes ``now`` or a ``Clock`` instead of
asking for it, so that tests can hand it a fake one; nothing in the library reads the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock", "monotonic"]

Clock = Callable[[], float]

monotonic: Clock = time.monotonic
