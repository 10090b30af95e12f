"""The pytest plugin, as somebody else's project would meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

_TEST = """
    def test_example({fixture}):
        pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with no services: a PostgreSQL folder that is empty, a Toxiproxy that is not there."""
    empty = pytester.mkdir("empty")
    monkeypatch.setenv("RESILIENTDB_PG_BIN", str(empty))
    monkeypatch.setenv("RESILIENTDB_MARIADB_BIN", str(empty))
    monkeypatch.setenv("TOXIPROXY_SERVER", str(empty / "nothing"))
    monkeypatch.delenv("CI", raising=False)
    return pytester


@pytest.mark.parametrize(
    ("fixture", "service"),
    [
        ("resilientdb_postgres", "PostgreSQL"),
        ("resilientdb_standby", "PostgreSQL"),
        ("resilientdb_toxiproxy", "Toxiproxy"),
        ("resilientdb_proxy", "Toxiproxy"),
        ("resilientdb_standby_proxy", "Toxiproxy"),
        ("resilientdb_mariadb", "MariaDB"),
        ("resilientdb_mariadb_proxy", "Toxiproxy"),
    ],
)
def test_a_missing_service_skips_with_its_reason(
    project: pytest.Pytester, fixture: str, service: str
) -> None:
    project.makepyfile(_TEST.format(fixture=fixture))
    result = project.runpytest_subprocess("-ra", "-p", "no:cacheprovider")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED*{service} is not available: *=*/empty*"])


def test_in_ci_a_missing_service_fails(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    project.makepyfile(_TEST.format(fixture="resilientdb_postgres"))
    result = project.runpytest_subprocess("-ra", "-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*PostgreSQL is not available: RESILIENTDB_PG_BIN=*has no initdb*"])


def test_unused_it_loads_no_service(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import sys

        def test_example():
            for name in ("faults", "postgres", "mariadb", "toxiproxy", "processes"):
                assert f"resilientdb.testing.{name}" not in sys.modules
            assert "psycopg" not in sys.modules
            assert "requests" not in sys.modules
        """
    )
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)


def test_fixtures_work_and_leave_nothing(pytester: pytest.Pytester, resilientdb_proxy: object) -> None:
    assert resilientdb_proxy  # skipped, with the reason, where there are no services
    pytester.makepyfile(
        """
        from pathlib import Path
        import psycopg
        from resilientdb.testing import faults
        from resilientdb.testing.processes import run_folder

        def test_proxy(resilientdb_postgres, resilientdb_proxy):
            Path("pids").write_text(f"{resilientdb_postgres.pid} {run_folder().path}")
            url = resilientdb_postgres.url("", port=resilientdb_proxy.listen_port)
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            Path("name").write_text(resilientdb_proxy.name)

        def test_the_next_has_another(resilientdb_proxy, resilientdb_toxiproxy):
            assert resilientdb_proxy.name != Path("name").read_text()
            assert len(resilientdb_toxiproxy.proxies()) == 1

        def test_standby(resilientdb_standby, resilientdb_standby_proxy):
            assert resilientdb_standby.in_recovery()
            assert resilientdb_standby_proxy.upstream == resilientdb_standby.address
        """
    )
    result = pytester.runpytest_subprocess("-W", "error", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)
    pid, folder = (pytester.path / "pids").read_text().split()
    assert not Path("/proc", pid).exists()
    assert not Path(folder).exists()
