"""What all commands share: loading them when they are asked for, exit codes, and what to install.

Exit codes: 0 all is well, 2 the command was used wrongly (or a configuration is wrong), 3 it was done and the
outcome is bad, or it could not be done here. Ctrl-C gives 130.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import click

import resilientdb

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FAILURE", "INTERRUPTED", "OK", "USAGE", "CommandFailed", "main"]

OK: Final = 0
USAGE: Final = 2
FAILURE: Final = 3
INTERRUPTED: Final = 130


class _Entry(NamedTuple):
    module: str
    attribute: str
    summary: str


_COMMANDS: Final = {
    "config": _Entry(
        "resilientdb.cli.config", "config", "Show the options in force, and where each came from."
    ),
    "demo": _Entry(
        "resilientdb.cli.demo.command",
        "demo",
        "Break a real PostgreSQL under two web applications, one of them guarded.",
    ),
}

_EXTRAS: Final = {
    "aiosqlite": "sqlite",
    "asyncpg": "asyncpg",
    "greenlet": "asyncio",
    "prometheus_client": "observability",
    "psycopg": "psycopg",
    "psycopg2": "psycopg2",
    "requests": "testing",
    "rich": "cli",
    "starlette": "asgi",
    "toxiproxy": "testing",
    "uvicorn": "demo",
}
"""The extra that brings a module, by the module's top-level name."""


class CommandFailed(click.ClickException):
    """Ends a command with exit code 3 and one message, without a traceback."""

    exit_code = FAILURE

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"resilientdb: {self.message}", file=file, err=file is None)


class _LazyGroup(click.Group):
    """Knows its commands by name, and imports one when it is run or its help is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        with _explained(ctx, cmd_name):
            command: click.Command = getattr(importlib.import_module(entry.module), entry.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``, from the summaries here: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name].summary) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        with _explained(ctx):
            return super().invoke(ctx)


@contextlib.contextmanager
def _explained(ctx: click.Context, command: str | None = None) -> Iterator[None]:
    """Turns the import error of an optional dependency into the name of the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        # The demo needs most of them, so one extra brings them all.
        extra = "demo" if (command or ctx.invoked_subcommand) == "demo" else _EXTRAS[module]
        raise CommandFailed(f"{module} is not installed: pip install 'resilientdb[{extra}]'") from error


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(resilientdb.__version__, prog_name="resilientdb", message="%(prog)s %(version)s")
def main() -> None:
    """Keep answering while the database does not.

    Exit codes: 0 all is well; 2 wrong usage or configuration; 3 a bad outcome, or something that is needed is
    missing; 130 interrupted.
    """
