"""The run cut into slices of time, as the charts and the tables behind them show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from resilientdb.cli.demo.record import Event, Figures, Phase, Sample, figures_of
from resilientdb.cli.demo.services import APPS, App

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["SLICE", "Band", "Segment", "Series", "lanes_of", "series_of"]

SLICE: Final = 0.5
"""Seconds of one slice; a request belongs to the slice in which it was sent."""

NODES: Final = ("primary", "standby")


class Band(NamedTuple):
    """A phase on the time axis, in seconds since the start."""

    name: str
    kind: str
    start: float
    end: float


class Segment(NamedTuple):
    """A stretch of time in which something stayed the same."""

    start: float
    end: float
    value: str


@dataclass(frozen=True, slots=True)
class Series:
    """``slices`` by application: one ``Figures`` every ``SLICE`` seconds. ``end`` is the whole length."""

    end: float
    bands: tuple[Band, ...]
    slices: Mapping[App, tuple[Figures, ...]]

    @property
    def times(self) -> list[float]:
        """The middle of each slice."""
        return [(index + 0.5) * SLICE for index in range(len(self.slices["plain"]))]


def series_of(phases: Sequence[Phase], samples: Iterable[Sample]) -> Series:
    """Cut a finished run into slices."""
    zero = phases[0].started_at
    end = (phases[-1].ended_at or phases[-1].started_at) - zero
    count = max(1, int(end / SLICE))
    cut: dict[App, list[list[Sample]]] = {app: [[] for _ in range(count)] for app in APPS}
    for sample in samples:
        index = int((sample.sent_at - zero) / SLICE)
        if 0 <= index < count:  # the last, incomplete slice would look like a collapse
            cut[sample.app][index].append(sample)
    return Series(
        end=end,
        bands=tuple(
            Band(phase.name, phase.kind, phase.started_at - zero, (phase.ended_at or zero) - zero)
            for phase in phases
        ),
        slices={app: tuple(figures_of(slice_) for slice_ in slices) for app, slices in cut.items()},
    )


def lanes_of(events: Iterable[Event], zero: float, end: float) -> dict[str, list[Segment]]:
    """What the guarded engine believed over time: each node's breaker, and where writes went."""
    state = {f"breaker of the {node}": "closed" for node in NODES} | {"writes go to": "primary"}
    since = dict.fromkeys(state, 0.0)
    lanes: dict[str, list[Segment]] = {lane: [] for lane in state}

    def move(lane: str, at: float, value: str) -> None:
        lanes[lane].append(Segment(since[lane], at, state[lane]))
        state[lane], since[lane] = value, at

    for event in sorted(events, key=lambda event: event.at):
        at = min(max(event.at - zero, 0.0), end)
        if event.name == "CircuitStateChanged" and f"breaker of the {event.node}" in state:
            move(f"breaker of the {event.node}", at, event.new)
        elif event.name == "PrimaryChanged":
            move("writes go to", at, event.new or "nowhere")
    for lane in lanes:
        move(lane, end, "")
    return {lane: [part for part in parts if part.end > part.start] for lane, parts in lanes.items()}
