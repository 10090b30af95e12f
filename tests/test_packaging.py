"""What an installation promises: entry points, extras, types; and nothing of the machine it was made on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import resilientdb

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def source_files() -> list[Path]:
    """Everything that is, or will be, under version control."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("sqlalchemy.plugins", "resilientdb.engine.plugin:ResilientPlugin"),
        ("pytest11", "resilientdb.testing.pytest_plugin"),
        ("console_scripts", "resilientdb.cli:main"),
    ],
)
def test_entry_points_are_registered_and_load(group: str, target: str) -> None:
    (found,) = importlib.metadata.entry_points(group=group, name="resilientdb")
    assert found.value == target
    assert found.load() is not None


def test_the_package_is_typed() -> None:
    assert (ROOT / "resilientdb" / "py.typed").exists()


def test_version() -> None:
    assert str(Version(resilientdb.__version__)) == resilientdb.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert "## [Unreleased]" in changelog
    if not Version(resilientdb.__version__).is_devrelease:
        assert released[0] == resilientdb.__version__


def test_extras_that_are_named_exist() -> None:
    texts = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("examples/*.py"),
    ]
    named: set[str] = set()
    for text in (path.read_text(encoding="utf-8") for path in texts):
        for group in re.findall(r"(?:resilientdb|\.)\[([a-z0-9,]+)\]", text):
            named |= set(group.split(","))
        named |= set(re.findall(r"--extra (\w+)", text))
    assert {"dev", "demo", "psycopg", "testing"} <= named
    assert named <= set(EXTRAS)


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    wanted = {
        canonicalize_name(Requirement(line).name)
        for line in [
            *PROJECT["project"]["dependencies"],
            *(line for extra in EXTRAS.values() for line in extra),
        ]
    }
    # Type stubs follow the packages they describe.
    unpinned = {name for name in wanted - pinned - {"resilientdb"} if not name.startswith("types-")}
    assert unpinned == set()


def test_what_the_source_distribution_names_exists() -> None:
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists(), name
    for name in (PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        assert (ROOT / name).stat().st_size > 0, name


def test_no_path_of_a_machine() -> None:
    """Of the checkout itself, of a home folder, or of the temporary folder of a session."""
    own = {str(ROOT), str(Path.home())} - {"/", "/root"}
    looks_like_one = re.compile(r"/(?:home|Users|root)/\w+/|/tmp/\w+\.\d")
    found = []
    for path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if any(name in line for name in own) or looks_like_one.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    found = [line for line in found if not line.startswith("tests/test_packaging.py:")]
    assert found == []


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, and a test does not download it")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "resilientdb/py.typed" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"resilientdb"}
