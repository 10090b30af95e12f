"""What all commands share: exit codes, the version, lazy loading, and what to install when something is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

import resilientdb
from resilientdb.cli import main


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def _without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where a module is not installed."""
    return _python(
        "import sys, importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from resilientdb.cli import main\n"
        f"sys.argv = ['resilientdb', *{list(arguments)!r}]\n"
        "main()"
    )


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.output) == (0, f"resilientdb {resilientdb.__version__}\n")


def test_help_lists_the_commands_and_imports_none_of_them() -> None:
    done = _python(
        "import sys\nfrom resilientdb.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([name for name in ('rich', 'starlette', 'uvicorn', 'toxiproxy', 'resilientdb.testing') "
        "if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "config" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_an_unknown_command_is_wrong_usage() -> None:
    result = CliRunner().invoke(main, ["dmeo"])
    assert result.exit_code == 2
    assert "dmeo" in result.output


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("click", [], "resilientdb[cli]"),
        ("rich", ["config", "explain"], "resilientdb[cli]"),
        ("rich", ["demo", "--quick"], "resilientdb[demo]"),
        ("uvicorn", ["demo", "--quick"], "resilientdb[demo]"),
        ("starlette", ["demo", "--quick"], "resilientdb[demo]"),
        ("toxiproxy", ["demo", "--quick"], "resilientdb[demo]"),
        ("psycopg", ["demo", "--quick"], "resilientdb[demo]"),
    ],
)
def test_a_missing_extra_is_named(
    module: str, arguments: list[str], extra: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    report = tmp_path_factory.mktemp("report") / "demo.html"
    done = _without(module, *arguments, *(["--report", str(report)] if "demo" in arguments else []))
    assert done.returncode == 3, done.stderr
    assert module in done.stderr
    assert f"pip install '{extra}'" in done.stderr
    assert "Traceback" not in done.stderr
