"""How options, values and mistakes are put into words: one voice for code, environment, URL and tables.

Nothing that looks like a credential leaves this file: errors and ``config explain`` show values only
through ``shown``.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["as_text", "flat", "name_of", "shown", "unknown_option", "wrong_value"]

HIDDEN = "***"
_LONGEST_SHOWN = 60
_LARGEST_SHOWN = 64  # bits; Python itself refuses to print an int of 4300 digits

# A URL, user:password@host, or "password=…" as in a libpq connection string.
_SECRET_TEXT = re.compile(
    r"://|[^\s:@]*:[^\s@]+@|(?:passw(?:or)?d|pwd|secret|token)\w*\s*[=:]", re.IGNORECASE
)
_SECRET_KEY = re.compile(r"passw|pwd|secret|token|credential|dsn|ur[il]|api_?key", re.IGNORECASE)


def flat(key: str) -> str:
    """``retry.backoff.initial`` as the environment and URLs spell it: ``retry_backoff_initial``."""
    return key.replace(".", "_")


def name_of(thing: object) -> str:
    """An object or callable by name only: its repr may hold a URL."""
    name = getattr(thing, "__qualname__", None)
    return name if isinstance(name, str) else type(thing).__qualname__


def as_text(value: object) -> str:
    """A valid value as the environment would spell it; objects by name."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, tuple):
        return ", ".join(map(name_of, value)) or "none"
    return name_of(value)


def _safe(value: object, key: str) -> object:
    """The value for ``ConfigurationError.value``: plain data as it is, secrets and objects by description."""
    if isinstance(value, int) and value.bit_length() > _LARGEST_SHOWN:
        return "<a very large int>"
    if value is None or isinstance(value, bool | int | float):
        return HIDDEN if value is not None and _SECRET_KEY.search(key) else value
    if isinstance(value, str):
        return HIDDEN if _SECRET_TEXT.search(value) or _SECRET_KEY.search(key) else value
    if isinstance(value, type) or callable(value):
        return f"<{name_of(value)}>"
    return f"<{type(value).__qualname__}>"


def shown(value: object, key: str = "") -> str:
    """A rejected value, fit for a message: short, and ``'***'`` where it or its key looks like a secret."""
    safe = _safe(value, key)
    if isinstance(safe, str) and not isinstance(value, str):
        return safe
    text = repr(safe)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def wrong_value(key: str, value: object, allowed: str, *, said: str | None = None) -> ConfigurationError:
    """``key`` is the dotted option, ``said`` how the source spells it when that differs."""
    name = key if said is None else f"{said} ({key})"
    return ConfigurationError(
        f"{name} must be {allowed}; got {shown(value, said or key)}", key=key, value=_safe(value, said or key)
    )


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The option that was probably meant, if one is near enough."""
    by_spelling = {flat(option): option for option in valid}
    found = difflib.get_close_matches(flat(name).lower(), by_spelling, n=1, cutoff=0.6)
    return by_spelling[found[0]] if found else None


def unknown_option(
    key: str,
    value: object,
    valid: dict[str, str],
    *,
    said: str | None = None,
    spelled: Callable[[str], str] = str,
    listed: Iterable[str] | None = None,
) -> ConfigurationError:
    """``valid`` maps each dotted option to what it allows, ``said`` is what was written, and ``spelled`` says
    how an option is written there (``RESILIENTDB_QUEUE_TIMEOUT``). ``listed`` are the ones to name when none
    is near; None = all."""
    written = said or key
    meant = nearest(key, valid)
    if meant is not None:
        hint = f"did you mean {spelled(meant)} ({valid[meant]})?"
    else:
        hint = f"valid: {', '.join(map(spelled, valid if listed is None else listed))}"
    name = HIDDEN if _SECRET_TEXT.search(written) else written
    return ConfigurationError(
        f"{name} is not an option (got {shown(value, name)}); {hint}",
        key=HIDDEN if _SECRET_TEXT.search(key) else key,
        value=_safe(value, name),
    )
