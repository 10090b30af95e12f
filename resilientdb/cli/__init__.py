"""The ``resilientdb`` command.

``group`` holds what all commands share; each command is a module or package of its own, imported when it is
used. May import every other room; nothing imports it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

__all__ = ["main"]

if TYPE_CHECKING:
    from resilientdb.cli.group import main
else:
    try:
        from resilientdb.cli.group import main
    except ModuleNotFoundError as missing:
        if missing.name != "click":
            raise

        def main(*_args: object, **_options: object) -> NoReturn:
            """Say what to install: without click there is no command line."""
            sys.stderr.write("resilientdb: click is not installed: pip install 'resilientdb[cli]'\n")
            sys.exit(3)
