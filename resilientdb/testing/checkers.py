"""Histories as in Jepsen, and what must hold between a history and the final state.

A workload notes each operation before it starts it and how it ended: ``OK`` (acknowledged),
``FAIL`` (certainly not done) or ``INFO`` (unknown: an exception proves nothing unless it is known
to). After the last fault the ledger is read once and compared::

    history = History()
    with history.operation(key, certain=(PoolSaturated,)):
        insert(key)
    ...
    check_ledger(history, primary.query("SELECT k FROM ledger")).raise_for_violations()
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from resilientdb.testing.errors import HistoryViolation

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

__all__ = ["History", "LedgerReport", "Operation", "Outcome", "check_ledger"]

_SHOWN = 10  # elements of each kind in a message; the report has them all


class Outcome(enum.StrEnum):
    """How an operation ended, as far as its client can know."""

    OK = "ok"
    FAIL = "fail"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Operation:
    """One attempt to bring ``id`` into the ledger. Times are the history's clock, in seconds."""

    number: int
    id: Hashable
    invoked_at: float
    completed_at: float | None = None
    outcome: Outcome = Outcome.INFO  # while it is under way nothing is known either
    error: str | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took; None while it is under way."""
        return None if self.completed_at is None else self.completed_at - self.invoked_at


class History:
    """All operations of a run, in the order of their invocation. Safe for threads and tasks.

    The same id may be invoked again (a client that retries by itself): see :func:`check_ledger`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._operations: list[Operation] = []  # guarded by _lock

    def invoke(self, id: Hashable) -> int:  # noqa: A002 - Jepsen's and our own word for it
        """Note that an operation begins; returns its number, for :meth:`complete`."""
        with self._lock:
            number = len(self._operations)
            self._operations.append(Operation(number, id, self._clock()))
            return number

    def complete(self, number: int, outcome: Outcome, error: BaseException | str | None = None) -> Operation:
        """Note how an operation ended. ``ValueError`` if it has ended before."""
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
        with self._lock:
            operation = self._operations[number]
            if operation.completed_at is not None:
                raise ValueError(
                    f"operation {number} ({operation.id!r}) has already ended: {operation.outcome}"
                )
            ended = replace(operation, completed_at=self._clock(), outcome=outcome, error=text)
            self._operations[number] = ended
            return ended

    @contextlib.contextmanager
    def operation(
        self,
        id: Hashable,  # noqa: A002
        *,
        certain: tuple[type[BaseException], ...] = (),
    ) -> Iterator[int]:
        """A block that is one operation: ``OK`` if it ends well, else ``INFO`` (the error passes through).

        ``certain`` are the exceptions that prove that nothing was done (``FAIL``).
        """
        number = self.invoke(id)
        try:
            yield number
        except BaseException as error:
            self.complete(number, Outcome.FAIL if isinstance(error, certain) else Outcome.INFO, error)
            raise
        else:
            self.complete(number, Outcome.OK)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """A copy of all operations so far."""
        with self._lock:
            return tuple(self._operations)

    def __len__(self) -> int:
        with self._lock:
            return len(self._operations)

    def count(self, outcome: Outcome) -> int:
        """How many operations ended so (those under way count as ``INFO``)."""
        return sum(operation.outcome is outcome for operation in self.operations)

    def slower_than(self, seconds: float) -> tuple[Operation, ...]:
        """Operations that took longer, or are under way for longer: what a deadline must leave empty."""
        now = self._clock()
        return tuple(
            operation
            for operation in self.operations
            if (now if operation.completed_at is None else operation.completed_at) - operation.invoked_at
            > seconds
        )


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What :func:`check_ledger` found. The first four fields are violations and should be empty."""

    lost: frozenset[Hashable]
    unexpected: frozenset[Hashable]
    resurrected: frozenset[Hashable]
    duplicated: Mapping[Hashable, int]
    attempted: int
    acknowledged: int
    failed: int
    unknown: int
    unknown_present: int
    final: int

    @property
    def valid(self) -> bool:
        """Whether history and ledger agree."""
        return not (self.lost or self.unexpected or self.resurrected or self.duplicated)

    @property
    def unknown_share(self) -> float:
        """Elements of which the client knows nothing, as a share of those attempted; 0 if there were none."""
        return self.unknown / self.attempted if self.attempted else 0.0

    def violations(self) -> list[str]:
        """One line for each kind of violation, with the first elements."""
        kinds: tuple[tuple[str, Iterable[Hashable], int], ...] = (
            ("acknowledged but not there", self.lost, len(self.lost)),
            ("there but never attempted", self.unexpected, len(self.unexpected)),
            ("there though reported as certainly not done", self.resurrected, len(self.resurrected)),
            (
                "there more than once",
                [f"{element!r} x {count}" for element, count in self.duplicated.items()],
                len(self.duplicated),
            ),
        )
        return [f"{total} {what}: {_some(elements)}" for what, elements, total in kinds if total]

    def raise_for_violations(self) -> None:
        """Raise :class:`HistoryViolation` unless the report is valid."""
        if not self.valid:
            raise HistoryViolation("; ".join(self.violations()) + f" ({self})")

    def __str__(self) -> str:
        return (
            f"attempted {self.attempted}: acknowledged {self.acknowledged}, failed {self.failed},"
            f" unknown {self.unknown} ({self.unknown_share:.1%}, of which {self.unknown_present} are there);"
            f" {self.final} in the ledger"
        )


def check_ledger(history: History | Iterable[Operation], final_rows: Iterable[Hashable]) -> LedgerReport:
    """The set check of Jepsen: ok ⊆ final, final ⊆ attempted, fail ∩ final = ∅, each element at most once.

    ``final_rows`` are the elements found at the end; a driver's one-column rows may be passed as
    they are. An id that was attempted several times is acknowledged if any attempt was, and counts
    as certainly not done only if every attempt does.
    """
    operations = history.operations if isinstance(history, History) else tuple(history)
    outcomes: dict[Hashable, set[Outcome]] = {}
    for operation in operations:
        outcomes.setdefault(operation.id, set()).add(operation.outcome)
    acknowledged = {element for element, seen in outcomes.items() if Outcome.OK in seen}
    failed = {element for element, seen in outcomes.items() if seen == {Outcome.FAIL}}
    unknown = outcomes.keys() - acknowledged - failed
    counts = Counter(_element(row, outcomes) for row in final_rows)
    final = counts.keys()
    return LedgerReport(
        lost=frozenset(acknowledged - final),
        unexpected=frozenset(final - outcomes.keys()),
        resurrected=frozenset(failed & final),
        duplicated={element: count for element, count in counts.items() if count > 1},
        attempted=len(outcomes),
        acknowledged=len(acknowledged),
        failed=len(failed),
        unknown=len(unknown),
        unknown_present=len(unknown & final),
        final=counts.total(),
    )


def _element(row: Hashable, attempted: Mapping[Hashable, object]) -> Hashable:
    """The element in a row: a one-column row stands for its value, unless such tuples were attempted."""
    if isinstance(row, tuple) and len(row) == 1 and row not in attempted:
        value: Hashable = row[0]
        return value
    return row


def _some(elements: Iterable[Hashable]) -> str:
    shown = sorted(str(element) for element in elements)
    more = f", … and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
