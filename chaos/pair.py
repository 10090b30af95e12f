"""A primary and its synchronous standby, which may change places again and again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from chaos.invariants import eventually
from resilientdb.testing import faults

if TYPE_CHECKING:
    from resilientdb.testing import Postgres

__all__ = ["Pair"]

_SETTLED = 0.1
"""Seconds after which every process of the server has read its configuration again."""


class Pair:
    """Two servers. For one thread at a time, but ``copy`` and ``couple`` may go on beside faults on the primary."""

    def __init__(self, primary: Postgres, standby: Postgres) -> None:
        self.primary = primary
        self.standby = standby

    def __enter__(self) -> Pair:
        self.primary.start()
        self.standby.start()
        self.couple()
        return self

    def __exit__(self, *_: object) -> None:
        self.standby.close()
        self.primary.close()

    def fail_over(self, how: Literal["immediate", "main"] = "immediate", *, after: float = 0.0) -> None:
        """Lose the primary, promote the standby ``after`` so many seconds, and exchange the roles.

        The old primary is fenced: nothing of it runs any more, until ``rebuild``.
        """
        self.primary.crash(how)
        time.sleep(after)
        faults.promote(self.standby)
        self.swap()

    def swap(self) -> None:
        """Note that a promotion has happened."""
        self.primary, self.standby = self.standby, self.primary

    def rebuild(self) -> None:
        """After a promotion: the old primary comes back, by base backup, as the other one's synchronous standby."""
        self.copy()
        self.couple()

    def copy(self) -> None:
        """The first half of ``rebuild``: the old primary is a standby. It needs the primary all the while."""
        # Or it would come along in the backup, and the standby, once promoted, would wait for one of its own.
        self.primary.query("ALTER SYSTEM RESET synchronous_standby_names")
        self.standby.follow(self.primary)

    def couple(self) -> None:
        """The other half: from here on, what is acknowledged is on the standby. May be tried again."""
        self.primary.query("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.primary.query("SELECT pg_reload_conf()")
        eventually(self._is_coupled, "the standby replicates synchronously", timeout=30.0)
        time.sleep(_SETTLED)
        # Also what was acknowledged by those that had not read it.
        self.standby.wait_caught_up(self.primary)

    def _is_coupled(self) -> bool:
        return bool(
            self.primary.query(
                "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"
            )
        )
