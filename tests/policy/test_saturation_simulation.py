"""Slots and the lines over many steps of virtual time: callers of every kind, each promise checked at each step."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from resilientdb.policy.saturation import Admission, Lane, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES, TARGET, INTERVAL = 12, 0.5, 5.0
LIMITS = (5, 5, 5, 3, 8, 2)
NAMED = (Lane.CRITICAL_PLUS, Lane.CRITICAL, Lane.SHEDDABLE_PLUS, Lane.SHEDDABLE)
QUIET, STALL = 300.0, 15.0
"""Every so many seconds nothing comes back for so long."""


class Caller:
    """Takes one slot after another, waits for one if it must, and gives all of them back at the end."""

    def __init__(self, named: Lane, patience: float | None, gives_up: float) -> None:
        self.named = named
        self.patience = patience
        """As told to the queue."""
        self.gives_up = gives_up
        self.slots: list[int] = []
        self.given: int | None = None
        """A slot that it was given while it waited, and has not come for yet."""
        self.turn = 0
        """What was to happen to it in an earlier turn no longer does."""
        self.lane = named
        self.since = 0.0
        self.remaining: float | None = None

    @property
    def holds(self) -> int:
        return len(self.slots)


class Simulation:
    """Callers come at random, hold for a while, ask for more, give up, and lose what they hold; the limit changes,
    the lines are emptied, and at times nothing comes back at all."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.admission: Admission[Caller] = Admission(
            limit=LIMITS[0], max_waiting=PLACES, target=TARGET, interval=INTERVAL
        )
        self.now = 0.0
        self.open = True
        self.serial = itertools.count()
        self.events: list[tuple[float, int, str, Caller | None, int]] = []
        self.owner: dict[int, Caller | None] = {}
        """Every slot there is, and whose it is: its one owner, or None while it is idle."""
        self.idle: list[int] = []
        self.lines: dict[Lane, dict[Caller, None]] = {lane: {} for lane in Lane}
        """In the order in which they came."""
        self.watched = False
        self.steps = 0
        """Not counting what was to happen and no longer does."""
        self.seen: Counter[str] = Counter()
        self.to_all: dict[str, Callable[[], None]] = {
            "arrive": self.arrive,
            "look": self.look,
            "change limit": self.change_limit,
            "close idle": self.close_idle,
            "dismiss": self.dismiss,
        }
        self.to_one: dict[str, Callable[[Caller], None]] = {
            "ask": self.ask,
            "give up": self.give_up,
            "come for it": self.come_for_it,
            "finish": self.finish,
            "connect fails": self.connect_fails,
        }

    def later(self, mean: float, what: str, who: Caller | None = None) -> None:
        self.at(self.now + self.chance.expovariate(1 / mean), what, who)

    def at(self, when: float, what: str, who: Caller | None = None) -> None:
        turn = 0 if who is None else who.turn
        heapq.heappush(self.events, (when, next(self.serial), what, who, turn))

    def count(self, what: str, who: Caller) -> None:
        self.seen[what] += 1
        self.seen[f"{what}, a holder"] += who.holds > 0

    # -- asking ------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        if not self.open:
            return
        # Load swings between half and four times of what five connections can bear.
        self.later((0.6, 0.3, 0.1)[int(self.now // 40) % 3], "arrive")
        patience = self.chance.choice((None, None, 1.0, 4.0))
        gives_up = patience or self.chance.choice((2.0, 2.0, math.inf))
        self.ask(Caller(self.chance.choices(NAMED, (1, 5, 2, 2))[0], patience, gives_up))

    def ask(self, who: Caller) -> None:
        if self.idle:
            slot = self.idle.pop()
            assert self.owner[slot] is None
            self.take(who, slot, connected=True)
        elif self.admission.try_take():
            self.take(who, next(self.serial), connected=False)
        else:
            self.join(who)

    def take(self, who: Caller, slot: int, *, connected: bool) -> None:
        who.turn += 1
        self.owner[slot] = who
        who.slots.append(slot)
        if not connected and self.chance.random() < 0.2:
            self.later(0.5, "connect fails", who)
        else:
            self.later(0.7, "ask" if self.chance.random() < 0.3 else "finish", who)

    def join(self, who: Caller) -> None:
        stuck = self.would_be_stuck(who)
        overloaded = self.admission.overloaded()[who.named]
        answer = self.admission.join(who, who.named, self.now, who.patience)
        assert (answer is Refusal.DEADLOCK) is stuck
        if isinstance(answer, Refusal):
            if answer is Refusal.FULL and (line := self.lines[who.named]):
                assert not overloaded
                assert self.now - next(iter(line)).since <= 3 * TARGET
            self.count(answer.value, who)
            self.finish(who)
            return
        assert who.lane is (Lane.HOLDING if who.holds else who.named)
        if answer is not None:
            assert answer.lane >= who.lane > Lane.HOLDING, "nobody makes room for the less critical"
            assert answer is next(iter(self.lines[answer.lane]))
            assert not any(self.lines[lane] for lane in Lane if lane > max(answer.lane, who.lane))
            if answer.lane is who.lane and not overloaded:
                assert self.now - answer.since > 3 * TARGET, "it takes a verdict, or that it has waited long"
                self.seen["displaced by its like"] += 1
            self.send_home(answer, "pool-displaced")
        self.lines[who.lane][who] = None
        who.turn += 1
        if who.gives_up < math.inf:
            self.at(self.now + who.gives_up, "give up", who)
        if self.chance.random() < 0.1:
            self.later(0.5, "give up", who)  # is cancelled
        self.watch()

    def would_be_stuck(self, newcomer: Caller) -> bool:
        """If ``newcomer`` waited for one more, could anybody who waits ever be served?

        The graph of who holds and who waits, reduced: who does not wait will be done some day, and so will whoever is
        served, and then what they hold serves others.
        """
        if not newcomer.holds:
            return False
        waiting = {newcomer, *itertools.chain(*self.lines.values())}
        free = sum(owner not in waiting for owner in self.owner.values())
        served = 0
        while free and waiting:
            free += waiting.pop().holds
            served += 1
        assert not (served and waiting), "all or nobody: any slot will do"
        return not served

    # -- no longer waiting -------------------------------------------------------------------------------------

    def send_home(self, who: Caller, why: str) -> None:
        del self.lines[who.lane][who]  # KeyError: was not in line, or is taken out twice
        self.count(why, who)
        who.turn += 1
        self.at(self.now, "finish", who)

    def give_up(self, who: Caller) -> None:
        if self.admission.leave(who, self.now):
            self.send_home(who, "gave up")
            return
        # Served a moment before: what it was given goes on to the next.
        assert who not in self.lines[who.lane]
        assert who.given is not None
        self.count("served too late", who)
        who.slots.append(who.given)
        who.given = None
        self.finish(who)

    def come_for_it(self, who: Caller) -> None:
        assert who.given is not None
        slot, who.given = who.given, None
        self.take(who, slot, connected=self.chance.random() < 0.9)

    # -- giving back -------------------------------------------------------------------------------------------

    def finish(self, who: Caller) -> None:
        assert who not in self.lines[who.lane]
        who.turn += 1
        while who.slots:
            self.hand_on(who, who.slots.pop(), lost=self.chance.random() < 0.1)

    def connect_fails(self, who: Caller) -> None:
        self.hand_on(who, who.slots.pop(), lost=True)
        self.finish(who)

    def hand_on(self, giver: Caller | None, slot: int, *, lost: bool) -> None:
        admission = self.admission
        assert self.owner[slot] is giver
        over = admission.limit is not None and admission.total > admission.limit
        before = any(self.lines.values())
        shed, who = admission.serve(self.now, lost=lost)
        self.send_shed_home(shed)
        if who is not None:
            self.check_order(who)
            del self.lines[who.lane][who]
            self.count("served", who)
            self.seen["handed on above the limit"] += lost and over
            assert who.given is None
            who.given = slot
            self.owner[slot] = who
            self.later(0.1, "come for it", who)
        elif lost:
            self.seen["ceased to be"] += 1
            assert over or not before, "somebody could have used it"
            del self.owner[slot]
        else:
            assert not before
            self.owner[slot] = None
            self.idle.append(slot)

    def check_order(self, who: Caller) -> None:
        line = next(filter(None, self.lines.values()))
        if who.lane is Lane.HOLDING or not self.admission.overloaded()[who.lane]:
            # (Of a line that is empty now the verdict is over, but then there was only one to choose.)
            assert who is next(iter(line))
            self.seen["first come first served"] += 1
        else:
            assert who is next(reversed(line))
            self.seen["newest first"] += 1

    # -- nothing comes back ------------------------------------------------------------------------------------

    def watch(self) -> None:
        """As a pool's timer: it is set when somebody joins, unless it is set already."""
        soon = self.admission.next_stall(self.now)
        if soon is not None and not self.watched:
            assert soon >= TARGET / 2
            self.watched = True
            self.at(self.now + soon, "look")

    def look(self) -> None:
        self.watched = False
        shed = self.admission.stalled(self.now)
        self.seen["shed in a stall"] += len(shed)
        self.send_shed_home(shed)
        self.watch()

    def send_shed_home(self, shed: list[Caller]) -> None:
        for gone in shed:
            waited = self.now - gone.since
            too_late = gone.patience is not None and waited > gone.patience / 2
            assert too_late or (waited > 2 * TARGET and gone.lane is not Lane.HOLDING)
            assert gone is next(iter(self.lines[gone.lane])), "who has waited longest goes first"
            self.send_home(gone, "pool-shed")
        assert not shed or any(self.lines.values()), "the last in line stays"

    # -- what befalls the pool ---------------------------------------------------------------------------------

    def change_limit(self) -> None:
        self.admission.limit = self.chance.choice(LIMITS)
        while self.admission.waiting and self.admission.try_take():
            slot = next(self.serial)
            self.owner[slot] = None
            self.hand_on(None, slot, lost=True)
        if self.open:
            self.later(8.0, "change limit")

    def close_idle(self) -> None:
        if self.idle:
            self.hand_on(None, self.idle.pop(), lost=True)
        if self.open:
            self.later(10.0, "close idle")

    def dismiss(self) -> None:
        for gone in self.admission.dismiss():
            self.send_home(gone, "dismissed")
        assert not any(self.lines.values())
        if self.open:
            self.later(60.0, "dismiss")

    # -- all of it ---------------------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        self.at(0.0, "arrive")
        for what in ("change limit", "close idle", "dismiss"):
            self.later(20.0, what)
        while self.steps < steps:
            self.step()
        # Nobody has been forgotten: without newcomers, everybody is done in the end and gives everything back.
        self.open = False
        while self.events:
            self.step()
        assert set(self.owner.values()) <= {None}
        assert len(self.idle) == len(self.owner) == self.admission.total

    def step(self) -> None:
        self.now, _, what, who, turn = heapq.heappop(self.events)
        if who is None:
            self.to_all[what]()
        elif who.turn != turn:
            return
        elif who.holds and what != "give up" and self.now % QUIET < STALL:
            self.later(STALL - self.now % QUIET, what, who)
            return
        else:
            self.to_one[what](who)
        self.steps += 1
        self.check()

    def check(self) -> None:
        admission, lines = self.admission, self.lines
        assert admission.total == len(self.owner), "no slot is lost or invented"
        assert admission.depths() == tuple(map(len, lines.values()))
        assert admission.waiting == sum(admission.depths())
        assert admission.waiting - len(lines[Lane.HOLDING]) <= PLACES
        if admission.waiting:
            assert not self.idle
            assert admission.limit is not None
            assert admission.total >= admission.limit
            assert not all(owner in lines[owner.lane] for owner in self.owner.values() if owner is not None)


OFTEN = {
    *("served", "first come first served", "newest first", "gave up", "shed in a stall", "ceased to be"),
    *("dismissed", "served too late"),
    *(f"{what}, a holder" for what in ("served", "gave up", "pool-shed", "pool-would-be-late")),
    *(why.value for why in Refusal),
    "displaced by its like",
}
SOMETIMES = {"dismissed, a holder", "served too late, a holder", "handed on above the limit"}
NEVER = {"pool-saturated, a holder", "pool-displaced, a holder"}


@pytest.mark.parametrize("seed", range(3))
def test_an_hour_in_virtual_time(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.run(60_000)
    assert {what: simulation.seen[what] for what in OFTEN if simulation.seen[what] < 30} == {}
    assert {what: simulation.seen[what] for what in SOMETIMES if not simulation.seen[what]} == {}
    assert {what: simulation.seen[what] for what in NEVER if simulation.seen[what]} == {}


@pytest.mark.nightly
def test_a_day_in_virtual_time() -> None:
    Simulation(4).run(1_500_000)


def test_two_simulations_of_one_seed_are_the_same() -> None:
    twins = [Simulation(9), Simulation(9)]
    for twin in twins:
        twin.run(2_000)
    assert twins[0].seen == twins[1].seen
    assert twins[0].now == twins[1].now
