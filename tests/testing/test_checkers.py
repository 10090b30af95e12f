"""Histories and the ledger check: each kind of violation must be seen, and nothing else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from resilientdb.testing import FakeClock, History, HistoryViolation, Outcome, check_ledger

if TYPE_CHECKING:
    from collections.abc import Hashable


def _history(**outcomes: Outcome | None) -> History:
    history = History()
    for element, outcome in outcomes.items():
        number = history.invoke(element)
        if outcome is not None:
            history.complete(number, outcome)
    return history


def test_a_faithful_ledger_is_valid() -> None:
    history = _history(a=Outcome.OK, b=Outcome.FAIL, c=Outcome.INFO, d=Outcome.INFO, e=None)
    report = check_ledger(history, ["a", "c"])
    report.raise_for_violations()
    assert report.valid
    assert (report.attempted, report.acknowledged, report.failed, report.unknown) == (5, 1, 1, 3)
    assert (report.unknown_present, report.final) == (1, 2)
    assert report.unknown_share == 0.6


@pytest.mark.parametrize(
    ("final", "field", "message"),
    [
        ([], "lost", "acknowledged but not there: a"),
        (["a", "z"], "unexpected", "never attempted: z"),
        (["a", "b"], "resurrected", "certainly not done: b"),
        (["a", "a"], "duplicated", "more than once: 'a' x 2"),
        (["a", "c", "c", "c"], "duplicated", "more than once: 'c' x 3"),
    ],
)
def test_each_violation_is_found_alone(final: list[str], field: str, message: str) -> None:
    report = check_ledger(_history(a=Outcome.OK, b=Outcome.FAIL, c=Outcome.INFO), final)
    assert not report.valid
    found = {name for name in ("lost", "unexpected", "resurrected", "duplicated") if getattr(report, name)}
    assert found == {field}
    with pytest.raises(HistoryViolation, match=message):
        report.raise_for_violations()


def test_several_violations_are_all_told() -> None:
    report = check_ledger(_history(a=Outcome.OK, b=Outcome.FAIL), ["b", "b", "z"])
    assert len(report.violations()) == 4


def test_an_element_that_was_attempted_again_counts_once() -> None:
    history = History()
    for outcome in (Outcome.INFO, Outcome.OK):
        history.complete(history.invoke("a"), outcome)
    for outcome in (Outcome.FAIL, Outcome.INFO):
        history.complete(history.invoke("b"), outcome)
    report = check_ledger(history, ["a", "b"])
    assert report.valid
    assert (report.attempted, report.acknowledged, report.unknown) == (2, 1, 1)


def test_one_column_rows_stand_for_their_value() -> None:
    assert check_ledger(_history(a=Outcome.OK), [("a",)]).valid
    history = History()
    history.complete(history.invoke(("a",)), Outcome.OK)
    rows: list[Hashable] = [("a",)]
    assert check_ledger(history, rows).valid


def test_an_empty_run() -> None:
    report = check_ledger(History(), [])
    assert report.valid
    assert report.unknown_share == 0.0


def test_an_exception_is_unknown_unless_it_is_certain() -> None:
    history = History()
    with history.operation("done"):
        pass
    with pytest.raises(TimeoutError), history.operation("unknown", certain=(ConnectionRefusedError,)):
        raise TimeoutError("silence")
    with (
        pytest.raises(ConnectionRefusedError),
        history.operation("refused", certain=(ConnectionRefusedError,)),
    ):
        raise ConnectionRefusedError
    assert [operation.outcome for operation in history.operations] == [Outcome.OK, Outcome.INFO, Outcome.FAIL]
    assert history.operations[1].error == "TimeoutError: silence"
    assert history.count(Outcome.INFO) == 1


def test_an_operation_ends_once() -> None:
    history = History()
    number = history.invoke("a")
    history.complete(number, Outcome.OK)
    with pytest.raises(ValueError, match="already ended"):
        history.complete(number, Outcome.FAIL)


def test_times_are_the_clocks_and_slow_operations_are_found() -> None:
    clock = FakeClock()
    history = History(clock=clock)
    quick, slow, _hung = (history.invoke(name) for name in ("quick", "slow", "hung"))
    clock.advance(0.5)
    history.complete(quick, Outcome.OK)
    clock.advance(1.0)
    history.complete(slow, Outcome.OK)
    assert [operation.seconds for operation in history.operations] == [0.5, 1.5, None]
    assert [operation.id for operation in history.slower_than(1.0)] == ["slow", "hung"]


def test_threads_may_share_a_history() -> None:
    history = History()

    def work(worker: int) -> None:
        for number in range(200):
            with history.operation((worker, number)):
                pass

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history) == 1600
    report = check_ledger(history, [(worker, number) for worker in range(8) for number in range(200)])
    assert report.valid
    assert report.acknowledged == 1600
