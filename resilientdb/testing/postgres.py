"""A PostgreSQL server of our own: a primary or a streaming standby, on 127.0.0.1 by TCP only.

::

    with Postgres() as primary, Postgres.standby(primary) as standby:
        engine = create_engine(primary.url("psycopg"))
        primary.crash()
        standby.promote()

Durability is off (``fsync``, ``full_page_writes``): these clusters are thrown away. That also means
that a *machine* crash cannot be shown with them; a crash of the server or of a backend can.
"""

from __future__ import annotations

import functools
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from resilientdb.testing import wire
from resilientdb.testing.binaries import PostgresBinaries, find_postgres
from resilientdb.testing.errors import ServiceFailed, ServiceUnavailable
from resilientdb.testing.privileges import unprivileged
from resilientdb.testing.processes import ServerProcess, children, end_strangers, run_folder
from resilientdb.testing.services import DatabaseServer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    import psycopg

__all__ = ["Postgres"]

_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "100",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "wal_keep_size": "128MB",  # a standby that was held back finds its way without a slot
    "hot_standby": "on",
    "wal_receiver_timeout": "5s",
    "wal_retrieve_retry_interval": "500ms",
    "log_line_prefix": "%m [%p] ",
}
_STOP = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_template_lock = threading.Lock()


class Postgres(DatabaseServer):
    """One server and its data. ``start()`` makes the data if there is none yet; ``close()`` removes it.

    ``settings`` go to ``postgresql.conf`` (so ``ALTER SYSTEM`` may still override them), after the
    defaults. ``major`` asks for one version of PostgreSQL. Clusters of one run are copies of one
    initdb and share its system identifier; ``fresh=True`` runs an initdb of its own.

    Methods are for one thread at a time. Raises :class:`ServiceUnavailable` when no PostgreSQL is
    installed, :class:`ServiceFailed` when one does not do what it was told.
    """

    superuser: ClassVar[str] = "postgres"
    _port_taken = "could not create any TCP/IP sockets"

    def __init__(
        self,
        *,
        name: str = "primary",
        settings: Mapping[str, str | float] | None = None,
        binaries: PostgresBinaries | None = None,
        major: int | None = None,
        fresh: bool = False,
    ) -> None:
        super().__init__(name, settings, kind="postgres")
        self.binaries = (binaries or find_postgres(major)).usable()
        self._fresh = fresh

    @classmethod
    def standby(
        cls,
        primary: Postgres,
        *,
        name: str = "standby",
        settings: Mapping[str, str | float] | None = None,
        via: tuple[str, int] | None = None,
    ) -> Self:
        """A streaming hot standby of a running primary, by base backup at its first start.

        ``via`` is the (host, port) by which it replicates, for instance a proxy in front of the
        primary, so that replication can be slowed or cut.
        """
        server = cls(name=name, settings=settings, binaries=primary.binaries)
        server._source = via or (primary.host, primary.port)
        return server

    # ------------------------------------------------------------------------------------- addresses

    def url(
        self,
        driver: str = "psycopg",
        database: str = "postgres",
        host: str | None = None,
        port: int | None = None,
    ) -> str:
        """A SQLAlchemy URL; with ``port`` (and ``host``) of a proxy, one that leads through it.

        ``driver=""`` gives a plain ``postgresql://`` URL, as libpq and asyncpg take it.
        """
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://{self.superuser}@{host or self.host}:{port or self.port}/{database}"

    # ------------------------------------------------------------------------------------- life cycle

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", *, timeout: float = 15.0) -> None:
        """Stop: ``fast`` ends sessions, ``immediate`` is a crash, ``smart`` waits for sessions to end.

        After ``timeout`` seconds a mode that has not come to an end becomes ``immediate``.
        """
        process = self._process
        if process is None:
            return
        process.signal(_STOP[mode])
        if not process.wait(timeout):
            process.stop(timeout=5.0)
        self._process = None

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> Self:
        """Stop and start, on the same port and data."""
        self.stop(mode)
        return self.start()

    def crash(self, how: Literal["immediate", "main", "backend"] = "immediate") -> None:
        """Crash the server.

        ``immediate``: all of it at once, without a checkpoint; it stays down until ``start()``,
        which recovers. ``main``: so too, by kill -9 of the main process; its backends notice by
        themselves, and what they are at they may bring to its end; returns when the last of them
        has gone. ``backend``: kill -9 of one backend of our own, on which the server drops *every*
        session, recovers and goes on; returns when it accepts logins again.
        """
        if how == "immediate":
            self.stop("immediate")
            return
        if how == "main":
            self._kill_main()
            return
        import os

        psycopg = _psycopg()
        # The witness is closed by the server once it has noticed the crash; without it, a login
        # could still slip in before, and this would return too early.
        with self._connect() as victim, self._connect() as witness:
            os.kill(victim.info.backend_pid, signal.SIGKILL)
            try:
                witness.execute("SELECT pg_sleep(30)")
            except psycopg.OperationalError:
                pass
            else:
                raise ServiceFailed(f"{self.name} did not notice its backend's crash\n{self.log_tail()}")
        self.wait_ready()

    def reload(self) -> None:
        """Read the configuration again (after ``ALTER SYSTEM`` or ``configure``)."""
        if self._process is not None:
            self._process.signal(signal.SIGHUP)

    def configure(self, **settings: str | float) -> None:
        """Add settings to ``postgresql.conf``; they hold after ``reload()`` or ``restart()``."""
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{_quoted(value)}'\n" for name, value in settings.items())

    # ------------------------------------------------------------------------------------ replication

    def promote(self, *, timeout: float = 30.0) -> float:
        """Make a standby the primary; returns the seconds until it takes writes."""
        begun = time.monotonic()
        seconds = max(1, round(timeout))
        self.binaries.run("pg_ctl", "promote", "-w", "-t", str(seconds), "-D", self.data, timeout=timeout + 5)
        self._source = None
        return time.monotonic() - begun

    def in_recovery(self) -> bool:
        """Whether the server says that it is a standby."""
        return bool(self.query("SELECT pg_is_in_recovery()")[0][0])

    def follow(self, primary: Postgres, *, via: tuple[str, int] | None = None) -> Self:
        """Throw this server's data away and come back, on the same port, as a standby of ``primary``."""
        self.stop("immediate")
        shutil.rmtree(self.data)
        self._source = via or (primary.host, primary.port)
        return self.start()

    def wait_caught_up(self, primary: Postgres, *, timeout: float = 30.0) -> float:
        """Wait until all that ``primary`` has written by now is visible here; returns the seconds it took."""
        target = primary.query("SELECT pg_current_wal_flush_lsn()::text")[0][0]
        begun = time.monotonic()
        with self._connect() as connection:
            while True:
                row = connection.execute(
                    "SELECT COALESCE(pg_last_wal_replay_lsn() >= %s::pg_lsn, false)", [target]
                ).fetchone()
                if row is not None and row[0]:
                    return time.monotonic() - begun
                if time.monotonic() - begun > timeout:
                    raise ServiceFailed(
                        f"{self.name} has not replayed {target} after {timeout:g} s\n{self.log_tail()}"
                    )
                time.sleep(0.005)

    # -------------------------------------------------------------------------------------- questions

    def query(
        self, sql: str, parameters: Sequence[object] | None = None, *, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run a statement in autocommit on a connection of its own; returns its rows, ``[]`` if it has none.

        It goes to the server directly, never through a proxy, so it also tells the truth during a fault.
        """
        with self._connect(database) as connection:
            cursor = connection.execute(sql.encode(), parameters)
            return cursor.fetchall() if cursor.description is not None else []

    def __repr__(self) -> str:
        return f"<Postgres {self.name} {self.binaries.major} on {self.address}, {self._state}>"

    # ---------------------------------------------------------------------------------------- inside

    def _connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        connection: psycopg.Connection[tuple[Any, ...]] = _psycopg().Connection.connect(
            host=self.host,
            port=self.port,
            user=self.superuser,
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        )
        return connection

    def _kill_main(self) -> None:
        process = self._process
        if process is None:
            return
        process.signal(signal.SIGSTOP)  # from here on it has no more children than can be seen
        orphans = children(process.pid)
        process.kill()
        self._process = None
        end_strangers(orphans, grace=5.0)

    def _make_data(self) -> None:
        if self._source is not None:
            self._empty_data()
            host, port = self._source
            target = f"host={host} port={port} user={self.superuser} application_name={self.name}"
            self.binaries.run(
                "pg_basebackup",
                "-D",
                self.data,
                "-d",
                target,
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
                "--no-sync",
            )
            settings = self.settings
        else:
            if self._fresh:
                self._empty_data()
                _initdb(self.binaries, self.data, self.superuser)
            else:
                shutil.copytree(_template(self.binaries, self.superuser), self.data)
                unprivileged().own(self.data)
            settings = {**_SETTINGS, **self.settings}
        self.configure(**settings)

    def _empty_data(self) -> None:
        self.data.mkdir(mode=0o700)
        unprivileged().own(self.data)

    def _launch(self) -> ServerProcess:
        command: list[str | Path] = [self.binaries.program("postgres"), "-D", self.data]
        for setting in (f"port={self.port}", f"listen_addresses={self.host}", "unix_socket_directories="):
            command += ["-c", setting]
        return ServerProcess(
            f"PostgreSQL {self.name}",
            command,
            log=self.log,
            privileges=unprivileged(),
            stop_signal=signal.SIGQUIT,
        )

    def _accepts_logins(self) -> bool:
        return wire.accepts_connections(self.host, self.port, user=self.superuser)


@functools.cache
def _template_of(binaries: PostgresBinaries, superuser: str, _owner: int) -> Path:
    data = run_folder().folder("initdb") / "data"
    data.mkdir(mode=0o700)
    unprivileged().own(data)
    _initdb(binaries, data, superuser)
    return data


def _template(binaries: PostgresBinaries, superuser: str) -> Path:
    """The data of an untouched cluster, made once a run: copying it takes a tenth of an initdb."""
    with _template_lock:
        return _template_of(binaries, superuser, run_folder().owner)  # a forked child has its own


def _initdb(binaries: PostgresBinaries, data: Path, superuser: str) -> None:
    # No password anywhere: it listens on loopback, holds test data, and lives for minutes.
    binaries.run("initdb", "-D", data, "-U", superuser, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")


def _psycopg() -> ModuleType:
    # An optional dependency, loaded when it is asked for.
    try:
        import psycopg
    except ImportError as error:
        raise ServiceUnavailable(
            "questions to PostgreSQL go through psycopg: pip install 'psycopg[binary]'"
        ) from error
    return psycopg


def _quoted(value: str | float) -> str:
    return str(value).replace("'", "''")
