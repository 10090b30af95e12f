"""The charts, as SVG text: no library, no script needed to see them, colours by the page's style sheet."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Final

from resilientdb.cli.demo.load import PATIENCE
from resilientdb.cli.demo.series import SLICE
from resilientdb.cli.demo.services import APPS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from resilientdb.cli.demo.record import Figures
    from resilientdb.cli.demo.series import Segment, Series

__all__ = ["ENDINGS", "goodput_chart", "lanes_chart", "latency_chart", "outcome_chart"]

_WIDTH: Final = 1000
_LEFT: Final = 118
_RIGHT: Final = 14
_TOP: Final = 26
_BOTTOM: Final = 26

ENDINGS: Final = (
    ("answered", "answered in time"),
    ("refused", "503 with Retry-After"),
    ("failed", "errors"),
    ("hung", "no answer in time"),
)
"""How a request ended: the CSS class, and its words."""


class _Frame:
    """One chart's coordinates and its parts so far."""

    def __init__(self, series: Series, height: int, title: str) -> None:
        self.series = series
        self.height = height
        self.bottom = height - _BOTTOM
        head = (
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}"'
            f' data-left="{_LEFT}" data-right="{_WIDTH - _RIGHT}" data-width="{_WIDTH}"'
            f' data-end="{series.end:.2f}" data-slice="{SLICE:g}">'
        )
        self.parts = [head]

    def x(self, seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, seconds / self.series.end)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def phases(self) -> None:
        """The faults as bands, named above, and the seconds below."""
        for band in self.series.bands:
            start, end = self.x(band.start), self.x(band.end)
            if band.kind == "fault":
                self.add(
                    f'<rect class="band" x="{start:.1f}" y="{_TOP - 8}" width="{end - start:.1f}"'
                    f' height="{self.bottom - _TOP + 8:.1f}"/>'
                )
            if band.kind != "recovery":
                self.add(
                    f'<text class="phase {band.kind}" x="{(start + end) / 2:.1f}" y="{_TOP - 13}">'
                    f"{escape(band.name)}</text>"
                )
        step = 10 if self.series.end > 60 else 5 if self.series.end > 25 else 2
        for second in range(0, int(self.series.end) + 1, step):
            self.add(
                f'<text class="tick x" x="{self.x(second):.1f}" y="{self.bottom + 17}">{second} s</text>'
            )

    def level(self, y: float, text: str, *, css: str = "grid") -> None:
        """A horizontal line with its value at the left."""
        self.add(f'<line class="{css}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        self.add(f'<text class="tick y" x="{_LEFT - 8}" y="{y + 4:.1f}">{escape(text)}</text>')

    def line(self, values: Sequence[float | None], y: Callable[[float], float], css: str) -> None:
        """A line through the slices; a slice without a value interrupts it."""
        path, pen_down = [], False
        for seconds, value in zip(self.series.times, values, strict=True):
            if value is None:
                pen_down = False
                continue
            path.append(f"{'L' if pen_down else 'M'}{self.x(seconds):.1f} {y(value):.1f}")
            pen_down = True
        self.add(f'<path class="line {css}" d="{"".join(path)}"/>')

    def svg(self) -> str:
        self.add(f'<line class="cursor" y1="{_TOP - 8}" y2="{self.bottom}" x1="0" x2="0"/></svg>')
        return "".join(self.parts)


def goodput_chart(series: Series) -> str:
    """Requests a second that were answered in time, by the second in which they were sent."""
    frame = _Frame(series, 300, "Requests a second answered in time")
    sent = [figures.sent / SLICE for figures in series.slices["plain"]]
    top = max([*sent, 1.0])

    def y(rate: float) -> float:  # by the square root: both the calm and the flood are to be seen
        return frame.bottom - (frame.bottom - _TOP) * math.sqrt(rate / top)

    frame.phases()
    for rate in _round_rates(top):
        frame.level(y(rate), f"{rate:g}/s")
    frame.line(list(sent), y, "sent")
    for app in APPS:
        frame.line([figures.answered / SLICE for figures in series.slices[app]], y, app)
    return frame.svg()


def latency_chart(series: Series) -> str:
    """The 99th percentile of the time to an answer of any kind, and thin, the median."""
    frame = _Frame(series, 280, "Latency of all requests, 99th percentile and median")
    least = 0.002

    def y(seconds: float) -> float:
        share = math.log(max(seconds, least) / least) / math.log(PATIENCE / least)
        return frame.bottom - (frame.bottom - _TOP) * share

    frame.phases()
    for seconds, text in ((0.002, "2 ms"), (0.01, "10 ms"), (0.1, "100 ms"), (0.5, "500 ms")):
        frame.level(y(seconds), text)
    frame.level(y(PATIENCE), "client gives up", css="limit")
    for app in APPS:
        frame.line([figures.p50 for figures in series.slices[app]], y, f"{app} thin")
        frame.line([figures.p99 for figures in series.slices[app]], y, app)
    return frame.svg()


def outcome_chart(series: Series) -> str:
    """How requests ended, as shares of those sent in each slice, one strip for each application."""
    strip, gap = 92, 14
    frame = _Frame(series, _TOP + 2 * strip + gap + _BOTTOM, "How requests ended, as a share")
    frame.phases()
    width = max(1.0, frame.x(SLICE) - frame.x(0) - 0.6)
    for position, app in enumerate(APPS):
        top = _TOP + position * (strip + gap)
        frame.add(
            f'<text class="tick y name {app}" x="{_LEFT - 8}" y="{top + strip / 2 + 4:.1f}">{app}</text>'
        )
        for index, figures in enumerate(series.slices[app]):
            if not figures.sent:
                continue
            base = float(top + strip)
            for css, count in endings(figures).items():
                height = strip * count / figures.sent
                if count:
                    frame.add(
                        f'<rect class="end {css}" x="{frame.x(index * SLICE):.1f}" y="{base - height:.1f}"'
                        f' width="{width:.1f}" height="{height:.1f}"/>'
                    )
                base -= height
    return frame.svg()


def lanes_chart(series: Series, lanes: Mapping[str, Sequence[Segment]]) -> str:
    """What stayed how for how long: one lane for each thing."""
    lane_height, gap = 24, 8
    frame = _Frame(series, _TOP + len(lanes) * (lane_height + gap) + _BOTTOM, "Circuit breakers over time")
    frame.phases()
    for position, (name, segments) in enumerate(lanes.items()):
        top = _TOP + position * (lane_height + gap)
        label = name.replace("breaker of the ", "breaker: ")
        frame.add(f'<text class="tick y" x="{_LEFT - 8}" y="{top + 16}">{escape(label)}</text>')
        for segment in segments:
            start, end = frame.x(segment.start), frame.x(segment.end)
            frame.add(
                f'<rect class="lane {escape(segment.value, quote=True)}" x="{start:.1f}" y="{top}" rx="3"'
                f' width="{max(end - start, 1.5):.1f}" height="{lane_height}">'
                f"<title>{escape(segment.value)}, {segment.start:.2f} s to {segment.end:.2f} s</title></rect>"
            )
            if end - start > 9 * len(segment.value) + 8:
                frame.add(
                    f'<text class="lane-text" x="{start + 7:.1f}" y="{top + 16}">{escape(segment.value)}</text>'
                )
    return frame.svg()


def endings(figures: Figures) -> dict[str, int]:
    """Counts by the CSS class of ``ENDINGS``."""
    failed = figures.errors + figures.unknown
    return {"answered": figures.answered, "refused": figures.refused, "failed": failed, "hung": figures.hung}


def _round_rates(top: float) -> list[float]:
    """Values for the axis up to ``top``: 0, 10, 50 and so on, far enough apart to be read."""
    candidates = [0.0] + [digit * 10.0**power for power in range(5) for digit in (1, 2, 5)]
    chosen: list[float] = []
    for rate in candidates:
        if rate <= top and (not chosen or math.sqrt(rate / top) - math.sqrt(chosen[-1] / top) > 0.13):
            chosen.append(rate)
    return chosen
