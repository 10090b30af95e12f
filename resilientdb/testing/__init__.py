"""What a team needs to prove its own stack: real services, faults as scoped blocks, checkers.

=====================  ========================================================================
``postgres``           a PostgreSQL primary or streaming standby from any installed binaries
``mariadb``            a MariaDB primary or GTID replica, from the system's packages
``valkey``             a Valkey (or Redis) server, for what is stored there
``toxiproxy``          the Toxiproxy server and a checked client: what it says is what is so
``faults``             down, hang, pause, latency, reset, reply lost, …: blocks that prove themselves
``checkers``           histories as in Jepsen, and the ledger check over them
``clock``              :class:`FakeClock`
``pytest_plugin``      fixtures (``resilientdb_postgres``, ``resilientdb_proxy``, …)
``install``            ``python -m resilientdb.testing.install``: fetch or build what is missing
``services``           what the servers have in common: the life of a process and of its data
``processes``          what the services stand on: owned processes, temporary folders, privileges
=====================  ========================================================================

It may import the library's public package and nothing of another room's insides; nothing but the
command line, the demo and tests may import it. Importing this package is cheap: every name below
is loaded when it is first asked for, and neither pytest nor a driver is imported by it. The faults
are a module: ``from resilientdb.testing import faults``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resilientdb.testing.checkers import History, LedgerReport, Operation, Outcome, check_ledger
    from resilientdb.testing.clock import FakeClock
    from resilientdb.testing.errors import (
        FaultNotActive,
        HistoryViolation,
        ServiceFailed,
        ServiceUnavailable,
        TestingError,
        ToxiproxyError,
    )
    from resilientdb.testing.mariadb import MariaDB
    from resilientdb.testing.postgres import Postgres
    from resilientdb.testing.toxiproxy import Proxy, Toxic, ToxiproxyServer
    from resilientdb.testing.valkey import Valkey

__all__ = [
    "FakeClock",
    "FaultNotActive",
    "History",
    "HistoryViolation",
    "LedgerReport",
    "MariaDB",
    "Operation",
    "Outcome",
    "Postgres",
    "Proxy",
    "ServiceFailed",
    "ServiceUnavailable",
    "TestingError",
    "Toxic",
    "ToxiproxyError",
    "ToxiproxyServer",
    "Valkey",
    "check_ledger",
]

_HOME = {
    "FakeClock": "clock",
    "FaultNotActive": "errors",
    "History": "checkers",
    "HistoryViolation": "errors",
    "LedgerReport": "checkers",
    "MariaDB": "mariadb",
    "Operation": "checkers",
    "Outcome": "checkers",
    "Postgres": "postgres",
    "Proxy": "toxiproxy",
    "ServiceFailed": "errors",
    "ServiceUnavailable": "errors",
    "TestingError": "errors",
    "Toxic": "toxiproxy",
    "ToxiproxyError": "errors",
    "ToxiproxyServer": "toxiproxy",
    "Valkey": "valkey",
    "check_ledger": "checkers",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
