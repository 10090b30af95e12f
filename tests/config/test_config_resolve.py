"""Who wins: call > environment > URL > profile > default, field by field."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any, cast

import pybreaker
import pytest

from resilientdb.config import (
    PROFILES,
    Backoff,
    BreakerPolicy,
    Resilience,
    RetryPolicy,
    Routing,
    SaturationQueue,
    resolve,
)
from resilientdb.config.base import leaves
from resilientdb.config.wording import flat
from resilientdb.errors import ConfigurationError

LEAVES = dict(leaves(Resilience))
LAYERS = ("call", "env", "url", "profile")


@pytest.mark.parametrize(
    "present", [set(some) for n in range(5) for some in itertools.combinations(LAYERS, n)]
)
def test_precedence(present: set[str]) -> None:
    """queue.timeout, which the web profile sets, said by every combination of sources."""
    call = Resilience(queue=SaturationQueue(timeout=11)) if "call" in present else None
    environ = {"RESILIENTDB_QUEUE_TIMEOUT": "12"} if "env" in present else {}
    url_options = {"queue_timeout": "13"} if "url" in present else {}
    if "profile" in present:
        url_options["profile"] = "web"
    expected = {
        "call": (11.0, "call"),
        "env": (12.0, "env RESILIENTDB_QUEUE_TIMEOUT"),
        "url": (13.0, "url resilientdb_queue_timeout"),
        "profile": (2.0, "profile web"),
    }
    winner = next((expected[layer] for layer in LAYERS if layer in present), (5.0, "default"))
    resolved = resolve(call=call, environ=environ, url_options=url_options)
    assert (resolved.resilience.queue.timeout, resolved.sources["queue.timeout"]) == winner
    assert resolved.resilience.queue.max_waiting == 50
    assert resolved.sources["queue.max_waiting"] == "default"


def test_fields_of_one_table_come_from_anywhere() -> None:
    resolved = resolve(
        call=Resilience(retry=RetryPolicy(attempts=9)),
        environ={"RESILIENTDB_RETRY_BACKOFF_INITIAL": "0.2"},
        url_options={"profile": "worker", "retry_budget_floor": "7"},
    )
    retry = resolved.resilience.retry
    assert (retry.attempts, retry.timeout) == (9, 60.0)
    assert (retry.backoff.initial, retry.backoff.maximum, retry.budget.floor) == (0.2, 10.0, 7)
    got = {key: source for key, source in resolved.sources.items() if key.startswith("retry.")}
    assert got == {
        "retry.attempts": "call",
        "retry.timeout": "profile worker",
        "retry.wait_when_open": "profile worker",
        "retry.wait": "default",
        "retry.stop": "default",
        "retry.backoff.initial": "env RESILIENTDB_RETRY_BACKOFF_INITIAL",
        "retry.backoff.maximum": "profile worker",
        "retry.backoff.multiplier": "default",
        "retry.backoff.jitter": "default",
        "retry.budget.ratio": "default",
        "retry.budget.window": "default",
        "retry.budget.floor": "url resilientdb_retry_budget_floor",
    }


def test_a_default_said_aloud_is_said() -> None:
    call = Resilience(queue=SaturationQueue(max_waiting=50), routing=Routing(fallback_to_primary=True))
    environ = {"RESILIENTDB_QUEUE_MAX_WAITING": "7", "RESILIENTDB_ROUTING_FALLBACK_TO_PRIMARY": "no"}
    resolved = resolve(call=call, environ=environ)
    assert resolved.resilience == Resilience()
    assert resolved.sources["queue.max_waiting"] == "call"


def test_a_replaced_policy_still_yields_where_it_says_nothing() -> None:
    call = replace(Resilience(queue=SaturationQueue(max_waiting=10)), deadline=1.5)
    environ = {
        "RESILIENTDB_QUEUE_TIMEOUT": "9",
        "RESILIENTDB_DEADLINE": "9",
        "RESILIENTDB_QUEUE_MAX_WAITING": "9",
    }
    resolved = resolve(call=call, environ=environ).resilience
    assert (resolved.queue.max_waiting, resolved.queue.timeout, resolved.deadline) == (10, 9.0, 1.5)


@pytest.mark.parametrize(
    ("call", "env", "url", "argument", "name", "source"),
    [
        (None, None, None, None, None, "default"),
        (None, None, "web", None, "web", "url resilientdb_profile"),
        (None, "worker", "web", None, "worker", "env RESILIENTDB_PROFILE"),
        ("batch", "worker", "web", None, "batch", "call"),
        ("batch", "worker", "web", "pgbouncer", "pgbouncer", "call"),
        (None, "worker", None, "pgbouncer", "pgbouncer", "call"),
    ],
)
def test_the_highest_source_names_the_profile(
    call: Any, env: str | None, url: str | None, argument: Any, name: Any, source: str
) -> None:
    resolved = resolve(
        call=Resilience.profile(call) if call else None,
        environ={"RESILIENTDB_PROFILE": env} if env else {},
        url_options={"profile": url} if url else {},
        profile=argument,
    )
    assert (resolved.profile, resolved.sources["profile"]) == (name, source)
    assert resolved.resilience == (Resilience.profile(name) if name else Resilience())


@pytest.mark.parametrize("name", PROFILES)
def test_profiles(name: Any) -> None:
    profile = PROFILES[name]
    policy = Resilience.profile(name)
    assert policy.given() == {}
    assert profile.summary
    for key, setting in profile.settings.items():
        assert policy.values()[key] == setting.value != LEAVES[key].default, f"{key} is the default"
        assert type(policy.values()[key]) is type(setting.value)
        assert setting.reason
    unset = LEAVES.keys() - profile.settings.keys()
    assert all(policy.values()[key] == LEAVES[key].default for key in unset)


def test_every_value_of_a_profile_can_be_overridden_by_the_environment() -> None:
    for name, profile in PROFILES.items():
        for key in profile.settings:
            text = "1"
            environ = {f"RESILIENTDB_{flat(key).upper()}": text}
            if key == "retry.backoff.maximum":
                environ["RESILIENTDB_RETRY_BACKOFF_INITIAL"] = "0.1"
            resolved = resolve(call=Resilience.profile(cast("Any", name)), environ=environ)
            assert resolved.resilience.values()[key] == 1
            assert resolved.sources[key].startswith("env ")


def test_a_profile_shows_through_what_replaces_its_tables() -> None:
    policy = replace(Resilience.profile("web"), queue=SaturationQueue(max_waiting=10))
    assert (policy.queue.max_waiting, policy.queue.timeout) == (10, 2.0)
    assert policy.given() == {"queue.max_waiting": 10}
    assert resolve(call=policy, environ={}).profile == "web"


def test_a_table_taken_from_a_profile_brings_its_values() -> None:
    web, batch = Resilience.profile("web"), Resilience.profile("batch")
    assert Resilience(queue=web.queue).given() == {"queue.timeout": 2.0}
    assert replace(web, queue=batch.queue).queue.timeout == 60.0
    assert resolve(call=Resilience(queue=web.queue), environ={}).resilience.queue == web.queue


def test_unknown_profiles() -> None:
    for source in (
        lambda: Resilience.profile(cast("Any", "wbe")),
        lambda: Resilience.from_mapping({"profile": "wbe"}),
        lambda: Resilience.from_env(environ={"RESILIENTDB_PROFILE": "wbe"}),
        lambda: resolve(environ={}, url_options={"profile": "wbe"}),
        lambda: resolve(environ={}, profile=cast("Any", "wbe")),
    ):
        with pytest.raises(
            ConfigurationError, match=r"'pgbouncer'; got 'wbe'; did you mean 'web'\?"
        ) as caught:
            source()
        assert caught.value.key == "profile"
    with pytest.raises(ConfigurationError, match=r"got 3$"):
        Resilience.profile(cast("Any", 3))


@pytest.mark.parametrize("call", [None, Resilience(), Resilience(enabled=True), Resilience.profile("web")])
def test_the_kill_switch_beats_everybody(call: Resilience | None) -> None:
    resolved = resolve(call=call, environ={"RESILIENTDB_ENABLED": "false"}, url_options={"enabled": "true"})
    assert resolved.resilience.enabled is False
    assert resolved.sources["enabled"] == "env RESILIENTDB_ENABLED"


def test_only_off_is_an_emergency() -> None:
    environ = {"RESILIENTDB_ENABLED": "true"}
    assert resolve(call=Resilience(enabled=False), environ=environ).resilience.enabled is False
    assert resolve(environ=environ, url_options={"enabled": "false"}).resilience.enabled is True
    assert resolve(environ={}, url_options={"enabled": "false"}).resilience.enabled is False


def test_a_mistake_is_an_error_even_where_a_higher_source_hides_it() -> None:
    call = Resilience(queue=SaturationQueue(timeout=1))
    with pytest.raises(ConfigurationError, match="resilientdb_queue_timeout"):
        resolve(call=call, environ={}, url_options={"queue_timeout": "soon"})
    with pytest.raises(ConfigurationError, match="RESILIENTDB_QUEUE_TIMEOUT"):
        resolve(call=call, environ={"RESILIENTDB_QUEUE_TIMEOUT": "-1"})


def test_a_contradiction_between_sources_names_both() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(environ={"RESILIENTDB_RETRY_BACKOFF_INITIAL": "3"}, url_options={"profile": "web"})
    message = str(caught.value)
    assert message.startswith(
        "retry.backoff.maximum must be at least retry.backoff.initial (3 seconds); got 0.5"
    )
    assert "retry.backoff.initial from env RESILIENTDB_RETRY_BACKOFF_INITIAL" in message
    assert "retry.backoff.maximum from profile web" in message
    assert caught.value.key == "retry.backoff.maximum"
    agreed = resolve(call=Resilience(retry=RetryPolicy(backoff=Backoff(initial=3, maximum=4))), environ={})
    assert agreed.resilience.retry.backoff.maximum == 4


def test_call_must_be_a_resilience() -> None:
    with pytest.raises(ConfigurationError, match=r"resilience must be a Resilience\(\.\.\.\); got <dict>"):
        resolve(call=cast("Any", {"queue": 3}), environ={})


def test_resolving_twice_changes_nothing() -> None:
    once = resolve(environ={"RESILIENTDB_QUEUE_TIMEOUT": "9"}, url_options={"profile": "web"})
    twice = resolve(call=once.resilience, environ={})
    assert twice.resilience == once.resilience
    assert twice.profile == "web"


def test_explain_has_a_row_for_every_option_and_hides_objects() -> None:
    def storage(_node: str) -> pybreaker.CircuitBreakerStorage:
        raise NotImplementedError

    listener = pybreaker.CircuitBreakerListener()
    call = Resilience(breaker=BreakerPolicy(listeners=(listener, listener), storage=storage))
    resolved = resolve(call=call, environ={}, url_options={"profile": "web"})
    rows = resolved.explain()
    assert [row.key for row in rows] == ["profile", *LEAVES]
    by_key = {key: (value, source) for key, value, source in rows}
    assert by_key["profile"] == ("web", "url resilientdb_profile")
    assert by_key["deadline"] == ("10.0", "profile web")
    assert by_key["enabled"] == ("true", "default")
    assert by_key["breaker.listeners"] == ("CircuitBreakerListener, CircuitBreakerListener", "call")
    value, source = by_key["breaker.storage"]
    assert value.endswith("storage")
    assert source == "call"
    assert ("profile", "none", "default") in resolve(environ={}).explain()


def test_the_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENTDB_DEADLINE", "4")
    assert resolve().resilience.deadline == 4


def test_importing_it_brings_nothing_beyond_what_errors_brings() -> None:
    program = (
        "import sys, resilientdb.errors; before = set(sys.modules); import resilientdb.config;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'resilientdb'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
