"""What each code, type and text means: the taxonomy's words and the tables behind ``faults.classify``.

Sources: PostgreSQL's and MySQL's error lists; the poolers' sources for the codes they make themselves; the drivers
as tried on real servers. Data only: a row is added here and nowhere else.
"""

from __future__ import annotations

import enum
import errno
from typing import Final


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
    # Not run again as a transaction: the pool has retried the connect already, and attempts must not multiply.
    CANNOT_CONNECT = ("cannot-connect", True, False, True, False, True)
    # The node works, it is only not the one that was meant: a matter of routing, not of the breaker.
    WRONG_ROLE = ("wrong-role", False, False, False, True, True)
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

SQLSTATES: Final = {
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
SQLSTATE_CLASSES: Final = {
    "08": LOST,
    "28": CONFIGURATION,
    "40": RETRY,  # 40001 serialization failure or recovery conflict, 40P01 deadlock
    "53": OVERLOAD,  # connections, memory, disk
    "58": OVERLOAD,  # system error; PgDog's 58000 for every failure of its pool
    "F0": CONFIGURATION,
}
POOLER_CODES: Final = frozenset({"08P01", "08006", "58000", "XX000"})
"""Codes that poolers put on different events: a known text decides, and a COMMIT is never settled by one."""

REFUSED_AT_COMMIT: Final = frozenset({"53100", "53200", "55P03", 1205})
"""Said only by the server itself, and only while it can still roll back: a definite no. Not so ``57014``: a
cancelled COMMIT may be a pooler's or a distributed database's word, so that one stays in doubt."""

MYSQL_ERRNOS: Final = {
    **dict.fromkeys((2006, 2013, 2014, 2045, 2048, 2055, 1053, 1158, 1159, 1160, 1161, 1927, 4031), LOST),
    # 3032: in offline mode it serves administrators only.
    **dict.fromkeys((2001, 2002, 2003, 2004, 2005, 2012, 2026, 3032), UNREACHABLE),
    # 1792: a READ ONLY transaction, the application's own or, on a reader of Amazon Aurora, every one.
    **dict.fromkeys((1792, 1836, 1047), WRONG_ROLE),  # 1047: a Galera node that is not in the cluster
    # 1412, 1615: a table was altered meanwhile.
    **dict.fromkeys((1213, 1412, 1614, 1615, 3101, 1020), RETRY),
    1180: IN_DOUBT,  # error during COMMIT
    **dict.fromkeys((1021, 1037, 1038, 1040, 1041, 1114, 1129, 1135, 1203, 1206, 1226, 1637), OVERLOAD),
    **dict.fromkeys((9001, 9002, 9005), OVERLOAD),  # ProxySQL
    # 1205 rolls back the statement only, the transaction stays open: like PostgreSQL's 55P03, not a deadlock.
    **dict.fromkeys((1205, 1317, 1613, 1689, 1969, 3024, 3572), TIMEOUT),
    **dict.fromkeys(
        (1044, 1045, 1049, 1130, 1251, 1524, 1698, 1820, 1862, 2019, 2049, 2059, 2061), CONFIGURATION
    ),
    **dict.fromkeys((3118, 3159, 4151), CONFIGURATION),
    **dict.fromkeys((*range(2030, 2037), 2068), APPLICATION),  # the client library, misused
}
MYSQL_READ_ONLY_OPTION: Final = 1290
"""«Running with the --x option»: only where x is read-only does it tell of a role."""

SQLITE_CODES: Final = {
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

TYPES: Final = {
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

LOCAL_ERRNOS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}
)
LOST_ERRNOS: Final = frozenset(
    {errno.EBADF, errno.ENOTCONN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN}
)

TEXTS: Final[tuple[tuple[str, Fault], ...]] = tuple(
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
            |not connected|network operation failed|packet sequence number wrong""",
        ),
        (
            RETRY,
            "database is locked|database table is locked",
        ),
    )
    for phrase in map(str.strip, phrases.split("|"))
)
"""Phrases of libpq, servers and poolers in lower case, first match wins. Used only where no code decides."""

CONNECTING: Final = {
    LOST: UNREACHABLE,
    TIMEOUT: UNREACHABLE,
    IN_DOUBT: UNREACHABLE,
    APPLICATION: CONFIGURATION,
}
COMMITTING: Final = dict.fromkeys((LOST, UNREACHABLE, TIMEOUT, CANCELLED, OVERLOAD), IN_DOUBT)
SHIFTS: Final[dict[Phase, dict[Fault, Fault]]] = {
    Phase.CONNECT: CONNECTING,
    Phase.CHECKOUT: CONNECTING,
    Phase.BEGIN: {},
    Phase.STATEMENT: {},
    Phase.COMMIT: COMMITTING,
}
"""What the phase makes of a verdict."""
