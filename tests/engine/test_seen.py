"""The record of what the drivers said: whole, and free of what belongs to nobody else."""

from __future__ import annotations

import re

from resilientdb.policy.faults import Fault
from tests.docs.generate import SERVERS
from tests.engine.seen import EVENTS, RECORD, load

DRIVERS = {driver for drivers in SERVERS.values() for driver in drivers}


def test_every_event_is_recorded() -> None:
    assert list(load()) == list(EVENTS)
    by_server = [set(drivers) for drivers in SERVERS.values()]
    for event, rows in load().items():
        assert set(rows) <= DRIVERS
        if event != "cancelled":  # of tasks only
            # With all drivers of a server or with none.
            assert all(drivers <= set(rows) or not drivers & set(rows) for drivers in by_server), event


def test_every_fault_that_a_server_can_cause_was_seen() -> None:
    seen = {row["fault"] for rows in load().values() for row in rows.values()}
    assert seen == {fault.value for fault in Fault} - {Fault.LOCAL_REJECTION.value}


def test_it_holds_names_and_codes_only() -> None:
    for rows in load().values():
        for row in rows.values():
            assert set(row) == {"error", "code", "invalidated", "fault"}
            assert re.fullmatch(r"[A-Za-z]+", row["error"])
            assert row["code"] is None or re.fullmatch(r"[0-9A-Z]{4,5}", row["code"])
    assert "127.0.0.1" not in RECORD.read_text(encoding="utf-8")
