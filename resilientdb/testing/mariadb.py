"""A MariaDB server of our own: a primary or a GTID replica, on 127.0.0.1.

::

    with MariaDB() as primary, MariaDB.replica(primary) as replica:
        engine = create_engine(primary.url("pymysql"))
        primary.kill()
        replica.promote()

The application's account has rights on one database only: an administrator may write to a server that is
``read_only``, and would never meet that error. Durability is off: these servers are thrown away.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from resilientdb.testing.errors import ServiceFailed, ServiceUnavailable
from resilientdb.testing.privileges import unprivileged
from resilientdb.testing.processes import ServerProcess, run_folder, run_tool
from resilientdb.testing.services import DatabaseServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

__all__ = ["MARIADB_BIN_VARIABLE", "MariaDB", "MariaDBBinaries", "find_mariadb"]

MARIADB_BIN_VARIABLE = "RESILIENTDB_MARIADB_BIN"
_PLACES = ("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/local/mysql/bin")
_SETTINGS = {
    "innodb_buffer_pool_size": "32M",
    "innodb_log_file_size": "16M",
    "innodb_flush_log_at_trx_commit": "0",
    "innodb_use_native_aio": "0",  # containers have few of the kernel's
    "performance_schema": "off",
    "max_connections": "100",
    "max_connect_errors": "1000000",  # or a host that breaks off a hundred logins is locked out
    "skip_name_resolve": "on",
    "log_bin": "bin",
    "slave_net_timeout": "5",
}
_template_lock = threading.Lock()
_server_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class MariaDBBinaries:
    """The server, and the program that makes its first data."""

    server: Path
    installer: Path


def find_mariadb() -> MariaDBBinaries:
    """From the folder in ``RESILIENTDB_MARIADB_BIN``, else from PATH and the system's usual places.

    Raises :class:`ServiceUnavailable`, which says what to install.
    """
    chosen = os.environ.get(MARIADB_BIN_VARIABLE)
    named = [str(Path(chosen).expanduser().absolute())] if chosen else []
    path = os.pathsep.join(named or [*os.environ.get("PATH", "").split(os.pathsep), *_PLACES])
    server = shutil.which("mariadbd", path=path)
    installer = shutil.which("mariadb-install-db", path=path)
    if server is None or installer is None:
        place = f"{MARIADB_BIN_VARIABLE}={chosen} has none" if chosen else "no MariaDB found"
        raise ServiceUnavailable(
            f"{place}: install your system's mariadb-server, or set {MARIADB_BIN_VARIABLE} to the folder that"
            " holds mariadbd and mariadb-install-db"
        )
    return MariaDBBinaries(Path(server), Path(installer))


class MariaDB(DatabaseServer):
    """One server and its data. ``start()`` makes the data if there is none yet; ``close()`` removes it.

    ``settings`` are the server's variables, after the defaults. Methods are for one thread at a time. Raises
    :class:`ServiceUnavailable` when no MariaDB is installed, :class:`ServiceFailed` when one does not do what it
    was told.
    """

    superuser: ClassVar[str] = "root"
    user: ClassVar[str] = "app"
    """The application's account. Neither has a password: it listens on loopback and lives for minutes."""
    database: ClassVar[str] = "app"
    _port_taken = "Can't start server: Bind on TCP"

    def __init__(
        self,
        *,
        name: str = "primary",
        settings: Mapping[str, str | float] | None = None,
        binaries: MariaDBBinaries | None = None,
    ) -> None:
        super().__init__(name, settings, kind="mariadb")
        self.binaries = binaries or find_mariadb()
        self._server_id = next(_server_ids)

    @classmethod
    def replica(
        cls,
        primary: MariaDB,
        *,
        name: str = "replica",
        settings: Mapping[str, str | float] | None = None,
        via: tuple[str, int] | None = None,
    ) -> Self:
        """A ``read_only`` replica by GTID of a running primary, whose whole history it replays.

        ``via`` is the (host, port) by which it replicates, for instance a proxy in front of the primary.
        """
        server = cls(name=name, settings=settings, binaries=primary.binaries)
        server._source = via or (primary.host, primary.port)
        return server

    # ------------------------------------------------------------------------------------- addresses

    def url(
        self,
        driver: str = "pymysql",
        database: str | None = None,
        host: str | None = None,
        port: int | None = None,
    ) -> str:
        """A SQLAlchemy URL for the application's account; with ``port`` (and ``host``) of a proxy, through it."""
        place = f"{host or self.host}:{port or self.port}"
        return f"mysql+{driver}://{self.user}@{place}/{self.database if database is None else database}"

    # ------------------------------------------------------------------------------------- life cycle

    def stop(self, mode: Literal["fast", "immediate"] = "fast", *, timeout: float = 15.0) -> None:
        """Stop: ``fast`` ends sessions and shuts down, ``immediate`` is a crash.

        After ``timeout`` seconds a shutdown that has not come to an end becomes a crash.
        """
        process = self._process
        if process is None:
            return
        process.signal(signal.SIGCONT)  # a stopped process hears nothing else
        if mode == "immediate":
            process.kill()
        else:
            process.stop(timeout=timeout)
        self._process = None

    def kill(self) -> None:
        """Crash it: SIGKILL. It stays down until ``start()``, which recovers."""
        self.stop("immediate")

    @contextlib.contextmanager
    def hang(self) -> Iterator[None]:
        """Stop the process for the length of the block (SIGSTOP): its kernel still accepts connections, and
        acknowledges what is sent; nobody answers."""
        process = self._process
        if process is None:
            raise ServiceFailed(f"{self.name} is not running")
        process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.signal(signal.SIGCONT)

    # ------------------------------------------------------------------------------------ replication

    def promote(self) -> None:
        """Make a replica a primary that takes writes."""
        for statement in ("STOP SLAVE", "RESET SLAVE ALL", "SET GLOBAL read_only = 0"):
            self.query(statement)
        self._source = None

    def demote(self, primary: MariaDB) -> None:
        """Make it ``read_only`` and a replica of ``primary``, as an operator does who exchanges the two."""
        self.query("SET GLOBAL read_only = 1")
        self._source = (primary.host, primary.port)
        self._begin_to_follow()

    @property
    def read_only(self) -> bool:
        """Whether it refuses the application's writes."""
        return bool(self.query("SELECT @@global.read_only")[0][0])

    def wait_caught_up(self, primary: MariaDB, *, timeout: float = 30.0) -> float:
        """Wait until all that ``primary`` has written by now is visible here; returns the seconds it took."""
        target = primary.query("SELECT @@global.gtid_binlog_pos")[0][0]
        begun = time.monotonic()
        rows = self.query("SELECT MASTER_GTID_WAIT(%s, %s)", [target, timeout])
        if rows[0][0] != 0:
            raise ServiceFailed(
                f"{self.name} has not replayed {target} after {timeout:g} s\n{self.log_tail()}"
            )
        return time.monotonic() - begun

    # -------------------------------------------------------------------------------------- questions

    def query(
        self, sql: str, parameters: Sequence[object] | None = None, *, database: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Run a statement as administrator, in autocommit, on a connection of its own; returns its rows.

        It goes to the server directly, never through a proxy, so it also tells the truth during a fault.
        """
        pymysql = _pymysql()
        connection = pymysql.connect(
            host=self.host,
            port=self.port,
            user=self.superuser,
            database=database,
            autocommit=True,
            connect_timeout=10,
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters)
                return list(cursor.fetchall()) if cursor.description is not None else []
        finally:
            connection.close()

    def __repr__(self) -> str:
        return f"<MariaDB {self.name} on {self.address}, {self._state}>"

    # ---------------------------------------------------------------------------------------- inside

    def _make_data(self) -> None:
        shutil.copytree(_template(self.binaries), self.data, symlinks=True)
        unprivileged().own(self.data)

    def _set_up(self) -> None:
        if self._source is None:
            self._make_account()
        else:
            self._begin_to_follow()

    def _make_account(self) -> None:
        # Nobody's account would be taken for everybody's who comes from this machine.
        self.query("DELETE FROM mysql.global_priv WHERE user = ''")
        self.query("FLUSH PRIVILEGES")
        self.query(f"CREATE DATABASE {self.database}")
        self.query(f"CREATE USER {self.user}@'%'")
        self.query(f"GRANT ALL ON {self.database}.* TO {self.user}@'%'")

    def _begin_to_follow(self) -> None:
        assert self._source is not None
        host, port = self._source
        self.query(
            "CHANGE MASTER TO master_host=%s, master_port=%s, master_user=%s, master_connect_retry=1, "
            "master_use_gtid=slave_pos",
            [host, port, self.superuser],
        )
        self.query("START SLAVE")

    def _launch(self) -> ServerProcess:
        settings = {**_SETTINGS, **self.settings, "server_id": self._server_id}
        if self._source is not None:
            settings["read_only"] = "on"
        command: list[str | Path] = [self.binaries.server, "--no-defaults", f"--datadir={self.data}"]
        command += [f"--port={self.port}", f"--bind-address={self.host}"]
        # Both relative to the data: the path of a Unix socket has to be short.
        command += ["--socket=server.sock", "--pid-file=server.pid"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        return ServerProcess(f"MariaDB {self.name}", command, log=self.log, privileges=unprivileged())

    def _accepts_logins(self) -> bool:
        return _greets(self.host, self.port)


@functools.cache
def _template_of(binaries: MariaDBBinaries, _owner: int) -> Path:
    data = run_folder().folder("mariadb-install-db") / "data"
    data.mkdir(mode=0o700)
    privileges = unprivileged()
    privileges.own(data)
    run_tool(
        "mariadb-install-db",
        [
            binaries.installer,
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            f"--innodb-log-file-size={_SETTINGS['innodb_log_file_size']}",  # what is not made is not copied
        ],
        privileges=privileges,
    )
    return data


def _template(binaries: MariaDBBinaries) -> Path:
    """The data of an untouched server, made once a run: copying it is faster."""
    with _template_lock:
        return _template_of(binaries, run_folder().owner)  # a forked child has its own


def _greets(host: str, port: int) -> bool:
    """Whether the server says its greeting, which it does once it takes logins."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            return connection.recv(5)[4:] == b"\x0a"  # the protocol's version; an error would be 0xff
    except OSError:
        return False


def _pymysql() -> ModuleType:
    # An optional dependency, loaded when it is asked for.
    try:
        import pymysql
    except ImportError as error:
        raise ServiceUnavailable("questions to MariaDB go through pymysql: pip install pymysql") from error
    module: ModuleType = pymysql
    return module
