"""Callers, and what each of them saw.

A ``Work`` is what one caller wants; a ``Load`` brings many of them to a stack, at a rate (open loop: callers
arrive whether or not earlier ones were answered, as visitors do) or so many at a time; a ``Call`` is what became
of one. Threads and tasks look the same from here: see ``drivers``.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, overload

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy import Connection

__all__ = ["Call", "Calls", "Load", "Work", "once"]

Body = Callable[["Connection", int], Any]
"""What a caller does with its connection; it is given the call's number. Also run for asynchronous drivers."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one caller wants."""

    body: Body
    commit: bool = False
    """``begin()`` rather than ``connect()``."""
    whole: bool = False
    """By ``run_transaction`` where there is one; plain SQLAlchemy has only ``begin()``."""
    exactly_once: bool | Literal["guarded"] = False
    """By ``run_transaction(exactly_once=...)`` where there is one; plain SQLAlchemy tries again on any error."""
    tries: int = 1
    """How often plain SQLAlchemy does that at most."""
    deadline: float | None = None
    """Seconds from arrival. Plain SQLAlchemy has no deadlines: there it is only what latency is measured by."""
    read_only: bool = False
    cancel_at: int | None = None
    """The task is cancelled when it waits for the so-manieth time; threads cannot be cancelled."""


@dataclass(frozen=True, slots=True)
class Call:
    """What became of one. Times: monotonic seconds. ``due`` is when it should have begun: a caller that was
    kept waiting before it could even start has waited. ``began``: when its thread or task came to run."""

    number: int
    due: float
    began: float
    ended: float
    work: Work
    value: Any = None
    error: BaseException | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def seconds(self) -> float:
        return self.ended - self.due


class Calls(Sequence[Call]):
    """Finished calls, by number."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = sorted(calls, key=lambda call: call.number)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Calls: ...
    def __getitem__(self, index: int | slice) -> Call | Calls:
        return Calls(self._calls[index]) if isinstance(index, slice) else self._calls[index]

    def __len__(self) -> int:
        return len(self._calls)

    def where(self, condition: Callable[[Call], bool]) -> Calls:
        return Calls(filter(condition, self._calls))

    def due(self, since: float, until: float = float("inf")) -> Calls:
        """Those that arrived in this time."""
        return self.where(lambda call: since <= call.due < until)

    @property
    def ok(self) -> Calls:
        return self.where(lambda call: call.ok)

    @property
    def failed(self) -> Calls:
        return self.where(lambda call: not call.ok)

    @property
    def ok_share(self) -> float:
        return len(self.ok) / len(self) if self else 0.0

    @property
    def slowest(self) -> float:
        return max((call.seconds for call in self), default=0.0)

    def quantile(self, share: float) -> float:
        """The latency that this share of the calls did not exceed."""
        ordered = sorted(call.seconds for call in self)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def under_way(self, at: float) -> int:
        """How many were neither answered nor refused at that moment."""
        return sum(call.due <= at < call.ended for call in self)

    def errors(self) -> Counter[str]:
        """How they failed, by class; SQLAlchemy's wrappers with the driver's class behind it."""
        return Counter(_name(call.error) for call in self if call.error is not None)


def _name(error: BaseException) -> str:
    original = getattr(error, "orig", None)
    behind = getattr(original, "__cause__", None) or original
    return type(error).__name__ + (f"({type(behind).__name__})" if behind is not None else "")


class Caller(Protocol):
    """Where a load goes: a stack."""

    def start(self, work: Work, number: int, due: float, done: Callable[[Call], object]) -> None:
        """Begin one call in a thread or task of its own; ``done`` is called from there, once."""


class Load:
    """Brings ``works`` to a stack from its own thread, for the length of a block.

    ``rate``: arrivals a second, evenly spaced; None: as many at once as ``in_flight`` allows, each next one
    when another has ended. With both, an arrival that finds no room is dropped, as by a server's full backlog.
    Leaving the block stops the arrivals (an endless ``works`` is cut short, a finite one without a rate is
    brought to its end) and waits for every caller; ``TimeoutError`` if one is left after ``patience`` seconds.
    """

    def __init__(
        self,
        stack: Caller,
        works: Work | Iterable[Work],
        *,
        rate: float | None = None,
        in_flight: int | None = None,
        patience: float = 45.0,
    ) -> None:
        self._stack = stack
        self._works: Iterator[Work] = itertools.repeat(works) if isinstance(works, Work) else iter(works)
        self._rate = rate
        self._in_flight = in_flight
        self._patience = patience
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._calls: list[Call] = []  # guarded by _changed, as are the counts
        self._started = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._arrive, name="chaos-load", daemon=True)

    @property
    def calls(self) -> Calls:
        """Those that have ended so far."""
        with self._changed:
            return Calls(self._calls)

    @property
    def under_way(self) -> int:
        with self._changed:
            return self._started - len(self._calls)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rate is not None or error is not None:
            self._stop.set()
        self._thread.join(self._patience)
        with self._changed:
            ended = self._changed.wait_for(lambda: len(self._calls) == self._started, self._patience)
            left = self._started - len(self._calls)
        if self._thread.is_alive() or not ended:
            raise TimeoutError(
                f"{left} callers are still under way {self._patience:g} s after the last arrival"
            )

    def join(self) -> None:
        """Wait until all ``works`` have been brought; only of a finite number of them."""
        self._thread.join()

    def _arrive(self) -> None:
        first = time.monotonic()
        for number, work in enumerate(self._works):
            due = time.monotonic()
            if self._rate is not None:
                due = first + number / self._rate
                self._stop.wait(max(0.0, due - time.monotonic()))
            if self._stop.is_set() or not self._take_place():
                if self._stop.is_set():
                    return
                continue
            if self._rate is None:
                due = time.monotonic()
            self._stack.start(work, number, due, self._done)

    def _take_place(self) -> bool:
        with self._changed:
            full = self._in_flight is not None and self._started - len(self._calls) >= self._in_flight
            if full and self._rate is not None:
                self.dropped += 1
                return False
            while self._in_flight is not None and self._started - len(self._calls) >= self._in_flight:
                self._changed.wait(0.05)
                if self._stop.is_set():
                    return False
            self._started += 1
            return True

    def _done(self, call: Call) -> None:
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()


def once(stack: Caller, *works: Work, patience: float = 30.0) -> Calls:
    """Bring these works all at once and wait for them."""
    with Load(stack, works, in_flight=len(works), patience=patience) as load:
        pass
    return load.calls
