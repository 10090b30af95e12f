"""What callers get from a pool under overload: a simulation in virtual time, with the real admission.

Five slots, fifty places, 20 ms a transaction: 250 a second are possible. Clients come at random and want their
answer within a second. What is measured is *goodput*: answers that came in time, as a share of what was possible.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from resilientdb.policy.saturation import Admission, Lane, Refusal

NAMED = (Lane.CRITICAL_PLUS, Lane.CRITICAL, Lane.SHEDDABLE_PLUS, Lane.SHEDDABLE)
SLOTS, PLACES, SERVICE = 5, 50, 0.02
CAPACITY = SLOTS / SERVICE
PATIENCE = 1.0
"""Seconds after which a client no longer wants its answer."""
QUEUE_TIMEOUT = 5.0
"""Seconds after which a waiter leaves whose deadline nobody told the queue: its client has gone long ago."""
NEVER = math.inf
"""As the interval: nothing is ever called overload. What is left is a bounded line, first come first served."""
NOTICED = 1.05
"""Seconds after which a line that stands is called overloaded: target and interval."""
TIMED_OUT = "pool-timeout"


@dataclass(frozen=True, slots=True)
class Stream:
    """Clients of one kind: so many a second, each of whom keeps a slot for so long."""

    rate: float
    lane: Lane = Lane.CRITICAL
    seconds: float = SERVICE
    spread: float = 0.5
    """By which part of that, at most, it is longer or shorter."""
    nested: bool = False
    """Whether it takes a second slot half-way through, and keeps the first."""


@dataclass(eq=False, slots=True)
class Client:
    came: float
    stream: Stream
    work: float
    lane: Lane
    slots: int = 0
    holds: int = 0
    """Of its slots, those that the queue is told of."""
    since: float = 0.0
    remaining: float | None = None
    took: float = math.inf
    """Seconds from coming to the answer."""
    ended: float = math.inf
    refused: str | None = None


class World:
    """Clients, a pool and a database, which is ``slower`` by a factor in a span of time."""

    def __init__(
        self,
        seed: int,
        *streams: Stream,
        interval: float = 1.0,
        deadlines: bool = False,
        watched: bool = False,
        nesting_is_told: bool = True,
        slow: tuple[float, float] = (math.inf, math.inf),
        slower: float = 10.0,
    ) -> None:
        self.chance = random.Random(seed)
        self.admission: Admission[Client] = Admission(limit=SLOTS, max_waiting=PLACES, interval=interval)
        self.deadlines = deadlines
        """Whether the queue is told of the clients' patience."""
        self.watched = watched
        """Whether a timer looks after those who wait while nothing comes back."""
        self.timer_is_set = False
        self.nesting_is_told = nesting_is_told
        self.slow, self.slower = slow, slower
        self.now = 0.0
        self.serial = itertools.count()
        self.events: list[tuple[float, int, str, Client | None]] = []
        self.idle = 0
        self.clients: list[Client] = []
        for stream in streams:
            self.expect(stream)

    def later(self, seconds: float, what: str, who: Client | None = None) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.serial), what, who))

    def expect(self, stream: Stream) -> None:
        seconds = self.chance.expovariate(stream.rate)
        work = stream.seconds * self.chance.uniform(1 - stream.spread, 1 + stream.spread)
        self.later(seconds, "arrive", Client(self.now + seconds, stream, work, stream.lane))

    def serve(self, client: Client) -> None:
        client.slots += 1
        client.holds = client.slots if self.nesting_is_told else 0
        begin, end = self.slow
        seconds = client.work * (self.slower if begin <= self.now < end else 1.0)
        if not client.stream.nested:
            self.later(seconds, "finish", client)
        else:
            self.later(seconds / 2, "ask" if client.slots == 1 else "finish", client)

    def refuse(self, client: Client, why: str) -> None:
        client.refused, client.ended = why, self.now
        self.give_back(client)

    def arrive(self, client: Client) -> None:
        self.expect(client.stream)
        self.clients.append(client)
        self.ask(client)

    def ask(self, client: Client) -> None:
        if self.idle:
            self.idle -= 1
            self.serve(client)
        elif self.admission.try_take():
            self.serve(client)
        else:
            left = PATIENCE - (self.now - client.came) if self.deadlines else None
            answer = self.admission.join(client, client.stream.lane, self.now, left)
            if isinstance(answer, Refusal):
                self.refuse(client, answer.value)
                return
            if answer is not None:
                self.refuse(answer, Refusal.DISPLACED.value)
            self.later(QUEUE_TIMEOUT if left is None else left, "give up", client)
            self.set_timer()

    def give_up(self, client: Client) -> None:
        if self.admission.leave(client, self.now):
            self.refuse(client, TIMED_OUT)

    def finish(self, client: Client) -> None:
        client.took, client.ended = self.now - client.came, self.now
        self.give_back(client)

    def give_back(self, client: Client) -> None:
        while client.slots:
            client.slots -= 1
            gone, served = self.admission.serve(self.now)
            if served is None:
                self.idle += 1
            else:
                self.serve(served)
            for shed in gone:
                self.refuse(shed, Refusal.SHED.value)

    def set_timer(self) -> None:
        soon = self.admission.next_stall(self.now) if self.watched else None
        if soon is not None and not self.timer_is_set:
            self.timer_is_set = True
            self.later(soon, "look")

    def look(self) -> None:
        self.timer_is_set = False
        for shed in self.admission.stalled(self.now):
            self.refuse(shed, Refusal.SHED.value)
        self.set_timer()

    def run(self, seconds: float) -> World:
        actions = {"arrive": self.arrive, "ask": self.ask, "give up": self.give_up, "finish": self.finish}
        while self.events[0][0] < seconds:
            self.now, _, what, client = heapq.heappop(self.events)
            if client is None:
                self.look()
            else:
                actions[what](client)
        return self

    # -- what came of it ---------------------------------------------------------------------------------------

    def arrived(self, begin: float, end: float) -> list[Client]:
        return [client for client in self.clients if begin <= client.came < end]

    def answered(self, begin: float, end: float) -> list[Client]:
        return [client for client in self.clients if begin <= client.ended < end and not client.refused]

    def goodput(self, begin: float, end: float, capacity: float = CAPACITY) -> float:
        """Of what was possible in that time: all who came, or all that the database can do."""
        good = sum(client.took <= PATIENCE for client in self.answered(begin, end))
        return good / min(len(self.arrived(begin, end)), capacity * (end - begin))

    def kept(self, stream: Stream, begin: float = 0, end: float = 19) -> float:
        """The share of those who came then and had their answer in time."""
        came = [client for client in self.arrived(begin, end) if client.stream == stream]
        return sum(client.took <= PATIENCE for client in came) / len(came)

    def p99(self, begin: float, end: float) -> float:
        took = sorted(client.took for client in self.answered(begin, end))
        return took[len(took) * 99 // 100]

    def refused(self, begin: float, end: float) -> Counter[str]:
        return Counter(client.refused for client in self.arrived(begin, end) if client.refused)

    def waits_for_nothing(self, begin: float, end: float) -> list[float]:
        """How long those who came then, and were refused, waited to hear it."""
        return [client.ended - client.came for client in self.arrived(begin, end) if client.refused]


DEADLINES = pytest.mark.parametrize("deadlines", [False, True], ids=["deadlines-unknown", "deadlines-known"])
SEEDS = pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(s, marks=pytest.mark.nightly) for s in range(3, 20))]
)


# -- more clients than the database can serve ---------------------------------------------------------------------


@SEEDS
@DEADLINES
@pytest.mark.parametrize("load", [0.5, 0.8, 1, 2, 5, 10])
def test_under_any_steady_load_the_database_works_for_clients_who_are_still_there(
    load: float, deadlines: bool, seed: int
) -> None:
    """Also one that it can just bear: who is turned away too eagerly then leaves slots with nothing to do."""
    world = World(seed, Stream(load * CAPACITY), deadlines=deadlines).run(20)
    assert world.goodput(0, 20) >= 0.96
    # From the first second on, in which it is not known yet to be more than a burst.
    assert world.p99(0, 3) <= 0.22
    assert world.p99(0, 20) <= 0.22
    if load <= 0.8:
        assert not world.refused(0, 20)


@SEEDS
@pytest.mark.parametrize("load", [2, 5, 10])
def test_making_room_for_the_newer_costs_no_answers(load: float, seed: int) -> None:
    """A second of too much, which is no overload yet: the same number is served as by a line in which all stay, and
    everybody sooner than its longest wait."""
    stream = Stream(load * CAPACITY, spread=0.0)
    room, bare = (World(seed, stream, interval=interval).run(1.0) for interval in (1.0, NEVER))
    assert room.refused(0, 1)[Refusal.DISPLACED.value] > 10
    assert len(room.answered(0, 1)) == len(bare.answered(0, 1))
    assert room.p99(0, 1) <= bare.p99(0, 1) - 0.02


@SEEDS
def test_who_is_refused_is_told_soon(seed: int) -> None:
    waits = World(seed, Stream(5 * CAPACITY)).run(20).waits_for_nothing(0, 19)
    assert len(waits) > 10_000
    assert max(waits) <= 0.3


# -- a database that becomes slow ---------------------------------------------------------------------------------


@SEEDS
@DEADLINES
@pytest.mark.parametrize("load", [0.5, 2, 10])
def test_a_brown_out_is_no_outage(load: float, deadlines: bool, seed: int) -> None:
    """Ten times slower for 15 s: as much as is still possible gets done, and afterwards all is as before."""
    world = World(seed, Stream(load * CAPACITY), deadlines=deadlines, slow=(5, 20)).run(30)
    assert world.goodput(5, 20, CAPACITY / 10) >= 0.9
    assert world.goodput(20.5, 30) >= 0.95
    assert world.p99(20.5, 30) <= 0.3
    for second in range(21, 30):
        assert world.goodput(second, second + 1) >= 0.85


@SEEDS
@pytest.mark.parametrize("spread", [0.0, 0.5], ids=["queries-alike", "queries-differ"])
def test_from_its_first_second_on_nobody_is_served_too_late(spread: float, seed: int) -> None:
    """The queue knows no deadlines, and the interval is not over yet: the line is full, and its oldest make room."""
    stream = Stream(0.5 * CAPACITY, spread=spread)
    world = World(seed, stream, watched=True, slow=(5, 20)).run(30)
    assert world.p99(5, 20) <= 0.85 * PATIENCE
    assert world.goodput(5, 8, CAPACITY / 10) >= 0.9
    assert world.goodput(5, 20, CAPACITY / 10) >= 0.97


@SEEDS
def test_a_bounded_line_alone_turns_it_into_one(seed: int) -> None:
    """The same world without overload control: all the places are taken by clients who have given up. (Once the
    queue knows their deadlines, it need not guess.)"""
    bare = World(seed, Stream(0.5 * CAPACITY), interval=NEVER, slow=(5, 20)).run(30)
    assert bare.goodput(5, 20, CAPACITY / 10) < 0.3
    assert bare.p99(5, 20) > 2 * PATIENCE
    told = World(seed, Stream(0.5 * CAPACITY), interval=NEVER, slow=(5, 20), deadlines=True).run(30)
    assert told.goodput(5, 20, CAPACITY / 10) >= 0.85
    assert told.refused(5, 20)[Refusal.HOPELESS.value] > 100


@SEEDS
def test_after_a_standstill_it_works_again_as_soon_as_the_slots_are_free(seed: int) -> None:
    """A hundred times slower, so that nobody is served in time, and all callers have deadlines: what the queue has
    learned in that minute must not outlive it."""
    world = World(seed, Stream(CAPACITY), deadlines=True, slow=(5, 65), slower=100).run(75)
    longest = 1.5 * SERVICE * 100
    assert world.goodput(65 + longest, 75) >= 0.95


HANG: dict[str, Any] = {"slow": (5.0, 6.0), "slower": 500.0}
"""Whoever is served in that second keeps its slot for at least five: until 10.0 nothing comes back."""


@SEEDS
@DEADLINES
@pytest.mark.parametrize("load", [0.5, 2, 10])
def test_while_it_hangs_everybody_is_told_soon(load: float, deadlines: bool, seed: int) -> None:
    world = World(seed, Stream(load * CAPACITY), deadlines=deadlines, watched=True, **HANG).run(30)
    assert max(world.waits_for_nothing(5, 9.5)) <= NOTICED + 0.2
    # One at a time stays, to find out when it is over: until its own deadline, if it has one.
    assert sum(seconds > 0.3 for seconds in world.waits_for_nothing(6.5, 9.5)) <= 4
    assert world.goodput(20.5, 30) >= 0.95
    assert world.p99(20.5, 30) <= 0.3


@SEEDS
def test_without_a_timer_they_wait_as_long_as_it_hangs(seed: int) -> None:
    """Where so few come that nobody needs their places."""
    stream = Stream(0.04 * CAPACITY)
    bare, watched = (World(seed, stream, watched=watched, **HANG).run(12) for watched in (False, True))
    assert min(client.ended for client in bare.arrived(6, 8)) >= 10
    assert max(watched.waits_for_nothing(6, 8)) <= NOTICED + 0.2


@SEEDS
@DEADLINES
@pytest.mark.parametrize("load", [0.5, 1, 5])
def test_a_timer_does_no_harm_while_the_line_moves(load: float, deadlines: bool, seed: int) -> None:
    stream = Stream(load * CAPACITY)
    world = World(seed, stream, deadlines=deadlines, watched=True, slow=(5, 12)).run(20)
    assert world.goodput(0, 5) >= 0.95
    assert world.goodput(5, 12, CAPACITY / 10) >= 0.9
    assert world.goodput(12.5, 20) >= 0.95


# -- a connection in the hand, another wanted ---------------------------------------------------------------------


@SEEDS
@DEADLINES
@pytest.mark.parametrize("load", [0.5, 1, 2, 5])
def test_transactions_that_need_a_second_connection_get_it_first(
    load: float, deadlines: bool, seed: int
) -> None:
    """A third of all. They keep a slot for as long as they wait: were they to wait behind the others, most slots
    would soon be held by somebody who waits."""
    streams = (Stream(load * CAPACITY * 2 / 3), Stream(load * CAPACITY / 3, nested=True))
    told = World(seed, *streams, deadlines=deadlines, watched=True).run(20)
    bare = World(seed, *streams, deadlines=deadlines, watched=True, nesting_is_told=False).run(20)
    possible = CAPACITY * 6 / 7  # the nested take half as much again
    assert told.goodput(0, 20, possible) >= 0.85
    # At half the load it is a matter of chance how often all slots come to be held so.
    lost = told.goodput(0, 20, possible) - bare.goodput(0, 20, possible)
    assert lost >= (0.02 if load < 1 else 0.25)
    plain, nested = (told.kept(stream) for stream in streams)
    assert nested >= 0.9 * plain, "nor do they fare worse for it"
    assert told.refused(0, 20)[Refusal.DEADLOCK.value] <= 0.01 * len(told.arrived(0, 20))


# -- not all work is alike ----------------------------------------------------------------------------------------


@SEEDS
@DEADLINES
@pytest.mark.parametrize("load", [1, 2, 5])
def test_fast_and_slow_work_together(load: float, deadlines: bool, seed: int) -> None:
    """Nine of ten take 10 ms, the tenth takes 110 ms: on average 20 ms, as before."""
    fast, slow = Stream(0.9 * load * CAPACITY, seconds=0.01), Stream(0.1 * load * CAPACITY, seconds=0.11)
    world = World(seed, fast, slow, deadlines=deadlines).run(20)
    assert world.goodput(0, 20) >= 0.9
    assert world.p99(0, 20) <= 0.4
    # Neither kind is starved for the other's sake.
    served = Counter(client.stream for client in world.answered(0, 20))
    came = Counter(client.stream for client in world.arrived(0, 20))
    assert served[slow] / came[slow] >= 0.8 * served[fast] / came[fast]
    assert served[fast] / came[fast] >= 0.8 * served[slow] / came[slow]


@SEEDS
@DEADLINES
def test_what_matters_most_does_not_feel_an_overload_of_the_rest(deadlines: bool, seed: int) -> None:
    """Twice the load, a quarter of it of each criticality: half can be served, and it is the upper half."""
    streams = [Stream(0.5 * CAPACITY, lane) for lane in NAMED]
    world = World(seed, *streams, deadlines=deadlines).run(30)
    plus, critical, sheddable_plus, sheddable = (world.kept(stream, 2, 29) for stream in streams)
    assert plus >= 0.99
    assert plus >= critical >= 0.85
    assert 0.15 >= sheddable_plus >= sheddable
    assert sheddable <= 0.01
    assert world.goodput(0, 30) >= 0.95


@SEEDS
@DEADLINES
def test_nor_a_brown_out_as_long_as_there_is_room_for_it(deadlines: bool, seed: int) -> None:
    """Ten times slower; critical_plus work takes half of what is left, and five times too much of the rest wants
    the other half."""
    plus, rest = Stream(0.05 * CAPACITY, Lane.CRITICAL_PLUS), Stream(0.45 * CAPACITY, Lane.SHEDDABLE)
    world = World(seed, plus, rest, deadlines=deadlines, slow=(1, 40)).run(30)
    assert world.kept(plus, 2, 29) >= 0.95
    assert world.kept(rest, 2, 29) <= 0.15
