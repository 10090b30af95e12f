"""The examples that are no servers: the script through cuts, and the migration."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, inspect

from resilientdb.testing import faults
from resilientdb.testing.processes import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.testing import Postgres, Proxy

EXAMPLES = Path(__file__).parents[2] / "examples"
TRANSFERS = 1000


def test_script_goes_on_after_cuts(
    resilientdb_postgres: Postgres, resilientdb_proxy: Proxy, database: str, tmp_path: Path
) -> None:
    log = tmp_path / "script.log"
    url = resilientdb_postgres.url(database=database, port=resilientdb_proxy.listen_port)
    script = ServerProcess(
        "script",
        [sys.executable, "-W", "error", EXAMPLES / "script.py", str(TRANSFERS)],
        log=log,
        env={"DATABASE_URL": url},
    )

    def transferred() -> int:
        assert script.running, script.log_tail()
        return log.read_text().count("transferred")

    with script:
        for fault, seconds in ((faults.reset, 0.1), (faults.down, 0.5)):
            before = transferred()
            wait(lambda before=before: transferred() > before + 50)  # type: ignore[misc]
            with fault(resilientdb_proxy) as active:
                wait(lambda active=active, seconds=seconds: active.seconds > seconds)  # type: ignore[misc]
        assert transferred() < TRANSFERS, "the cuts came too late to prove anything"
        assert script.wait(60), script.log_tail()
    assert script.returncode == 0, script.log_tail()

    said = log.read_text()
    assert "CircuitStateChanged" in said
    assert f"alice {1000 - TRANSFERS}\nbob {TRANSFERS}\nstate: healthy\n" in said
    rows = resilientdb_postgres.query("SELECT name, balance FROM account ORDER BY name", database=database)
    assert rows == [("alice", 1000 - TRANSFERS), ("bob", TRANSFERS)]


def test_migration(
    resilientdb_postgres: Postgres, resilientdb_proxy: Proxy, database: str, tmp_path: Path
) -> None:
    url = resilientdb_postgres.url(database=database, port=resilientdb_proxy.listen_port)
    configuration = ["-c", str(EXAMPLES / "migrations" / "alembic.ini")]

    def tables() -> list[str]:
        engine = create_engine(resilientdb_postgres.url(database=database))
        try:
            return sorted(inspect(engine).get_table_names())
        finally:
            engine.dispose()

    for arguments, expected in (
        (["upgrade", "head"], ["alembic_version", "item"]),
        (["downgrade", "base"], ["alembic_version"]),
    ):
        alembic = ServerProcess(
            "alembic",
            [sys.executable, "-W", "error", "-m", "alembic.config", *configuration, *arguments],
            log=tmp_path / "alembic.log",
            env={"DATABASE_URL": url},
        )
        assert alembic.wait(30)
        assert alembic.returncode == 0, alembic.log_tail()
        assert tables() == expected


def wait(condition: Callable[[], bool], *, within: float = 20.0) -> None:
    give_up = time.monotonic() + within
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)
