"""Owned processes: awaited with a deadline, stopped, and never left behind nor mistaken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from resilientdb.testing import processes
from resilientdb.testing.errors import ServiceFailed
from resilientdb.testing.processes import ServerProcess, free_port, run_folder, server_environment, start_time

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SLEEPER = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"]
_DEAF = [
    sys.executable,
    "-S",
    "-c",
    "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def _is_up(server: ServerProcess) -> Callable[[], bool]:
    return lambda: "up" in server.log.read_text()


def _eventually(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_starts_waits_and_stops(tmp_path: Path) -> None:
    with ServerProcess("sleeper", _SLEEPER, log=tmp_path / "log") as server:
        assert server.wait_ready(_is_up(server)) < 10
        assert server.running
        assert os.getsid(server.pid) == server.pid  # a Ctrl-C at the terminal does not reach it
        assert (run_folder().path / "processes" / f"{server.pid}.json").exists()
    assert server.returncode == -signal.SIGTERM
    assert not (run_folder().path / "processes" / f"{server.pid}.json").exists()


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    server = ServerProcess("deaf", _DEAF, log=tmp_path / "log")
    server.wait_ready(_is_up(server))
    server.stop(timeout=0.05)
    assert server.returncode == -signal.SIGKILL
    server.stop()  # nothing happens


def test_an_early_end_is_told_with_the_log(tmp_path: Path) -> None:
    argv = [sys.executable, "-S", "-c", "import sys; sys.exit('no disk left')"]
    server = ServerProcess("broken", argv, log=tmp_path / "log")
    with pytest.raises(ServiceFailed, match=r"(?s)broken ended with status 1.*no disk left"):
        server.wait_ready(lambda: False)


def test_a_deadline_is_told_with_the_log(tmp_path: Path) -> None:
    with ServerProcess("slow", _SLEEPER, log=tmp_path / "log") as server:
        server.wait_ready(_is_up(server))
        with pytest.raises(ServiceFailed, match=r"(?s)not ready after 0.05 s.*up"):
            server.wait_ready(lambda: False, timeout=0.05)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServiceFailed, match="ghost cannot be started"):
        ServerProcess("ghost", [tmp_path / "nothing"], log=tmp_path / "log")


def test_servers_do_not_inherit_what_would_lead_them_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "production")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    environment = server_environment({"EXTRA": "1"})
    assert "PGHOST" not in environment
    assert (environment["LC_ALL"], environment["TZ"], environment["EXTRA"]) == ("C", "UTC", "1")


def test_free_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(10_000 <= port < 32_000 for port in ports)


def test_folders_can_be_passed_by_an_unprivileged_server() -> None:
    folder = run_folder().folder("example")
    assert folder.stat().st_mode & 0o777 == 0o755
    assert run_folder().path.stat().st_mode & 0o777 == 0o755


_KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from resilientdb.testing.processes import ServerProcess, run_folder
folder = run_folder().folder("left")
server = ServerProcess("left behind", {argv!r}, log=folder / "log")
print(server.pid, run_folder().path, flush=True)
{end}
"""


def _run(end: str) -> tuple[int, Path]:
    from pathlib import Path

    script = _KILLED_RUN.format(argv=_SLEEPER, end=end)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid, folder = result.stdout.split()
    return int(pid), Path(folder)


def test_what_a_killed_run_left_is_ended_by_the_next() -> None:
    pid, folder = _run("os.kill(os.getpid(), signal.SIGKILL)")
    assert start_time(pid) is not None
    assert folder.exists()
    assert "left behind" in processes.sweep()
    assert _eventually(lambda: start_time(pid) is None)
    assert not folder.exists()


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError"])
def test_a_run_that_ends_leaves_nothing(end: str) -> None:
    pid, folder = _run(end)
    assert start_time(pid) is None
    assert not folder.exists()


def test_a_stranger_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    """The book of a dead run names a pid that another process has been given since."""
    with ServerProcess("stranger", _SLEEPER, log=tmp_path / "log") as stranger:
        stranger.wait_ready(_is_up(stranger))
        pid, folder = _run("os.kill(os.getpid(), signal.SIGKILL)")
        record = {"pid": stranger.pid, "started": "1", "name": "stranger"}
        (folder / "processes" / "1.json").write_text(json.dumps(record))
        (folder / "processes" / "2.json").write_text("{half a rec")
        assert "stranger" not in processes.sweep()
        assert stranger.running
        assert start_time(pid) is None


def test_a_living_run_is_left_alone() -> None:
    mine = run_folder().path
    processes.sweep()
    assert mine.exists()


def test_start_time_of_nobody() -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    assert start_time(gone.pid) is None
    assert start_time(os.getpid()) == start_time(os.getpid()) is not None
