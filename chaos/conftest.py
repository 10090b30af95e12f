"""Options, the servers that scenarios share, and ``run``: one scenario on one driver, bare or guarded."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chaos.drivers import STACKS, Stack
from chaos.invariants import Observer, at_rest, nothing_left
from chaos.pair import Pair
from chaos.profiles import PROFILES, Profile
from chaos.report import Number, Report, Result, latencies
from resilientdb.testing import Postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    import resilientdb as rdb
    from chaos.workloads import Calls

_SEED = 20_240
_report = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption(
        "--chaos-profile", choices=sorted(PROFILES), default="short", help="how long and how hard"
    )
    group.addoption(
        "--chaos-ledger",
        type=int,
        metavar="N",
        help="write so many entries into the ledger, on PostgreSQL all drivers together",
    )
    group.addoption("--chaos-seed", type=int, default=_SEED, help="for everything that is drawn at random")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_report] = Report(config.getoption("--chaos-profile"), config.getoption("--chaos-seed"))


def pytest_report_header(config: pytest.Config) -> str:
    report = config.stash[_report]
    return f"chaos: profile {report.profile}, seed {report.seed}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_report]
    if not report.results:
        return
    path = Path(config.rootpath, "report", "chaos.json")
    report.write(path)
    terminalreporter.section(f"chaos: profile {report.profile}, seed {report.seed}")
    for line in report.lines():
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"written to {path.relative_to(config.rootpath)}")


class Run:
    """One scenario on one driver, bare or guarded."""

    def __init__(self, scenario: str, driver: str, variant: str, profile: Profile, report: Report) -> None:
        self.driver = driver
        self.guarded = variant != "bare"
        self.profile = profile
        self.rng = random.Random(f"{report.seed} {scenario} {driver}")
        self.result = Result(scenario=scenario, driver=driver, variant=variant)
        self.observer: Observer
        self._report = report

    @contextlib.contextmanager
    def stack(
        self,
        server: Postgres,
        *,
        port: int | None = None,
        replicas: Sequence[str] = (),
        resilience: rdb.Resilience | None = None,
        ends_on: Postgres | Callable[[], Postgres] | str | None = "server",
        hosts: str | None = None,
        **options: Any,
    ) -> Generator[Stack]:
        """An engine, observed; afterwards what must hold after every scenario does.

        ``port``: of the proxy in front of ``server``; ``hosts``: several of them, as the query of
        a URL has them. ``ends_on``: the server that takes writes at the end, if it is another one (a function says
        which), or None if there is none (that this engine knows of).
        """
        before = set(threading.enumerate())
        kind = STACKS[self.driver]
        url = server.url(kind.scheme, port=port)
        stack = kind(
            url if hosts is None else f"{url.partition('@')[0]}@/postgres?{hosts}",
            guarded=self.guarded,
            replicas=replicas,
            resilience=resilience,
            **options,
        )
        last: Postgres | None = server
        try:
            with Observer(stack) as self.observer:
                yield stack
                if not isinstance(ends_on, str):
                    last = ends_on() if callable(ends_on) else ends_on
                at_rest(stack, self.observer, last)
        finally:
            stack.close()
        nothing_left(before, [server, *([last] if last is not None else [])], stack.application)

    def record(self, says: str, calls: Calls | None = None, **numbers: Number) -> None:
        """Note what was seen, before it is judged."""
        self._report.results.append(self.result)
        self.result.says = says
        if calls is not None:
            self.result.numbers.update(latencies(calls))
            self.result.numbers["errors"] = ", ".join(
                f"{n} {name}" for name, n in calls.errors().most_common()
            )
        self.result.numbers.update(
            {name: round(n, 4) if isinstance(n, float) else n for name, n in numbers.items()}
        )


@pytest.fixture(scope="session")
def profile(pytestconfig: pytest.Config) -> Profile:
    """The sizes in force."""
    return PROFILES[pytestconfig.getoption("--chaos-profile")]


@pytest.fixture(params=[name for name in STACKS if name != "psycopg2"])
def driver(request: pytest.FixtureRequest) -> str:
    """psycopg2 hangs and fails as psycopg does; it runs where what it sends is its own."""
    return str(request.param)


@pytest.fixture(params=["bare", "guarded"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(request: pytest.FixtureRequest, driver: str, variant: str, profile: Profile) -> Iterator[Run]:
    """The scenario's name is the test's, with what else it is parametrized by."""
    function: str = request.node.originalname
    extra = [
        str(value)
        for name, value in request.node.callspec.params.items()
        if name not in {"driver", "variant"}
    ]
    scenario = " ".join([function.removeprefix("test_").replace("_", " "), *extra])
    one = Run(scenario, driver, variant, profile, request.config.stash[_report])
    yield one
    one.result.held = not getattr(request.node, "chaos_failed", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    outcome = yield
    if call.when == "call" and outcome.failed:
        vars(item)["chaos_failed"] = True
    return outcome


@pytest.fixture(scope="session")
def doomed(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    """A server that scenarios may stop and crash; it runs before and after each. (The other one is asked for so
    that a machine without PostgreSQL skips, or in CI fails, for the reason it gives.)"""
    with Postgres(name="doomed", binaries=resilientdb_postgres.binaries) as server:
        yield server


@pytest.fixture(scope="session")
def pairs(resilientdb_postgres: Postgres) -> Iterator[Pair]:
    """A primary and its synchronous standby, in force before and after each scenario, though perhaps exchanged."""
    primary = Postgres(name="left", binaries=resilientdb_postgres.binaries).start()
    with Pair(primary, Postgres.standby(primary, name="right")) as pair:
        yield pair
