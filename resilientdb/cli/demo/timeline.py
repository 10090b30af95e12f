"""The phases of the demo, and the fault of each.

calm → slow → hang → cut → overload → promote → calm, with a pause after each fault to see who recovers, and when.

* **slow**: the primary's answers take 0.15 s longer. Its proxies delay what comes back from it.
* **hang**: the primary falls silent. Connections stay open, nothing comes back, new ones get no answer.
* **cut**: primary and standby refuse every connection, and those that were open are closed.
* **overload**: ten times as many requests arrive.
* **promote**: the primary crashes for good; after a while the standby is made the primary, as a cluster manager
  would. The plain application keeps the address it was given, as a real deployment would until somebody changes
  it.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from resilientdb.cli.demo.record import Phase
from resilientdb.testing import FaultNotActive, faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from resilientdb.cli.demo.feeds import LoadFeed
    from resilientdb.cli.demo.record import Record
    from resilientdb.cli.demo.services import Services
    from resilientdb.testing import Proxy

__all__ = ["DEFAULT_SECONDS", "LEAST_SECONDS", "MOST_SECONDS", "QUICK_SECONDS", "RATE", "Timeline", "plan"]

RATE: Final = 30.0
"""Requests a second to each application."""

OVERLOAD: Final = 10
SLOWNESS: Final = 0.15
DEFAULT_SECONDS: Final = 50.0
QUICK_SECONDS: Final = 18.0
LEAST_SECONDS: Final = 15.0
MOST_SECONDS: Final = 300.0

_LEAST_PHASE: Final = 1.2
"""Seconds below which a phase would show nothing: a breaker takes one to notice silence."""

_NOTICED: Final = 0.3
"""Share of the promote phase that passes before somebody promotes the standby."""


class _Part(NamedTuple):
    name: str
    what: str
    weight: float
    recovery: float


_PLAN: Final = (
    _Part("calm", "nothing is wrong", 5, 0),
    _Part("slow", f"the primary answers {SLOWNESS:g} s late", 5, 3),
    _Part("hang", "the primary falls silent", 6, 3),
    _Part("cut", "primary and standby refuse connections", 4, 3),
    _Part("overload", f"{OVERLOAD} times as many requests", 6, 4),
    _Part("promote", "the primary crashes, the standby is promoted", 8, 0),
    _Part("calm again", "nothing is wrong any more", 4, 0),
)


def plan(seconds: float) -> list[Phase]:
    """The phases, their lengths in proportion, ``seconds`` in all (a little more where a phase would be too
    short to show anything)."""
    whole = sum(part.weight + part.recovery for part in _PLAN)
    phases = []
    for part in _PLAN:
        fault = not part.name.startswith("calm")
        rate = RATE * OVERLOAD if part.name == "overload" else RATE
        length = max(_LEAST_PHASE, seconds * part.weight / whole)
        phases.append(Phase(part.name, "fault" if fault else "calm", part.what, rate, length))
        if part.recovery:
            length = max(_LEAST_PHASE, seconds * part.recovery / whole)
            phases.append(Phase(f"after {part.name}", "recovery", "the fault is over", RATE, length))
    return phases


class Timeline:
    """Runs the phases, one after the other, in the calling thread. ``tick`` is called about ten times a second."""

    def __init__(self, services: Services, load: LoadFeed, record: Record, tick: Callable[[], None]) -> None:
        self._services = services
        self._load = load
        self._record = record
        self._tick = tick

    def run(self, phases: list[Phase]) -> None:
        """Run them all. Raises ``FaultNotActive`` if a fault was not in force, for then all figures are void."""
        faults_of = {
            "slow": self._slow,
            "hang": self._hang,
            "cut": self._cut,
            "promote": self._promote,
        }
        for phase in phases:
            self._load.set_rate(phase.rate)
            phase.started_at = time.monotonic()
            self._record.phases.append(phase)
            faults_of.get(phase.name, self._nothing)(phase)
            phase.ended_at = time.monotonic()
            if phase.kind == "fault" and phase.healed_at is None:
                phase.healed_at = phase.ended_at
            if phase.name == "overload":
                self._prove_overload(phase)

    # -- the faults ----------------------------------------------------------------------------------------

    def _nothing(self, phase: Phase) -> None:
        self._wait(phase.started_at + phase.seconds)

    def _slow(self, phase: Phase) -> None:
        self._break(phase, self._primaries(), lambda proxy: faults.latency(proxy, SLOWNESS, SLOWNESS / 10))

    def _hang(self, phase: Phase) -> None:
        self._break(phase, self._primaries(), faults.hang)

    def _cut(self, phase: Phase) -> None:
        standby = list(self._services.standby_proxies.values())
        self._break(phase, [*self._primaries(), *standby], faults.down)

    def _promote(self, phase: Phase) -> None:
        services = self._services
        services.primary.crash()
        phase.proofs.append("the primary's server process has ended")
        self._wait(phase.started_at + phase.seconds * _NOTICED)
        if services.primary.running:
            raise FaultNotActive("promote: the old primary runs")
        seconds = faults.promote(services.standby)
        phase.healed_at = time.monotonic()
        phase.proofs.append(
            f"the standby was in recovery, was promoted in {seconds:.2f} s, "
            f"{phase.healed_at - phase.started_at:.1f} s after the crash, and says so"
        )
        self._wait(phase.started_at + phase.seconds)

    # -- inside --------------------------------------------------------------------------------------------

    def _primaries(self) -> list[Proxy]:
        return list(self._services.primary_proxies.values())

    def _break(
        self,
        phase: Phase,
        proxies: list[Proxy],
        fault: Callable[[Proxy], AbstractContextManager[faults.ActiveFault]],
    ) -> None:
        """The same fault on several proxies, checked while it lasts."""
        checks = 0
        with contextlib.ExitStack() as stack:
            active = [stack.enter_context(fault(proxy)) for proxy in proxies]
            for _ in self._seconds(time.monotonic() + phase.seconds):
                for one in active:
                    one.check()
                checks += 1
        names = ", ".join(proxy.name for proxy in proxies)
        phase.proofs.append(
            f"{active[0].name} read back from Toxiproxy for {names} at the start, {checks} times while it lasted "
            "and at the end; a probe of our own through each met it too"
        )

    def _prove_overload(self, phase: Phase) -> None:
        assert phase.ended_at is not None
        span = phase.ended_at - phase.started_at
        sent = sum(
            sample.app == "plain" and phase.started_at <= sample.sent_at < phase.ended_at - 1.0
            for sample in self._record.samples
        )
        rate = sent / max(span - 1.0, 0.1)
        if rate < 0.8 * phase.rate:
            raise FaultNotActive(f"overload: only {rate:.0f} of {phase.rate:.0f} requests a second were sent")
        phase.proofs.append(f"{rate:.0f} requests a second were sent to each application")

    def _seconds(self, end: float) -> Iterator[None]:
        """Wait until ``end``, and yield about once a second."""
        while time.monotonic() < end:
            self._wait(min(end, time.monotonic() + 1.0))
            yield

    def _wait(self, end: float) -> None:
        while (left := end - time.monotonic()) > 0:
            self._load.check()
            self._tick()
            time.sleep(min(left, 0.1))
