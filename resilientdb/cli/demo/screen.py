"""The terminal: a live table where there is one, a line a second where there is not, and the final tables."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resilientdb.cli.demo import wording
from resilientdb.cli.demo.services import APPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from resilientdb.cli.demo.record import Figures, Phase, Record
    from resilientdb.cli.demo.verdict import PhaseResult, Verdict

__all__ = ["Screen"]

_STYLES: Final[dict[str, str]] = {"plain": "bold dark_orange3", "guarded": "bold dodger_blue1"}
_BARS: Final = " ▁▂▃▄▅▆▇█"
_HISTORY: Final = 44
_EVERY: Final = 0.5
_WIDE: Final = 124
_BREAKER_STYLES: Final = {"closed": "green", "open": "red", "half-open": "yellow"}


class Screen:
    """What the user sees. As a context manager it takes the terminal and gives it back."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.is_live = self.console.is_terminal
        if not self.is_live:
            self.console.width = max(self.console.width, _WIDE)  # a log file has no edge
        self._live: Live | None = None
        self._record: Record | None = None
        self._phases: Sequence[Phase] = ()
        self._zero = 0.0
        self._told = 0.0
        self._history: dict[str, deque[float]] = {app: deque(maxlen=_HISTORY) for app in APPS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(Text(f"· {text}", style="dim"))

    def begin(self, record: Record, phases: Sequence[Phase]) -> None:
        """The phases start now."""
        self._record, self._phases, self._zero = record, phases, time.monotonic()
        if self.is_live:
            self._live = Live(
                get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()

    def tick(self) -> None:
        """Called ten times a second; does something twice, or once where there is no terminal."""
        now = time.monotonic()
        if self._record is None or now - self._told < (_EVERY if self.is_live else 1.0):
            return
        self._told = now
        figures = self._record.live(now)
        for app, history in self._history.items():
            history.append(figures[app].answered_share or 0.0)
        if not self.is_live and self._record.phase is not None:
            state, breakers = self._record.guarded_state()
            opened = ", ".join(f"{node} {breaker}" for node, breaker in breakers.items())
            self.console.print(
                f"{now - self._zero:5.1f} s  {self._record.phase.name:<15}"
                + "  ".join(f"{app}: {_line(figures[app])}" for app in APPS)
                + f"  [{state or 'starting'}: {opened}]",
                markup=False,
                soft_wrap=True,
            )

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def conclude(self, verdict: Verdict) -> None:
        """The side-by-side table, the writes and the goals."""
        self.console.print()
        wide = self.console.width >= _WIDE
        self.console.print(_wide_table(verdict) if wide else _narrow_table(verdict))
        self.console.print(Text(_NOTE, style="dim"), soft_wrap=True)
        self.console.print(Text("\nAltogether", style="bold"))
        for app in APPS:
            total = verdict.totals[app]
            figures = (
                f"{wording.share(total.answered_share)} of {total.sent} answered in time, "
                f"{wording.share(total.good_share)} answered or told when to retry"
            )
            self.console.print(Text.assemble("  ", (f"{app:<9}", _STYLES[app]), figures), soft_wrap=True)
        self.console.print(Text("\nWrites", style="bold"))
        for app in APPS:
            ledger = wording.writes(verdict.ledgers[app])
            self.console.print(Text.assemble("  ", (f"{app:<9}", _STYLES[app]), ledger), soft_wrap=True)
        self.console.print(Text("\nWhat the guarded application had to show", style="bold"))
        for goal in verdict.goals:
            mark = ("✓", "bold green") if goal.met else ("✗", "bold red")
            words = Text.assemble("  ", mark, f" {goal.what}: ", (goal.figure, "bold"))
            self.console.print(words, soft_wrap=True)

    def say_reports(self, page: Path, data: Path) -> None:
        """Where the report is."""
        self.console.print(f"\nReport: {page}   data: {data}", markup=False, soft_wrap=True)

    def say_kept(self, addresses: Mapping[str, str]) -> None:
        """What goes on running, and where; all of it until Ctrl-C."""
        self.console.print(Text("\nEverything goes on running until Ctrl-C:", style="bold"))
        for name, address in addresses.items():
            self.console.print(f"  {name:<34} {address}", markup=False, soft_wrap=True)

    # -- the live view -------------------------------------------------------------------------------------

    def _render(self) -> RenderableType:
        record = self._record
        phase = record.phase if record is not None else None
        if record is None or phase is None:
            return Text("starting …")
        now = time.monotonic()
        whole = sum(one.seconds for one in self._phases)
        strip = Text()
        for one in self._phases:
            if one.kind == "recovery":
                continue
            present = phase.name in {one.name, f"after {one.name}"}
            strip.append(f" {one.name} ", style="reverse bold" if present else "dim")
            strip.append(" ")
        alarm = "bold red" if phase.kind == "fault" else "bold green"
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{now - self._zero:4.0f} s", style="bold"),
            ProgressBar(total=whole, completed=now - self._zero, width=24),
            Text.assemble((phase.name, alarm), f"  {phase.what}"),
        )
        state, breakers = record.guarded_state()
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", "answered in time, of those that ended", "now", "p50", "p99", "503s", "failed"):
            table.add_column(heading, justify="left" if heading[:1] in {"", "a"} else "right", no_wrap=True)
        figures = record.live(now)
        for app in APPS:
            bars = "".join(_BARS[round(value * (len(_BARS) - 1))] for value in self._history[app])
            table.add_row(
                Text(app, style=_STYLES[app]),
                Text(f"{bars:<{_HISTORY}}", style=_STYLES[app]),
                *_cells(figures[app]),
            )
        circuits = Text("guarded engine: ", style="dim").append(state or "?", style="bold")
        for node, breaker in breakers.items():
            circuits.append(f"   breaker of the {node}: ", style="dim")
            circuits.append(breaker, style=_BREAKER_STYLES.get(breaker, "bold"))
        return Padding(Group(strip, Text(), head, Text(), table, Text(), circuits), (1, 1))


def _cells(figures: Figures) -> list[Text]:
    failed = figures.errors + figures.hung + figures.unknown
    return [
        Text(f"{figures.answered}/{figures.sent}", style="bold"),
        Text(wording.latency(figures.p50)),
        Text(wording.latency(figures.p99)),
        Text(str(figures.refused), style="yellow" if figures.refused else "dim"),
        Text(str(failed), style="bold red" if failed else "dim"),
    ]


def _line(figures: Figures) -> str:
    failed = figures.errors + figures.hung + figures.unknown
    return (
        f"{figures.answered:3}/{figures.sent:<3} answered, p99 {wording.latency(figures.p99):>6},"
        f" {figures.refused:3} refused, {failed:3} failed"
    )


# ----------------------------------------------------------------------------------------- the final tables


def _failed(figures: Figures) -> int:
    return figures.errors + figures.unknown


_NOTE: Final = (
    "503 and retry: refused in time, with a Retry-After. errors: whatever else came. back to normal: counted from "
    "the end of the fault."
)
_HEADINGS: Final = (
    ("answered", "in time"),
    ("", "p99"),
    ("503 and", "retry"),
    ("", "errors"),
    ("no", "answer"),
    ("back to", "normal"),
)


def _wide_table(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True, min_width=16)
    for over, under in _HEADINGS:
        for app in APPS:
            words = f"{over}\n{under}\n" if app == "plain" else "\n\n"
            table.add_column(
                Text.assemble(words, (app, _STYLES[app])), justify="right", no_wrap=True, min_width=8
            )
    for phase, results in verdict.phases:
        pairs = zip(*(_row(phase, results[app], verdict) for app in APPS), strict=True)
        style = "dim" if phase.kind == "recovery" else ""
        table.add_row(_name(phase), *(cell for pair in pairs for cell in pair), style=style)
    return table


def _narrow_table(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("", ""):
        table.add_column(heading, no_wrap=True)
    for over, under in _HEADINGS:
        table.add_column(f"{over}\n{under}", justify="right", no_wrap=True)
    for phase, results in verdict.phases:
        for app in APPS:
            name = _name(phase) if app == "plain" else Text()
            table.add_row(name, Text(app, style=_STYLES[app]), *_row(phase, results[app], verdict))
    return table


def _name(phase: Phase) -> Text:
    return Text(f"  {phase.name}") if phase.kind == "recovery" else Text(phase.name, style="bold")


def _row(phase: Phase, result: PhaseResult, verdict: Verdict) -> list[Text]:
    figures = result.all
    answered = figures.answered_share or 0.0
    style = "green" if answered >= 0.95 else "red" if answered < 0.5 else "yellow"
    return [
        Text(wording.share(figures.answered_share), style=style),
        Text(wording.latency(figures.p99)),
        _count(figures.refused, "yellow"),
        _count(_failed(figures), "red"),
        _count(figures.hung, "red"),
        Text(wording.back(result.recovery, last=_is_last_fault(phase, verdict))),
    ]


def _count(number: int, style: str) -> Text:
    return Text(str(number) if number else "·", style=style if number else "dim")


def _is_last_fault(phase: Phase, verdict: Verdict) -> bool:
    faults: list[Any] = [one for one, _ in verdict.phases if one.kind == "fault"]
    return bool(faults) and faults[-1] is phase
