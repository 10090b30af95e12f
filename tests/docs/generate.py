"""Writes the parts of the documentation that are tables of the code: ``python -m tests.docs.generate``.

``docs/configuration.md`` is generated as a whole; in other files the part between ``<!-- generated:NAME -->``
and ``<!-- /generated:NAME -->``. ``test_generated`` fails while a file says something else than the code.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilientdb.config import ENV_PREFIX, PROFILES, URL_PREFIX, Resilience, options, resilience
from resilientdb.config.base import leaves, options_of
from resilientdb.config.wording import as_text, flat
from resilientdb.middleware.problem import _FAULTS
from resilientdb.policy.faults import Fault
from tests.engine.seen import EVENTS, load

if TYPE_CHECKING:
    from types import ModuleType

    from resilientdb.config.base import Option, Options

ROOT = Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------- the options

_HEAD = """\
# Configuration

<!-- Written by `python -m tests.docs.generate` from resilientdb.config. Do not edit. -->

Every option, what it allows, its default and the reason for it. Durations are seconds. `None` means no
limit, `0` means do not wait. How to set an option (code, environment, URL, mapping, profile) is in
[Getting started](getting-started.md#options).

Precedence, option by option: call > environment > URL > profile > default. One exception, on purpose:
`RESILIENTDB_ENABLED=false` beats the call too, because it is the operator's emergency switch.

An unknown option, a value out of range, or two values that contradict each other raise
`ConfigurationError`, which names the option, the value, what is allowed and the nearest option that exists.
"""


def configuration() -> str:
    """The whole of ``docs/configuration.md``."""
    said = {**_docstrings(options), **_docstrings(resilience)}
    parts = [_HEAD, "## At a glance\n", _overview(), "## Profiles\n", *_profiles()]
    parts += ["## Options\n", *_tables(Resilience, "", said)]
    return "\n".join(parts)


def _overview() -> str:
    rows = [["option", "default", *(f"`{name}`" for name in PROFILES)], ["---"] * (2 + len(PROFILES))]
    for key, option in leaves(Resilience):
        settings = [profile.settings.get(key) for profile in PROFILES.values()]
        cells = [f"`{as_text(setting.value)}`" if setting else "" for setting in settings]
        rows.append([f"[`{key}`](#{_anchor(key)})", f"`{as_text(option.default)}`", *cells])
    return _markdown(rows)


def _profiles() -> list[str]:
    parts = ["A profile ranks above the defaults and below everything that somebody said.\n"]
    for profile in PROFILES.values():
        rows = [["option", "value", "reason"], ["---"] * 3]
        for key, setting in profile.settings.items():
            rows.append([f"`{key}`", f"`{as_text(setting.value)}`", setting.reason])
        parts.append(f"### Profile `{profile.name}`\n\n{profile.summary}\n\n{_markdown(rows)}")
    return parts


def _tables(table: type[Options], prefix: str, said: dict[str, str]) -> list[str]:
    parts = []
    for name, option in options_of(table).items():
        text = said[f"{table.__name__}.{name}"]
        if option.table is not None:
            parts.append(
                f"### `{prefix}{name}`: {option.table.__name__}\n\n{said[option.table.__name__]} {text}\n"
            )
            parts += _tables(option.table, f"{prefix}{name}.", said)
        else:
            parts.append(f"#### `{prefix}{name}`\n\n{_facts(f'{prefix}{name}', option)}\n\n{text}\n")
    return parts


def _facts(key: str, option: Option) -> str:
    facts = [f"{option.describe()[0].upper()}{option.describe()[1:]}", f"default `{as_text(option.default)}`"]
    if option.kind is not None and option.kind.from_text:
        facts += [f"`{ENV_PREFIX}{flat(key).upper()}`", f"`{URL_PREFIX}{flat(key)}`"]
    return " · ".join(facts)


def _docstrings(module: ModuleType) -> dict[str, str]:
    """``Class`` and ``Class.field`` → the text that stands below it in the source, as Markdown."""
    found: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found[node.name] = _prose(ast.get_docstring(node) or "")
        for field, following in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[f"{node.name}.{field.target.id}"] = _prose(str(following.value.value))
    return found


def _prose(docstring: str) -> str:
    text = inspect.cleandoc(docstring).replace("``", "`")
    return "\n".join(textwrap.fill(part, 110) for part in text.split("\n\n"))


def _anchor(key: str) -> str:
    """GitHub's anchor of the heading "`key`"."""
    return re.sub(r"[^\w-]", "", key.lower())


# -------------------------------------------------------------------------------------------- the faults

MEANINGS = {
    Fault.CONNECTION_LOST: "The connection broke while it was in use.",
    Fault.CANNOT_CONNECT: "The server refuses, cannot be reached, or is starting up or shutting down.",
    Fault.WRONG_ROLE: "The node works, but is a standby and was sent a write.",
    Fault.RETRY_TRANSACTION: "Serialization failure or deadlock: the transaction was rolled back.",
    Fault.IN_DOUBT: "COMMIT was sent and its reply never came.",
    Fault.OVERLOAD: "The server, or a pooler in front of it, is out of connections, memory or disk.",
    Fault.TIMEOUT: "A statement or a lock took longer than a timeout allows.",
    Fault.CONFIGURATION: "Wrong password, database or certificate; a pooler that loses prepared statements.",
    Fault.APPLICATION: "The statement is wrong or breaks a constraint. The server is well.",
    Fault.CANCELLED: "The caller went away: a cancelled task, Ctrl-C.",
    Fault.LOCAL_REJECTION: "Refused in this process and never sent: full queue, open circuit, no file descriptors.",
}


def faults() -> str:
    """The table of ``failure-modes.md``: each ``Fault`` and what follows from it."""
    rows = [
        [
            "fault",
            "what happened",
            "breaker",
            "connect tried again",
            "transaction run again",
            "connection",
            "HTTP",
        ]
    ]
    rows.append(["---"] * 7)
    for fault in Fault:
        breaker = (
            "failure" if fault.is_node_failure else "success" if fault.is_healthy_reply else "no evidence"
        )
        rows.append(
            [
                f"`{fault.value}`",
                MEANINGS[fault],
                breaker,
                "yes" if fault.retry_connect else "no",
                "yes" if fault.retry_transaction else "no",
                "closed" if fault.evicts_connection else "kept",
                _http(fault),
            ]
        )
    return _markdown(rows)


def _http(fault: Fault) -> str:
    if fault is Fault.LOCAL_REJECTION:
        return "503, the error's own reason"
    if fault is Fault.TIMEOUT:
        return "503 `deadline-exceeded` if the deadline is over, else the framework's"
    kind = _FAULTS.get(fault)
    if kind is None:
        return "the framework's"
    again = "" if kind.retry != "never" else ", no `Retry-After`"
    return f"{kind.status} `{kind.reason}`{again}"


# ---------------------------------------------------------------------------------------- what was seen

SERVERS = {
    "PostgreSQL": ["psycopg", "psycopg_async", "psycopg2", "asyncpg"],
    "MariaDB": ["pymysql", "aiomysql", "asyncmy"],
}


def what_was_seen() -> str:
    """For each server, what its drivers said in each event, from the tests' record."""
    return "\n".join(_seen_on(server, drivers) for server, drivers in SERVERS.items())


def _seen_on(server: str, drivers: list[str]) -> str:
    record = {event: rows for event, rows in load().items() if set(rows) & set(drivers)}
    header = ["event", "fault", *(f"`{driver}`" for driver in drivers)]
    table = [header, ["---"] * len(header)]
    for event, rows in record.items():
        found = {rows[driver]["fault"] for driver in drivers if driver in rows}
        words = " or ".join(f"`{fault}`" for fault in sorted(found))
        table.append([EVENTS[event], words, *(_said(rows.get(driver)) for driver in drivers)])
    return f"### {server}\n\n{_markdown(table)}"


def _said(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    words = [f"`{row['error']}`", *([row["code"]] if row["code"] else [])]
    return f"{' '.join(words)}{' †' if row['invalidated'] else ''}"


# --------------------------------------------------------------------------------------------- the files


def _markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)


def documents() -> dict[Path, str]:
    """Every generated file, as it should be."""
    modes = ROOT / "docs" / "failure-modes.md"
    text = _filled(modes.read_text(encoding="utf-8"), "faults", faults())
    return {
        ROOT / "docs" / "configuration.md": configuration(),
        modes: _filled(text, "seen", what_was_seen()),
    }


def _filled(text: str, name: str, part: str) -> str:
    start, end = f"<!-- generated:{name} -->", f"<!-- /generated:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{start} … {end} is missing")
    return f"{before}{start}\n\n{part}\n{end}{after}"


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
