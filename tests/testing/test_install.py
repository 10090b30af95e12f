"""``python -m resilientdb.testing.install``."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilientdb.testing import install, toxiproxy_binary
from resilientdb.testing.binaries import PG_BIN_VARIABLE
from resilientdb.testing.mariadb import MARIADB_BIN_VARIABLE
from resilientdb.testing.toxiproxy_binary import TOXIPROXY_VARIABLE, ToxiproxyBinary


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOXIPROXY_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("RESILIENTDB_CACHE", str(tmp_path / "cache"))


def test_check_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["--toxiproxy", "--check"]) == 1
    assert capsys.readouterr().out.startswith("Toxiproxy: missing: not built yet; run python -m")
    assert not (tmp_path / "cache").exists()


def test_what_is_missing_is_built_and_one_line_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = ToxiproxyBinary(Path("/cache/toxiproxy-server"), "a build with go")
    monkeypatch.setattr(install, "build_toxiproxy", lambda: built)
    assert install.main(["--toxiproxy"]) == 0
    assert capsys.readouterr().out == "Toxiproxy: built in 0 s, a build with go (/cache/toxiproxy-server)\n"


def test_what_is_there_is_said_with_its_place(
    tmp_path: Path,
    resilientdb_postgres: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert resilientdb_postgres
    program = tmp_path / "toxiproxy"
    program.write_text("#!/bin/sh\necho toxiproxy-server version 2.12.0\n")
    program.chmod(0o755)
    monkeypatch.setenv(TOXIPROXY_VARIABLE, str(program))
    assert install.main([]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("PostgreSQL: ")
    assert second.startswith("MariaDB: ")
    assert third == f"Toxiproxy: from {TOXIPROXY_VARIABLE} ({program})"


def test_a_missing_service_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PG_BIN_VARIABLE, str(tmp_path))
    monkeypatch.setattr(install, "build_toxiproxy", lambda: ToxiproxyBinary(tmp_path, "a test"))
    assert install.main([]) == 1
    first, _, third = capsys.readouterr().out.splitlines()
    assert first.startswith("PostgreSQL: missing: ")
    assert third.startswith("Toxiproxy: built in ")


def test_mariadb_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MARIADB_BIN_VARIABLE, str(tmp_path))
    monkeypatch.setattr(install, "_postgres", lambda: "here")
    monkeypatch.setattr(install, "build_toxiproxy", lambda: ToxiproxyBinary(tmp_path, "a test"))
    assert install.main([]) == 0
    assert f"MariaDB: missing: {MARIADB_BIN_VARIABLE}={tmp_path} has none" in capsys.readouterr().out


def test_the_pinned_version_is_the_one_that_was_measured() -> None:
    assert toxiproxy_binary.TOXIPROXY_VERSION == "2.12.0"
