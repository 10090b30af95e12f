"""What one option may hold: kind and range, checked for values from code and parsed from text.

A field says it in its annotation: ``max_waiting: Annotated[int | None, Count(minimum=0)] = 50``. Whether
``None`` is allowed is read from the type, so the two cannot disagree.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from typing import Final

__all__ = [
    "REJECTED",
    "Choice",
    "Count",
    "Factory",
    "Flag",
    "Kind",
    "Listeners",
    "Name",
    "Number",
    "Seconds",
    "Strategy",
]

LONGEST_SECONDS: Final = 1_000_000.0
"""Eleven days. Longer ones overflow the C integers of socket options and lock timeouts long after start-up;
``None`` says "no limit"."""

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_LISTENER_METHODS = ("before_call", "failure", "success", "state_change")


class _Rejected:
    def __repr__(self) -> str:
        return "REJECTED"


_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")

REJECTED: Final = _Rejected()
"""Returned by ``check`` and ``parse`` in place of a value that is not allowed."""


class Kind:
    """One kind of value."""

    from_text = True
    """Whether the environment and URLs can hold it."""

    def describe(self) -> str:
        """What is allowed, in words that fit after "must be"."""
        raise NotImplementedError

    def check(self, value: object) -> object:
        """The value in its canonical type, or ``REJECTED``."""
        raise NotImplementedError

    def parse(self, text: str) -> object:
        """The value written as ``text``, not yet checked, or ``REJECTED``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Count(Kind):
    """An int; a bool is not one."""

    minimum: int

    def describe(self) -> str:
        return f"an int, {self.minimum} or more"

    def check(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int) or value < self.minimum:
            return REJECTED
        return int(value)

    def parse(self, text: str) -> object:
        try:
            return int(text)
        except ValueError:
            return REJECTED


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Kind):
    """A finite float between two bounds; an int is taken for one, a bool is not."""

    minimum: float = 0.0
    above: bool = False
    """The minimum itself is excluded."""
    maximum: float = math.inf
    unit: str = "a number"

    def describe(self) -> str:
        low, high = f"{self.minimum:.10g}", f"{self.maximum:.10g}"
        if math.isinf(self.maximum):
            return f"{self.unit} above {low}" if self.above else f"{self.unit}, {low} or more"
        return (
            f"{self.unit} above {low}, at most {high}" if self.above else f"{self.unit} from {low} to {high}"
        )

    def check(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return REJECTED
        try:
            number = float(value)
        except OverflowError:
            return REJECTED
        if not math.isfinite(number) or number > self.maximum:
            return REJECTED
        in_range = number > self.minimum if self.above else number >= self.minimum
        return number if in_range else REJECTED

    def parse(self, text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return REJECTED


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds(Number):
    """A duration."""

    maximum: float = LONGEST_SECONDS
    unit: str = "seconds"


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]

    def describe(self) -> str:
        return " or ".join(map(repr, self.words))

    def check(self, value: object) -> object:
        return value if isinstance(value, str) and value in self.words else REJECTED

    def parse(self, text: str) -> object:
        return text.lower()


@dataclass(frozen=True, slots=True)
class Flag(Kind):
    """A bool, and nothing that is merely truthy."""

    def describe(self) -> str:
        return "a bool (true or false)"

    def check(self, value: object) -> object:
        return value if isinstance(value, bool) else REJECTED

    def parse(self, text: str) -> object:
        word = text.lower()
        if word in _TRUE:
            return True
        return False if word in _FALSE else REJECTED


@dataclass(frozen=True, slots=True)
class Name(Kind):
    """A word that the user has chosen: letters, digits, ``-``, ``_`` and ``.``."""

    def describe(self) -> str:
        return "a name of letters, digits, '-', '_' and '.'"

    def check(self, value: object) -> object:
        return value if isinstance(value, str) and _NAME.fullmatch(value) else REJECTED

    def parse(self, text: str) -> object:
        return text


@dataclass(frozen=True, slots=True)
class Listeners(Kind):
    """Objects with pybreaker's listener methods, kept as a tuple."""

    from_text = False

    def describe(self) -> str:
        return "a tuple of pybreaker.CircuitBreakerListener instances"

    def check(self, value: object) -> object:
        if not isinstance(value, tuple | list):
            return REJECTED
        usable = all(
            not isinstance(listener, type)
            and all(callable(getattr(listener, method, None)) for method in _LISTENER_METHODS)
            for listener in value
        )
        return tuple(value) if usable else REJECTED

    def parse(self, text: str) -> object:  # noqa: ARG002
        return REJECTED


@dataclass(frozen=True, slots=True)
class Factory(Kind):
    """A callable that makes a breaker's storage, not a storage: each node needs its own."""

    from_text = False

    def describe(self) -> str:
        return "a callable that takes a node's name and returns a pybreaker.CircuitBreakerStorage"

    def check(self, value: object) -> object:
        return value if callable(value) else REJECTED

    def parse(self, text: str) -> object:  # noqa: ARG002
        return REJECTED


@dataclass(frozen=True, slots=True)
class Strategy(Kind):
    """One of tenacity's strategies, or a function that does the same: takes the ``RetryCallState`` of the attempt
    that failed and returns ``answer``."""

    from_text = False
    what: str
    """``wait`` or ``stop``."""
    example: str
    answer: str

    def describe(self) -> str:
        return (
            f"a tenacity {self.what} strategy (such as {self.example}) or a plain function that takes tenacity's "
            f"RetryCallState and returns {self.answer}"
        )

    def check(self, value: object) -> object:
        # A class is one that somebody forgot to call; what must be awaited cannot be asked by a thread; a strategy
        # for the other question would be asked happily, and its answer taken for one to this.
        kind = next((base.__module__ for base in type(value).__mro__ if base.__name__ in _BASES), None)
        usable = (
            callable(value)
            and not isinstance(value, type)
            and not inspect.iscoroutinefunction(value)
            and not inspect.iscoroutinefunction(getattr(value, "__call__", None))  # noqa: B004
            and kind in {None, f"tenacity.{self.what}"}
            and _takes_one(value)
        )
        return value if usable else REJECTED

    def parse(self, text: str) -> object:  # noqa: ARG002
        return REJECTED


_BASES = frozenset({"wait_base", "stop_base", "retry_base"})


def _takes_one(function: object) -> bool:
    """Whether it can be called with one argument; True if it does not say."""
    try:
        inspect.signature(function).bind(None)  # type: ignore[arg-type]
    except TypeError:
        return False
    except ValueError:
        return True
    return True
