"""What happened, as it comes in: every response, every phase, every event of the guarded engine."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from resilientdb.cli.demo.load import BROKEN, LATE, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from resilientdb.cli.demo.services import App

__all__ = ["Event", "Figures", "Outcome", "Phase", "Record", "Sample", "figures_of", "percentile"]

Outcome = Literal["answered", "refused", "unknown", "error", "hung"]
"""answered: 2xx in time. refused: 503 with a usable Retry-After, in time. unknown: the honest 500 of a write whose
COMMIT got no reply. error: anything else that came, a broken connection included. hung: nothing came in time."""


class Sample(NamedTuple):
    """One request to one application, as the load generator reports it."""

    number: int
    app: App
    kind: str
    sent_at: float
    seconds: float
    status: int
    retry_after: str | None
    reason: str

    @property
    def outcome(self) -> Outcome:
        if self.status == LATE or self.seconds > PATIENCE:
            return "hung"
        if 200 <= self.status < 300:
            return "answered"
        if self.status == 503 and self.retry_after is not None and self.retry_after.isdecimal():
            return "refused"
        if self.reason == "commit-outcome-unknown":
            return "unknown"
        return "error"

    @property
    def error(self) -> str:
        """How it failed, in a word or two; "" for what was answered or refused."""
        if self.outcome in {"answered", "refused"}:
            return ""
        if self.outcome == "hung":
            return "no answer"
        return "connection broken" if self.status == BROKEN else f"status {self.status}"


@dataclass(slots=True)
class Phase:
    """One part of the timeline. ``kind``: calm, fault, or the recovery after one. Times are monotonic seconds."""

    name: str
    kind: Literal["calm", "fault", "recovery"]
    what: str
    rate: float
    seconds: float
    started_at: float = 0.0
    ended_at: float | None = None
    healed_at: float | None = None
    """When what was broken was whole again: the end of a fault, or the moment of the promotion."""
    proofs: list[str] = field(default_factory=list)
    """How it was made sure that the fault was in force."""


class Event(NamedTuple):
    """A transition that the guarded engine announced; ``node`` is "primary" or "standby" as at the start."""

    at: float
    name: str
    node: str
    old: str
    new: str
    cause: str


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts and latencies of some samples. A request without an answer counts as ``PATIENCE`` seconds."""

    sent: int
    answered: int
    refused: int
    unknown: int
    errors: int
    hung: int
    p50: float | None
    p99: float | None

    @property
    def answered_share(self) -> float | None:
        return self.answered / self.sent if self.sent else None

    @property
    def good_share(self) -> float | None:
        """Answered in time, or told correctly to come back later."""
        return (self.answered + self.refused) / self.sent if self.sent else None


def figures_of(samples: Iterable[Sample]) -> Figures:
    """Count some samples."""
    counts: dict[Outcome, int] = dict.fromkeys(("answered", "refused", "unknown", "error", "hung"), 0)
    latencies = []
    for sample in samples:
        counts[sample.outcome] += 1
        latencies.append(min(sample.seconds, PATIENCE))
    latencies.sort()
    return Figures(
        sent=len(latencies),
        answered=counts["answered"],
        refused=counts["refused"],
        unknown=counts["unknown"],
        errors=counts["error"],
        hung=counts["hung"],
        p50=percentile(latencies, 0.50),
        p99=percentile(latencies, 0.99),
    )


def percentile(ordered: list[float], share: float) -> float | None:
    """The value that ``share`` of an ordered list does not exceed (nearest rank); None of an empty list."""
    if not ordered:
        return None
    rank = -int(-share * len(ordered) // 1)  # the ceiling
    return ordered[max(0, rank - 1)]


_LIVE: Final = 1.0
"""Seconds that live figures look back."""


class Record:
    """Written by the threads that listen, read by the screen and the verdict. ``_lock`` guards all of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._events: list[Event] = []
        self._lag = 0.0
        self._breakers: dict[str, str] = {}
        self._state = ""
        self.phases: list[Phase] = []
        """Appended to and changed by the main thread only."""

    def add(self, samples: list[Sample], lag: float) -> None:
        with self._lock:
            self._samples += samples
            self._lag = max(self._lag, lag)

    def add_state(self, state: str, breakers: dict[str, str], events: list[Event]) -> None:
        with self._lock:
            self._state, self._breakers = state, breakers
            self._events += events

    @property
    def samples(self) -> list[Sample]:
        """A copy of all samples so far, in the order in which they ended."""
        with self._lock:
            return list(self._samples)

    @property
    def events(self) -> list[Event]:
        with self._lock:
            return list(self._events)

    @property
    def lag(self) -> float:
        """The latest that any request was sent after it was due, in seconds."""
        with self._lock:
            return self._lag

    @property
    def phase(self) -> Phase | None:
        """The present one."""
        return self.phases[-1] if self.phases else None

    def live(self, now: float) -> dict[str, Figures]:
        """Figures of what ended in the last second, by application."""
        recent: dict[str, list[Sample]] = {"plain": [], "guarded": []}
        with self._lock:
            for sample in reversed(self._samples):
                ended = sample.sent_at + sample.seconds
                if ended < now - 2 * _LIVE - PATIENCE:
                    break
                if now - _LIVE < ended <= now:
                    recent[sample.app].append(sample)
        return {app: figures_of(samples) for app, samples in recent.items()}

    def guarded_state(self) -> tuple[str, dict[str, str]]:
        """The guarded engine's state and its breakers' by node, as last seen."""
        with self._lock:
            return self._state, dict(self._breakers)

    def as_json(self, zero: float) -> dict[str, Any]:
        """All of it, times in seconds since ``zero``."""
        return {
            "samples": [
                [
                    s.number,
                    s.app,
                    s.kind,
                    round(s.sent_at - zero, 4),
                    s.seconds,
                    s.status,
                    s.outcome,
                    s.reason,
                ]
                for s in sorted(self.samples, key=lambda sample: sample.sent_at)
            ],
            "events": [{**event._asdict(), "at": round(event.at - zero, 4)} for event in self.events],
        }
