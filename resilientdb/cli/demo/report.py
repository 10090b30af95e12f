"""The report: one HTML page that needs nothing else, and the data beside it as JSON."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from resilientdb.cli.demo import charts, wording
from resilientdb.cli.demo.app import DEADLINE, POOL_SIZE, SLOW_QUERY
from resilientdb.cli.demo.load import KINDS, PATIENCE, WEIGHTS
from resilientdb.cli.demo.series import SLICE, Series, lanes_of, series_of
from resilientdb.cli.demo.services import APPS, App

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from resilientdb.cli.demo.record import Phase, Record
    from resilientdb.cli.demo.verdict import PhaseResult, Verdict

__all__ = ["Report", "write_report"]

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_NAMES: Final[Mapping[App, str]] = {"plain": "plain SQLAlchemy", "guarded": "with resilientdb"}


@dataclass(frozen=True, slots=True)
class Report:
    """All that goes into it. ``versions``: what ran, and of which version."""

    verdict: Verdict
    record: Record
    seed: int
    versions: Mapping[str, str]

    @property
    def zero(self) -> float:
        return self.record.phases[0].started_at

    def as_json(self) -> dict[str, Any]:
        """The figures and every single request, times in seconds since the start."""
        return {
            "seed": self.seed,
            "versions": dict(self.versions),
            "client_deadline": PATIENCE,
            "generator_lag": self.record.lag,
            **self.verdict.as_json(self.zero),
            "sample_fields": ["number", "app", "kind", "sent_at", "seconds", "status", "outcome", "reason"],
            **self.record.as_json(self.zero),
        }


def write_report(report: Report, page: Path) -> Path:
    """Write the page and, beside it, its data; returns the data's path."""
    data = page.with_suffix(".json")
    data.write_text(json.dumps(report.as_json(), separators=(",", ":")), encoding="utf-8")
    page.write_text(_page(report, data.name), encoding="utf-8")
    return data


def _page(report: Report, data_name: str) -> str:
    verdict = report.verdict
    series = series_of(report.record.phases, report.record.samples)
    lanes = lanes_of(report.record.events, report.zero, series.end)
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    outcome = "goals met" if verdict.passed else "goals missed"
    body = [
        _header(verdict, outcome),
        _tiles(verdict),
        _section("Phase by phase", _phase_table(verdict), _PHASE_NOTE),
        _chart(
            "Answered in time",
            "Requests a second, by the moment they were sent. The vertical scale is a square root, so that both the "
            "calm and the flood can be read. The dotted line is what was sent.",
            charts.goodput_chart(series),
            _slice_table(series, "answered", "Answered in time, of those sent"),
            _legend(("plain", _NAMES["plain"]), ("guarded", _NAMES["guarded"]), ("sent", "sent to each")),
        ),
        _chart(
            "How requests ended",
            f"Shares of the requests sent in each {SLICE:g} s. A refusal that says when to come back is an answer "
            "that a client, a proxy or a queue can use; an error is not, and silence is worst.",
            charts.outcome_chart(series),
            _slice_table(series, "endings", "Answered / refused / errors / no answer"),
            _legend(*charts.ENDINGS, box=True),
        ),
        _chart(
            "Time to an answer",
            "The 99th percentile (thick) and the median (thin) of all requests, refusals included. A request "
            f"without an answer counts as {PATIENCE:g} s, when its client gives up. Logarithmic.",
            charts.latency_chart(series),
            _slice_table(series, "latency", "Median, 99th percentile"),
            _legend(("plain", _NAMES["plain"]), ("guarded", _NAMES["guarded"])),
        ),
        _chart(
            "What the guarded engine knew",
            "The circuit breaker of each node, and where writes went. Primary and standby are named as at the start.",
            charts.lanes_chart(series, lanes),
            _table(
                ("", "from", "to", ""),
                [
                    (lane, f"{part.start:.2f} s", f"{part.end:.2f} s", part.value)
                    for lane, parts in lanes.items()
                    for part in parts
                ],
            ),
            _legend(("closed", "closed"), ("open", "open"), ("half-open", "half open"), box=True),
        ),
        _section("Every write, accounted for", _write_table(verdict), _WRITE_NOTE),
        _section("What the guarded application had to show", _goal_table(verdict)),
        _section("How requests failed, and why they were refused", _failure_tables(verdict)),
        _section("Were the faults real?", _proofs(verdict)),
        _section("What the guarded engine said", _event_table(report)),
        _section("What was run", _setup(report)),
        _footer(data_name),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>resilientdb demo: {outcome}</title><style>{style}</style></head><body><main>"
        + "\n".join(body)
        + '</main><div id="tip" hidden></div>'
        + f'<script type="application/json" id="data">{_hover_data(series)}</script>'
        + f"<script>{script}</script></body></html>\n"
    )


_PHASE_NOTE: Final = (
    "“Answered in time” is a 2xx within the client's deadline. “Back to normal” is the time from the end of the "
    "fault (for promote, from the moment there was a primary again) until half a second in which at least 95 % "
    "were answered in time; “> 3.0 s” means not before the next fault began. “Errors” is whatever else came: a 500, "
    "a broken connection, and the honest answer that nobody knows whether a write was stored."
)
_WRITE_NOTE: Final = (
    "After the run, the table of the surviving database was compared with what each client was told. There is no "
    "unique constraint that would hide a write applied twice. Replication was synchronous, so that a write that was "
    "acknowledged must survive the crash of the primary. For a write whose client got an error or nothing, either "
    "outcome is allowed, but a refusal (503 with Retry-After) promises that nothing was done."
)


# ---------------------------------------------------------------------------------------------------- parts


def _header(verdict: Verdict, outcome: str) -> str:
    return (
        f'<header><p class="badge {"good" if verdict.passed else "bad"}">{outcome}</p>'
        "<h1>One application, twice, over a database that breaks</h1>"
        f"<p>The same {verdict.totals['plain'].sent} requests went to two copies of a web application: one over "
        '<b class="plain">plain SQLAlchemy</b>, one <b class="guarded">with resilientdb</b>. Meanwhile their '
        "PostgreSQL was slowed, silenced, cut off, overrun and failed over. This is what their clients saw."
        "</p></header>"
    )


def _footer(data_name: str) -> str:
    now = dt.datetime.now(dt.UTC)
    return (
        f'<footer><p>Every figure and every request: <a href="{escape(data_name)}">{escape(data_name)}</a>. '
        f"Made {now:%Y-%m-%d %H:%M} UTC by resilientdb demo.</p></footer>"
    )


def _section(title: str, content: str, note: str = "") -> str:
    paragraph = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{content}{paragraph}</section>"


def _chart(title: str, text: str, svg: str, table: str, legend: str) -> str:
    return (
        f'<section class="figure"><h2>{escape(title)}</h2><p>{escape(text)}</p>{legend}'
        f'<div class="scroll">{svg}</div>'
        f"<details><summary>As a table</summary>{table}</details></section>"
    )


def _legend(*entries: tuple[str, str], box: bool = False) -> str:
    kind = "box" if box else "stroke"
    items = "".join(f'<li><i class="{kind} {css}"></i>{escape(words)}</li>' for css, words in entries)
    return f'<ul class="legend">{items}</ul>'


def _tiles(verdict: Verdict) -> str:
    def failed(app: App) -> int:
        total = verdict.totals[app]
        return total.errors + total.hung + total.unknown

    rows = (
        ("answered in time", {app: wording.share(verdict.totals[app].answered_share) for app in APPS}),
        (
            "answered in time or told when to retry",
            {app: wording.share(verdict.totals[app].good_share) for app in APPS},
        ),
        ("errors and requests without an answer", {app: str(failed(app)) for app in APPS}),
    )
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><p>{escape(what)}</p>'
            + "".join(
                f'<p class="{app}"><b>{escape(values[app])}</b> {escape(_NAMES[app])}</p>'
                for app in reversed(APPS)
            )
            + "</div>"
            for what, values in rows
        )
        + "</div>"
    )


def _phase_table(verdict: Verdict) -> str:
    columns = (
        "answered in time",
        "p99",
        "503 with Retry-After",
        "errors",
        "no answer in time",
        "back to normal",
    )
    head = "".join(f'<th colspan="2" scope="colgroup">{escape(column)}</th>' for column in columns)
    pair = "".join(f'<th class="{app}" scope="col">{app}</th>' for app in APPS)
    faults = [phase for phase, _ in verdict.phases if phase.kind == "fault"]
    rows = []
    for phase, results in verdict.phases:
        last = phase is faults[-1]
        cells = zip(*(_phase_cells(results[app], last=last) for app in APPS), strict=True)
        text = "".join(cell for pair_of_cells in cells for cell in pair_of_cells)
        rows.append(
            f'<tr class="{phase.kind}"><th scope="row">{escape(phase.name)}<small>{escape(_what(phase))}</small></th>'
            f"{text}</tr>"
        )
    return (
        f'<div class="scroll"><table class="phases"><thead><tr><th rowspan="2" scope="col">phase</th>{head}</tr>'
        f"<tr>{pair * len(columns)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _what(phase: Phase) -> str:
    return "" if phase.kind == "recovery" else phase.what


def _phase_cells(result: PhaseResult, *, last: bool) -> list[str]:
    figures = result.all
    answered = figures.answered_share or 0.0
    grade = "good" if answered >= 0.95 else "bad" if answered < 0.5 else "fair"
    return [
        f'<td class="{grade}">{wording.share(figures.answered_share)}</td>',
        f"<td>{escape(wording.latency(figures.p99))}</td>",
        _count(figures.refused),
        _count(figures.errors + figures.unknown),
        _count(figures.hung),
        f"<td>{escape(wording.back(result.recovery, last=last))}</td>",
    ]


def _count(number: int) -> str:
    return f"<td>{number}</td>" if number else '<td class="none">0</td>'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], css: str = "") -> str:
    headings = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    opening = f'<table class="{css}">' if css else "<table>"
    return (
        f'<div class="scroll">{opening}<thead><tr>{headings}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _slice_table(series: Series, what: str, heading: str) -> str:
    def cell(app: App, index: int) -> str:
        figures = series.slices[app][index]
        if what == "answered":
            return f"{figures.answered} / {figures.sent}"
        if what == "latency":
            return f"{wording.latency(figures.p50)}, {wording.latency(figures.p99)}"
        return " / ".join(str(count) for count in charts.endings(figures).values())

    rows = [
        (
            f"{index * SLICE:.1f} s",
            _band_at(series, (index + 0.5) * SLICE),
            *(cell(app, index) for app in APPS),
        )
        for index in range(len(series.slices["plain"]))
    ]
    return f"<p>{escape(heading)}, by half second.</p>" + _table(("sent from", "phase", *APPS), rows)


def _band_at(series: Series, seconds: float) -> str:
    return next((band.name for band in series.bands if band.start <= seconds < band.end), "")


def _write_table(verdict: Verdict) -> str:
    ledgers = verdict.ledgers
    questions = (
        ("sent", lambda one: one.attempted),
        ("acknowledged (2xx in time)", lambda one: one.acknowledged),
        ("  of these lost", lambda one: len(one.lost)),
        ("  of these there more than once", lambda one: len(one.duplicated)),
        ("refused (503 with Retry-After)", lambda one: one.failed),
        ("  of these there nevertheless", lambda one: len(one.resurrected)),
        ("outcome unknown to the client", lambda one: one.unknown),
        ("  of these there", lambda one: one.unknown_present),
    )
    return _table(
        ("writes", *APPS), [(text, *(ask(ledgers[app]) for app in APPS)) for text, ask in questions], "facts"
    )


def _goal_table(verdict: Verdict) -> str:
    rows = "".join(
        f'<tr class="{"met" if goal.met else "missed"}"><td>{"✓ met" if goal.met else "✗ missed"}</td>'
        f"<td>{escape(goal.what)}</td><td>{escape(goal.figure)}</td></tr>"
        for goal in verdict.goals
    )
    return f'<div class="scroll"><table class="facts goals"><tbody>{rows}</tbody></table></div>'


def _failure_tables(verdict: Verdict) -> str:
    rows = [(app, words, count) for app in APPS for words, count in verdict.errors[app].items()]
    rows += [("guarded", f"refused: {reason}", count) for reason, count in verdict.reasons.items()]
    return _table(("application", "what", "requests"), rows, "facts causes")


def _proofs(verdict: Verdict) -> str:
    rows = [(phase.name, "; ".join(phase.proofs)) for phase, _ in verdict.phases if phase.proofs]
    return _table(("fault", "how it was made sure"), rows, "facts prose")


def _event_table(report: Report) -> str:
    rows = [
        (
            f"{event.at - report.zero:.2f} s",
            event.name,
            event.node,
            _change(event.old, event.new),
            event.cause,
        )
        for event in sorted(report.record.events, key=lambda event: event.at)
    ]
    shown = rows[:200]
    rest = f"<p>… and {len(rows) - len(shown)} more.</p>" if len(rows) > len(shown) else ""
    return _table(("at", "event", "node", "change", "cause"), shown, "facts prose") + rest


def _change(old: str, new: str) -> str:
    return f"{old or 'none'} → {new or 'none'}" if old or new else ""


def _setup(report: Report) -> str:
    weights = dict(zip(KINDS, WEIGHTS, strict=True))
    points = [
        (
            f"Requests arrive as a Poisson process (seed {report.seed}), whatever became of those before: "
            f"{weights['items']} % read twenty rows, {weights['slow']} % run a query that takes {SLOW_QUERY:g} s, "
            f"{weights['add']} % write a row. Both applications get the same ones at the same moments. A client "
            f"hangs up after {PATIENCE:g} s. The generator was never more than "
            f"{report.record.lag * 1000:.0f} ms late, and its lateness counts as latency."
        ),
        (
            "Both applications are the same routes under Starlette and uvicorn, one process each, with "
            f"{POOL_SIZE} connections and no overflow to a node. The plain one has SQLAlchemy's defaults otherwise."
        ),
        (
            "The guarded one also has the library's defaults. It is given the standby as a replica, so it can use "
            f"that node's connections for reads too, and a deadline of {DEADLINE:g} s a request, a little less "
            "than its clients have."
        ),
        (
            "Every node is reached through Toxiproxy, by each application through a proxy of its own, with the "
            "same fault on both at the same moment. Replication goes past the proxies."
        ),
        (
            "At the end the plain application still has the address of the primary that died: in a real "
            "deployment it stays down until somebody, or something, changes that."
        ),
        "Neither the start of everything nor any logging by the applications is part of what was measured.",
    ]
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return f"<ul>{items}</ul>" + _table(("what", "version"), report.versions.items(), "facts")


def _hover_data(series: Series) -> str:
    """What the pointer shows: one text for each slice, ready made."""
    lines = []
    for index, seconds in enumerate(series.times):
        entry: dict[str, object] = {"t": seconds - SLICE / 2, "phase": _band_at(series, seconds)}
        for app in APPS:
            figures = series.slices[app][index]
            entry[app] = (
                f"{figures.answered} of {figures.sent} answered, {figures.refused} refused, "
                f"{figures.errors + figures.unknown} errors, {figures.hung} unanswered, "
                f"p99 {wording.latency(figures.p99)}"
            )
        lines.append(entry)
    return json.dumps(lines).replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return resources.files("resilientdb.cli.demo").joinpath(name).read_text(encoding="utf-8")
