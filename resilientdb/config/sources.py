"""Reads options from the environment, a database URL or a table (TOML, JSON), checked but not yet merged.

All three share one flat spelling, ``queue_max_waiting``; a table may nest instead. What cannot be
understood is an error, never skipped: a misspelt limit must not turn into no limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from resilientdb.config.base import Option, Options, leaves
from resilientdb.config.fields import REJECTED
from resilientdb.config.profiles import find_profile
from resilientdb.config.wording import flat, nearest, shown, unknown_option, wrong_value
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from resilientdb.config.profiles import ProfileName

__all__ = ["ENV_PREFIX", "RESERVED_VARIABLES", "URL_PREFIX", "Layer", "read_env", "read_table", "read_url"]

ENV_PREFIX: Final = "RESILIENTDB_"
URL_PREFIX: Final = "resilientdb_"

RESERVED_VARIABLES: Final = frozenset({"PG_BIN", "MARIADB_BIN", "CACHE"})
"""Variables with our prefix that belong to other rooms of the library (the test services): no options."""

# Kubernetes describes a Service called "resilientdb" to every pod in these variables.
_KUBERNETES_VARIABLE = re.compile(r"SERVICE_(HOST|PORT)(_\w+)?|PORT(_\w+)?")

_PROFILE = "profile"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one source says: ``values`` and ``names`` (``env RESILIENTDB_QUEUE_TIMEOUT``) by dotted key."""

    values: dict[str, object]
    names: dict[str, str]
    profile: ProfileName | None


class _Reader:
    """The options of ``root`` by their flat spelling, for one source."""

    def __init__(self, root: type[Options]) -> None:
        self.options: dict[str, Option] = dict(leaves(root))
        self.by_flat = {flat(key): key for key in (*self.options, _PROFILE)}
        self.values: dict[str, object] = {}
        self.names: dict[str, str] = {}
        self.profile: ProfileName | None = None

    def valid(self) -> dict[str, str]:
        """Every option, and what it allows."""
        return {key: option.describe() for key, option in self.options.items()} | {
            _PROFILE: "the name of a profile"
        }

    def unknown(
        self, name: str, value: object, said: str, spelled: Callable[[str], str]
    ) -> ConfigurationError:
        """The error for a flat ``name`` that is no option; its key is dotted as far as the table is clear."""
        valid = self.valid()
        meant = nearest(name, valid)
        table = meant.rpartition(".")[0] if meant else ""
        start = f"{flat(table)}_"
        key = f"{table}.{name.removeprefix(start)}" if table and name.startswith(start) else name
        listed = [key for key in valid if key == _PROFILE or self._from_text(key)]
        return unknown_option(key, value, valid, said=said, spelled=spelled, listed=listed)

    def _from_text(self, key: str) -> bool:
        kind = self.options[key].kind
        return kind is not None and kind.from_text

    def text(self, key: str, text: str, *, said: str | None = None, named: str = "") -> None:
        """Take the value that ``text`` stands for. ``said`` is how the source spells the option."""
        if key == _PROFILE:
            self.profile = find_profile(text.strip(), said=said).name
            self.names[key] = named
            return
        option = self.options[key]
        if not self._from_text(key):
            allowed = f"set in code ({option.describe()}); text cannot hold it"
            raise wrong_value(key, text, allowed, said=said)
        value = option.parse(text)
        if value is REJECTED:
            raise wrong_value(key, text, option.describe(), said=said)
        self.values[key] = value
        self.names[key] = named

    def value(self, key: str, raw: object) -> None:
        """Take a value that is not text."""
        option = self.options[key]
        value = option.check(raw)
        if value is REJECTED:
            raise wrong_value(key, raw, option.describe())
        self.values[key] = value

    def done(self) -> Layer:
        """What was read."""
        return Layer(values=self.values, names=self.names, profile=self.profile)


def read_env(root: type[Options], environ: Mapping[str, str], prefix: str = ENV_PREFIX) -> Layer:
    """Every variable that starts with ``prefix``; those reserved for other uses are passed over."""
    if not prefix:
        raise wrong_value("prefix", prefix, "a non-empty string; every variable would be an option")
    reader = _Reader(root)

    def spelled(key: str) -> str:
        return prefix + flat(key).upper()

    by_variable = {spelled(key): key for key in reader.valid()}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        rest = variable.removeprefix(prefix)
        if variable in by_variable:
            reader.text(by_variable[variable], text, said=variable, named=f"env {variable}")
        elif rest not in RESERVED_VARIABLES and not _KUBERNETES_VARIABLE.fullmatch(rest):
            raise reader.unknown(rest.lower(), text, variable, spelled)
    return reader.done()


def read_url(root: type[Options], options: Mapping[str, str | Sequence[str]]) -> Layer:
    """Options of a URL's query, their ``resilientdb_`` already removed."""
    reader = _Reader(root)

    def spelled(key: str) -> str:
        return URL_PREFIX + flat(key)

    for name, given in options.items():
        said = URL_PREFIX + name
        texts = [given] if isinstance(given, str) else list(given)
        key = reader.by_flat.get(name)
        if key is None:
            raise reader.unknown(name, texts[0] if texts else None, said, spelled)
        if len(texts) != 1:
            got = ", ".join(shown(text, said) for text in texts) or "nothing"
            raise ConfigurationError(f"{said} ({key}) must be given once in a URL; got {got}", key=key)
        reader.text(key, texts[0], said=said, named=f"url {said}")
    return reader.done()


def read_table(root: type[Options], table: Mapping[str, object]) -> Layer:
    """A table as TOML or JSON holds it: nested, flat or dotted keys; values or their text."""
    reader = _Reader(root)
    tables = {key[: at.start()] for key in reader.options for at in re.finditer(r"\.", key)}
    seen: set[str] = set()
    for key, value in _walk(reader, table, tables):
        if key in seen:
            raise ConfigurationError(f"{key} is given twice, in different spellings", key=key)
        seen.add(key)
        if key == _PROFILE:
            reader.profile = find_profile(value.strip() if isinstance(value, str) else value).name
        elif isinstance(value, str):
            reader.text(key, value)
        else:
            reader.value(key, value)
    return reader.done()


def _walk(
    reader: _Reader, table: object, tables: Collection[str], within: str = ""
) -> Iterator[tuple[str, object]]:
    """The values of nested tables by dotted key, whatever way they are spelled."""
    if not isinstance(table, Mapping):
        raise wrong_value(within or "resilience", table, "a table of options (a mapping)")
    by_flat = reader.by_flat | {flat(name): name for name in tables}
    for name, value in table.items():
        path = f"{within}.{name}" if within else str(name)
        key = by_flat.get(flat(path))
        if key is None:
            raise unknown_option(path, value, reader.valid())
        if key not in tables:
            yield key, value
        else:
            yield from _walk(reader, value, tables, key)
