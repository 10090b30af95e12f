"""An unchanged application: SQLAlchemy's own compliance suite ends, test by test, as it does without the library.

The suite runs twice against the same server, as it is and with ``?plugin=resilientdb`` in the URL of every engine
it makes, each time in a process and a database of its own. Three plugins with a fault show that the comparison
can fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from resilientdb.testing import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
INNER_TIMEOUT = 200.0
"""Seconds; about 20 on a machine with nothing else to do."""
DRIVERS = [
    "psycopg",
    "asyncpg",
    pytest.param("psycopg2", marks=pytest.mark.nightly),
    pytest.param("psycopg_async", marks=pytest.mark.nightly),
]

pytestmark = pytest.mark.timeout(INNER_TIMEOUT + 40)


@dataclass(frozen=True)
class Run:
    """What one run of the suite wrote down."""

    sqlalchemy: str
    outcomes: dict[str, str]
    """By test id; a skip with its reason."""
    failures: dict[str, str]
    warnings: dict[str, int]
    engines: dict[str, int]
    """How many were made, by the class of their pool."""
    checkouts: dict[str, int]
    doors: list[str]
    """The pool classes among them that are the library's."""

    @property
    def counts(self) -> str:
        counted = Counter(outcome.split()[0].rstrip(":") for outcome in self.outcomes.values())
        return ", ".join(f"{counted[word]} {word}" for word in ("passed", "failed", "skipped"))


class Inner:
    """A pytest process with the suite in it."""

    def __init__(self, server: Postgres, driver: str, word: str, folder: Path, *selection: str) -> None:
        name = f"{driver}_{word or 'plain'}"
        self._report = folder / f"{name}.json"
        self._output = folder / f"{name}.txt"
        server.query(f"CREATE DATABASE {name}")
        server.query("CREATE SCHEMA test_schema", database=name)
        suite = HERE / "suite"
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "RESILIENTDB_"))
        }
        environment |= {"PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pytest", "-q", str(suite / "dialect_suite.py")),
                    *("-c", str(suite / "setup.cfg"), "--rootdir", str(suite), "--confcutdir", str(suite)),
                    *("-p", "sqlalchemy.testing.plugin.pytestplugin", "-p", "suite.plugin"),
                    *("--dburi", server.url(driver, name) + (f"?plugin={word}" if word else "")),
                    *("--drop-in", word, "--report", str(self._report)),
                    *selection,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
            )

    def finish(self) -> Run:
        """Wait for its end; a run that is cut short has no report and is an error."""
        try:
            self._process.wait(INNER_TIMEOUT)
            return Run(**json.loads(self._report.read_bytes()))
        except (subprocess.TimeoutExpired, OSError, ValueError) as error:
            output = self._output.read_text(encoding="utf-8", errors="replace")
            pytest.fail(f"the suite did not finish: {error!r}\n{output[-4000:]}", pytrace=False)
        finally:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Pair:
    plain: Run
    guarded: Run


class Bench:
    """The server, and the runs made against it so far: each pair is run once, its two halves side by side."""

    def __init__(self, server: Postgres, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._pairs: dict[str, Pair] = {}

    def run(self, driver: str, word: str, *selection: str) -> Run:
        return Inner(self._server, driver, word, self._folder, *selection).finish()

    def pair(self, driver: str) -> Pair:
        if driver not in self._pairs:
            plain, guarded = (Inner(self._server, driver, word, self._folder) for word in ("", "resilientdb"))
            try:
                self._pairs[driver] = Pair(plain.finish(), guarded.finish())
            finally:
                guarded.kill()
        return self._pairs[driver]


@pytest.fixture(scope="module")
def bench(resilientdb_postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """``resilientdb_postgres`` is asked for so that a machine without PostgreSQL says so."""
    settings = {"max_prepared_transactions": 20}
    with Postgres(name="compliance", settings=settings, binaries=resilientdb_postgres.binaries) as server:
        yield Bench(server, tmp_path_factory.mktemp("compliance"))


def differences(plain: Run, guarded: Run) -> list[str]:
    """One line for each test that does not end the same way in both runs."""
    return [
        f"{test}: {before} without the library, {after} with it\n{guarded.failures.get(test, '')}"
        for test in sorted(plain.outcomes.keys() | guarded.outcomes.keys())
        if (before := plain.outcomes.get(test, "absent")) != (after := guarded.outcomes.get(test, "absent"))
    ]


def bypasses(plain: Run, guarded: Run) -> list[str]:
    """What shows that the guarded run was not one: engines or checkouts that are not the library's, or missing."""
    found = [f"the plain run went through {door}" for door in plain.doors]
    for what in ("engines", "checkouts"):
        before, after = getattr(plain, what), getattr(guarded, what)
        found += [f"{after[kind]} {what} of a plain {kind}" for kind in after if kind not in guarded.doors]
        if sum(before.values()) != sum(after.values()):
            found.append(f"{sum(before.values())} {what} without the library, {sum(after.values())} with it")
    return found


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_test_ends_as_without_the_library(
    bench: Bench, driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = bench.pair(driver)
    with capsys.disabled():
        print(
            f"\nSQLAlchemy {pair.plain.sqlalchemy}, {driver}: {pair.plain.counts} without the library, "
            f"{pair.guarded.counts} with it; {pair.guarded.engines}, checkouts {pair.guarded.checkouts}"
        )
    assert not differences(pair.plain, pair.guarded)
    assert pair.guarded.warnings == pair.plain.warnings
    # The same emptiness twice would be no proof.
    assert list(pair.plain.outcomes.values()).count("passed") > 1500
    assert pair.plain.failures == {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_connection_came_through_the_door(bench: Bench, driver: str) -> None:
    pair = bench.pair(driver)
    assert not bypasses(pair.plain, pair.guarded)
    assert sum(pair.guarded.checkouts.values()) > 1500


@pytest.mark.parametrize("fault", ["in_except", "forgetful"])
def test_a_plugin_with_a_fault_is_found_out(bench: Bench, fault: str) -> None:
    broken = bench.run("psycopg", fault, "-k", "Isolation")
    plain = bench.pair("psycopg").plain
    ran = {test: outcome for test, outcome in plain.outcomes.items() if test in broken.outcomes}
    assert len(ran) == len(broken.outcomes) > 10
    assert any("failed" in line for line in differences(replace(plain, outcomes=ran), broken))


def test_a_plugin_that_does_nothing_is_found_out(bench: Bench) -> None:
    absent = bench.run("psycopg", "absent", "-k", "Isolation")
    assert set(absent.outcomes.values()) == {"passed"}
    assert any("of a plain QueuePool" in line for line in bypasses(bench.pair("psycopg").plain, absent))


def test_a_test_that_did_not_run_is_a_difference() -> None:
    one = Run("", {"a": "passed", "b": "skipped: why"}, {}, {}, {}, {}, [])
    for other in ({"a": "passed"}, {"a": "passed", "b": "skipped: other"}, {**one.outcomes, "c": "passed"}):
        assert len(differences(one, replace(one, outcomes=other))) == 1
    assert differences(one, one) == []
