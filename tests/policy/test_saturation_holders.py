"""Callers who hold a connection and want one more: ahead of all, and told when nobody could ever be served."""

from __future__ import annotations

import pytest

from resilientdb.policy.saturation import Admission, Lane, Refusal

TARGET, INTERVAL = 0.05, 0.2
NAMED = [lane for lane in Lane if lane is not Lane.HOLDING]


class Waiter:
    def __init__(self, holds: int = 0) -> None:
        self.holds = holds
        self.lane = Lane.CRITICAL
        self.since = 0.0
        self.remaining: float | None = None


def make(limit: int = 5, max_waiting: int | None = 4) -> Admission[Waiter]:
    """All slots are taken."""
    admission: Admission[Waiter] = Admission(
        limit=limit, max_waiting=max_waiting, target=TARGET, interval=INTERVAL
    )
    while admission.try_take():
        pass
    return admission


# -- the line for them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", NAMED)
def test_who_holds_is_served_first_whatever_its_criticality(named: Lane) -> None:
    admission = make()
    plus, first, second = Waiter(), Waiter(holds=1), Waiter(holds=2)
    admission.join(plus, Lane.CRITICAL_PLUS)
    assert admission.join(first, named) is None
    assert admission.join(second, named) is None
    assert first.lane is Lane.HOLDING
    assert admission.depths() == (2, 1, 0, 0, 0)
    assert [admission.serve()[1] for _ in range(3)] == [first, second, plus]


def test_there_is_room_for_them_in_a_full_line_and_they_take_nobodys_place() -> None:
    admission = make(max_waiting=4)
    for _ in range(4):
        admission.join(Waiter(), Lane.CRITICAL)
    assert admission.join(Waiter(holds=1), Lane.SHEDDABLE) is None
    assert admission.join(Waiter(), Lane.CRITICAL) is Refusal.FULL
    admission.serve()
    admission.serve()
    assert admission.depths() == (0, 0, 3, 0, 0)
    assert admission.join(Waiter(holds=1), Lane.CRITICAL) is None
    assert admission.join(Waiter(), Lane.CRITICAL) is None, "the holder is not counted"
    assert admission.join(Waiter(), Lane.CRITICAL) is Refusal.FULL


@pytest.mark.parametrize("named", NAMED)
def test_nobody_makes_them_leave(named: Lane) -> None:
    admission = make(max_waiting=1)
    holder = Waiter(holds=1)
    admission.join(holder, Lane.SHEDDABLE)
    for _ in range(3):
        answer = admission.join(Waiter(), named)
        assert answer in (None, Refusal.FULL)
    assert admission.serve(100.0)[1] is holder


def test_where_nobody_may_wait_they_may_not_either() -> None:
    admission = make(max_waiting=0)
    assert admission.join(Waiter(holds=1)) is Refusal.FULL
    assert admission.join(Waiter(holds=5)) is Refusal.FULL
    assert admission.waiting == 0


def test_their_line_is_never_overloaded() -> None:
    admission = make(limit=9, max_waiting=None)
    holders = [Waiter(holds=1) for _ in range(8)]
    for holder in holders:
        admission.join(holder, now=0.0)
    served = []
    for now in range(1, 9):
        assert admission.stalled(float(now)) == []
        shed, who = admission.serve(float(now))
        assert shed == []
        served.append(who)
        assert not any(admission.overloaded())
    assert served == holders, "first come first served"


def test_only_their_own_deadline_ends_their_wait() -> None:
    admission = make(max_waiting=None)
    for now in (0.0, 1.0):
        admission.join(Waiter(), now=now)
        admission.serve(now + 1.0)  # one place a second
    late, patient, other = Waiter(holds=1), Waiter(holds=1), Waiter()
    assert admission.join(late, now=2.0, remaining=1.5) is None, "the first in line finds out"
    assert admission.join(patient, now=2.0) is None
    assert admission.join(other, Lane.CRITICAL_PLUS, now=2.0) is None
    assert admission.join(Waiter(holds=1), now=2.0, remaining=1.5) is Refusal.HOPELESS
    assert admission.serve(3.5) == ([late], patient)


# -- a deadlock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_who_would_complete_the_circle_is_refused(limit: int) -> None:
    admission = make(limit)
    for _ in range(limit - 1):
        assert admission.join(Waiter(holds=1)) is None
    assert admission.join(Waiter(holds=1)) is Refusal.DEADLOCK
    assert admission.waiting == limit - 1
    assert admission.join(Waiter()) is None, "who holds nothing completes no circle"


def test_a_caller_who_holds_everything_waits_for_itself() -> None:
    admission = make(limit=3)
    assert admission.join(Waiter(holds=2)) is None
    assert make(limit=3).join(Waiter(holds=3)) is Refusal.DEADLOCK


def test_it_is_told_though_its_time_would_be_over_anyway() -> None:
    admission = make(limit=2, max_waiting=None)
    for now in (0.0, 10.0):
        admission.join(Waiter(), now=now)
        admission.serve(now + 10.0)
    admission.join(Waiter(holds=1), now=20.0)
    assert admission.join(Waiter(holds=1), now=20.0, remaining=0.1) is Refusal.DEADLOCK


def test_there_is_none_while_somebody_else_has_a_slot() -> None:
    admission = make(limit=3)
    first, second = Waiter(holds=1), Waiter(holds=1)
    assert admission.join(first) is None
    assert admission.join(second) is None
    # The third comes back: one of the two has two slots now, and works.
    assert admission.serve(lost=True)[1] is first
    assert admission.join(Waiter()) is None
    first.holds = 2
    assert admission.join(first) is Refusal.DEADLOCK


def test_there_is_none_where_a_slot_may_still_be_made() -> None:
    admission = make(limit=1)
    admission.limit = 2
    assert admission.join(Waiter(holds=1)) is None


@pytest.mark.parametrize("how", ["leave", "dismiss", "late"])
def test_who_waits_no_longer_holds_nobody_up(how: str) -> None:
    admission = make(limit=3, max_waiting=None)
    first, second = Waiter(holds=1), Waiter(holds=1)
    admission.join(first, remaining=1.0)
    admission.join(second)
    assert admission.join(Waiter(holds=1)) is Refusal.DEADLOCK
    if how == "leave":
        assert admission.leave(first)
        assert not admission.leave(first)
    elif how == "dismiss":
        assert admission.dismiss() == [first, second]
    else:
        assert admission.stalled(1.1) == [first]
    assert admission.join(Waiter(holds=1), now=2.0) is None
    answer = admission.join(Waiter(holds=1), now=2.0)
    assert answer is (None if how == "dismiss" else Refusal.DEADLOCK)


def test_a_lowered_limit_makes_none() -> None:
    """The last slot that is not held by somebody who waits is handed on, though there is one too many."""
    admission = make(limit=3)
    first, second = Waiter(holds=1), Waiter(holds=1)
    admission.join(first)
    admission.join(second)
    admission.limit = 1
    assert admission.serve(lost=True) == ([], first)
    assert admission.total == 3
    # It gives both back. While it has one of them, the other may cease to be.
    assert admission.serve(lost=True) == ([], None)
    assert admission.serve(lost=True) == ([], second)
    assert admission.total == 2


def test_above_a_lowered_limit_a_slot_ceases_to_be_while_others_are_at_work() -> None:
    admission = make(limit=4)
    holder = Waiter(holds=1)
    admission.join(holder)
    admission.limit = 2
    assert [admission.serve(lost=True) for _ in range(2)] == [([], None), ([], None)]
    assert admission.serve(lost=True) == ([], holder)
    assert admission.total == 2


def test_the_sum_is_that_of_what_was_told_when_they_joined() -> None:
    """Whatever the owner does to its waiters meanwhile."""
    admission = make(limit=3)
    first, second = Waiter(holds=1), Waiter(holds=1)
    admission.join(first)
    first.holds = 9
    admission.leave(first)
    admission.join(second)
    assert admission.join(Waiter(holds=1)) is None
    assert admission.join(Waiter(holds=1)) is Refusal.DEADLOCK
