"""What has happened at one node's pool, counted. It outlives the pools, as the node does."""

from __future__ import annotations

from resilientdb.policy.histogram import Recorder
from resilientdb.policy.saturation import Refusal

__all__ = ["Tally"]


class Tally:
    """Plain counters, changed by many threads without a lock: they are for people to look at, and in years of
    such counting hardly one is lost."""

    __slots__ = (
        "checkouts",
        "closed",
        "connect_failures",
        "create",
        "hold",
        "leaks",
        "opened",
        "refused",
        "retired",
        "timeouts",
        "wait",
        "waited",
    )

    def __init__(self) -> None:
        self.checkouts = 0
        self.waited = 0
        self.timeouts = 0
        self.opened = 0
        self.closed = 0
        self.connect_failures = 0
        self.leaks = 0
        self.refused = dict.fromkeys(Refusal, 0)
        self.retired: dict[str, int] = {}
        self.wait = Recorder()
        """Seconds in line, of all who waited."""
        self.hold = Recorder()
        """Seconds from checkout to checkin, of one checkout in seven: a healthy one has no time for more."""
        self.create = Recorder()
        """Seconds to open a connection."""

    def count_retired(self, why: str) -> None:
        self.retired[why] = self.retired.get(why, 0) + 1
