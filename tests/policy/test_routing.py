"""Which node is asked, and in which order."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.policy.routing import engine_state, next_primary, order_for_read

if TYPE_CHECKING:
    from resilientdb.stats import Role

ROLES = st.sampled_from(["primary", "replica", "unknown"])


@dataclass(eq=False)
class Node:
    role: Role
    available: bool = True
    load: int = 0


NODES = st.lists(st.builds(Node, role=ROLES, available=st.booleans(), load=st.integers(0, 3)), max_size=6)


@given(
    nodes=NODES,
    has_primary=st.booleans(),
    fallback=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
def test_a_read_goes_to_fit_replicas_first(
    nodes: list[Node], has_primary: bool, fallback: bool, rng: random.Random
) -> None:
    primary = nodes[0] if nodes and has_primary else None
    order = order_for_read(nodes, primary, rng, fallback_to_primary=fallback)
    replicas = [node for node in nodes if node.role == "replica" and node is not primary]
    assert len({id(node) for node in order}) == len(order)
    assert [node for node in replicas if node not in order] == [], "no replica is left out"
    assert [node for node in order if node is not primary and node not in replicas] == []
    assert (primary in order) == (primary is not None and (fallback or not replicas))
    fit = [node for node in replicas if node.available]
    assert set(order[: len(fit)]) == set(fit)
    if len(fit) > 1:
        assert order[0].load <= order[1].load, "the better of the first two"


def test_the_least_loaded_of_two_is_asked_and_the_most_loaded_hardly_ever() -> None:
    nodes = [Node("primary"), *(Node("replica", load=load) for load in range(4))]
    rng = random.Random(3)
    first = Counter(
        order_for_read(nodes, nodes[0], rng, fallback_to_primary=True)[0].load for _ in range(6_000)
    )
    # Of six pairs each wins against those that are more loaded: 3, 2, 1 and none of them.
    assert [round(first[load] / 1_000) for load in range(4)] == [3, 2, 1, 0]


def test_equal_replicas_share_the_reads() -> None:
    nodes = [Node("primary"), Node("replica"), Node("replica"), Node("replica")]
    rng = random.Random(3)
    first = Counter(
        id(order_for_read(nodes, nodes[0], rng, fallback_to_primary=True)[0]) for _ in range(3_000)
    )
    assert len(first) == 3
    assert min(first.values()) > 900


def test_a_replica_that_recovers_is_still_asked() -> None:
    """Otherwise no call would ever go there and show that it is well."""
    primary, recovering = Node("primary"), Node("replica", available=False)
    order = order_for_read([primary, recovering], primary, random.Random(1), fallback_to_primary=True)
    assert order == [recovering, primary]


def test_without_fallback_the_primary_serves_reads_only_when_there_is_no_replica() -> None:
    primary, replica = Node("primary"), Node("replica", available=False)
    rng = random.Random(1)
    assert order_for_read([primary, replica], primary, rng, fallback_to_primary=False) == [replica]
    assert order_for_read([primary], primary, rng, fallback_to_primary=False) == [primary]
    assert order_for_read([primary], None, rng, fallback_to_primary=False) == []


@pytest.mark.parametrize(
    ("now", "was", "present_role", "takes_over"),
    [
        ("primary", "replica", "primary", True),  # promoted under our eyes: its history is the later one
        ("primary", "unknown", "primary", False),  # an old primary that came back
        ("primary", "primary", "primary", False),
        ("primary", "unknown", "replica", True),  # nobody else claims it any more
        ("primary", "unknown", None, True),
        ("replica", "primary", "primary", False),
        ("unknown", "primary", "primary", False),
    ],
)
def test_who_takes_the_writes(now: Role, was: Role, present_role: Role | None, takes_over: bool) -> None:
    changed = Node(now)
    present = None if present_role is None else Node(present_role)
    assert next_primary(changed, was, present) is (changed if takes_over else present)


def test_a_primary_that_is_demoted_leaves_nobody() -> None:
    node = Node("replica")
    assert next_primary(node, "primary", node) is None


@given(nodes=NODES, has_primary=st.booleans(), saturated=st.booleans())
def test_the_state_of_the_engine(nodes: list[Node], has_primary: bool, saturated: bool) -> None:
    primary = nodes[0] if nodes and has_primary else None
    state = engine_state(nodes, primary, saturated=saturated)
    can_write = primary is not None and primary.available and primary.role != "replica"
    can_read = any(node.available and node.role == "replica" for node in nodes)
    if can_write:
        assert state == ("saturated" if saturated else "healthy")
    else:
        assert state == ("read_only" if can_read else "down")
