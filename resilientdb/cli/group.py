"""What all commands share: loading them when they are asked for, exit codes, and what to install.

Exit codes: 0 all is well, 2 the command was used wrongly (or a configuration is wrong), 3 it was done and the
outcome is bad, or it could not be done here. Ctrl-C gives 130.
"""

from __future__ import annotations

import importlib
from typing import IO, Any, Final, NamedTuple

import click

import resilientdb

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

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        with _MissingExtras(cmd_name):
            command: click.Command = getattr(importlib.import_module(entry.module), entry.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``, from the summaries here: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name].summary) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        with _MissingExtras(ctx.invoked_subcommand or "resilientdb"):
            return super().invoke(ctx)


class _MissingExtras:
    """Turns the import error of an optional dependency into the name of the extra that brings it."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, ModuleNotFoundError):
            return
        module = (error.name or "").partition(".")[0]
        # The demo needs most of them, so one extra brings them all.
        extra = "demo" if self._command == "demo" else _EXTRAS.get(module)
        if module not in _EXTRAS or extra is None:
            return
        raise CommandFailed(
            f"this command needs {module}, which is not installed: pip install 'resilientdb[{extra}]'"
        ) from error


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(resilientdb.__version__, prog_name="resilientdb", message="%(prog)s %(version)s")
def main() -> None:
    """Keep answering while the database does not.

    Exit codes: 0 all is well; 2 wrong usage or configuration; 3 a bad outcome, or something that is needed is
    missing; 130 interrupted.
    """
