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

import enum
import errno
import functools
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Fault", "Phase", "classify", "describe", "evidence", "sqlstate_of"]


class Phase(enum.Enum):
    """What was being done when the error came. Savepoints and ROLLBACK count as ``STATEMENT``."""

    CONNECT = "connect"
    CHECKOUT = "checkout"
    """Taking a connection, old or new, and making it fit for use."""
    BEGIN = "begin"
    STATEMENT = "statement"
    COMMIT = "commit"
    """From the moment COMMIT (or an autocommit write) is sent until its reply has been read, and no longer:
    the flush inside ``session.commit()`` and its listeners are ``STATEMENT``."""


class Fault(enum.Enum):
    """The verdict. ``value`` is a stable slug, fit for a metric label; what follows from it, the columns."""

    is_node_failure: bool
    """Counts against the node at its breaker."""
    is_healthy_reply: bool
    """The node answered as a working server would: counts for it. Neither of the two: inconclusive."""
    retry_connect: bool
    """Opening a connection may be tried again, after a pause and within the retry budget."""
    retry_transaction: bool
    """Nothing was committed and another run may succeed: the whole transaction may be run again."""
    evicts_connection: bool
    """The connection it happened on is not to be used again."""

    #                   slug                 failure healthy connect transaction evicts
    CONNECTION_LOST = ("connection-lost", True, False, True, True, True)
    CANNOT_CONNECT = ("cannot-connect", True, False, True, True, True)
    # The node works, it is only not the one that was meant: a matter of routing, not of the breaker.
    WRONG_ROLE = ("wrong-role", False, False, True, True, True)
    RETRY_TRANSACTION = ("retry-transaction", False, True, False, True, False)
    # A lost reply or a caller that gave up: the breaker, which must tell them apart, asks evidence().
    IN_DOUBT = ("in-doubt", False, False, False, False, True)
    # The server (or a pooler in front of it) is out of connections, memory, disk or time to queue. Not run
    # again as a transaction: that is more of what it has too much of.
    OVERLOAD = ("overload", True, False, True, False, False)
    # A statement or a lock took too long: perhaps the query, perhaps another transaction, perhaps the node.
    # The breaker has the slow-call rate for the last. Repeating it costs as long again.
    TIMEOUT = ("timeout", False, False, False, False, False)
    # A wrong password or database name: the server works, no attempt will ever succeed, and connections
    # opened before may still serve. An open circuit would only hide the one message that says what to mend.
    # Not a healthy reply either: a probe that cannot log in proves nothing. Evicts, because prepared
    # statements that vanish behind a pooler stay wrong on this connection.
    CONFIGURATION = ("configuration", False, False, False, False, True)
    APPLICATION = ("application", False, True, False, False, False)
    # A cancelled task, KeyboardInterrupt, GeneratorExit: nothing about the node, but half a reply may be on
    # the wire, and the next user must not read it.
    CANCELLED = ("cancelled", False, False, False, False, True)
    # Refused on this side and never sent: our own saturation, an open circuit, no file descriptors.
    LOCAL_REJECTION = ("local-rejection", False, False, False, False, False)

    def __new__(
        cls,
        slug: str,
        is_node_failure: bool,
        is_healthy_reply: bool,
        retry_connect: bool,
        retry_transaction: bool,
        evicts_connection: bool,
    ) -> Fault:
        fault = object.__new__(cls)
        fault._value_ = slug
        fault.is_node_failure = is_node_failure
        fault.is_healthy_reply = is_healthy_reply
        fault.retry_connect = retry_connect
        fault.retry_transaction = retry_transaction
        fault.evicts_connection = evicts_connection
        return fault


LOST: Final = Fault.CONNECTION_LOST
UNREACHABLE: Final = Fault.CANNOT_CONNECT
WRONG_ROLE: Final = Fault.WRONG_ROLE
RETRY: Final = Fault.RETRY_TRANSACTION
IN_DOUBT: Final = Fault.IN_DOUBT
OVERLOAD: Final = Fault.OVERLOAD
TIMEOUT: Final = Fault.TIMEOUT
CONFIGURATION: Final = Fault.CONFIGURATION
APPLICATION: Final = Fault.APPLICATION
CANCELLED: Final = Fault.CANCELLED
LOCAL: Final = Fault.LOCAL_REJECTION

_SQLSTATES: Final = {
    "08001": UNREACHABLE,
    "08004": CONFIGURATION,
    "08007": IN_DOUBT,  # transaction resolution unknown (said by drivers that fail over)
    "08P01": OVERLOAD,  # PgBouncer's one code for everything; its text is read first
    "25006": WRONG_ROLE,  # read-only transaction: a standby, unless the application asked for READ ONLY
    "25P03": LOST,  # idle in transaction too long: the server has hung up
    "25P04": TIMEOUT,  # transaction_timeout
    "26000": CONFIGURATION,  # prepared statement unknown …
    "42P05": CONFIGURATION,  # … or there already: a pooler that does not track them
    "40002": APPLICATION,  # a constraint, checked at the end
    "40003": IN_DOUBT,  # statement completion unknown (CockroachDB: "result is ambiguous")
    "3D000": CONFIGURATION,
    "55P03": TIMEOUT,  # lock_timeout, NOWAIT
    "57014": TIMEOUT,  # statement_timeout, or cancelled by somebody
    "57P01": LOST,
    "57P02": LOST,
    "57P03": UNREACHABLE,  # starting up, shutting down, in recovery
    "57P04": CONFIGURATION,  # the database was dropped
    "57P05": LOST,  # idle_session_timeout
}
_SQLSTATE_CLASSES: Final = {
    "08": LOST,
    "28": CONFIGURATION,
    "40": RETRY,  # 40001 serialization failure or recovery conflict, 40P01 deadlock
    "53": OVERLOAD,  # connections, memory, disk
    "58": OVERLOAD,  # system error; PgDog's 58000 for every failure of its pool
    "F0": CONFIGURATION,
}
_POOLER_CODES: Final = frozenset({"08P01", "08006", "58000", "XX000"})
"""Codes that poolers put on different events: a known text decides, and a COMMIT is never settled by one."""

_REFUSED_AT_COMMIT: Final = frozenset({"53100", "53200", "55P03", 1205})
"""Said only by the server itself, and only while it can still roll back: a definite no. Not so ``57014``: a
cancelled COMMIT may be a pooler's or a distributed database's word, so that one stays in doubt."""

_MYSQL_ERRNOS: Final = {
    **dict.fromkeys((2006, 2013, 2014, 2045, 2048, 2055, 1053, 1158, 1159, 1160, 1161, 1927, 4031), LOST),
    **dict.fromkeys((2001, 2002, 2003, 2004, 2005, 2012, 2026), UNREACHABLE),
    **dict.fromkeys((1792, 1836, 1047), WRONG_ROLE),  # 1047: a Galera node that is not in the cluster
    **dict.fromkeys((1213, 3101, 1020), RETRY),
    1180: IN_DOUBT,  # error during COMMIT
    **dict.fromkeys((1021, 1037, 1038, 1040, 1041, 1129, 1135, 1203, 1226, 9001, 9002, 9005), OVERLOAD),
    # 1205 rolls back the statement only, the transaction stays open: like PostgreSQL's 55P03, not a deadlock.
    **dict.fromkeys((1205, 1317, 1969, 3024), TIMEOUT),
    **dict.fromkeys((1044, 1045, 1049, 1130, 1251, 1698, 2049, 2059, 2061, 3159), CONFIGURATION),
}
_MYSQL_READ_ONLY_OPTION: Final = 1290
"""«Running with the --x option»: only where x is read-only does it tell of a role."""

_SQLITE_CODES: Final = {
    5: RETRY,  # BUSY: another connection is writing; also at COMMIT, which then simply has not happened
    6: RETRY,  # LOCKED
    7: OVERLOAD,  # NOMEM
    8: CONFIGURATION,  # READONLY
    9: TIMEOUT,  # INTERRUPT
    10: OVERLOAD,  # IOERR
    13: OVERLOAD,  # FULL
    14: UNREACHABLE,  # CANTOPEN
    26: CONFIGURATION,  # NOTADB
}

_TYPES: Final = {
    ("resilientdb.errors", "CommitOutcomeUnknown"): IN_DOUBT,
    ("resilientdb.errors", "ConfigurationError"): CONFIGURATION,
    ("resilientdb.errors", "ResilienceError"): LOCAL,
    ("pybreaker", "CircuitBreakerError"): LOCAL,
    ("sqlalchemy.exc", "TimeoutError"): LOCAL,  # the pool's own; not the builtin
    ("sqlalchemy.exc", "DisconnectionError"): LOST,
    ("psycopg_pool", "PoolTimeout"): LOCAL,
    ("psycopg_pool", "TooManyRequests"): LOCAL,
    ("psycopg_pool", "PoolClosed"): LOCAL,
    ("psycopg", "ConnectionTimeout"): UNREACHABLE,
    ("asyncpg", "ClientConfigurationError"): CONFIGURATION,
    ("asyncpg", "ProtocolError"): LOST,
    ("asyncpg", "TargetServerAttributeNotMatched"): WRONG_ROLE,
    # The schema changed under a cached plan: the cache has been emptied, a new run succeeds.
    ("asyncpg", "InvalidCachedStatementError"): RETRY,
    ("ssl", "SSLCertVerificationError"): CONFIGURATION,
    ("ssl", "SSLError"): LOST,
    ("socket", "gaierror"): UNREACHABLE,
    ("builtins", "ConnectionRefusedError"): UNREACHABLE,
    ("builtins", "ConnectionError"): LOST,
    ("builtins", "TimeoutError"): TIMEOUT,
}
"""Types that say it themselves, looked up along the MRO, nearest first; before any code."""

_LOCAL_ERRNOS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}
)
_LOST_ERRNOS: Final = frozenset(
    {errno.EBADF, errno.ENOTCONN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN}
)

_TEXTS: Final[tuple[tuple[str, Fault], ...]] = tuple(
    (phrase, fault)
    for fault, phrases in (
        (
            CONFIGURATION,
            """authentication failed|no password supplied|no pg_hba.conf entry|" does not exist
            |no such database|no such user|is not permitted to log in|is not currently accepting connections
            |permission denied for database|certificate verify failed|server does not support ssl
            |invalid connection option|for connection option|invalid port number|tenant or user not found""",
        ),
        (
            OVERLOAD,
            """too many connections|too many clients|remaining connection slots|no more connections allowed
            |max_client_conn|query_wait_timeout|max client connections reached|maxclients|max_user_connections
            |checkout timeout|out of memory""",
        ),
        # One connection used from two places at once, or a cursor after its end.
        (
            APPLICATION,
            """another command is already in progress|another operation is in progress|cursor is closed
            |cursor already closed""",
        ),
        (
            WRONG_ROLE,
            "session is read-only|session is not read-only|hot standby mode",
        ),
        (
            UNREACHABLE,
            """the database system is|connection refused|connect call failed|could not translate host name
            |failed to resolve host|name or service not known|temporary failure in name resolution
            |no route to host|network is unreachable|server login has been failing|pooler is shutting down
            |connection timeout expired|timeout expired|can't connect""",
        ),
        (
            TIMEOUT,
            "statement timeout|lock timeout|query_timeout",
        ),
        (
            LOST,
            """server closed the connection|connection is closed|connection already closed
            |connection was closed|connection is lost|connection has been closed|connection reset
            |connection not open|broken pipe|ssl syscall error|consuming input failed|could not receive data
            |could not send data|terminating connection|lost synchronization|no connection to the server
            |server conn crashed|client_idle_timeout|idle transaction timeout|eof detected|lost connection
            |not connected""",
        ),
        (
            RETRY,
            "database is locked|database table is locked",
        ),
    )
    for phrase in map(str.strip, phrases.split("|"))
)
"""Phrases of libpq, servers and poolers in lower case, first match wins. Used only where no code decides."""

_CONNECTING: Final = {
    LOST: UNREACHABLE,
    TIMEOUT: UNREACHABLE,
    IN_DOUBT: UNREACHABLE,
    APPLICATION: CONFIGURATION,
}
_COMMITTING: Final = dict.fromkeys((LOST, UNREACHABLE, TIMEOUT, CANCELLED, OVERLOAD), IN_DOUBT)
_SHIFTS: Final[dict[Phase, dict[Fault, Fault]]] = {
    Phase.CONNECT: _CONNECTING,
    Phase.CHECKOUT: _CONNECTING,
    Phase.BEGIN: {},
    Phase.STATEMENT: {},
    Phase.COMMIT: _COMMITTING,
}
"""What the phase makes of a verdict."""

_POSTGRESQL: Final = frozenset({"psycopg", "psycopg2", "asyncpg"})
_MYSQL: Final = frozenset({"pymysql", "aiomysql", "asyncmy", "MySQLdb", "mysql", "mariadb"})
_SQLITE: Final = frozenset({"sqlite3", "aiosqlite", "pysqlite3"})
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

    ``WRONG_ROLE`` from a transaction that the application itself declared READ ONLY is an application error;
    only the caller can know.
    """
    guess: _Verdict | None = None
    for link in _links(error):
        verdict = _judge(link)
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


def evidence(error: BaseException, phase: Phase = Phase.STATEMENT) -> Fault:
    """What ``error`` shows about the node, for its breaker: ``classify`` without the doubt over a COMMIT.

    A COMMIT that lost its connection is ``IN_DOUBT`` for the transaction and ``CONNECTION_LOST`` for the
    node; one whose caller was cancelled is ``IN_DOUBT`` and ``CANCELLED``.
    """
    return classify(error, Phase.STATEMENT if phase is Phase.COMMIT else phase)


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE of the outermost link that has one, through SQLAlchemy's wrappers; None without."""
    return next(filter(None, map(_sqlstate, _links(error))), None)


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
    if sqlstate := sqlstate_of(error):
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
            return _Verdict(_SQLITE_CODES.get(number & 0xFF, APPLICATION))
    return _judge_os(link) if kind.family == "os" else _judge_driver(kind, link)


def _judge_sqlstate(code: str, link: BaseException) -> _Verdict:
    fault = _SQLSTATES.get(code) or _SQLSTATE_CLASSES.get(code[:2], APPLICATION)
    if code in _POOLER_CODES:
        phrase = _phrase(_text(link))
        return _Verdict(phrase[1] if phrase else fault, at_commit=IN_DOUBT)
    return _Verdict(fault, at_commit=fault if code in _REFUSED_AT_COMMIT else None)


def _judge_mysql(number: int, link: BaseException) -> _Verdict:
    if number == _MYSQL_READ_ONLY_OPTION:
        return _Verdict(WRONG_ROLE if "read-only" in _text(link) else APPLICATION)
    # 2000-2999 are made by the client library, and (0, '') by a connection that is gone.
    unknown = LOST if number == 0 or 2000 <= number < 3000 else APPLICATION
    fault = _MYSQL_ERRNOS.get(number, unknown)
    return _Verdict(fault, at_commit=fault if number in _REFUSED_AT_COMMIT else None)


def _judge_os(link: BaseException) -> _Verdict:
    number = _number(link)
    if number in _LOCAL_ERRNOS:
        return _Verdict(LOCAL, at_commit=IN_DOUBT)
    if number in _LOST_ERRNOS:
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
    return _SHIFTS[phase].get(fault, fault)


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
        fault = _TYPES.get((module, name)) or _TYPES.get((root, name))
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
    return next((row for row in _TEXTS if row[0] in text), None)


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
