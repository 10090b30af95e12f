"""Server processes that we own: started apart, awaited with a deadline, stopped by pid, never lost.

Each Python process that starts servers has one *run folder* in the system's temporary folder. Its
name carries the pid and start time of that process, and each server's pid and start time are noted
in it. A run that is killed leaves the folder behind; the next run finds the owner gone, ends what
is still running (only where pid *and* start time agree, so never a stranger that was given the
number since) and removes the folder. A run that ends normally does the same for itself at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from resilientdb.testing.errors import ServiceFailed
from resilientdb.testing.privileges import Privileges

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

__all__ = [
    "RunFolder",
    "ServerProcess",
    "children",
    "end_strangers",
    "free_port",
    "run_folder",
    "run_tool",
    "server_environment",
    "start_time",
    "sweep",
]

_PREFIX = "resilientdb-run"
_PORTS = range(10_000, 32_000)  # below what the kernel hands to outgoing connections
_KILL_GRACE = 5.0


# ------------------------------------------------------------------------------- identity of a process


def start_time(pid: int) -> str | None:
    """A text that tells this process from any other that had or will have its number; None if it is gone.

    A zombie counts as gone: it has ended and only waits for its parent.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        return _start_time_by_ps(pid)
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name in parentheses may hold spaces
    if fields[0] in {b"Z", b"X"}:
        return None
    return fields[19].decode()


def _start_time_by_ps(pid: int) -> str | None:  # macOS, BSD
    result = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, started = result.stdout.strip().partition(" ")
    if result.returncode != 0 or state.startswith("Z"):
        return None
    return started.strip().replace(" ", "_")


def children(pid: int) -> dict[int, str]:
    """The processes that ``pid`` has started and that still run, each with its start time."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if listed.exists():
        pids = [int(child) for child in listed.read_text(encoding="ascii").split()]
    else:  # macOS, BSD, and a kernel built without it
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        pairs = [line.split() for line in table.stdout.splitlines()]
        pids = [int(child) for child, parent in pairs if int(parent) == pid]
    started = {child: start_time(child) for child in pids}
    return {child: at for child, at in started.items() if at is not None}


def end_strangers(strangers: Mapping[int, str], *, grace: float) -> None:
    """Wait for the end of processes that are no children of ours; after ``grace`` seconds, kill them."""
    deadline = time.monotonic() + grace
    for pid, started in strangers.items():
        while start_time(pid) == started:
            if time.monotonic() > deadline:
                _kill_stranger(pid, started)
            time.sleep(0.005)


def _world() -> str:
    """Within which pids mean the same thing: this boot of this machine and this pid namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


# --------------------------------------------------------------------------------------- the run folder


class RunFolder:
    """The temporary folder of this process, and the book of the servers that it started."""

    def __init__(self) -> None:
        pid = os.getpid()
        self.owner = pid
        started = hashlib.sha256((start_time(pid) or "").encode()).hexdigest()[:8]
        # mkdtemp gives 0700, and a server that runs as nobody must be able to pass through.
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{_world()}-{pid}-{started}-", dir=_temporary()))
        self.path.chmod(0o755)
        (self.path / "processes").mkdir(mode=0o700)

    def folder(self, name: str) -> Path:
        """Make a fresh 0755 folder in the run folder."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.path))
        path.chmod(0o755)
        return path

    def note(self, pid: int, name: str) -> None:
        """Write down a server, so that it can be found again if this process is killed."""
        record = {"pid": pid, "started": start_time(pid), "name": name}
        path = self.path / "processes" / f"{pid}.json"
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(record), encoding="utf-8")
        draft.rename(path)

    def forget(self, pid: int) -> None:
        """Strike out a server that has ended."""
        (self.path / "processes" / f"{pid}.json").unlink(missing_ok=True)


_lock = threading.RLock()
_current: RunFolder | None = None  # guarded by _lock
_alive: dict[int, ServerProcess] = {}  # guarded by _lock; by pid, in the order of their start
_inherited: list[ServerProcess] = []  # guarded by _lock; kept, or their Popen would warn as it is collected


def run_folder() -> RunFolder:
    """The run folder of this process; made, after a sweep of what killed runs left, when first asked for."""
    global _current  # noqa: PLW0603 - one a process, and a forked child needs its own
    with _lock:
        if _current is None or _current.owner != os.getpid():
            _inherited.extend(_alive.values())  # after a fork these belong to the parent
            _alive.clear()
            sweep()
            _current = RunFolder()
            atexit.register(_at_exit, _current)
        return _current


def sweep() -> list[str]:
    """End the servers, and remove the folders, of runs whose process is gone; returns the servers' names."""
    ended: list[str] = []
    for folder in _temporary().glob(f"{_PREFIX}-{_world()}-*"):
        try:
            status = folder.lstat()
            pid, started = folder.name.split("-")[3:5]
            alive = start_time(int(pid))
        except (OSError, ValueError):
            continue
        # Another account could plant a folder that names our processes.
        if status.st_uid != os.geteuid() or folder.is_symlink():
            continue
        if alive is not None and hashlib.sha256(alive.encode()).hexdigest()[:8] == started:
            continue
        for record in (folder / "processes").glob("*.json"):
            try:
                entry = json.loads(record.read_text(encoding="utf-8"))
                if _kill_stranger(int(entry["pid"]), entry["started"]):
                    ended.append(str(entry["name"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # another run sweeps at the same time, or the record was never finished
        shutil.rmtree(folder, ignore_errors=True)
    return ended


def _kill_stranger(pid: int, started: str | None) -> bool:
    """Kill a process that is no child of ours, if it is still the one noted; wait until it is gone."""
    if started is None or start_time(pid) != started:
        return False
    # SIGQUIT lets a PostgreSQL take its children with it at once; others it ends as well.
    for number, grace in ((signal.SIGQUIT, 2.0), (signal.SIGKILL, _KILL_GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            if start_time(pid) != started:
                return True
            time.sleep(0.01)
    return True


def _at_exit(folder: RunFolder) -> None:
    if folder.owner != os.getpid():
        return  # a forked child must not end its parent's servers
    with _lock:
        servers = list(_alive.values())
    for server in reversed(servers):
        with contextlib.suppress(Exception):
            server.stop(timeout=2.0)
    shutil.rmtree(folder.path, ignore_errors=True)


def _temporary() -> Path:
    """The temporary folder; one that everybody can reach if servers run as nobody."""
    chosen = Path(tempfile.gettempdir()).resolve()
    if os.geteuid() == 0:
        reachable = all(part.stat().st_mode & 0o001 for part in (chosen, *chosen.parents))
        if not reachable and Path("/tmp").is_dir():  # noqa: S108 - the run folder has a random name
            return Path("/tmp")  # noqa: S108
    return chosen


# ------------------------------------------------------------------------------------------------ ports

_given: set[int] = set()  # guarded by _lock; two servers of one process never get the same


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now.

    Another process may take it before the server binds it, so starts retry with another. It lies
    below the range of outgoing connections: there, a client that keeps dialling a port on which
    nobody listens can be connected to itself.
    """
    for _ in range(200):
        port = random.choice(_PORTS)
        with _lock:
            if port in _given:
                continue
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
                try:
                    candidate.bind(("127.0.0.1", port))
                except OSError:
                    continue
            _given.add(port)
        return port
    raise ServiceFailed(f"no free port found on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop - 1}")


# ---------------------------------------------------------------------------------------------- servers


def server_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a server or a tool of ours: the same on every machine.

    The caller's ``PG*`` variables are left out: ``PGHOST``, ``PGOPTIONS`` and their kind would
    lead initdb and pg_basebackup astray.
    """
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment.update({"LC_ALL": "C", "TZ": "UTC"}, **(extra or {}))
    return environment


def run_tool(
    name: str,
    command: Sequence[str | Path],
    *,
    privileges: Privileges,
    timeout: float = 120.0,
) -> str:
    """Run a program that prepares or steers a server to its end; returns its output.

    Raises :class:`ServiceFailed` with that output if it fails or takes too long.
    """
    try:
        result = subprocess.run(
            [*privileges.prefix, *(str(part) for part in command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd="/",
            env=server_environment(),
            user=privileges.uid,
            group=privileges.gid,
            extra_groups=[] if privileges.switches_user else None,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceFailed(f"{name} did not run: {error}") from error
    if result.returncode != 0:
        raise ServiceFailed(f"{name} failed with status {result.returncode}:\n{result.stdout.strip()}")
    return result.stdout


class ServerProcess:
    """One running server. The constructor starts it; :meth:`stop` ends it; as a context manager, both.

    ``argv`` runs in its own session (a Ctrl-C at the terminal is for the tests to handle), with
    stdin closed and stdout and stderr appended to ``log``. Raises :class:`ServiceFailed` if it
    cannot be executed.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        privileges: Privileges | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.stop_signal = stop_signal
        self.log = log
        self._folder = run_folder()
        privileges = privileges or Privileges()
        command = [*privileges.prefix, *(str(part) for part in argv)]
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env=server_environment(env),
                    start_new_session=True,
                    user=privileges.uid,
                    group=privileges.gid,
                    extra_groups=[] if privileges.switches_user else None,
                )
            except OSError as error:
                raise ServiceFailed(f"{name} cannot be started: {error}") from error
        self.pid = self._process.pid
        with _lock:
            _alive[self.pid] = self
        self._folder.note(self.pid, name)

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait_ready(self, probe: Callable[[], bool], *, timeout: float = 30.0) -> float:
        """Wait until ``probe()`` is true and return the seconds it took.

        Raises :class:`ServiceFailed`, with the end of the log, if the process ends first or
        ``timeout`` seconds pass.
        """
        begun = time.monotonic()
        pause = 0.002
        while True:
            if not self.running:
                self._ended()
                raise ServiceFailed(f"{self.name} ended with status {self.returncode}\n{self.log_tail()}")
            if probe():
                return time.monotonic() - begun
            if time.monotonic() - begun > timeout:
                raise ServiceFailed(f"{self.name} was not ready after {timeout:g} s\n{self.log_tail()}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        self._process.send_signal(number)  # polls first, so never a stranger that was given the pid

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within ``timeout`` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self._ended()
        return True

    def stop(self, *, timeout: float = 10.0) -> None:
        """Ask with ``stop_signal``, and kill after ``timeout`` seconds. Nothing happens if it has ended."""
        self.signal(self.stop_signal)
        if not self.wait(timeout):
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        if not self.wait(_KILL_GRACE):
            raise ServiceFailed(f"{self.name} (pid {self.pid}) cannot be killed")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's log."""
        return log_tail(self.log, lines)

    def _ended(self) -> None:
        with _lock:
            _alive.pop(self.pid, None)
        self._folder.forget(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self.running else f"ended with {self.returncode}"
        return f"<ServerProcess {self.name} pid {self.pid}, {state}>"


def log_tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log file, headed by its path."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"--- {log}: {error.strerror}"
    return "\n".join([f"--- end of {log}:", *text.splitlines()[-lines:]])
