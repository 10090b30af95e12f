"""``resilientdb config explain``: what is in force, who said so, and no password."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from resilientdb.cli import main

if TYPE_CHECKING:
    from click.testing import Result

_SECRET = "hunter2"


def _explain(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["config", "explain", *arguments], env=environ)


def test_sources() -> None:
    result = _explain(
        "postgresql://app@db/x?resilientdb_profile=web&resilientdb_breaker_window=5",
        "--json",
        environ={"RESILIENTDB_QUEUE_TIMEOUT": "2.5"},
    )
    assert result.exit_code == 0, result.output
    rows = {row["key"]: (row["value"], row["source"]) for row in json.loads(result.output)["options"]}
    assert rows["queue.timeout"] == ("2.5", "env RESILIENTDB_QUEUE_TIMEOUT")
    assert rows["breaker.window"] == ("5.0", "url resilientdb_breaker_window")
    assert rows["retry.timeout"] == ("3.0", "profile web")
    assert rows["retry.attempts"] == ("3", "default")


def test_the_table_says_the_same() -> None:
    result = _explain(environ={"RESILIENTDB_QUEUE_TIMEOUT": "2.5"})
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if line.startswith("queue.timeout"))
    assert line.split() == ["queue.timeout", "2.5", "env", "RESILIENTDB_QUEUE_TIMEOUT"]


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://app:{_SECRET}@db/x",
        f"postgresql://db/x?password={_SECRET}&sslpassword={_SECRET}&user=app",
        f"postgresql://app:{_SECRET}@db/x?resilientdb_replicas=r:5433,postgresql://app:{_SECRET}@h/x",
        f"postgresql://db/x?resilientdb_replicas=app:{_SECRET}@h:5433",
    ],
)
def test_passwords_are_hidden(url: str, form: tuple[str, ...]) -> None:
    result = _explain(url, *form)
    assert result.exit_code == 0, result.output
    assert "db/x" in result.output
    assert _SECRET not in result.output


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            f"postgresql://app:{_SECRET}@db/x?resilientdb_queue_timeot=3",
            "did you mean resilientdb_queue_timeout",
        ),
        (f"postgresql://app:{_SECRET}@db/x?resilientdb_queue_timeout=-3", "0"),
        (f"postgresql//app:{_SECRET}@db/x", "not a database URL"),
        (f"postgresql://app:{_SECRET}@db:port/x", "not a database URL"),
    ],
)
def test_a_wrong_configuration_is_exit_code_2(url: str, words: str) -> None:
    result = _explain(url)
    assert result.exit_code == 2
    assert words in result.output
    assert _SECRET not in result.output
