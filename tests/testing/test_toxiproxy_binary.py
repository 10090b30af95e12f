"""Where the Toxiproxy server is looked for, and how it gets into the cache."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from resilientdb.testing import ServiceUnavailable, toxiproxy_binary
from resilientdb.testing.toxiproxy_binary import (
    TOXIPROXY_VARIABLE,
    TOXIPROXY_VERSION,
    build_toxiproxy,
    cache_folder,
    find_toxiproxy,
)


def _program(path: Path, says: str = f"toxiproxy-server version {TOXIPROXY_VERSION}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOXIPROXY_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("RESILIENTDB_CACHE", str(tmp_path / "cache"))


def test_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_toxiproxy() is None
    cached = _program(cache_folder() / f"toxiproxy-server-{TOXIPROXY_VERSION}")
    found = find_toxiproxy()
    assert found is not None
    assert (found.path, found.source) == (cached, "the cache")
    on_path = _program(tmp_path / "bin" / "toxiproxy-server", "toxiproxy-server version git")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    found = find_toxiproxy()
    assert found is not None
    assert (found.path, found.source) == (on_path, "PATH")
    named = _program(tmp_path / "mine")
    monkeypatch.setenv(TOXIPROXY_VARIABLE, str(named))
    found = find_toxiproxy()
    assert found is not None
    assert (found.path, found.source) == (named, TOXIPROXY_VARIABLE)


@pytest.mark.parametrize("says", ["toxiproxy-server version 2.1.4", "hello", ""])
def test_a_program_that_will_not_do(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = _program(tmp_path / "bin" / "toxiproxy-server", says)
    monkeypatch.setenv("PATH", f"{unfit.parent}:/usr/bin:/bin")
    assert find_toxiproxy() is None
    monkeypatch.setenv(TOXIPROXY_VARIABLE, str(unfit))
    with pytest.raises(ServiceUnavailable, match=TOXIPROXY_VARIABLE):
        find_toxiproxy()


def test_the_cache_is_in_the_environment_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESILIENTDB_CACHE")
    assert cache_folder() == Path(sys.prefix, ".cache", "resilientdb")


def test_processes_that_build_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(folder: Path) -> str:
        built.append(folder)
        _program(folder / "server")
        return "a test"

    monkeypatch.setattr(toxiproxy_binary, "_build", build)
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(build_toxiproxy().source)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["a test", "the cache", "the cache", "the cache"]
    assert len(built) == 1
    assert not built[0].exists()  # nothing but the program is kept
    names = sorted(path.name for path in cache_folder().iterdir())
    program = f"toxiproxy-server-{TOXIPROXY_VERSION}"
    assert names == [program, f"{program}.lock"]


def test_a_go_on_path_is_used_and_kept_in_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = _program(tmp_path / "bin" / "go")
    go.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = version ]; then echo "go version go1.26.1 linux/amd64"; exit; fi\n'
        f'env > {tmp_path}/environment; echo "$@" > {tmp_path}/arguments\n'
        "printf '#!/bin/sh\\necho toxiproxy-server version 2.12.0\\n' > $GOBIN/server\n"
    )
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    assert build_toxiproxy().source == f"a build with {go}"
    environment = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    for name in ("HOME", "XDG_CONFIG_HOME", "GOBIN", "GOPATH", "GOCACHE"):
        assert "resilientdb-build-" in environment[name]
    assert environment["HTTPS_PROXY"] == "http://proxy.example"
    assert f"cmd/server@v{TOXIPROXY_VERSION}" in (tmp_path / "arguments").read_text()
    found = find_toxiproxy()
    assert found is not None
    assert found.source == "the cache"


def test_an_old_go_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = _program(tmp_path / "bin" / "go", "go version go1.19.8 linux/amd64")
    monkeypatch.setenv("PATH", str(go.parent))
    assert toxiproxy_binary._go_on_path() is None


def test_a_build_that_fails_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = _program(tmp_path / "bin" / "go")
    go.write_text('#!/bin/sh\n[ "$1" = version ] && echo go1.26.1 && exit\necho no route to proxy; exit 1\n')
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")
    with pytest.raises(
        ServiceUnavailable, match=r"(?s)go install failed.*no route to proxy.*install Toxiproxy"
    ):
        build_toxiproxy()
    assert find_toxiproxy() is None


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESILIENTDB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ServiceUnavailable, match="set RESILIENTDB_CACHE to another folder"):
        build_toxiproxy()
