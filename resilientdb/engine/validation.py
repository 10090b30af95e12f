"""Start-up validation: does what was configured exist, let us in, play the role it was given, and have room?"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from sqlalchemy.pool import QueuePool

from resilientdb.engine.compat import greenlet_spawn
from resilientdb.errors import ConfigurationError
from resilientdb.policy.faults import Fault, Phase, classify, describe

if TYPE_CHECKING:
    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.node import Node
    from resilientdb.stats import Role

__all__ = ["validate"]

OLDEST_POSTGRESQL: Final = 13
OLDEST_MARIADB: Final = (10, 6)
OLDEST_MYSQL: Final = (8, 0)

_REMEDIES = {
    Fault.CANNOT_CONNECT: "is the server running, and are host and port right?",
    Fault.CONFIGURATION: "check the user, password and database in the URL",
    Fault.OVERLOAD: "the server has no connection left: raise max_connections or use a smaller pool",
    Fault.WRONG_ROLE: "the server plays another role",
}

_VERSION: Final = "SELECT current_setting('server_version_num')"
_ROOM: Final = (
    "SELECT pg_backend_pid(), current_setting('max_connections', true), "
    "current_setting('superuser_reserved_connections', true), current_setting('reserved_connections', true)"
)
"""``true``: NULL for what this server has no word for; ``reserved_connections`` came with PostgreSQL 16."""

_MYSQL: Final = "SELECT version(), connection_id(), @@global.max_connections, @@session.max_user_connections"
"""The last is the account's own limit, or else the one for all accounts; 0 is none."""


class _Problem(NamedTuple):
    """What is wrong: the option that says so, the sentence, the error behind it."""

    key: str
    text: str
    cause: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Room:
    """How many connections a server has for us, and which setting says so."""

    free: int
    setting: str


@dataclass(frozen=True, slots=True)
class _Server:
    """What a server says of itself; None where it does not."""

    role: Role | None = None
    too_old: str | None = None
    """What it is, and what is needed; None if it is new enough."""
    room: _Room | None = None


def validate(cluster: Cluster, timeout: float, processes: int | None) -> None:
    """Ask each node once, on a connection of its own; ``ConfigurationError`` with all that is wrong."""
    given: object = processes
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ConfigurationError(
            f"processes must be how many processes use this database, 1 or more, or None; got {given!r}",
            key="processes",
            value=given,
        )
    if not cluster.resilience.enabled:
        return  # plain SQLAlchemy, which checks nothing either
    problems: list[_Problem] = []
    for position, node in enumerate(cluster.nodes):
        key = "url" if position == 0 else f"replicas[{position - 1}]"
        try:
            server = _ask(cluster, node, timeout)
        except Exception as error:  # noqa: BLE001 - reported, all of them together
            fault = classify(error, Phase.CONNECT)
            remedy = _REMEDIES.get(fault, "see the cause")
            problems.append(_Problem(key, f"{node.name} failed ({describe(error)}); {remedy}", error))
            continue
        expected: Role = "primary" if position == 0 else "replica"
        if server.role is not None and server.role != expected and len(cluster.nodes) > 1:
            text = f"{node.name} is a {server.role}, not a {expected}; exchange the URLs"
            problems.append(_Problem(key, text))
        if server.too_old is not None:
            problems.append(_Problem(key, f"{node.name} is {server.too_old} or newer is needed"))
        elif server.room is not None and processes is not None:
            problems += _shortage(node, server.room, processes)
    if problems:
        raise ConfigurationError(
            "the database configuration does not work: "
            + "; ".join(f"{problem.key}: {problem.text}" for problem in problems),
            key=problems[0].key,
        ) from problems[0].cause


def _shortage(node: Node, room: _Room, processes: int) -> list[_Problem]:
    """Whether the pools of all processes together may ask for more connections than there are."""
    pool: object = node.pool
    stats = None if node.pool is None else node.pool.stats()
    if not isinstance(pool, QueuePool) or stats is None:
        return []  # a pool class of the user's own: nobody can say what it may open
    free, size = room.free, pool.size()
    has = f"{node.name} has room for {free} connections ({room.setting})"
    use = f"{processes} {'process' if processes == 1 else 'processes'} x"
    if stats.limit is None:
        key, unlimited = ("max_overflow", "max_overflow=-1") if size else ("pool_size", "pool_size=0")
        text = (
            f"{has}, but the pool is unlimited ({unlimited}): set pool_size and max_overflow so that {use} "
            f"(pool_size + max_overflow) is at most {free}"
        )
        return [_Problem(key, text)]
    if processes * stats.limit <= free:
        return []
    text = (
        f"{has}, but {use} (pool_size {size} + max_overflow {stats.limit - size}) may ask for "
        f"{processes * stats.limit}: lower pool_size or max_overflow, run fewer processes, or raise max_connections"
    )
    return [_Problem("pool_size", text)]


def _release(version: int) -> str:
    """What people call it: 12.22 for 120022, 9.6.24 for 90624."""
    if version >= 100_000:
        return f"{version // 10_000}.{version % 10_000}"
    return f"{version // 10_000}.{version // 100 % 100}.{version % 100}"


def _ask(cluster: Cluster, node: Node, timeout: float) -> _Server:
    dialect = cluster.dialect

    def ask() -> _Server:
        connection: Any = node.open_raw(timeout)
        try:
            if cluster.driver.role_query is None:
                dialect.do_ping(connection)
                return _Server()
            role = cluster.driver.read_role(_row(connection, cluster.driver.role_query))
            is_mysql = dialect.name in {"mysql", "mariadb"}
            return _of_mysql(connection, role) if is_mysql else _of_postgresql(connection, role)
        finally:
            with contextlib.suppress(Exception):
                dialect.do_rollback(connection)
                dialect.do_close(connection)

    if not dialect.is_async:
        return ask()

    async def ask_in_greenlet() -> _Server:
        return await greenlet_spawn(ask)

    # A loop of its own, in a thread of its own: this may be called where a loop is running already.
    answer: list[_Server] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(asyncio.run(ask_in_greenlet()))
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="resilientdb-validate", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]


def _of_postgresql(connection: Any, role: Role) -> _Server:
    """Something that only speaks PostgreSQL's language may not answer all of this; that is no fault of its."""
    too_old = room = None
    try:
        version = int(_row(connection, _VERSION)[0])
        if version < OLDEST_POSTGRESQL * 10_000:
            too_old = f"PostgreSQL {_release(version)}; {OLDEST_POSTGRESQL}"
        else:
            own_pid, most, *reserved = _row(connection, _ROOM)
            # A pooler (PgBouncer and its like) invents the number that a client is told at its login, and has
            # connections to share: how many clients it takes, the server behind it cannot say.
            if most is not None and own_pid == _told_pid(connection):
                kept = sum(int(one) for one in reserved if one is not None)
                room = _Room(int(most) - kept, f"max_connections {most}, {kept} of them reserved")
    except Exception as error:
        if classify(error, Phase.STATEMENT).evicts_connection:
            raise  # no answer at all
    return _Server(role, too_old, room)


def _of_mysql(connection: Any, role: Role) -> _Server:
    """As for PostgreSQL; a proxy (ProxySQL, MaxScale) tells its own number of the connection, too."""
    too_old = room = None
    try:
        version, own_id, most, most_of_account = _row(connection, _MYSQL)
        product, oldest = (
            ("MariaDB", OLDEST_MARIADB) if "mariadb" in version.lower() else ("MySQL", OLDEST_MYSQL)
        )
        release = re.match(r"(\d+)\.(\d+)[.\d]*", version)
        if release is not None and tuple(map(int, release.groups())) < oldest:
            too_old = f"{product} {release[0]}; {oldest[0]}.{oldest[1]}"
        elif own_id == getattr(connection, "driver_connection", connection).thread_id():
            room = _Room(most, f"max_connections {most}")
            if 0 < most_of_account < most:
                room = _Room(most_of_account, f"max_user_connections {most_of_account}")
    except Exception as error:
        if classify(error, Phase.STATEMENT).evicts_connection:
            raise
    return _Server(role, too_old, room)


def _row(connection: Any, query: str) -> tuple[Any, ...]:
    cursor = connection.cursor()
    try:
        cursor.execute(query)
        return tuple(cursor.fetchone())
    finally:
        cursor.close()


def _told_pid(connection: Any) -> int | None:
    """The number of the server process, as the driver was told it at the login."""
    own = getattr(connection, "driver_connection", connection)
    # asyncpg has a method; psycopg and psycopg2 have libpq's facts.
    return cast("int", own.get_server_pid() if hasattr(own, "get_server_pid") else own.info.backend_pid)
