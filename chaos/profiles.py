"""How long and how hard. Times in seconds, rates a second."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PROFILES", "Profile"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the suite."""

    name: str
    rate: float
    """Arrivals of a steady load; far below what the pool can serve."""
    warmup: float
    outage: float
    """Of faults that show at once: refused, closed, reset."""
    silence: float
    """Of faults that must be detected first (within 1.25 s)."""
    slow: float
    recovery: float
    """Watched after healing; at least 1.2, since the bound for normality is 1."""
    overload: float
    goodput: float
    """Share of the capacity served in time under overload. A short window loses a tenth to one pause of 0.2 s."""
    rounds: int
    """Deterministic faults made one by one (a lost COMMIT)."""
    works: int
    """Transactions of a closed-loop workload."""
    entries: int
    """In the ledger of each driver, if ``--chaos-ledger`` does not say another number."""
    ledger: float | None
    """Seconds after which those who need not write all of them stop; None = however long it takes."""


PROFILES = {
    "short": Profile(
        name="short",
        rate=40.0,
        warmup=0.4,
        outage=1.2,
        silence=2.0,
        slow=1.2,
        recovery=1.3,
        overload=2.0,
        goodput=0.8,
        rounds=3,
        works=150,
        entries=1_300,
        ledger=2.5,
    ),
    "nightly": Profile(
        name="nightly",
        rate=60.0,
        warmup=2.0,
        outage=10.0,
        silence=10.0,
        slow=10.0,
        recovery=3.0,
        overload=10.0,
        goodput=0.9,
        rounds=40,
        works=3000,
        entries=5_000,
        ledger=None,
    ),
}
