"""What each driver said when each fault was provoked on a real server, and what was made of it.

``seen.json`` is a record of it. ``RECORD_SEEN=1`` in the environment has the tests write what they see;
otherwise they compare: the fault must be the recorded one. ``docs/failure-modes.md`` has it as a table.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from resilientdb.policy.faults import Fault, Phase, classify, sqlstate_of

RECORD = Path(__file__).with_name("seen.json")

EVENTS = {
    "refused": "Nobody listens there",
    "unknown-host": "The host's name is unknown",
    "silent-connect": "The server takes the connection and says nothing",
    "reset-connect": "The connection is reset before the login",
    "shutting-down": "A login while the server shuts down",
    "wrong-password": "Wrong password",
    "unknown-database": "No such database",
    "too-many-connections": "No connection left",
    "account-limit": "No connection left for this account",
    "standby-connect": "A standby, where the URL asks for a server that takes writes",
    "stopped": "The server is stopped in the middle of a statement",
    "killed": "An administrator ends the session in the middle of a statement",
    "killed-idle": "The same between two statements",
    "cut": "The network cuts the connection",
    "idle-in-transaction": "The session was idle in a transaction for too long",
    "deadlock": "Deadlock",
    "serialization": "Serialization failure",
    "lock-timeout": "A lock is not to be had in time",
    "statement-timeout": "A statement takes too long",
    "interrupted": "An administrator ends the statement",
    "read-only-server": "A write on a server that is read-only",
    "own-read-only": "A write in the application's own READ ONLY transaction",
    "cancelled": "The task is cancelled in the middle of a statement",
    "unique": "Unique violation",
    "not-null": "NOT NULL violation",
    "syntax": "Syntax error",
    "lost-commit": "The connection is lost while COMMIT is answered",
    "killed-commit": "The session was ended just before COMMIT",
    "refused-commit": "COMMIT is refused by a deferred constraint",
    "serialization-commit": "COMMIT is refused by SERIALIZABLE",
    "read-only-commit": "COMMIT on a server that became read-only",
}
"""In the order of a connection's life."""


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """Event → driver → what was seen."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def seen(event: str, driver: str, error: BaseException, phase: Phase = Phase.STATEMENT) -> Fault:
    """The fault that ``error`` is; recorded, or compared with the record."""
    assert event in EVENTS
    fault = classify(error, phase)
    row = {
        "error": type(error).__name__,
        "code": _number(error) or sqlstate_of(error),
        "invalidated": getattr(error, "connection_invalidated", False) is True,
        "fault": fault.value,
    }
    rows = load()
    if os.environ.get("RECORD_SEEN"):
        rows.setdefault(event, {})[driver] = row
        ordered = {name: dict(sorted(rows[name].items())) for name in EVENTS if name in rows}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    else:
        recorded = rows[event][driver]
        assert row["fault"] == recorded["fault"], f"seen now: {row}; recorded: {recorded}"
    return fault


def _number(error: BaseException) -> str | None:
    """MySQL's number."""
    arguments = getattr(getattr(error, "orig", error), "args", ())
    if isinstance(error, OSError) or not arguments or not isinstance(arguments[0], int):
        return None
    return str(arguments[0])
