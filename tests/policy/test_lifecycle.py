"""What becomes of a pool's connections: in virtual time, against what is really known of each."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from resilientdb.config import Lifecycle
from resilientdb.policy.lifecycle import Orders, Retirement, Upkeep

START = 1_048_576.0  # far from 0, and times below are multiples of 1/64: no rounding anywhere


class Connection:
    def __init__(self, number: int = 0, since: float = START, retire_at: float = math.inf) -> None:
        self.number = number
        self.since = since
        self.retire_at = retire_at
        self.seen_since = -1.0
        self.idle_from = 0.0
        self.returned_at = since
        """What ``Upkeep`` cannot know."""
        self.asked_at = 0.0

    def __repr__(self) -> str:
        return f"<{self.number}>"


def lifecycle(**values: Any) -> Lifecycle:
    """No limits but those given."""
    none: dict[str, Any] = dict.fromkeys(("max_age", "idle_timeout", "keepalive", "validate_idle"))
    return Lifecycle(**(none | values))


def upkeep(draw: float = 1.0, **values: Any) -> Upkeep:
    return Upkeep(lifecycle(**values), lambda: draw)


def look(
    keeper: Upkeep, now: float, *idle: Connection, dozing: tuple[Connection, ...] = (), **counts: int
) -> Orders[Connection]:
    total = counts.get("total", len(idle) + len(dozing))
    return keeper.look(idle, dozing, total, counts.get("opening", 0), now)


# -- age ------------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1, exclude_max=True), st.sampled_from([1.0, 1800.0]))
def test_connections_end_in_the_last_tenth_of_their_age(draw: float, age: float) -> None:
    at = upkeep(draw, max_age=age).retire_at(START)
    assert START + 0.9 * age <= at <= START + age


def test_connections_opened_together_do_not_end_together() -> None:
    keeper = Upkeep(lifecycle(max_age=1800), random.Random(7).random)
    ends = sorted(keeper.retire_at(START) - START for _ in range(1000))
    assert ends[0] < 1622
    assert ends[-1] > 1798
    assert max(later - sooner for sooner, later in itertools.pairwise(ends)) < 5


def test_without_a_limit_none_is_too_old() -> None:
    assert upkeep().retire_at(START) == math.inf


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, math.inf]), max_size=8),
    st.integers(0, 8),
    st.integers(0, 4),
)
def test_who_is_too_old_is_ordered_out_and_nobody_else(ages: list[float], awake: int, min_size: int) -> None:
    connections = [Connection(number, retire_at=START + left) for number, left in enumerate(ages)]
    keeper = upkeep(max_age=10, min_size=min_size)
    orders = look(keeper, START, *connections[:awake], dozing=tuple(connections[awake:]))
    old = [one for one in connections if one.retire_at <= START]
    assert orders.retire == [(one, Retirement.AGE) for one in old], "min_size does not keep what is too old"
    assert orders.open == min(2, max(0, min_size - (len(ages) - len(old))))


# -- idleness -------------------------------------------------------------------------------------------------------


def test_unused_is_who_is_found_twice_with_the_same_mark() -> None:
    keeper, one = upkeep(idle_timeout=64), Connection()
    assert look(keeper, START, one).retire == []
    assert look(keeper, START + 63, one).retire == []
    one.since = START + 63.5  # used, and back: all at a price of one word written
    assert look(keeper, START + 64, one).retire == []
    assert look(keeper, START + 127, one).retire == []
    assert look(keeper, START + 128, one).retire == [(one, Retirement.IDLE)]


def test_the_longest_unused_go_first_and_min_size_stay_those_in_use_included() -> None:
    keeper = upkeep(idle_timeout=10, min_size=3)
    second, first = Connection(2, START - 1), Connection(1, START - 2)
    assert look(keeper, START, second, first).retire == []
    third = Connection(3, START)
    assert look(keeper, START + 1, second, dozing=(first, third)).retire == []
    for total, expected in ((3, []), (4, [first]), (5, [first, second]), (6, [first, second, third])):
        orders = look(keeper, START + 11, second, dozing=(third, first), total=total)
        assert orders.retire == [(one, Retirement.IDLE) for one in expected]


def test_what_is_closed_for_its_age_is_not_counted_as_kept() -> None:
    keeper = upkeep(idle_timeout=10, max_age=10, min_size=1)
    old, idle = Connection(retire_at=START + 5), Connection()
    look(keeper, START, old, idle)
    orders = look(keeper, START + 10, old, idle)
    assert orders.retire == [(old, Retirement.AGE)]
    assert orders.open == 0


def test_a_pool_kept_whole_is_not_looked_at_for_those_it_keeps() -> None:
    keeper, one = upkeep(idle_timeout=10, validate_idle=1, min_size=1), Connection()
    look(keeper, START, one)
    assert look(keeper, START + 100, dozing=(one,)).next_look is None


# -- doubt ----------------------------------------------------------------------------------------------------------


def test_unused_for_a_moment_is_in_doubt() -> None:
    keeper, one, other = upkeep(validate_idle=0.5), Connection(1), Connection(2)
    assert look(keeper, START, one, other) == Orders(retire=[], ping=[], doze=[], open=0, next_look=0.5)
    other.since = START + 0.25
    assert look(keeper, START + 0.5, one, other) == Orders(
        retire=[], ping=[], doze=[one], open=0, next_look=0.5
    )
    orders = look(keeper, START + 1, other, dozing=(one,))
    assert orders.doze == [other], "who dozes already is not ordered to"
    assert orders.next_look == 0.5, "it may have been taken before the order was carried out"
    assert look(keeper, START + 1.5, dozing=(one, other)).next_look is None


@pytest.mark.parametrize("total", [1, 2])
def test_those_in_use_may_come_back_unseen(total: int) -> None:
    keeper, one = upkeep(validate_idle=0.5), Connection()
    orders = look(keeper, START, dozing=(one,), total=total)
    assert orders.next_look == (0.5 if total > 1 else None)


def test_in_doubt_at_once_or_never() -> None:
    one = Connection()
    assert look(upkeep(validate_idle=0), START, one).doze == [one]
    never = upkeep(idle_timeout=10)
    look(never, START, one)
    assert look(never, START + 9, one).doze == []


def test_where_nothing_dozes_a_tenth_of_the_shortest_limit_is_often_enough() -> None:
    assert look(upkeep(idle_timeout=40, max_age=80), START, Connection()).next_look == 4
    assert look(upkeep(max_age=80), START, total=1).next_look == 8
    assert look(upkeep(max_age=80), START).next_look is None
    assert look(upkeep(), START, Connection(), total=5).next_look is None, "nothing will ever be due"


@given(st.lists(st.integers(0, 31), min_size=1, max_size=40))
def test_however_often_it_is_disturbed_looks_come_together(disturbances: list[int]) -> None:
    """Connections found at 32 different moments within one window are not looked at 32 times in each."""
    keeper = upkeep(validate_idle=0.5)
    connections = []
    for number, moment in enumerate(sorted(disturbances)):
        connections.append(Connection(number))
        orders = look(keeper, START + moment / 64, *connections)
        assert orders.next_look is not None
        assert 0.25 <= orders.next_look <= 0.5


# -- being kept alive -----------------------------------------------------------------------------------------------


def test_an_idle_connection_is_asked_again_and_again_until_it_is_used() -> None:
    keeper, one = upkeep(validate_idle=0.5, keepalive=10, max_age=1000), Connection()
    one.retire_at = START + 1000
    look(keeper, START, one)
    look(keeper, START + 0.5, one)
    now, asked = START + 0.5, []
    for _ in range(4):
        orders = look(keeper, now, dozing=(one,))
        if orders.ping:
            assert orders.ping == [one]
            asked.append(now - START)
        assert orders.next_look is not None
        now += orders.next_look
    assert asked == [10, 20, 30]
    one.since = START + 35
    assert look(keeper, START + 40, dozing=(one,)).ping == []
    assert look(keeper, START + 49, dozing=(one,)).ping == []
    assert look(keeper, START + 55, dozing=(one,)).ping == [one], "late, but once"
    orders = look(keeper, START + 56, dozing=(one,))
    assert (orders.ping, orders.next_look) == ([], 4)


def test_being_asked_is_no_use() -> None:
    keeper, one = upkeep(keepalive=4, idle_timeout=10), Connection()
    ordered = [look(keeper, START + second, one) for second in range(11)]
    assert [second for second, orders in enumerate(ordered) if orders.ping] == [4, 8]
    assert [second for second, orders in enumerate(ordered) if orders.retire] == [10]


def test_nothing_is_ordered_twice_of_one_connection() -> None:
    keeper, one = upkeep(keepalive=4, validate_idle=4, idle_timeout=8), Connection()
    look(keeper, START, one)
    orders = look(keeper, START + 4, one)
    assert (orders.ping, orders.doze) == ([one], [])
    assert look(keeper, START + 5, one).doze == [one]
    orders = look(keeper, START + 8, one)
    assert (orders.retire, orders.ping, orders.doze) == ([(one, Retirement.IDLE)], [], [])


# -- being opened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "opening", "expected"),
    [
        (0, 0, 3),
        (0, 2, 1),
        (0, 3, 0),
        (0, 9, 0),
        (2, 0, 3),
        (3, 0, 2),
        (3, 1, 1),
        (3, 2, 0),
        (5, 0, 0),
        (7, 0, 0),
    ],
)
def test_what_is_missing_is_opened_a_few_at_a_time(total: int, opening: int, expected: int) -> None:
    keeper = upkeep(min_size=5, max_connecting=3)
    assert look(keeper, START, total=total, opening=opening).open == expected


@given(st.lists(st.sampled_from(["now", "in the pause", "after", "opened"]), max_size=60), st.randoms())
def test_pauses_grow_within_their_bounds_and_end(events: list[str], rng: random.Random) -> None:
    keeper = Upkeep(lifecycle(min_size=1), rng.random)
    now, rounds = START, 0
    for event in events:
        if event == "opened":
            keeper.opened()
            rounds = 0
            assert look(keeper, now).open == 1
            continue
        keeper.open_failed(now)
        rounds += 1
        most = min(30.0, 0.1 * 2 ** (rounds - 1))
        orders = look(keeper, now)
        if orders.open:
            continue  # full jitter: as good as none
        pause = orders.next_look
        assert pause is not None
        assert 0 < pause <= most + 1e-9
        if event == "in the pause":
            keeper.open_failed(now + pause / 2)  # begun before it, as the other was
            assert look(keeper, now).next_look == pause
        now += pause + 1e-6
        assert look(keeper, now).open == 1, "it never gives up"


def test_nothing_is_opened_in_a_pause_until_something_could_be() -> None:
    keeper = upkeep(min_size=5)
    keeper.open_failed(START)
    assert [look(keeper, START + late).open for late in (0, 0.0625)] == [0, 0]
    keeper.opened()  # by somebody who needed it
    assert look(keeper, START + 0.0625).open == 2


def test_the_pause_takes_all_of_its_range() -> None:
    pauses = []
    for draw in (0.25, 0.5, 1.0):
        keeper = upkeep(draw, min_size=1)
        now = START
        for _ in range(20):
            keeper.open_failed(now)
            pause = look(keeper, now).next_look
            assert pause is not None
            now += pause + 1
        pauses.append(pause)
    assert pauses == [7.5, 15, 30]


def test_a_pause_is_for_the_background_only() -> None:
    keeper, one = upkeep(min_size=3, validate_idle=0.5), Connection()
    keeper.open_failed(START)
    look(keeper, START, one)
    assert look(keeper, START + 0.0625, one, total=3).next_look == 0.4375, "nothing is missing any more"


# -- all of it ------------------------------------------------------------------------------------------------------

STEPS = st.integers(0, 64 * 8).map(lambda ticks: ticks / 64)


class Pool(RuleBasedStateMachine):
    """A pool that carries the orders out, is looked at when it was said to, and at times besides."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.numbers = itertools.count()
        self.idle: list[Connection] = []
        self.dozing: list[Connection] = []
        self.out: list[Connection] = []
        self.look_at = math.inf
        self.total_then = 0
        self.left_alone: set[Connection] = set()
        """Seen by the last look, and not touched since: nothing of theirs may be due before the next."""

    @initialize(
        max_age=st.sampled_from([None, 16, 64]),
        idle_timeout=st.sampled_from([None, 8, 20]),
        keepalive=st.sampled_from([None, 2, 5]),
        validate_idle=st.sampled_from([None, 0, 0.5, 0.5, 0.5]),
        min_size=st.integers(0, 3),
        rng=st.randoms(use_true_random=False),
    )
    def make(self, rng: random.Random, **values: Any) -> None:
        self.policy = lifecycle(**values)
        self.keeper = Upkeep(self.policy, lambda: rng.randrange(64) / 64)
        self.look()

    @property
    def unused(self) -> list[Connection]:
        return self.idle + self.dozing

    @property
    def total(self) -> int:
        return len(self.unused) + len(self.out)

    @rule(seconds=STEPS)
    def open(self, seconds: float) -> None:
        self.pass_time(seconds)
        one = Connection(next(self.numbers), self.now, self.keeper.retire_at(self.now))
        self.out.append(one)
        self.look()

    @precondition(lambda self: self.unused)
    @rule(seconds=STEPS, data=st.data())
    def take(self, seconds: float, data: st.DataObject) -> None:
        self.pass_time(seconds + 1 / 64)  # no two checkouts of one connection begin at the same moment
        if not self.unused:
            return
        one = data.draw(st.sampled_from(self.unused))
        dozed = one in self.dozing
        (self.dozing if dozed else self.idle).remove(one)
        one.since = self.now
        self.out.append(one)
        self.left_alone.discard(one)
        if dozed:
            self.look()

    @precondition(lambda self: self.out)
    @rule(seconds=STEPS)
    def put_back(self, seconds: float) -> None:
        """Nobody hears of it."""
        self.pass_time(seconds)
        one = self.out.pop(0)
        one.returned_at = self.now
        self.idle.append(one)

    @rule(seconds=STEPS)
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @rule()
    def be_disturbed(self) -> None:
        self.look()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.look_at <= end:
            self.now = self.look_at
            self.look()
        self.now = end

    def look(self) -> None:
        policy, before = self.policy, self.unused
        # next_look has not skipped what was due: all that is found due now has become so now.
        for one in self.left_alone:
            assert one.retire_at >= self.now
            if policy.idle_timeout and self.total_then > policy.min_size:
                assert one.idle_from + policy.idle_timeout >= self.now
            if policy.keepalive:
                assert max(one.idle_from, one.asked_at) + policy.keepalive >= self.now
        orders = self.keeper.look(self.idle, self.dozing, self.total, 0, self.now)
        self.check(orders, before)
        self.carry_out(orders)
        assert orders.next_look is None or orders.next_look > 0
        self.look_at = math.inf if orders.next_look is None else self.now + orders.next_look
        self.left_alone = set(self.unused)
        self.total_then = self.total
        if orders.open:
            self.open_in_background(orders.open)

    def check(self, orders: Orders[Connection], before: list[Connection]) -> None:
        policy = self.policy
        by_reason = {reason: [one for one, why in orders.retire if why is reason] for reason in Retirement}
        assert set(by_reason[Retirement.AGE]) == {one for one in before if one.retire_at <= self.now}
        after_age = self.total - len(by_reason[Retirement.AGE])
        remain = self.total - len(orders.retire)
        assert remain >= min(policy.min_size, after_age), "never below min_size by idleness"
        for one in by_reason[Retirement.IDLE]:
            assert policy.idle_timeout is not None
            assert self.now - one.returned_at >= policy.idle_timeout
        for one in orders.doze:
            assert policy.validate_idle is not None
            assert one in self.idle
            assert self.now - one.returned_at >= policy.validate_idle
        for one in orders.ping:
            assert policy.keepalive is not None
            assert self.now - one.returned_at >= policy.keepalive
        if policy.validate_idle:
            late = 2.5 * policy.validate_idle
            for one in self.idle:
                seen_to = (
                    one in orders.doze or one in orders.ping or one in [gone for gone, _ in orders.retire]
                )
                assert seen_to or self.now - one.returned_at < late
        ordered = [*orders.ping, *orders.doze, *(one for one, _ in orders.retire)]
        assert len(ordered) == len(set(ordered)) <= len(before)
        assert orders.open == min(2, max(0, policy.min_size - remain))

    def carry_out(self, orders: Orders[Connection]) -> None:
        for one, _ in orders.retire:
            (self.idle if one in self.idle else self.dozing).remove(one)
        for one in orders.doze:
            self.idle.remove(one)
            self.dozing.append(one)
        for one in orders.ping:
            one.asked_at = self.now

    def open_in_background(self, count: int) -> None:
        for _ in range(count):
            self.idle.append(Connection(next(self.numbers), self.now, self.keeper.retire_at(self.now)))
        self.look()


TestPool = Pool.TestCase
TestPool.settings = hypothesis.settings(stateful_step_count=40)
