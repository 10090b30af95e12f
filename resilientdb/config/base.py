"""A table of options: a frozen dataclass that checks itself and knows which of its fields somebody asked for.

Which fields were *given* decides what the environment, the URL and a profile may still fill in, so it is
kept by each instance and survives ``dataclasses.replace``, copying and pickling. It takes no part in
equality: two tables with the same values are equal, whoever set them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, InitVar, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from resilientdb.config.fields import REJECTED, Kind
from resilientdb.config.wording import name_of, shown, unknown_option, wrong_value
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Self

__all__ = ["Option", "Options", "below", "leaves", "options_of"]

_PRIVATE = ("_ungiven", "_profile")

_known: dict[type[Options], Mapping[str, Option]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What is known of one field of a table: either a value of some ``kind`` or a ``table`` of its own."""

    name: str
    default: Any
    kind: Kind | None = None
    optional: bool = False
    table: type[Options] | None = None

    def describe(self) -> str:
        """What is allowed, in words that fit after "must be"."""
        if self.kind is None:
            return f"{self.table.__name__}(...)" if self.table else "a table"
        return f"{self.kind.describe()}, or None" if self.optional else self.kind.describe()

    def check(self, value: object) -> object:
        """The value as it is stored, or ``REJECTED``."""
        if self.table is not None:
            return value if isinstance(value, self.table) else REJECTED
        if value is None:
            return None if self.optional else REJECTED
        return REJECTED if self.kind is None else self.kind.check(value)

    def parse(self, text: str) -> object:
        """The value that ``text`` stands for, or ``REJECTED``."""
        text = text.strip()
        if self.kind is None:
            return REJECTED
        if self.optional and text.lower() == "none":
            return None
        return self.check(self.kind.parse(text))


def _read_options(cls: type[Options]) -> dict[str, Option]:
    found = {}
    for spec in dataclasses.fields(cls):
        default = spec.default if spec.default_factory is MISSING else spec.default_factory()
        if isinstance(default, Options):
            found[spec.name] = Option(name=spec.name, default=default, table=type(default))
            continue
        kinds = [note for note in getattr(spec.type, "__metadata__", ()) if isinstance(note, Kind)]
        if len(kinds) != 1:
            raise TypeError(f"{cls.__name__}.{spec.name} needs one Kind in its annotation")
        nullable = type(None) in get_args(getattr(spec.type, "__origin__", None))
        found[spec.name] = Option(name=spec.name, default=default, kind=kinds[0], optional=nullable)
    return found


def options_of(cls: type[Options]) -> Mapping[str, Option]:
    """The fields of a table, in order."""
    if cls not in _known:
        _known[cls] = _read_options(cls)
    return _known[cls]


def leaves(cls: type[Options], prefix: str = "") -> Iterator[tuple[str, Option]]:
    """Every option of a table and of the tables in it that holds a value, by dotted key."""
    for name, option in options_of(cls).items():
        if option.table is None:
            yield prefix + name, option
        else:
            yield from leaves(option.table, f"{prefix}{name}.")


def below(values: Mapping[str, object], table: str) -> dict[str, object]:
    """The part of dotted values that belongs to one table, by keys relative to it."""
    start = f"{table}."
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


@dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """Base of every table. Keyword arguments only; a bad one is a ``ConfigurationError``."""

    table: ClassVar[str] = ""
    """Dotted key of this table, as errors name it."""

    # Not a field. dataclasses.replace() hands it on with every other value, so a value that is still the
    # very object nobody gave is still not given, and what replace() changed is. (To "change" a field to the
    # same None, bool or small int it already had is not seen; say it in the constructor.)
    _ungiven: InitVar[Mapping[str, object] | None] = None

    def __init_subclass__(cls, *, table: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if table is not None:
            cls.table = table

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Runs before the generated ``__init__``, whose answer to a misspelt keyword is a bare TypeError."""
        options = options_of(cls)
        if args:
            raise ConfigurationError(
                f"{cls.__name__} takes keyword arguments only ({', '.join(options)}); "
                f"got {shown(args[0])} by position",
                key=cls.table or None,
            )
        for name, value in kwargs.items():
            if name not in options and name not in _PRIVATE:
                valid = {cls._key(key): option.describe() for key, option in options.items()}
                valid |= {cls._key(key): option.describe() for key, option in leaves(cls)}
                raise unknown_option(cls._key(name), value, valid, listed=map(cls._key, options))
        self = super().__new__(cls)
        # Values of the fields that nobody gave; __post_init__ fills them in.
        vars(self)["_ungiven"] = {name: None for name in options if name not in kwargs}
        return self

    def __post_init__(self, _ungiven: Mapping[str, object] | None) -> None:
        state = vars(self)
        ungiven = state["_ungiven"]
        inherited = _ungiven or {}
        for name, option in options_of(type(self)).items():
            raw = state[name]
            value = option.check(raw)
            if value is REJECTED:
                raise wrong_value(self._key(name), raw, option.describe())
            state[name] = value
            if name in ungiven or (name in inherited and inherited[name] is raw):
                ungiven[name] = value
        self._check_together()

    def _check_together(self) -> None:
        """Raise ``ConfigurationError`` where two fields contradict each other."""

    @classmethod
    def _key(cls, name: str) -> str:
        return f"{cls.table}.{name}" if cls.table else name

    @classmethod
    def assemble(
        cls, given: Mapping[str, object], background: Mapping[str, object], **private: object
    ) -> Self:
        """Build from dotted keys relative to this table: ``given`` counts as asked for, ``background``
        (a profile) does not, the rest is default."""
        values: dict[str, Any] = {}
        ungiven: dict[str, object] = {}
        for name, option in options_of(cls).items():
            if option.table is not None:
                values[name] = option.table.assemble(below(given, name), below(background, name))
            elif name in given:
                values[name] = given[name]
            elif name in background:
                values[name] = ungiven[name] = background[name]
        return cls(**values, _ungiven=ungiven, **private)

    def given(self) -> dict[str, object]:
        """The values somebody asked for, by dotted key relative to this table."""
        found: dict[str, object] = {}
        for name, option in options_of(type(self)).items():
            value = vars(self)[name]
            if isinstance(value, Options):
                found |= {f"{name}.{key}": inner for key, inner in value.given().items()}
            elif option.table is None and name not in vars(self)["_ungiven"]:
                found[name] = value
        return found

    def values(self) -> dict[str, object]:
        """Every value, by dotted key relative to this table."""
        found: dict[str, object] = {}
        for name in options_of(type(self)):
            value = vars(self)[name]
            if isinstance(value, Options):
                found |= {f"{name}.{key}": inner for key, inner in value.values().items()}
            else:
                found[name] = value
        return found

    def __repr__(self) -> str:
        """Only what differs from the default; objects by name, because a repr may hold a URL."""
        parts = []
        for name, option in options_of(type(self)).items():
            value = vars(self)[name]
            if value == option.default:
                continue
            if isinstance(value, tuple):
                text = f"<{', '.join(map(name_of, value))}>"
            elif value is None or isinstance(value, Options | str | int | float):
                text = repr(value)
            else:
                text = f"<{name_of(value)}>"
            parts.append(f"{name}={text}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _private(self) -> dict[str, object]:
        """What beside the fields must be handed to the constructor to get the same instance back."""
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: vars(self)[name] for name in options_of(type(self))}
        return _rebuild, (type(self), values, tuple(vars(self)["_ungiven"]), self._private())

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


def _rebuild(
    cls: type[Options], values: dict[str, Any], ungiven: tuple[str, ...], private: dict[str, Any]
) -> Options:
    # "The very object nobody gave" does not survive pickling; its name does.
    return cls(**values, _ungiven={name: values[name] for name in ungiven if name in values}, **private)
