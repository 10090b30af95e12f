"""``python -m resilientdb.cli``: the same command, where the script is not on PATH."""

from __future__ import annotations

from resilientdb.cli import main

if __name__ == "__main__":
    main(prog_name="resilientdb")
