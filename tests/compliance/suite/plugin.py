"""The pytest plugin of the inner runs: puts the library under every engine, and writes down what happened."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.pool import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("drop-in")
    group.addoption("--drop-in", default="", help="the plugin= word to put into every engine's URL")
    group.addoption("--report", required=True, help="file to write the outcomes to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.getoption("--drop-in"), Path(config.getoption("--report"))))


class Recorder:
    """Counts by pool class, and the outcome of each test by its id."""

    def __init__(self, word: str, report: Path) -> None:
        self._word = word
        self._report = report
        self._outcomes: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._warnings: Counter[str] = Counter()
        self._engines: Counter[str] = Counter()
        self._checkouts: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Before SQLAlchemy's own plugin makes the first engine."""
        from sqlalchemy.dialects import plugins
        from sqlalchemy.dialects.postgresql import provision as _  # noqa: F401 - registers what is replaced here
        from sqlalchemy.testing import provision

        for name, class_name in (("in_except", "InExcept"), ("forgetful", "Forgetful"), ("absent", "Absent")):
            plugins.register(name, "suite.broken", class_name)
        provision.post_configure_engine.for_db("postgresql")(self._create_extensions)
        provision.post_configure_testing_engine.for_db("postgresql")(self._engine_made)
        event.listen(Pool, "checkout", self._checked_out)

    def _create_extensions(self, _url: Any, engine: Any, _follower: Any) -> None:
        """Those of the suite's wishes that this server can fulfil."""
        available = text("SELECT name FROM pg_available_extensions WHERE name IN ('citext', 'hstore')")
        with engine.begin() as connection:
            for name in connection.execute(available).scalars().all():
                connection.execute(text(f"CREATE EXTENSION IF NOT EXISTS {name}"))

    def _engine_made(self, _url: Any, engine: Any, _options: Any, _scope: str) -> None:
        engine = getattr(engine, "sync_engine", engine)
        self._engines[type(engine.pool).__name__] += 1
        if self._word:
            # SQLAlchemy takes the word out of the URL that later engines of the suite are made from.
            engine.url = engine.url.update_query_dict({"plugin": self._word})

    def _checked_out(self, _connection: Any, _record: Any, proxy: Any) -> None:
        self._checkouts[type(proxy._pool).__name__] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome: str = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            outcome += f": {report.longrepr[2]}"
        elif report.failed:
            outcome += f" in {report.when}"
            self._failures[report.nodeid] = report.longreprtext[-4000:]
        self._outcomes[report.nodeid] = outcome

    def pytest_warning_recorded(self, warning_message: Any) -> None:
        self._warnings[warning_message.category.__name__] += 1

    def pytest_sessionfinish(self) -> None:
        self._report.write_text(
            json.dumps(
                {
                    "sqlalchemy": sqlalchemy.__version__,
                    "outcomes": self._outcomes,
                    "failures": self._failures,
                    "warnings": self._warnings,
                    "engines": self._engines,
                    "checkouts": self._checkouts,
                    "doors": self._doors(),
                }
            ),
            encoding="utf-8",
        )

    def _doors(self) -> list[str]:
        """The pool classes seen that are the library's; none where it was never imported."""
        door_module = sys.modules.get("resilientdb.engine.door")
        if door_module is None:
            return []
        todo, names = [door_module.Door], set()
        while todo:
            cls = todo.pop()
            todo += cls.__subclasses__()
            names.add(cls.__name__)
        return sorted(names & {*self._engines, *self._checkouts})
