"""``python -m resilientdb.testing.install``: find, or build into the cache, the services that tests need.

PostgreSQL comes from a wheel or the system and MariaDB from the system, so both are only looked for;
Toxiproxy is built if it is missing. One line a service. With ``--check`` nothing is built. The exit
status is 0 if everything asked for is there; MariaDB may be missing, and its tests are skipped then.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from resilientdb.testing.binaries import find_postgres
from resilientdb.testing.errors import TestingError
from resilientdb.testing.mariadb import find_mariadb
from resilientdb.testing.toxiproxy_binary import build_toxiproxy, find_toxiproxy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m resilientdb.testing.install", description=__doc__)
    parser.add_argument("--toxiproxy", action="store_true", help="only the Toxiproxy server")
    parser.add_argument("--check", action="store_true", help="only say what is there; build nothing")
    options = parser.parse_args(arguments)
    services: list[tuple[str, Callable[[], str]]] = []
    if not options.toxiproxy:
        services += [("PostgreSQL", _postgres), ("MariaDB", _mariadb)]
    services.append(("Toxiproxy", lambda: _toxiproxy(build=not options.check)))
    status = 0
    for name, find in services:
        try:
            line = find()
        except TestingError as error:
            line = f"missing: {error}"
            status = status if name == "MariaDB" else 1
        sys.stdout.write(f"{name}: {line}\n")
        sys.stdout.flush()
    return status


def _postgres() -> str:
    found = find_postgres()
    return f"{found.major} from {found.source} ({found.folder})"


def _mariadb() -> str:
    return f"from the system ({find_mariadb().server})"


def _toxiproxy(*, build: bool) -> str:
    found = find_toxiproxy()
    if found is not None:
        return f"from {found.source} ({found.path})"
    if not build:
        raise TestingError("not built yet; run python -m resilientdb.testing.install")
    begun = time.monotonic()
    built = build_toxiproxy()
    return f"built in {time.monotonic() - begun:.0f} s, {built.source} ({built.path})"


if __name__ == "__main__":
    sys.exit(main())
