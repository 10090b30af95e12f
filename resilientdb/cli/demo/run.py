"""The whole run: start, load, faults, verdict, report; and the clean-up, whatever happens."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resilientdb.cli.demo.feeds import LoadFeed, StateFeed
from resilientdb.cli.demo.load import PATIENCE
from resilientdb.cli.demo.record import Record
from resilientdb.cli.demo.report import Report, write_report
from resilientdb.cli.demo.services import APPS, Driver, Services
from resilientdb.cli.demo.timeline import RATE, Timeline, plan
from resilientdb.cli.demo.verdict import judge, ledger_of

if TYPE_CHECKING:
    from pathlib import Path

    from resilientdb.cli.demo.interrupts import Interrupts
    from resilientdb.cli.demo.screen import Screen
    from resilientdb.cli.demo.verdict import Verdict

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the command was asked to do."""

    seconds: float
    seed: int
    driver: Driver
    report: Path
    keep: bool


def run(settings: Settings, screen: Screen, interrupts: Interrupts) -> bool:
    """Run the demo; returns whether the guarded application met its goals.

    Raises ``testing.TestingError`` when a service cannot be run, or a fault was not in force;
    ``KeyboardInterrupt`` when it was interrupted (also at the end of ``keep``). Nothing is left behind in
    any case.
    """
    with contextlib.ExitStack() as stack:
        services = Services(settings.driver, settings.seed)
        stack.callback(services.close)
        stack.callback(interrupts.ignore)  # called first: the clean-up comes to its end
        services.start(interrupts, screen.say)
        record = Record()
        verdict = _measure(settings, services, record, screen, interrupts)
        report = Report(verdict, record, settings.seed, services.versions())
        data = write_report(report, settings.report)
        screen.conclude(verdict)
        screen.say_reports(settings.report, data)
        if settings.keep:
            screen.say_kept(services.addresses())
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        return verdict.passed


def _measure(
    settings: Settings, services: Services, record: Record, screen: Screen, interrupts: Interrupts
) -> Verdict:
    with contextlib.ExitStack() as stack:
        state = StateFeed(record, services.ports["guarded"], services.node_names())
        stack.callback(state.close)
        with interrupts.held():
            load = LoadFeed(record, services.ports, seed=settings.seed, rate=RATE)
            stack.callback(load.close)
        phases = plan(settings.seconds)
        screen.say(f"{sum(phase.seconds for phase in phases):.0f} s of traffic and faults")
        screen.begin(record, phases)
        stack.callback(screen.stop)
        Timeline(services, load, record, screen.tick).run(phases)
        load.finish()
    # What the applications still do for clients that have gone ends before the ledger is read.
    time.sleep(PATIENCE)
    rows = services.standby.query("SELECT app, key FROM items")
    return judge(record.phases, record.samples, {app: ledger_of(record.samples, app, rows) for app in APPS})
