"""What went wrong, in one word: every driver error mapped to a ``Fault``, from which all else follows.

Drivers and poolers name the same event differently, or not at all: a full server is ``53300`` from
PostgreSQL, ``08P01`` from PgBouncer, ``58000`` from PgDog, ``9001`` from ProxySQL, and only English text from
psycopg while it connects. Breaker, retry, eviction and routing never look at an exception themselves; they
ask ``classify`` and read the properties of its answer.

Order of evidence: types that say it themselves; SQLSTATE or vendor code; SQLAlchemy's
``connection_invalidated``; the message text (localisable, so late); the bare DBAPI class. The phase then
decides what it means: the same broken socket is ``CANNOT_CONNECT`` while connecting, ``CONNECTION_LOST`` in a
statement, ``IN_DOUBT`` once COMMIT was sent.

Errors are recognised by attributes and by module and class *names*: no driver needs to be installed and none
is imported here.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from resilientdb.policy.fault_tables import (
    APPLICATION,
    CANCELLED,
    IN_DOUBT,
    LOCAL,
    LOCAL_ERRNOS,
    LOST,
    LOST_ERRNOS,
    MYSQL_ERRNOS,
    MYSQL_READ_ONLY_OPTION,
    POOLER_CODES,
    REFUSED_AT_COMMIT,
    RETRY,
    SHIFTS,
    SQLITE_CODES,
    SQLSTATE_CLASSES,
    SQLSTATES,
    TEXTS,
    TYPES,
    UNREACHABLE,
    WRONG_ROLE,
    Fault,
    Phase,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Fault",
    "Phase",
    "blame_the_application",
    "classify",
    "describe",
    "evidence",
    "from_driver",
    "is_overload",
    "links_of",
    "number_of",
    "sqlstate_of",
]

_POSTGRESQL: Final = frozenset({"psycopg", "psycopg2", "asyncpg"})
_MYSQL: Final = frozenset({"pymysql", "aiomysql", "asyncmy", "MySQLdb", "mysql", "mariadb"})
_SQLITE: Final = frozenset({"sqlite3", "aiosqlite", "pysqlite3"})
_DRIVERS: Final = _POSTGRESQL | _MYSQL | _SQLITE
_DBAPI_NAMES: Final = frozenset(
    [
        "InterfaceError",
        "DataError",
        "OperationalError",
        "IntegrityError",
        "InternalError",
        "ProgrammingError",
        "NotSupportedError",
        "DatabaseError",
        "Error",
    ]
)
_SQLSTATE: Final = re.compile(r"[0-9A-Z]{5}")
_PLACE: Final = re.compile(
    r"""server\ at\ "([\w.:%/-]+)"(?:\ \([^)]*\))?,\ port\ (\d+)  # libpq
      | connect\ call\ failed\ \('([\w.:%-]+)',\ (\d+)               # asyncio
      | (?:host|host\ name|server\ on)\ ["']([\w.:%-]+)["']           # resolver, MySQL
    """,
    re.VERBOSE,
)
"""Where a message says which server it is about; only names and numbers can match, never a DSN."""
_MAX_LINKS: Final = 16
_MAX_TEXT: Final = 600


class _Verdict(NamedTuple):
    fault: Fault
    firm: bool = True
    """False: a guess from a bare driver type, which a cause further down may better."""
    at_commit: Fault | None = None
    """Overrides the phase table at COMMIT."""
    at_connect: Fault | None = None


class _Kind(NamedTuple):
    """What is known from the type alone."""

    family: str  # cancelled, typed, own, wrapper, postgresql, mysql, sqlite, os, driver, other
    name: str  # the DBAPI class it derives from, or its own
    fault: Fault | None = None


def classify(error: BaseException, phase: Phase = Phase.STATEMENT) -> Fault:
    """Say what ``error``, which came out of a database call in ``phase``, means.

    Takes SQLAlchemy's wrappers, bare driver errors, the raw ``OSError`` and ``TimeoutError`` that asyncpg
    lets out, the library's own errors, and anything that has one of them as ``__cause__``. Never raises. What
    it has never heard of is ``APPLICATION``; while connecting ``CONFIGURATION``; at COMMIT ``IN_DOUBT``,
    because only the server's word, or proof that nothing was sent, settles a COMMIT. A few microseconds.

    A write refused in a transaction that the application itself declared READ ONLY looks like one that a standby
    refused, ``WRONG_ROLE``. Where the two can be told apart, on an engine of this library, the answer is
    ``APPLICATION``.
    """
    guess: _Verdict | None = None
    for link in _links(error):
        verdict = _Verdict(APPLICATION) if _attribute(link, _BLAMED) is True else _judge(link)
        if verdict is None:
            continue
        if verdict.firm:
            return _shift(verdict, phase)
        # An earlier link saying no more than "a driver error" gives way to a link that says something.
        if guess is None or guess.fault is APPLICATION:
            guess = verdict
    # SQLAlchemy's own errors (a session in the wrong state) come before anything is sent.
    unsent = _kind_of(error).family == "wrapper"
    return _shift(guess or _Verdict(APPLICATION, at_commit=None if unsent else IN_DOUBT), phase)


_BLAMED: Final = "_resilientdb_application"


def blame_the_application(error: BaseException) -> None:
    """Have ``error`` be ``APPLICATION`` from now on: only who knows the connection could know that."""
    with contextlib.suppress(Exception):  # a class whose objects cannot be marked
        setattr(error, _BLAMED, True)


def evidence(error: BaseException, phase: Phase = Phase.STATEMENT) -> Fault:
    """What ``error`` shows about the node, for its breaker: ``classify`` without the doubt over a COMMIT.

    A COMMIT that lost its connection is ``IN_DOUBT`` for the transaction and ``CONNECTION_LOST`` for the
    node; one whose caller was cancelled is ``IN_DOUBT`` and ``CANCELLED``.
    """
    return classify(error, Phase.STATEMENT if phase is Phase.COMMIT else phase)


def is_overload(error: BaseException) -> bool:
    """Whether ``error``, by which a node failed, says that it has too much to do: it is full, or it was too slow."""
    return classify(error) is Fault.OVERLOAD or any(isinstance(link, TimeoutError) for link in _links(error))


def from_driver(error: BaseException) -> bool:
    """Whether a database driver has raised ``error``, by its class; SQLAlchemy's wrapper of such an error counts.

    Not what it was raised from: see ``links_of``. False for the raw ``OSError`` of a driver that lets one out: it
    looks like anybody's.
    """
    for base in type(error).__mro__:
        module = str(base.__module__)
        if module.partition(".")[0] in _DRIVERS or module.startswith("sqlalchemy.dialects."):
            return True
        if module == "sqlalchemy.exc" and base.__name__ in {"DBAPIError", "DisconnectionError"}:
            return True
    return False


def links_of(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it wraps or was raised from, outermost first; bounded, also for a chain that is a circle."""
    return _links(error)


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE of the outermost link that has one, through SQLAlchemy's wrappers; None without."""
    return next(filter(None, map(_sqlstate, _links(error))), None)


def number_of(error: BaseException) -> int | None:
    """MySQL's error number, of the outermost link that has one, through SQLAlchemy's wrappers; None without."""
    return next(filter(None, map(_number, _links(error))), None)


def describe(error: BaseException) -> str:
    """One line fit for a log, an event or a metric: class, SQLSTATE or vendor code, host and port if known.

    Built from known phrases, never from the message itself, which may hold SQL, values, users or a DSN. The
    library's own messages hold none of these and are kept.
    """
    links = list(_links(error))
    own = next((link for link in links if _kind_of(link).family == "own"), None)
    if own is not None:
        return _one_line(f"{type(own).__name__}: {_text(own)}")
    link = next((link for link in links if _kind_of(link).family != "wrapper"), error)
    root = str(type(link).__module__).partition(".")[0]
    words = [type(link).__name__ if root == "builtins" else f"{root}.{type(link).__name__}"]
    # MySQL's number says more than its SQLSTATE, which is the same for most of them.
    if (sqlstate := sqlstate_of(error)) and _kind_of(link).family != "mysql":
        words.append(f"[{sqlstate}]")
    elif _kind_of(link).family != "other":
        if number := _number(link):
            words.append(f"[{number}]")
        text = _text(link).lower()
        if place := _PLACE.search(text):
            words.append(":".join(part for part in place.groups() if part))
        if phrase := _phrase(text):
            words.append(phrase[0].strip('" '))
    return _one_line(" ".join(words))


# --- one link of the chain ---


def _judge(link: BaseException) -> _Verdict | None:
    """The verdict on one exception without its causes, or None if it says nothing."""
    kind = _kind_of(link)
    if kind.fault is not None:
        return _Verdict(kind.fault)  # ours come before anything is sent, but for CommitOutcomeUnknown
    if kind.family == "wrapper":
        lost = _attribute(link, "connection_invalidated") is True
        return _Verdict(LOST, firm=False) if lost else None
    if kind.family == "mysql" and (number := _number(link)) is not None:
        return _judge_mysql(number, link)
    if (code := _sqlstate(link)) is not None:
        return _judge_sqlstate(code, link)
    if kind.family == "sqlite":
        number = _attribute(link, "sqlite_errorcode")
        if isinstance(number, int):
            return _Verdict(SQLITE_CODES.get(number & 0xFF, APPLICATION))
    return _judge_os(link) if kind.family == "os" else _judge_driver(kind, link)


def _judge_sqlstate(code: str, link: BaseException) -> _Verdict:
    fault = SQLSTATES.get(code) or SQLSTATE_CLASSES.get(code[:2], APPLICATION)
    if code in POOLER_CODES:
        phrase = _phrase(_text(link))
        return _Verdict(phrase[1] if phrase else fault, at_commit=IN_DOUBT)
    return _Verdict(fault, at_commit=fault if code in REFUSED_AT_COMMIT else None)


def _judge_mysql(number: int, link: BaseException) -> _Verdict:
    if number == MYSQL_READ_ONLY_OPTION:
        return _Verdict(WRONG_ROLE if "read-only" in _text(link) else APPLICATION)
    # 2000-2999 are made by the client library, and (0, '') by a connection that is gone.
    unknown = LOST if number == 0 or 2000 <= number < 3000 else APPLICATION
    fault = MYSQL_ERRNOS.get(number, unknown)
    return _Verdict(fault, at_commit=fault if number in REFUSED_AT_COMMIT else None)


def _judge_os(link: BaseException) -> _Verdict:
    number = _number(link)
    if number in LOCAL_ERRNOS:
        return _Verdict(LOCAL, at_commit=IN_DOUBT)
    if number in LOST_ERRNOS:
        return _Verdict(LOST)
    phrase = _phrase(_text(link))
    # While connecting any OSError came from the attempt; elsewhere it may be the application's own.
    return _Verdict(
        phrase[1] if phrase else APPLICATION, firm=False, at_connect=UNREACHABLE, at_commit=IN_DOUBT
    )


def _judge_driver(kind: _Kind, link: BaseException) -> _Verdict | None:
    """A driver's error without any code: broken connections, failed connects, misuse."""
    if kind.family == "other":
        return None
    if kind.name in {"ProgrammingError", "DataError", "IntegrityError", "NotSupportedError"}:
        return _Verdict(APPLICATION, firm=False)
    if phrase := _phrase(_text(link)):
        # Even a phrase that blames the application does not prove that COMMIT was not sent.
        doubt = IN_DOUBT if phrase[1] is not RETRY else None
        return _Verdict(phrase[1], firm=False, at_commit=doubt)
    # libpq gives no code to what never reached the server, and psycopg makes all of it OperationalError.
    lost = kind.family == "postgresql" and kind.name == "OperationalError"
    return _Verdict(LOST if lost else APPLICATION, firm=False, at_connect=UNREACHABLE, at_commit=IN_DOUBT)


def _shift(verdict: _Verdict, phase: Phase) -> Fault:
    if phase is Phase.COMMIT and verdict.at_commit is not None:
        return verdict.at_commit
    fault = verdict.fault
    connecting = phase is Phase.CONNECT or phase is Phase.CHECKOUT
    if connecting and verdict.at_connect is not None and fault in {LOST, APPLICATION}:
        return verdict.at_connect
    return SHIFTS[phase].get(fault, fault)


# --- looking at exceptions without trusting them ---


def _links(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it wraps or was raised from, outermost first, each once, at most ``_MAX_LINKS``."""
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_LINKS:
        link = waiting.pop(0)
        if not issubclass(type(link), BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting.append(_attribute(link, "orig"))
        waiting.append(_attribute(link, "__cause__"))
        if issubclass(type(link), BaseExceptionGroup):
            waiting.extend(link.exceptions[:_MAX_LINKS])


def _kind_of(error: BaseException) -> _Kind:
    cls: Any = type(error)
    return _kind(cls)


@functools.lru_cache(maxsize=512)
def _kind(cls: type[BaseException]) -> _Kind:
    names = [(str(base.__module__), base.__name__) for base in cls.__mro__]
    for module, name in names:
        root = module.partition(".")[0]
        # SQLAlchemy translates asyncpg's errors into classes of its own adapter.
        if module == "sqlalchemy.dialects.postgresql.asyncpg":
            root = "asyncpg"
        fault = TYPES.get((module, name)) or TYPES.get((root, name))
        if fault is not None:
            return _Kind("own" if module == "resilientdb.errors" else "typed", cls.__name__, fault)
    if issubclass(cls, BaseExceptionGroup):
        return _Kind("other", cls.__name__)
    if not issubclass(cls, Exception):
        return _Kind("cancelled", cls.__name__, CANCELLED)
    if ("sqlalchemy.exc", "SQLAlchemyError") in names:
        return _Kind("wrapper", cls.__name__)
    family = "os" if issubclass(cls, OSError) else "other"
    for module, name in names:
        root = module.partition(".")[0]
        if root in _POSTGRESQL or module.startswith("sqlalchemy.dialects.postgresql"):
            family = "postgresql"
        elif root in _MYSQL or module.startswith("sqlalchemy.dialects.mysql"):
            family = "mysql"
        elif root in _SQLITE or module.startswith("sqlalchemy.dialects.sqlite"):
            family = "sqlite"
        elif name not in _DBAPI_NAMES or module == "builtins":
            continue
        elif family == "other":
            family = "driver"
    name = next((name for _, name in names if name in _DBAPI_NAMES), cls.__name__)
    return _Kind(family, name)


def _attribute(thing: object, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 - a property of a foreign exception; classifying must not fail over it
        return None


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except Exception:  # noqa: BLE001
        return ""


def _phrase(text: str) -> tuple[str, Fault] | None:
    text = text.lower()
    return next((row for row in TEXTS if row[0] in text), None)


def _sqlstate(link: BaseException) -> str | None:
    for code in (_attribute(link, "sqlstate"), _attribute(link, "pgcode")):
        if isinstance(code, str) and _SQLSTATE.fullmatch(code):
            return code
    code = _attribute(_attribute(link, "diag"), "sqlstate")
    return code if isinstance(code, str) and _SQLSTATE.fullmatch(code) else None


def _number(link: BaseException) -> int | None:
    """A MySQL error number or an errno: an attribute in some drivers, the first argument in the others."""
    number = _attribute(link, "errno")
    arguments = _attribute(link, "args")
    if number is None and isinstance(arguments, tuple) and arguments:
        number = arguments[0]
    return number if isinstance(number, int) else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
