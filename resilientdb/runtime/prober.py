"""Asks one node, again and again, whether it lives: the breaker's eyes while nobody else may look.

Only silence needs it (a dead server refuses at once) and only it heals a circuit without making some user's
request the guinea pig. It has a connection of its own, so a full pool does not blind it; a thread of its own, so
a blocked event loop does not either; and it asks only while the engine is used, so an idle service costs the
database nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from resilientdb.runtime.clock import Clock, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Probe", "Prober", "pause_after"]

logger = logging.getLogger("resilientdb")

_FIRST_PAUSE = 0.02
"""Seconds before a node that failed at once is asked again, doubled each time: a cut of a few milliseconds must not
become an outage of an interval's length."""
_LONGEST_SHARE = 0.6
"""Of the interval, the longest such pause. To be refused costs hardly anything; and what an interval promises, that
somebody is served so soon after the node is back, still needs a caller to come and a connection to be opened."""


class Probe(Protocol):
    """One node's examination. All calls come from the prober's thread, one at a time."""

    failed_at_once: bool
    """Whether the last examination found the node refusing or cutting connections, rather than silent or well."""

    def examine(self) -> bool:
        """Ask once, within a bounded time, and tell the node what was seen. False: nobody needs it now."""

    def run(self, errand: Callable[[Any], None]) -> None:
        """Call ``errand`` with the probe's connection, within a bounded time."""

    def close(self) -> None:
        """Give up the probe's connection; the next ``examine`` opens another."""


class Prober:
    """One daemon thread a node. ``start`` and ``stop`` may be called from any thread, any number of times."""

    def __init__(
        self, name: str, interval: float, make_probe: Callable[[], Probe], *, clock: Clock = monotonic
    ) -> None:
        self._name = name
        self._interval = interval
        self._make_probe = make_probe
        self._clock = clock
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._errands: deque[Callable[[Any], None]] = deque()

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._wake,), name=f"resilientdb-prober {self._name}", daemon=True
                )
                self._thread.start()

    def hurry(self) -> None:
        """Examine now: a caller has seen something."""
        self._wake.set()

    def send(self, errand: Callable[[Any], None]) -> bool:
        """Have ``errand`` called with the probe's connection, in its thread, as soon as that has time; False: it does
        not run. An errand that nobody comes for is forgotten."""
        if self._thread is None:
            return False
        self._errands.append(errand)
        self._wake.set()
        return True

    def stop(self, timeout: float | None = None) -> None:
        """Ask the thread to end; its connection is closed by it. Waits up to ``timeout`` seconds, if given."""
        with self._lock:
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None and timeout is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def after_fork(self) -> None:
        """In the child: the thread did not come along."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = None
        self._errands.clear()

    def _run_errands(self, probe: Probe) -> None:
        while self._errands:
            try:
                probe.run(self._errands.popleft())
            except Exception:  # noqa: BLE001 - its sender's; but the connection may have been lost with it
                probe.close()

    def _run(self, wake: threading.Event) -> None:
        me = threading.current_thread()
        probe = self._make_probe()
        refusals = 0
        try:
            while self._thread is me:
                wake.clear()
                self._run_errands(probe)
                began = self._clock()
                try:
                    if not probe.examine():
                        probe.close()
                except Exception:
                    logger.exception("probing %s failed in an unforeseen way", self._name)
                    probe.close()
                interval = self._interval
                if probe.failed_at_once:
                    interval = pause_after(refusals, interval)
                    refusals += 1
                else:
                    refusals = 0
                if self._thread is me:
                    wake.wait(max(0.0, interval - (self._clock() - began)))
        finally:
            probe.close()


def pause_after(refusals: int, interval: float) -> float:
    """Seconds from one examination to the next of a node that has failed at once so many times before this one."""
    return min(_FIRST_PAUSE * float(2 ** min(refusals, 16)), _LONGEST_SHARE * interval)
