"""What the caller has said about the work in hand: deadline, intent, criticality, and the request's record.

Kept in context variables, because pool hooks receive no arguments: they follow a task through ``await``,
through SQLAlchemy's greenlets and into threads started with a copied context. Each is a context manager
*and* a decorator, for plain functions and for ``async def``.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast

from resilientdb.errors import ConfigurationError
from resilientdb.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = [
    "Criticality",
    "Deadline",
    "RequestRecord",
    "criticality",
    "current_criticality",
    "current_deadline",
    "current_record",
    "deadline",
    "innermost_deadline",
    "is_read_only",
    "read_only",
    "recording",
]

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V")

Criticality = Literal["critical_plus", "critical", "sheddable_plus", "sheddable"]
CRITICALITIES: tuple[Criticality, ...] = ("critical_plus", "critical", "sheddable_plus", "sheddable")
"""Most critical first; each has its line (``policy.saturation.Lane``)."""


@dataclass(eq=False, slots=True)
class Deadline:
    """A moment on the monotonic clock after which nobody wants the answer. Compared by identity."""

    expires_at: float
    seconds: float
    """How long it was when it was set; for messages."""
    ended: bool = False
    """Whether the block it was set for has been left: it binds nothing any more."""
    outer: Deadline | None = None
    """The one it was set inside of, which goes on binding what outlives this one."""

    def is_in_force(self) -> bool:
        return not self.ended

    def remaining(self, now: float | None = None) -> float:
        """Seconds left, negative once it has passed."""
        return self.expires_at - (monotonic() if now is None else now)


@dataclass(eq=False, slots=True)
class RequestRecord:
    """What one request did to the pools; filled in by the pools, read by the web edge. Seconds."""

    connections: int = 0
    """Checkouts."""
    waits: int = 0
    """Checkouts that had to wait in line."""
    wait_time: float = 0.0
    hold_time: float = 0.0
    """From checkout to checkin, of the connections given back so far."""
    route: str | None = None
    """What was asked for, for those who look at who holds what; the web edge says ``GET /orders/7``. An
    application that knows better (``GET /orders/{id}``) may say so at any time."""
    began: float = field(default_factory=monotonic)
    """On the monotonic clock."""


_deadline: ContextVar[Deadline | None] = ContextVar("resilientdb_deadline", default=None)
_read_only: ContextVar[bool] = ContextVar("resilientdb_read_only", default=False)
_criticality: ContextVar[Criticality] = ContextVar("resilientdb_criticality", default="critical")
_record: ContextVar[RequestRecord | None] = ContextVar("resilientdb_record", default=None)

is_read_only = _read_only.get
"""Whether the caller has said that this work only reads."""
current_criticality = _criticality.get
current_record = _record.get
"""The record of the request in hand, or None outside one."""


innermost_deadline = _deadline.get
"""The innermost deadline, in force or ended; None: there is none at all. For those who ask at every statement."""


def current_deadline() -> Deadline | None:
    """The innermost deadline in force, or None.

    A task or thread that was started inside a block with a copy of its context still has the block's deadline when
    the block has ended: then it has that of the block around it.
    """
    found = _deadline.get()
    while found is not None and found.ended:
        found = found.outer
    return found


class _Scope(Generic[V]):
    """A context variable set for a block. Each entry has its own token, so one object may be entered again, and
    by several tasks and threads at once."""

    def __init__(self, variable: ContextVar[V]) -> None:
        self._variable = variable
        self._tokens: list[Token[V]] = []

    def _value(self) -> V:
        raise NotImplementedError

    def _again(self) -> _Scope[V]:
        """A fresh scope of the same meaning: a decorated function may run in many tasks at once."""
        raise NotImplementedError

    def __enter__(self) -> V:
        value = self._value()
        self._tokens.append(self._variable.set(value))
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for token in reversed(tuple(self._tokens)):
            try:
                self._variable.reset(token)
            except ValueError:
                continue  # another task's or thread's, which is inside the same object
            self._tokens.remove(token)
            return
        raise RuntimeError(f"{type(self).__name__} is left in another context than it was entered in")

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator: what it yields to would run outside the scope; "
                "use the context manager inside it"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def in_scope(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self._again():
                    return await function(*args, **kwargs)

            return cast("Callable[P, R]", in_scope)

        @functools.wraps(function)
        def in_scope_sync(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._again():
                return function(*args, **kwargs)

        return in_scope_sync


class deadline(_Scope["Deadline | None"]):  # noqa: N801 - used as a verb: with deadline(0.8):
    """Bounds everything the block asks of a database: waiting, connecting, statements and retries together.

    ``seconds`` from entry; None sets no bound of its own. Nested deadlines only shrink: an inner, later one
    has no effect. Past it, ``DeadlineExceeded``. Raises ``ConfigurationError`` for a negative or non-numeric
    value.
    """

    def __init__(self, seconds: float | None) -> None:
        given: object = seconds
        if given is not None and (
            isinstance(given, bool) or not isinstance(given, int | float) or not given >= 0
        ):
            raise ConfigurationError(
                f"deadline must be a number of seconds, 0 or more, or None; got {seconds!r}",
                key="deadline",
                value=seconds,
            )
        super().__init__(_deadline)
        self._seconds = seconds

    def _value(self) -> Deadline | None:
        outer = current_deadline()
        if self._seconds is None:
            return outer
        expires_at = monotonic() + self._seconds
        if outer is not None and outer.expires_at <= expires_at:
            return outer
        return Deadline(expires_at, self._seconds, outer=outer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mine = _deadline.get()
        super().__exit__(kind, error, trace)
        if mine is not None and mine is not current_deadline():
            mine.ended = True

    def _again(self) -> deadline:
        return deadline(self._seconds)


class read_only(_Scope[bool]):  # noqa: N801
    """Says that the block only reads, so a replica may serve it. Writing inside it is an error on a replica."""

    def __init__(self) -> None:
        super().__init__(_read_only)

    def _value(self) -> bool:
        return True

    def _again(self) -> read_only:
        return read_only()


class criticality(_Scope[Criticality]):  # noqa: N801
    """Says how much the block matters when there is not room for all: one of ``CRITICALITIES``."""

    def __init__(self, level: Criticality) -> None:
        if level not in CRITICALITIES:
            raise ConfigurationError(
                f"criticality must be one of {', '.join(CRITICALITIES)}; got {level!r}",
                key="criticality",
                value=level,
            )
        super().__init__(_criticality)
        self._level = level

    def _value(self) -> Criticality:
        return self._level

    def _again(self) -> criticality:
        return criticality(self._level)


class recording(_Scope["RequestRecord | None"]):  # noqa: N801
    """Collects what the block does to the pools into one ``RequestRecord``.

    ``route`` names the work in it, for whoever looks at what holds connections: a job, a command, a request.
    """

    def __init__(self, route: str | None = None) -> None:
        super().__init__(_record)
        self._route = route

    def _value(self) -> RequestRecord:
        return RequestRecord(route=self._route)

    def _again(self) -> recording:
        return recording(self._route)
