"""Nothing comes back: who waits is sent away all the same, by a timer that is set when somebody joins."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.policy.saturation import Admission, Lane, Refusal

TARGET, INTERVAL = 0.05, 1.0
NOTICED = TARGET + INTERVAL


class Waiter:
    def __init__(self, holds: int = 0) -> None:
        self.holds = holds
        self.lane = Lane.CRITICAL
        self.since = 0.0
        self.remaining: float | None = None


class Watched:
    """A pool whose slots never come back, and its timer, in virtual time."""

    def __init__(self, *, interval: float = INTERVAL) -> None:
        self.admission: Admission[Waiter] = Admission(
            limit=5, max_waiting=None, target=TARGET, interval=interval
        )
        while self.admission.try_take():
            pass
        self.now = 0.0
        self.timer: float | None = None
        self.looks = 0
        self.waited: dict[Waiter, float] = {}
        """Who was sent away, after how long."""

    def join(self, lane: Lane = Lane.CRITICAL, *, holds: int = 0, remaining: float | None = None) -> Waiter:
        waiter = Waiter(holds)
        assert self.admission.join(waiter, lane, self.now, remaining) is None
        if self.timer is None:
            self.set_timer()
        return waiter

    def set_timer(self) -> None:
        soon = self.admission.next_stall(self.now)
        assert soon is None or soon >= TARGET / 2
        self.timer = None if soon is None else self.now + soon

    def until(self, when: float) -> None:
        while self.timer is not None and self.timer <= when:
            self.now = self.timer
            self.looks += 1
            for gone in self.admission.stalled(self.now):
                self.waited[gone] = self.now - gone.since
            self.set_timer()
        self.now = when


def test_a_stall_is_noticed_after_target_and_interval_and_all_but_the_newest_are_sent_away() -> None:
    pool = Watched()
    waiters = [pool.join() for _ in range(10)]
    pool.until(NOTICED - 0.01)
    assert not pool.waited
    pool.until(NOTICED + TARGET)
    assert list(pool.waited) == waiters[:-1]
    assert pool.admission.overloaded()[Lane.CRITICAL]
    pool.until(60.0)
    assert list(pool.waited) == waiters[:-1], "the newest finds out when it is over"
    assert pool.admission.leave(waiters[-1])


@pytest.mark.parametrize("rate", [3, 20, 200])
def test_who_comes_during_a_stall_is_told_soon(rate: int) -> None:
    pool = Watched()
    came = []
    for number in range(10 * rate):
        pool.until(number / rate)
        came.append(pool.join())
    pool.until(10.5)
    assert set(came[:-1]) <= set(pool.waited)
    assert max(pool.waited.values()) <= NOTICED + 2 * TARGET
    late = [waited for waiter, waited in pool.waited.items() if waiter.since > NOTICED]
    if rate > 1 / TARGET:
        assert max(late) <= 5 * TARGET
    assert pool.looks <= 10.5 / (TARGET / 2)


def test_the_timer_rests_as_long_as_nothing_can_have_changed() -> None:
    pool = Watched()
    pool.join()
    pool.until(60.0)
    assert pool.looks <= 60 / (2 * TARGET) + 3, "an only waiter"
    idle = Watched()
    assert idle.admission.next_stall(0.0) is None
    waiter = idle.join()
    assert idle.admission.leave(waiter)
    assert idle.admission.next_stall(0.0) is None, "nobody waits"


def test_who_is_overdue_already_is_seen_to_at_once() -> None:
    """The verdict was reached as somebody was served, and then nothing came any more."""
    pool = Watched()
    waiters = [pool.join() for _ in range(4)]
    pool.admission.serve(1.0)
    pool.admission.serve(2.5)
    assert pool.admission.overloaded()[Lane.CRITICAL]
    assert pool.admission.next_stall(2.5) == TARGET / 2
    assert pool.admission.stalled(2.5) == waiters[1:2]
    assert pool.admission.next_stall(2.5) == 2 * TARGET, "then not before somebody else can be too old"


def test_where_overload_is_never_called_nobody_watches() -> None:
    pool = Watched(interval=math.inf)
    waiters = [pool.join() for _ in range(3)]
    assert pool.timer is None
    pool.until(1000.0)
    assert pool.admission.depths()[Lane.CRITICAL] == len(waiters)


def test_who_holds_is_not_sent_away_and_its_line_is_not_watched() -> None:
    pool = Watched()
    holders = [pool.join(holds=1) for _ in range(3)]
    assert pool.timer is None
    others = [pool.join(lane) for lane in (Lane.CRITICAL_PLUS, Lane.SHEDDABLE)]
    pool.until(60.0)
    assert set(pool.waited) == set(others)
    assert pool.admission.depths() == (len(holders), 0, 0, 0, 0)


def test_the_newest_of_the_most_critical_stays() -> None:
    pool = Watched()
    first, stays, sheddable = (pool.join(lane) for lane in (Lane.CRITICAL, Lane.CRITICAL, Lane.SHEDDABLE))
    pool.until(5.0)
    assert set(pool.waited) == {first, sheddable}
    assert pool.admission.serve(5.0) == ([], stays)


def test_a_line_that_all_have_given_up_has_not_drained() -> None:
    """Callers with less patience than it takes to notice: only one at a time finds out whether it is over."""
    pool = Watched()
    pool.join()
    pool.until(0.01)
    pool.admission.serve(pool.now)  # a place takes 10 ms, it seems
    first = [pool.join(remaining=1.0) for _ in range(20)]
    pool.until(1.01)
    for waiter in first:
        assert pool.admission.leave(waiter, pool.now)
    pool.until(1.5)
    probe = pool.join(remaining=1.0)
    assert pool.admission.join(Waiter(), Lane.CRITICAL, pool.now, 1.0) is Refusal.HOPELESS
    pool.until(1.7)
    assert pool.admission.overloaded()[Lane.CRITICAL], "as if the line had never been empty"
    assert pool.admission.serve(pool.now) == ([], probe)
    pool.join(remaining=1.0)
    pool.join(remaining=1.0)
    assert not any(pool.admission.overloaded())


@pytest.mark.parametrize("how", ["a pause", "served", "dismissed", "it went for another reason"])
def test_unless_something_speaks_for_it(how: str) -> None:
    pool = Watched()
    pool.join()
    pool.until(0.01)
    pool.admission.serve(pool.now)
    waiters = [pool.join(), pool.join(), pool.join()]
    pool.until(2.0)
    assert pool.admission.overloaded()[Lane.CRITICAL]
    last = waiters[-1]
    if how == "served":
        assert pool.admission.serve(pool.now) == ([], last)
    elif how == "dismissed":
        assert pool.admission.leave(pool.join(), pool.now)
        assert pool.admission.dismiss() == [last]
    else:
        assert pool.admission.leave(last, None if how == "it went for another reason" else pool.now)
    pool.until(pool.now + (1.1 if how == "a pause" else 0.1))
    pool.join(remaining=1.0)
    assert not any(pool.admission.overloaded())
    pool.join(remaining=1.0)


@pytest.mark.parametrize(("interval", "remembered"), [(0.2, 0.2), (1.0, 1.0), (math.inf, 1.0)])
def test_how_long_a_deserted_line_is_remembered(interval: float, remembered: float) -> None:
    pool = Watched(interval=interval)
    pool.join()
    pool.until(0.01)
    pool.admission.serve(pool.now)
    waiter = pool.join()
    pool.until(8.01)
    assert pool.admission.leave(waiter, pool.now)
    expected = [
        pool.admission.expected_wait(Lane.CRITICAL, pool.now + pause)
        for pause in (0.0, remembered * 0.9, remembered * 1.1)
    ]
    assert expected == [
        pytest.approx(4.0),
        pytest.approx(4.0, abs=remembered / 2),
        pytest.approx(0.01),
    ]


def test_who_has_too_little_time_left_goes_with_them() -> None:
    pool = Watched()
    late, patient = pool.join(remaining=0.5), pool.join(remaining=600.0)
    assert pool.admission.stalled(0.4) == []
    assert pool.admission.stalled(0.6) == [late]
    assert pool.admission.leave(patient)


def test_a_slow_line_is_none_that_stands() -> None:
    """Somebody is served every 40 ms, so the oldest has waited longer than the target only now and then."""
    pool = Watched()
    for number in range(250):
        pool.until(number * 0.04)
        pool.join()
        assert pool.admission.serve(pool.now)[0] == []
        pool.join()
        pool.until(number * 0.04 + 0.02)
        assert pool.admission.serve(pool.now)[0] == []
    assert not pool.waited


def test_once_it_is_over_the_line_is_as_before() -> None:
    pool = Watched()
    for number in range(400):
        pool.until(number / 100)
        pool.join()
    assert pool.admission.overloaded()[Lane.CRITICAL]
    stall_over = pool.now
    while pool.admission.waiting:
        pool.until(pool.now + 0.001)
        pool.admission.serve(pool.now)
    assert pool.now - stall_over <= 0.05
    first, second = pool.join(), pool.join()
    assert not any(pool.admission.overloaded())
    assert [pool.admission.serve(pool.now)[1] for _ in range(2)] == [first, second]


@given(
    st.lists(st.tuples(st.floats(0, 0.3), st.sampled_from(Lane), st.booleans()), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_nobody_stands_behind_its_time_whenever_they_come(
    arrivals: list[tuple[float, Lane, bool]], slack: float
) -> None:
    pool = Watched()
    for pause, lane, leaves in arrivals:
        pool.until(pool.now + pause)
        waiter = pool.join(lane)
        if leaves:
            pool.admission.leave(waiter)
    # All lanes have been seen to stand by then, and of each at most the newest of the most critical is left.
    pool.until(pool.now + 2 * (NOTICED + INTERVAL) + slack)
    holding, *others = pool.admission.depths()
    assert sum(others) <= 1
    assert holding == 0 or sum(others) == 0 or others == [0, 0, 0, 0]
