"""What the testing room raises.

::

    TestingError(RuntimeError)
    ├── ServiceUnavailable      nothing to run: a binary is missing; the message says what to install
    ├── ServiceFailed           a server that is installed did not do what it was asked
    └── ToxiproxyError          the fault injector refused, failed, or is not in the state asked for
        └── FaultNotActive      a fault that a test relies on is not (or no longer) there
    HistoryViolation(AssertionError)   the database broke its promise to the workload
"""

from __future__ import annotations

__all__ = [
    "FaultNotActive",
    "HistoryViolation",
    "ServiceFailed",
    "ServiceUnavailable",
    "TestingError",
    "ToxiproxyError",
]


class TestingError(RuntimeError):
    """Base of everything that goes wrong with the services themselves."""

    __test__ = False  # pytest would otherwise try to collect it where a test imports it


class ServiceUnavailable(TestingError):
    """A service cannot be run on this machine; the message says how to get it."""


class ServiceFailed(TestingError):
    """An installed server did not start, stop or answer as asked; the message ends with its log."""


class ToxiproxyError(TestingError):
    """The fault injector refused a change, or reports another state than the one asked for."""


class FaultNotActive(ToxiproxyError):
    """A fault was not active when it should have been, so whatever the test saw proves nothing."""


class HistoryViolation(AssertionError):
    """A history and the final state of the database contradict each other."""
