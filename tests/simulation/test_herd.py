"""A fleet and its database after an outage: with the library's policies it recovers, without them it does not."""

from __future__ import annotations

import random
from xml.etree import ElementTree as ET

import pytest

from tests.simulation import __main__ as command
from tests.simulation import herd
from tests.simulation.database import Database, Server
from tests.simulation.plots import Line, chart
from tests.simulation.systems import SYSTEMS
from tests.simulation.world import World

# -- the herd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("processes", [10, 100])
def test_with_the_library_it_recovers(processes: int, seed: int) -> None:
    outcome = herd.run(SYSTEMS["ours"], processes, seed=seed, seconds=40)
    assert min(outcome.shares[1:4]) > 0.95, "the fleet is well before"
    assert max(outcome.shares[6:14]) == 0, "and the outage is one"
    assert outcome.recovery is not None
    assert outcome.recovery <= 30


@pytest.mark.parametrize("name", ["pybreaker", "plain", "no slow start", "no breaker"])
def test_without_it_or_its_slow_start_the_database_stays_down(name: str) -> None:
    outcome = herd.run(SYSTEMS[name], 100, seconds=30)
    assert outcome.recovery is None
    assert max(outcome.active[20:]) > 2 * outcome.knee, (
        "busy all the time, with what nobody waits for any more"
    )


def test_the_budget_bounds_the_retries_where_no_breaker_does() -> None:
    with_budget, without = (
        herd.run(SYSTEMS[name], 100, seconds=20) for name in ("no breaker", "no breaker or budget")
    )
    allowed = 3 * (len(with_budget.offered) / 10 + 1) * 100  # the floor, since next to nothing succeeds
    assert 0 < with_budget.retries <= allowed + 0.2 * sum(with_budget.good)
    assert without.retries > 5 * with_budget.retries


def test_one_seed_is_one_run() -> None:
    first, again = (herd.run(SYSTEMS["ours"], 10, seed=3, seconds=5) for _ in range(2))
    assert first == again
    assert first != herd.run(SYSTEMS["ours"], 10, seed=4, seconds=5)


@pytest.mark.nightly
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("name", ["ours", "pybreaker", "plain"])
def test_ten_thousand_processes(name: str) -> None:
    outcome = herd.run(SYSTEMS[name], 10_000, seconds=35)
    if name == "ours":
        assert outcome.recovery is not None
        assert outcome.recovery <= 30
    else:
        assert outcome.recovery is None


# -- the database it meets ------------------------------------------------------------------------------------------


class Caller:
    """Sends things at chosen times, and remembers when they ended."""

    def __init__(self, server: Server) -> None:
        self.world = World()
        self.database = Database(self.world, server, random.Random(1))
        self.ended: list[tuple[float, bool]] = []

    def end(self, _whom: object, answered: bool) -> None:
        self.ended.append((self.world.now, answered))

    def connect(self, when: float, times: int = 1) -> None:
        for _ in range(times):
            self.world.at(when, lambda _: self.database.open(self.end, None))


def test_the_cores_are_shared() -> None:
    caller = Caller(Server(cores=2, knee=100, connect=1.0))
    caller.connect(0.0, times=4)
    caller.world.run(10)
    assert [when for when, _ in caller.ended] == pytest.approx([2.0] * 4)
    alone = Caller(Server(cores=2, knee=100, connect=1.0))
    alone.connect(0.0)
    alone.connect(0.5)
    alone.world.run(10)
    assert [when for when, _ in alone.ended] == pytest.approx([1.0, 1.5]), "one job uses one core"


def test_past_the_knee_it_does_less() -> None:
    caller = Caller(Server(cores=1, knee=2, thrash=0.5, connect=1.0))
    caller.connect(0.0, times=4)
    caller.world.run(100)
    assert caller.ended[-1][0] == pytest.approx(4 * 1.5), "twice as many as at the knee"


def test_what_a_dead_server_was_doing_is_lost_and_newcomers_are_refused_at_once() -> None:
    caller = Caller(Server(cores=1, knee=10, connect=1.0))
    caller.connect(0.0)
    caller.world.at(0.5, caller.database.die)
    caller.connect(0.6)
    caller.world.at(2.0, caller.database.start)
    caller.connect(3.0)
    caller.world.run(10)
    assert [answered for _, answered in caller.ended] == [False, False, True]
    assert [when for when, _ in caller.ended] == pytest.approx([0.501, 0.601, 4.0])


def test_a_cold_cache_makes_statements_dear_until_some_are_done() -> None:
    caller = Caller(Server(cores=1, knee=10, cold=8, warm_after=100))
    database, world = caller.database, caller.world
    assert database.coldness == 1
    database.die()
    database.start()
    assert database.coldness == 8
    world.at(0.0, lambda _: [database.query(database.epoch, caller.end, None) for _ in range(100)])
    world.run(1_000)
    assert database.coldness == pytest.approx(1 + 7 / 2.718, rel=0.01)


def test_a_session_of_an_earlier_life_is_dead() -> None:
    caller = Caller(Server(cores=1, knee=10))
    database = caller.database
    epoch = database.epoch
    database.die()
    database.start()
    database.query(epoch, caller.end, None)
    caller.world.run(1)
    [(when, answered)] = caller.ended
    assert when == pytest.approx(0.001)
    assert not answered


# -- what is made of it ---------------------------------------------------------------------------------------------


def outcome_of(*shares: float) -> herd.Outcome:
    before = [1.0] * int(herd.STARTS)
    good = [round(100 * share) for share in (*before, *shares)]
    return herd.Outcome(
        system="ours",
        processes=20,
        seed=1,
        offered=(100,) * len(good),
        good=tuple(good),
        active=(0,) * len(good),
        knee=1.0,
        sessions=(0,) * len(good),
        retries=0,
    )


def test_recovery_is_when_it_stays_well() -> None:
    assert outcome_of(0, 0.5, *[1] * 9).recovery == 2
    assert outcome_of(0, 1, 1, 0.9, *[1] * 9).recovery == 4
    assert outcome_of(*[0.9] * 20).recovery is None
    assert outcome_of(0, 0.6, 0.2, 1, 0.4, *[1] * 9).relapses == 2
    assert outcome_of(0, 0.5, *[1] * 9).lost == pytest.approx(1.5)


def test_a_drawing_is_small_and_well_formed() -> None:
    drawing = chart(
        "a < b", " %", [Line("x & y", [0, 50, 120]), Line("z", [1, 2, 3])], top=100, marks=[(1, "now")]
    )
    root = ET.fromstring(drawing)
    assert root.tag.endswith("svg")
    assert len(root.findall("{*}polyline")) == 2
    assert "a &lt; b" in drawing
    assert len(drawing) < 4_000


def test_the_command_prints_a_line_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["ours", "--sizes", "10"]) == 0
    assert capsys.readouterr().out.startswith("ours")
    with pytest.raises(SystemExit):
        command.main(["theirs"])


def test_the_document_shows_what_is_drawn() -> None:
    text = command.DOCUMENT.read_text(encoding="utf-8")
    for name in ("herd-answered.svg", "herd-busy.svg", "herd-parts.svg"):
        assert f"(images/{name})" in text
        assert (command.IMAGES / name).stat().st_size < 60_000
