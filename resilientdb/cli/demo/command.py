"""The ``demo`` command: options in, exit code out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from resilientdb.cli.group import FAILURE, INTERRUPTED, CommandFailed

if TYPE_CHECKING:
    from resilientdb.cli.demo.services import Driver

__all__ = ["demo"]

_DEFAULT_REPORT = Path("report", "demo.html")


@click.command()
@click.option(
    "--seconds", type=click.FloatRange(15, 300), default=None, help="Length of the run.  [default: 50]"
)
@click.option("--quick", is_flag=True, help="A short run: 18 seconds.")
@click.option("--driver", type=click.Choice(["psycopg", "asyncpg"]), default="psycopg", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of the traffic.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    default=_DEFAULT_REPORT,
    show_default=True,
    help="Where to write the page; the data goes beside it as JSON.",
)
@click.option("--keep", is_flag=True, help="Leave everything running at the end, until Ctrl-C.")
def demo(*, seconds: float | None, quick: bool, driver: Driver, seed: int, report: Path, keep: bool) -> None:
    """Break a real PostgreSQL under two web applications, one of them guarded.

    Starts a PostgreSQL primary and standby, Toxiproxy, and the same application twice: over plain SQLAlchemy, and
    over resilientdb. Sends both the same requests while the database is slow, silent, gone, overrun and failed
    over, and shows what their clients saw. Everything runs on this machine, in temporary folders, and is
    removed at the end.

    Exit code 0 if the guarded application met its goals, 3 if not (or if something is missing).
    """
    from resilientdb.cli.demo.interrupts import Interrupts
    from resilientdb.cli.demo.run import Settings, run
    from resilientdb.cli.demo.screen import Screen
    from resilientdb.cli.demo.timeline import DEFAULT_SECONDS, QUICK_SECONDS
    from resilientdb.testing import TestingError

    if quick and seconds is not None:
        raise click.UsageError("--quick is a length of its own: leave out --seconds")
    if report.suffix.lower() not in {".html", ".htm"}:
        raise click.BadParameter("the report is a page: its name must end in .html", param_hint="--report")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(str(error), param_hint="--report") from error
    settings = Settings(
        seconds=seconds or (QUICK_SECONDS if quick else DEFAULT_SECONDS),
        seed=seed,
        driver=driver,
        report=report,
        keep=keep,
    )
    with Interrupts() as interrupts, Screen() as screen:
        try:
            passed = run(settings, screen, interrupts)
        except TestingError as error:
            raise CommandFailed(str(error)) from error
        except KeyboardInterrupt:
            screen.stop()
            screen.say("interrupted; everything was stopped and removed")
            raise SystemExit(INTERRUPTED) from None
    if not passed:
        raise SystemExit(FAILURE)
