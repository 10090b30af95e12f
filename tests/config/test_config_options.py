"""Building options in code: mistakes, contradictions, and what an instance remembers of who gave what."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from typing import TYPE_CHECKING, Any, cast

import pybreaker
import pytest

import resilientdb.config as rc
from resilientdb.config import (
    Backoff,
    BreakerPolicy,
    Lifecycle,
    Resilience,
    RetryBudget,
    RetryPolicy,
    Routing,
    SaturationQueue,
)
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.config.base import Options

TABLES: tuple[type[Options], ...] = (
    SaturationQueue,
    Backoff,
    RetryBudget,
    RetryPolicy,
    BreakerPolicy,
    Routing,
    Lifecycle,
    Resilience,
)


def memory_storage(_node: str) -> pybreaker.CircuitBreakerStorage:
    return pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)


def test_public_names() -> None:
    assert {table.__name__ for table in TABLES} | {"resolve", "Resolved"} <= set(rc.__all__)
    assert all(hasattr(rc, name) for name in rc.__all__)


@pytest.mark.parametrize("table", TABLES)
def test_positional_arguments(table: Callable[..., Options]) -> None:
    with pytest.raises(ConfigurationError, match="takes keyword arguments only") as caught:
        table("postgresql://app:hunter2@db/x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "name", "key", "hint"),
    [
        (SaturationQueue, "max_wating", "queue.max_wating", "queue.max_waiting (an int, 0 or more, or None)"),
        (SaturationQueue, "timout", "queue.timout", "queue.timeout (seconds from 0 to 1000000, or None)"),
        (
            Backoff,
            "maximun",
            "retry.backoff.maximun",
            "retry.backoff.maximum (seconds above 0, at most 1000000)",
        ),
        (RetryBudget, "ration", "retry.budget.ration", "retry.budget.ratio (a number from 0 to 1)"),
        (RetryPolicy, "initial", "retry.initial", "retry.backoff.initial"),
        (RetryPolicy, "attempt", "retry.attempt", "retry.attempts (an int, 1 or more)"),
        (BreakerPolicy, "reset_timout", "breaker.reset_timout", "breaker.reset_timeout"),
        (Routing, "fallback", "routing.fallback", "routing.fallback_to_primary (a bool (true or false))"),
        (Lifecycle, "connect_time", "lifecycle.connect_time", "lifecycle.connect_timeout"),
        (Lifecycle, "max_use", "lifecycle.max_use", "lifecycle.max_uses (an int, 1 or more, or None)"),
        (Lifecycle, "validate_idel", "lifecycle.validate_idel", "lifecycle.validate_idle"),
        (Resilience, "max_waiting", "max_waiting", "queue.max_waiting"),
        (Resilience, "retries", "retries", "retry (RetryPolicy(...))"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(
    table: Callable[..., Options], name: str, key: str, hint: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        table(**{name: 3})
    assert str(caught.value).startswith(f"{key} is not an option (got 3); did you mean {hint}")
    assert (caught.value.key, caught.value.value) == (key, 3)


def test_an_unknown_keyword_near_to_nothing_lists_what_there_is() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"valid: queue\.max_waiting, queue\.timeout, queue\.target, queue\.interval, "
        r"queue\.sheddable_plus_share, queue\.sheddable_share, queue\.limiter$",
    ):
        cast("Any", SaturationQueue)(zzz=1)


def test_mypy_sees_the_signature() -> None:
    """mypy warns of an ignore it does not need, so these prove that it checks calls and values."""
    with pytest.raises(ConfigurationError):
        SaturationQueue(max_wating=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError):
        SaturationQueue(3)  # type: ignore[arg-type, call-arg]
    with pytest.raises(ConfigurationError):
        SaturationQueue(timeout="5")  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        SaturationQueue().timeout = 3.0  # type: ignore[misc]


@pytest.mark.parametrize("table", ["queue", "retry", "breaker", "routing", "lifecycle"])
def test_a_table_of_the_wrong_type(table: str) -> None:
    for value in (None, {"timeout": 1}, 3, Backoff()):
        with pytest.raises(ConfigurationError, match=rf"^{table} must be \w+\(\.\.\.\); got"):
            cast("Any", Resilience)(**{table: value})


def test_a_longest_pause_shorter_than_the_first_is_a_contradiction() -> None:
    with pytest.raises(
        ConfigurationError, match=r"retry\.backoff\.maximum must be at least retry\.backoff\.initial"
    ):
        Backoff(initial=3)
    with pytest.raises(ConfigurationError) as caught:
        replace(Backoff(), maximum=0.01)
    assert (caught.value.key, caught.value.value) == ("retry.backoff.maximum", 0.01)
    assert Backoff(initial=3, maximum=3).maximum == 3


def test_retries_that_can_never_be_made_are_a_contradiction() -> None:
    pauses = Backoff(initial=1, jitter="none")
    with pytest.raises(ConfigurationError, match=r"retry\.timeout must be more than retry\.backoff\.initial"):
        RetryPolicy(timeout=1, backoff=pauses)
    assert RetryPolicy(timeout=1, backoff=pauses, attempts=1).attempts == 1
    assert RetryPolicy(timeout=None, backoff=pauses).timeout is None
    assert RetryPolicy(timeout=0.5, backoff=Backoff(initial=1)).timeout == 0.5, "jitter may draw a short one"


def test_a_concern_that_nobody_lives_to_see_is_a_contradiction() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"queue\.target must be at most queue\.timeout \(0\.02 seconds\).*; got 0\.05$",
    ) as caught:
        SaturationQueue(timeout=0.02)
    assert (caught.value.key, caught.value.value) == ("queue.target", 0.05)
    with pytest.raises(ConfigurationError, match=r"queue\.target must be at most queue\.timeout"):
        SaturationQueue(target=5.01)
    assert SaturationQueue(timeout=0.05).timeout == 0.05
    assert SaturationQueue(timeout=0).timeout == 0, "nobody waits: there is nothing to judge"
    assert SaturationQueue(timeout=None, target=60).target == 60


def test_the_less_critical_have_no_more_places_than_the_more_critical() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"queue\.sheddable_share must be at most queue\.sheddable_plus_share \(0\.1\).*; got 0\.25$",
    ) as caught:
        SaturationQueue(sheddable_plus_share=0.1)
    assert (caught.value.key, caught.value.value) == ("queue.sheddable_share", 0.25)
    with pytest.raises(ConfigurationError, match=r"queue\.sheddable_share must be at most"):
        SaturationQueue(sheddable_share=0.51)
    assert SaturationQueue(sheddable_share=1, sheddable_plus_share=1).sheddable_share == 1
    assert SaturationQueue(sheddable_share=0, sheddable_plus_share=0).sheddable_plus_share == 0


def test_an_open_time_that_may_not_even_be_the_first_is_a_contradiction() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"breaker\.max_reset_timeout must be at least breaker\.reset_timeout \(90 seconds\); got 60\.0$",
    ) as caught:
        BreakerPolicy(reset_timeout=90)
    assert (caught.value.key, caught.value.value) == ("breaker.max_reset_timeout", 60.0)
    assert BreakerPolicy(reset_timeout=90, max_reset_timeout=90).max_reset_timeout == 90


@pytest.mark.parametrize("mode", ["forced_open", "metrics_only"])
def test_a_mode_of_no_breaker_is_a_contradiction(mode: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"breaker\.mode must be 'disabled' or left out") as caught:
        BreakerPolicy(enabled=False, mode=mode)
    assert caught.value.key == "breaker.mode"
    assert BreakerPolicy(enabled=False, mode="disabled").mode == "disabled"


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"keepalive": 600}, r"lifecycle\.idle_timeout \(600 seconds\).*lifecycle\.min_size more than 0"),
        ({"keepalive": 60, "idle_timeout": 30}, r"lifecycle\.idle_timeout \(30 seconds\)"),
        ({"keepalive": 1800, "min_size": 3}, r"lifecycle\.max_age \(1800 seconds\)"),
        ({"keepalive": 60, "max_age": 60, "idle_timeout": None}, r"lifecycle\.max_age \(60 seconds\)"),
    ],
)
def test_a_question_that_no_connection_lives_to_be_asked_is_a_contradiction(
    values: dict[str, Any], limit: str
) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"lifecycle\.keepalive must be less than {limit}"
    ) as caught:
        Lifecycle(**values)
    assert (caught.value.key, caught.value.value) == ("lifecycle.keepalive", values["keepalive"])


@pytest.mark.parametrize(
    "values",
    [
        {"keepalive": 599},
        {"keepalive": 900, "min_size": 1},
        {"keepalive": 900, "idle_timeout": None},
        {"keepalive": 9000, "idle_timeout": None, "max_age": None},
        {"max_age": 60},
    ],
)
def test_a_question_that_can_be_asked_is_none(values: dict[str, Any]) -> None:
    policy = Lifecycle(**values)
    assert {name: getattr(policy, name) for name in values} == values


def test_a_contradiction_between_two_sources_is_found() -> None:
    environ = {"RESILIENTDB_LIFECYCLE_KEEPALIVE": "60"}
    assert rc.resolve(environ=environ).resilience.lifecycle.keepalive == 60
    with pytest.raises(
        ConfigurationError, match=r"lifecycle\.keepalive must be less than lifecycle\.idle_timeout"
    ):
        rc.resolve(environ=environ, profile="pgbouncer")


def test_repr_shows_only_what_differs() -> None:
    assert repr(Resilience()) == "Resilience()"
    policy = Resilience(queue=SaturationQueue(max_waiting=10, timeout=5.0), deadline=2)
    assert repr(policy) == "Resilience(queue=SaturationQueue(max_waiting=10), deadline=2.0)"


def test_repr_shows_objects_by_name() -> None:
    secret = functools.partial(memory_storage, "redis://:hunter2@cache")
    policy = BreakerPolicy(storage=secret, listeners=(pybreaker.CircuitBreakerListener(),))
    assert repr(policy) == "BreakerPolicy(listeners=<CircuitBreakerListener>, storage=<partial>)"
    assert repr(BreakerPolicy(storage=memory_storage)) == "BreakerPolicy(storage=<memory_storage>)"


def test_equality_and_hash_go_by_value() -> None:
    assert SaturationQueue(max_waiting=50) == SaturationQueue()
    assert hash(SaturationQueue(max_waiting=50)) == hash(SaturationQueue())
    assert Resilience(queue=SaturationQueue(max_waiting=1)) != Resilience()
    assert hash(Resilience(deadline=1)) == hash(Resilience(deadline=1.0))

    class Unhashable(pybreaker.CircuitBreakerListener):
        __hash__ = None  # type: ignore[assignment]

    hash(Resilience(breaker=BreakerPolicy(listeners=(Unhashable(),))))


def test_only_named_fields_are_given() -> None:
    assert Resilience().given() == {}
    assert Resilience(queue=SaturationQueue(), retry=RetryPolicy()).given() == {}
    assert Resilience(queue=SaturationQueue(max_waiting=50)).given() == {"queue.max_waiting": 50}
    policy = Resilience(retry=RetryPolicy(backoff=Backoff(jitter="none")), enabled=True)
    assert policy.given() == {"retry.backoff.jitter": "none", "enabled": True}


def test_replace_adds_to_what_was_given() -> None:
    queue = SaturationQueue(max_waiting=10)
    assert replace(queue).given() == {"max_waiting": 10}
    assert replace(queue, max_waiting=11).given() == {"max_waiting": 11}
    assert replace(queue, timeout=1.0).given() == {"max_waiting": 10, "timeout": 1.0}
    assert replace(replace(queue, timeout=1.0)).given() == {"max_waiting": 10, "timeout": 1.0}
    assert replace(queue, timeout=float("5")).given() == {"max_waiting": 10, "timeout": 5.0}
    policy = replace(Resilience(queue=queue), deadline=3)
    assert policy.given() == {"queue.max_waiting": 10, "deadline": 3.0}
    with pytest.raises(ConfigurationError, match=r"queue\.timeout must be"):
        replace(queue, timeout=-1)


@pytest.mark.parametrize(
    "policy",
    [
        Resilience(),
        Resilience(queue=SaturationQueue(max_waiting=50)),
        Resilience.profile("web"),
        replace(Resilience.profile("batch"), deadline=3, queue=SaturationQueue(timeout=None)),
        Resilience(breaker=BreakerPolicy(storage=memory_storage)),
    ],
)
@pytest.mark.parametrize("again", [lambda p: pickle.loads(pickle.dumps(p)), copy.copy, copy.deepcopy])
def test_copies_remember_what_was_given(
    policy: Resilience, again: Callable[[Resilience], Resilience]
) -> None:
    twin = again(policy)
    assert twin == policy
    assert hash(twin) == hash(policy)
    assert twin.given() == policy.given()
    changed = replace(policy, deadline=7)
    assert replace(twin, deadline=7) == changed
    assert replace(twin, deadline=7).given() == changed.given()


def test_asdict_holds_options_only() -> None:
    assert asdict(SaturationQueue()) == {
        "max_waiting": 50,
        "timeout": 5.0,
        "target": 0.05,
        "interval": 1.0,
        "sheddable_plus_share": 0.5,
        "sheddable_share": 0.25,
        "limiter": None,
    }
    assert set(asdict(Resilience())) == {
        "queue",
        "retry",
        "breaker",
        "routing",
        "lifecycle",
        "deadline",
        "enabled",
    }


def test_a_subclass_may_add_nothing_and_still_works() -> None:
    class Mine(SaturationQueue):
        pass

    assert Resilience(queue=Mine(max_waiting=3)).given() == {"queue.max_waiting": 3}
