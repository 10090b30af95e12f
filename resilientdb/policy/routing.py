"""Which node to ask, and in which order, as a pure choice over what is known of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from resilientdb.stats import EngineState, Role

__all__ = ["Candidate", "engine_state", "next_primary", "order_for_read"]


class Candidate(Protocol):
    """What the choice looks at."""

    @property
    def role(self) -> Role: ...
    @property
    def available(self) -> bool:
        """Whether its circuit lets calls through."""

    @property
    def load(self) -> int:
        """Callers it serves or keeps waiting."""


C = TypeVar("C", bound=Candidate)


def order_for_read(
    nodes: Sequence[C], primary: C | None, rng: random.Random, *, fallback_to_primary: bool
) -> list[C]:
    """The nodes that may serve a read, best first.

    Of the replicas whose circuit is closed the better of two drawn at random comes first (power of two choices:
    as good as the least loaded, without every process running to the same one), then the others; then those
    that recover (their breaker gates how many get through), then the primary.
    """
    replicas = [node for node in nodes if node.role == "replica" and node is not primary]
    fit = [node for node in replicas if node.available]
    rng.shuffle(fit)
    if len(fit) > 1 and fit[1].load < fit[0].load:
        fit[0], fit[1] = fit[1], fit[0]
    # Ahead of the primary, or no call would ever show that they are well again; being refused costs no time.
    order = fit + [node for node in replicas if not node.available]
    if primary is not None and (fallback_to_primary or not replicas):
        order.append(primary)
    return order


def next_primary(changed: C, old: Role, present: C | None) -> C | None:
    """Who takes writes after ``changed`` was seen in another role than ``old``.

    A node seen to be promoted (a replica before, a primary now) takes over even from a node that still calls
    itself primary: its history is the later one. A node that says so without having been promoted under our
    eyes (an old primary that came back) takes over only from nobody.
    """
    if changed.role == "primary":
        return changed if present is None or old == "replica" or present.role != "primary" else present
    return None if present is changed else present


def engine_state(nodes: Sequence[Candidate], primary: Candidate | None, *, saturated: bool) -> EngineState:
    """The engine as the web edge sees it. Draining is not a matter of the nodes."""
    if primary is not None and primary.available and primary.role != "replica":
        return "saturated" if saturated else "healthy"
    if any(node.available and node.role == "replica" for node in nodes):
        return "read_only"
    return "down"
