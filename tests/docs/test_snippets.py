"""Every code block of the documentation runs, in order, against a real PostgreSQL with a standby.

Of each document: ``python`` blocks share one namespace and one event loop (``await`` works at the top level, as in
``python -m asyncio``); ``bash`` blocks run in one temporary folder; ``toml``, ``ini`` and ``json`` are parsed;
``text`` is output or a drawing. A comment on the line before a block says what is special about it::

    <!-- not run: the reason -->        it is only there to be read
    <!-- file: test_outage.py -->       it is a file, for the blocks after it

The documents use placeholders (``PLACEHOLDERS``), which are replaced by what the fixtures started.
"""

from __future__ import annotations

import ast
import asyncio
import configparser
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

import resilientdb as rdb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilientdb.testing import Postgres

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {"python", "bash", "toml", "ini", "json", "text"}
NOT_RUN = 3
"""How many blocks are only there to be read. Each new one needs a reason as good as theirs."""

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+): (?P<said>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    language: str
    code: str
    mark: str | None
    said: str | None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(path, line, match["language"], match["code"], match["mark"], match["said"]))
    assert text.count("```") == 2 * len(found), f"{path.name}: a fence that is not understood"
    return found


def by_name(path: Path) -> str:
    return path.name


@pytest.fixture
def placeholders(resilientdb_postgres: Postgres, resilientdb_standby: Postgres) -> Iterator[dict[str, str]]:
    """What stands in the documents → what stands for it here."""
    resilientdb_postgres.query("CREATE DATABASE docs")
    resilientdb_standby.wait_caught_up(resilientdb_postgres)
    yield {
        "app:secret@db/app": f"postgres@{resilientdb_postgres.address}/docs",
        "replica:5432": resilientdb_standby.address,
    }
    resilientdb_postgres.query("DROP DATABASE docs WITH (FORCE)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_every_block_runs(
    path: Path, placeholders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Reader(path, placeholders, tmp_path) as reader:
        for block in blocks(path):
            reader.follow(block)


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "assert 1 == 2"),
        ("python", "await nothing()"),
        ("bash", "false | true"),
        ("bash", "python -W error -c 'import warnings; warnings.warn(\"x\")'"),
        ("toml", "a = "),
        ("json", "{a: 1}"),
        ("cobol", "DISPLAY 'X'."),
    ],
)
def test_a_block_that_does_not_work_fails(language: str, code: str, tmp_path: Path) -> None:
    with Reader(ROOT / "README.md", {}, tmp_path) as reader, pytest.raises((Exception, AssertionError)):
        reader.follow(Block(ROOT / "README.md", 1, language, code, None, None))


class Reader:
    """Somebody who works through one document from top to bottom."""

    def __init__(self, path: Path, placeholders: dict[str, str], folder: Path) -> None:
        self._placeholders = placeholders
        self._folder = folder
        self._namespace: dict[str, Any] = {"__name__": path.stem}
        self._runner = asyncio.Runner()
        self._engines: dict[int, Any] = {}
        self._apps: list[Any] = []

    def __enter__(self) -> Reader:
        self._runner.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            if isinstance(engine, AsyncEngine):
                self._runner.run(engine.dispose())
            else:
                engine.dispose()
        self._runner.close()

    def follow(self, block: Block) -> None:
        assert block.language in RUN, f"{block}: a block of no known language"
        if block.mark == "not run":
            return
        code = block.code
        for placeholder, real in self._placeholders.items():
            code = code.replace(placeholder, real)
        if block.mark == "file":
            (self._folder / (block.said or "")).write_text(code, encoding="utf-8")
        if block.language == "python" and block.mark != "file":
            self._python(block, code)
        elif block.language == "bash":
            self._bash(block, code)
        elif block.language == "toml":
            tomllib.loads(code)
        elif block.language == "ini":
            configparser.ConfigParser().read_string(code)
        elif block.language == "json":
            json.loads(code)

    def _python(self, block: Block, code: str) -> None:
        # The blank lines make tracebacks point into the document.
        compiled = compile(
            "\n" * (block.line - 1) + code, str(block.path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )

        async def in_loop() -> None:
            result = eval(compiled, self._namespace)
            if inspect.isawaitable(result):
                await result

        self._runner.run(in_loop())
        for value in list(self._namespace.values()):
            if isinstance(value, sa.Engine | AsyncEngine):
                self._engines[id(value)] = value
        app = self._namespace.get("app")
        if app is not None and not any(app is known for known in self._apps):
            self._apps.append(app)
            self._visit(block, app)

    def _visit(self, block: Block, app: Any) -> None:
        """Frameworks build their middleware with the first request: make one."""
        if hasattr(app, "wsgi_app"):
            with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://docs") as client:
                response = client.get("/internal/health")
        else:

            async def ask() -> httpx.Response:
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://docs") as client:
                    return await client.get("/internal/health")

            response = self._runner.run(ask())
        mounted = "/internal" in block.code
        assert response.status_code == (200 if mounted else 404), f"{block}: {response.text}"

    def _bash(self, block: Block, code: str) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONWARNINGS": "error",
        }
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self._folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"


# ----------------------------------------------------------------------------------------- all documents


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    marked = [block for path in DOCUMENTS for block in blocks(path) if block.mark == "not run"]
    assert all(block.said for block in marked)
    assert len(marked) == NOT_RUN, "\n".join(f"{block}: {block.said}" for block in marked)


def test_marks_are_understood() -> None:
    for path in DOCUMENTS:
        assert {block.mark for block in blocks(path)} <= {None, "not run", "file"}, path.name
        lines = path.read_text(encoding="utf-8").splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if re.match(r"<!-- (not run|file)\b", line):
                assert following.startswith("```"), f"{path.name}: {line!r} stands before no block"


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(path: Path) -> None:
    prose = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(file), f"{path.name}: {target}"


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    prose = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text)
    assert len(set(named)) > 20
    assert [name for name in named if not (ROOT / "resilientdb" / name).exists()] == []


def test_tables_are_complete() -> None:
    names = {name for name in rdb.__all__ if _is_error(name) and name != "ResilienceError"}
    assert first_column("Errors") == names
    # The other extras are for work on the library itself: the Makefile's.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"observability", "chaos", "demo", "dev"}
    assert first_column("Install") == extras


def first_column(heading: str) -> set[str]:
    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def _is_error(name: str) -> bool:
    thing = getattr(rdb, name)
    return isinstance(thing, type) and issubclass(thing, Exception)


def test_events_are_all_named() -> None:
    from resilientdb import events

    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert [name for name in events.__all__ if name != "Event" and name not in text] == []


def test_profiles_are_all_named() -> None:
    from resilientdb.config import PROFILES

    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert [name for name in PROFILES if f"`{name}`" not in text] == []
