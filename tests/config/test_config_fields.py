"""Every single option: its range, its type, its default and its documentation."""

from __future__ import annotations

import ast
import inspect
import math
from typing import Any

import pybreaker
import pytest
import tenacity

from resilientdb.config import Resilience, options, resilience
from resilientdb.config.base import Option, Options, leaves, options_of
from resilientdb.config.fields import Choice, Count, Factory, Flag, Kind, Listeners, Name, Number, Strategy
from resilientdb.errors import ConfigurationError

LEAVES = dict(leaves(Resilience))


class ListenerOnly:
    def state_change(self) -> None: ...


class SomeObject:
    pass


def owner(key: str) -> tuple[type[Options], str]:
    """The table class a dotted key belongs to, and the field's name in it."""
    table: type[Options] = Resilience
    *path, name = key.split(".")
    for step in path:
        inner = options_of(table)[step].table
        assert inner is not None
        table = inner
    return table, name


def make(key: str, value: object) -> Any:
    table, name = owner(key)
    arguments: dict[str, Any] = {name: value}
    return getattr(table(**arguments), name)


def bad_values(option: Option) -> list[object]:
    """Values just outside the range, and of every wrong type."""
    kind = option.kind
    wrong: list[object] = [SomeObject(), [1], {"a": 1}, b"1", "a-word", 1j]
    if not option.optional:
        wrong.append(None)
    match kind:
        case Count():
            wrong += [kind.minimum - 1, -(10**5000), 1.0, True, False, math.nan]
        case Number():
            wrong += [math.nan, math.inf, -math.inf, -1, -0.001, True, False, 10**400]
            wrong.append(kind.minimum if kind.above else math.nextafter(kind.minimum, -math.inf))
            if math.isfinite(kind.maximum):
                wrong.append(math.nextafter(kind.maximum, math.inf))
        case Flag():
            wrong += [0, 1, "true"]
        case Choice():
            wrong += [True, 0, kind.words[0].upper()]
        case Name():
            wrong.remove("a-word")
            wrong += ["", "two words", "é", 1]
        case Listeners():
            wrong.remove(wrong[1])
            wrong += [
                (ListenerOnly(),),
                (pybreaker.CircuitBreakerListener,),
                pybreaker.CircuitBreakerListener(),
            ]
        case Factory():
            wrong += [pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)]
        case Strategy():
            wrong += [1.0, lambda: 0, tenacity.wait_fixed, tenacity.retry_always]
            wrong += [tenacity.stop_never if kind.what == "wait" else tenacity.wait_none()]
        case _:
            raise AssertionError(kind)
    return wrong


def good_values(option: Option) -> list[object]:
    """The edges of the range."""
    kind = option.kind
    good: list[object] = [option.default]
    if option.optional:
        good.append(None)
    match kind:
        case Count():
            good += [kind.minimum, kind.minimum + 1, 10**6]
        case Number():
            good.append(math.nextafter(kind.minimum, math.inf) if kind.above else kind.minimum)
            good += [1, 1.5] if kind.maximum > 1 else [1]
            good += [kind.maximum] if math.isfinite(kind.maximum) else [1e9]
        case Flag():
            good += [True, False]
        case Choice():
            good += kind.words
        case Name():
            good += ["main", "a-1_b.C"]
        case Listeners():
            good += [(pybreaker.CircuitBreakerListener(),)]
        case Factory():
            good += [lambda _node: pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)]
        case Strategy():
            good += [lambda _state: 0]
            good += [tenacity.stop_after_delay(5) if kind.what == "stop" else tenacity.wait_random(0, 1)]
        case _:
            raise AssertionError(kind)
    return good


@pytest.mark.parametrize("key", LEAVES)
def test_a_value_out_of_range_names_key_value_and_range(key: str) -> None:
    option = LEAVES[key]
    for value in bad_values(option):
        with pytest.raises(ConfigurationError) as caught:
            make(key, value)
        message = str(caught.value)
        assert message.startswith(f"{key} must be "), value
        assert option.describe() in message
        assert "; got " in message
        assert caught.value.key == key
        assert caught.value.__context__ is None
        if isinstance(value, float | bool) or value is None:
            assert message.endswith(f"got {value!r}")
            assert caught.value.value is value


BESIDE_THE_DEFAULTS = {
    "retry.backoff.initial": (0.0, 2.0),
    "retry.backoff.maximum": (0.05, math.inf),
    "queue.timeout": (0.05, math.inf),
    "queue.target": (0.0, 5.0),
    "queue.sheddable_plus_share": (0.25, 1.0),
    "queue.sheddable_share": (0.0, 0.5),
    "breaker.reset_timeout": (0.0, 60.0),
    "breaker.max_reset_timeout": (5.0, math.inf),
    "lifecycle.max_age": (0.0, math.inf),
    "lifecycle.keepalive": (0.0, 599.0),
}
"""Where a value contradicts the default of another option elsewhere: that is tested with the contradictions."""


@pytest.mark.parametrize("key", LEAVES)
def test_the_edges_of_the_range_are_in_it(key: str) -> None:
    low, high = BESIDE_THE_DEFAULTS.get(key, (-math.inf, math.inf))
    for value in good_values(LEAVES[key]):
        if not isinstance(value, int | float) or low <= value <= high:
            assert make(key, value) == value


@pytest.mark.parametrize("key", LEAVES)
def test_tables_say_the_same_of_a_bad_value(key: str) -> None:
    for value in bad_values(LEAVES[key]):
        if isinstance(value, str):
            continue  # text is parsed there
        with pytest.raises(ConfigurationError) as caught:
            Resilience.from_mapping({key: value})
        assert str(caught.value).startswith(f"{key} must be {LEAVES[key].describe()}; got ")


FITTING = {"queue.sheddable_share": 0, "breaker.max_reset_timeout": 5}
"""Where 1 does not fit the defaults."""


@pytest.mark.parametrize("key", LEAVES)
def test_numbers_are_stored_as_their_type(key: str) -> None:
    kind = LEAVES[key].kind
    if isinstance(kind, Number):
        assert type(make(key, FITTING.get(key, 1))) is float
    elif isinstance(kind, Count):
        assert type(make(key, 1)) is int
    else:
        assert isinstance(kind, Kind)


def test_a_list_of_listeners_becomes_a_tuple() -> None:
    listener = pybreaker.CircuitBreakerListener()
    assert make("breaker.listeners", [listener]) == (listener,)


DEFAULTS = {
    "queue.max_waiting": 50,
    "queue.timeout": 5.0,
    "queue.target": 0.05,
    "queue.interval": 1.0,
    "queue.sheddable_plus_share": 0.5,
    "queue.sheddable_share": 0.25,
    "queue.limiter": None,
    "retry.attempts": 3,
    "retry.timeout": 10.0,
    "retry.wait_when_open": False,
    "retry.backoff.initial": 0.05,
    "retry.backoff.maximum": 2.0,
    "retry.wait": None,
    "retry.stop": None,
    "retry.backoff.multiplier": 2.0,
    "retry.backoff.jitter": "full",
    "retry.budget.ratio": 0.2,
    "retry.budget.window": 10.0,
    "retry.budget.floor": 3,
    "breaker.failure_rate_threshold": 0.5,
    "breaker.minimum_calls": 10,
    "breaker.window": 10.0,
    "breaker.reset_timeout": 5.0,
    "breaker.max_reset_timeout": 60.0,
    "breaker.half_open_max_calls": 1,
    "breaker.slow_start_calls": 32,
    "breaker.slow_call_duration": None,
    "breaker.slow_call_rate_threshold": 0.5,
    "breaker.probe_interval": 0.25,
    "breaker.probe_timeout": 0.75,
    "breaker.listeners": (),
    "breaker.storage": None,
    "breaker.shared": None,
    "breaker.mode": "normal",
    "breaker.enabled": True,
    "routing.fallback_to_primary": True,
    "lifecycle.connect_timeout": 5.0,
    "lifecycle.tcp_user_timeout": 10.0,
    "lifecycle.keepalive_idle": 5.0,
    "lifecycle.min_size": 0,
    "lifecycle.max_connecting": 2,
    "lifecycle.max_age": 1800.0,
    "lifecycle.max_uses": None,
    "lifecycle.idle_timeout": 600.0,
    "lifecycle.keepalive": None,
    "lifecycle.validate_idle": 0.5,
    "lifecycle.validation_timeout": 1.0,
    "lifecycle.leak_threshold": None,
    "deadline": None,
    "enabled": True,
}


def test_the_defaults() -> None:
    assert Resilience().values() == DEFAULTS
    assert {key: option.default for key, option in LEAVES.items()} == DEFAULTS


@pytest.mark.parametrize("module", [options, resilience])
def test_every_field_is_documented(module: Any) -> None:
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node)
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if field.target.id.startswith("_"):
                continue
            is_documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_documented, f"{node.name}.{field.target.id}"


def test_a_field_without_a_kind_is_a_mistake_of_ours() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True, repr=False)
    class Bad(Options, table="bad"):
        size: int = 3

    with pytest.raises(TypeError, match=r"Bad\.size needs one Kind"):
        Bad()
