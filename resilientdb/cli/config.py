"""``resilientdb config explain``: the options an engine would get here and now, and who said so."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, get_args

import click
import sqlalchemy.exc
from sqlalchemy import make_url

from resilientdb.config import ENV_PREFIX, URL_PREFIX, resolve
from resilientdb.config.profiles import ProfileName
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import URL

    from resilientdb.config.resolve import Explanation

__all__ = ["config"]

_HIDDEN: Final = "***"
_SECRET: Final = re.compile(r"passw|pwd|secret|token|credential|api_?key|passfile|sslkey", re.IGNORECASE)
_REPLICAS: Final = f"{URL_PREFIX}replicas"


@click.group()
def config() -> None:
    """Show the options in force, and where each came from."""


@config.command()
@click.argument("url", required=False)
@click.option(
    "--profile", type=click.Choice(get_args(ProfileName)), help="As if the code named this profile."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object for each option.")
def explain(url: str | None, profile: ProfileName | None, *, as_json: bool) -> None:
    """Print every option's value and where it came from: code, environment, URL, profile or default.

    URL is a SQLAlchemy database URL; its resilientdb_… parameters count. Nothing is connected to, and passwords
    are not shown. What a program says in code is not known here; it ranks above all but
    RESILIENTDB_ENABLED=false.
    """
    parsed = _parse(url) if url is not None else None
    query: dict[str, Any] = dict(parsed.query) if parsed is not None else {}
    options = {
        key.removeprefix(URL_PREFIX): value
        for key, value in query.items()
        if key.startswith(URL_PREFIX) and key != _REPLICAS
    }
    try:
        rows = resolve(url_options=options, profile=profile).explain()
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    replicas = _replicas(query.get(_REPLICAS, ()))
    shown = _shown(parsed) if parsed is not None else None
    if as_json:
        document = {
            "url": shown,
            "replicas": replicas,
            "options": [{"key": row.key, "value": row.value, "source": row.source} for row in rows],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        _print(rows, shown, replicas)


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        pass  # and forget it: the text of that error may hold the URL, and so a password
    raise click.UsageError("URL is not a database URL (expected dialect+driver://user@host:port/database)")


def _shown(url: URL) -> str:
    """The URL without anything secret, be it in its parameters, and without the replicas, shown apart."""
    hidden = {key: _HIDDEN for key in url.query if _SECRET.search(key)}
    safe = url.difference_update_query([_REPLICAS]).update_query_dict(hidden)
    return safe.render_as_string(hide_password=True).replace("%2A%2A%2A", _HIDDEN)


def _replicas(value: str | Sequence[str]) -> list[str]:
    """The nodes of a ``resilientdb_replicas`` parameter, passwords hidden."""
    texts = [value] if isinstance(value, str) else list(value)
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return [_shown(_parse(part)) if "://" in part else part.rpartition("@")[2] for part in parts]


def _print(rows: Sequence[Explanation], url: str | None, replicas: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    if url is not None:
        console.print(Text.assemble(("url       ", "dim"), url), soft_wrap=True)
        for replica in replicas:
            console.print(Text.assemble(("replica   ", "dim"), replica), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("option", "value", "source"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        style = "dim" if row.source == "default" else ""
        table.add_row(
            Text(row.key), Text(row.value, style="bold" if not style else ""), Text(row.source, style)
        )
    console.print(table)
    if all(row.source == "default" for row in rows):
        click.echo(
            f"\nAll defaults. Set {ENV_PREFIX}QUEUE_TIMEOUT=2.5, {URL_PREFIX}queue_timeout=2.5 in the URL, or "
            "Resilience(...) in code."
        )
