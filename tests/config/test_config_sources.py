"""Options from the environment, a URL and tables: one spelling, strict, and silent about secrets."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.config import Resilience, SaturationQueue, resolve
from resilientdb.config.base import leaves
from resilientdb.config.fields import Choice, Count, Flag, Name, Number
from resilientdb.config.wording import as_text, flat
from resilientdb.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

LEAVES = dict(leaves(Resilience))
TEXT_KEYS = [key for key, option in LEAVES.items() if option.kind is not None and option.kind.from_text]


def variable(key: str) -> str:
    return "RESILIENTDB_" + flat(key).upper()


def values_of(key: str) -> st.SearchStrategy[Any]:
    kind = LEAVES[key].kind
    values: st.SearchStrategy[Any]
    match kind:
        case Count():
            values = st.integers(min_value=kind.minimum)
        case Number():
            top = min(kind.maximum, 1e9)
            values = st.floats(kind.minimum, top, exclude_min=kind.above)
        case Flag():
            values = st.booleans()
        case Choice():
            values = st.sampled_from(kind.words)
        case Name():
            values = st.from_regex(r"[A-Za-z]{2}[-_.][0-9]", fullmatch=True)
        case _:
            raise AssertionError(key)
    return st.none() | values if LEAVES[key].optional else values


IN_ORDER = (
    ("retry.backoff.initial", "retry.backoff.maximum"),
    ("queue.sheddable_share", "queue.sheddable_plus_share"),
    ("queue.target", "queue.timeout"),
    ("breaker.reset_timeout", "breaker.max_reset_timeout"),
)
"""Pairs of which the first may not be more than the second."""


def without_contradictions(values: dict[str, Any]) -> dict[str, Any]:
    def at(key: str) -> Any:
        return values.get(key, LEAVES[key].default)

    for lower, upper in IN_ORDER:
        if at(upper) and at(lower) > at(upper):  # 0 or None: no timeout to be above
            values[lower], values[upper] = at(upper), at(lower)
    if not at("queue.sheddable_plus_share"):
        values["queue.sheddable_share"] = 0.0
    ends = [at("lifecycle.max_age"), at("lifecycle.idle_timeout")]
    if at("lifecycle.keepalive") and any(end and at("lifecycle.keepalive") >= end for end in ends):
        values["lifecycle.keepalive"] = None
    values["retry.backoff.jitter"] = "full"
    if not at("breaker.enabled"):
        values["breaker.mode"] = "disabled"
    return values


some_options = st.fixed_dictionaries({}, optional={key: values_of(key) for key in TEXT_KEYS}).map(
    without_contradictions
)


@given(some_options)
def test_the_environment_round_trips(values: dict[str, Any]) -> None:
    policy = Resilience.from_mapping(values)
    environ = {variable(key): as_text(value) for key, value in values.items()}
    assert Resilience.from_env(environ=environ) == policy
    assert Resilience.from_env(environ=environ).given() == policy.given() == values


@given(some_options)
def test_every_source_says_the_same(values: dict[str, Any]) -> None:
    policy = Resilience.from_mapping(values)
    texts = {flat(key): as_text(value) for key, value in values.items()}
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        table = nested
        for step in path:
            table = table.setdefault(step, {})
        table[name] = value
    assert Resilience.from_mapping(nested) == policy
    assert Resilience.from_mapping(texts) == policy
    assert resolve(environ={}, url_options=texts).resilience == policy
    assert resolve(call=policy, environ={}).resilience == policy


@given(some_options)
def test_what_explain_says_can_be_set_again(values: dict[str, Any]) -> None:
    rows = resolve(call=Resilience.from_mapping(values), environ={}).explain()
    environ = {variable(row.key): row.value for row in rows if row.key in TEXT_KEYS}
    assert Resilience.from_env(environ=environ) == Resilience.from_mapping(values)


@given(st.sampled_from(TEXT_KEYS), st.text(max_size=20))
def test_any_text_is_taken_or_refused_by_name(key: str, text: str) -> None:
    refused: ConfigurationError | None = None
    try:
        Resilience.from_env(environ={variable(key): text})
    except ConfigurationError as error:
        refused = error
    if refused is not None:
        assert refused.key in {key, "retry.backoff.maximum", "queue.target", "queue.sheddable_share"}
        assert refused.__context__ is None


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize("text", ["", "  ", "a-word", "1;2", "nan", "-1"])
def test_malformed_text_names_variable_key_value_and_range(key: str, text: str) -> None:
    if text and isinstance(LEAVES[key].kind, Name):
        text = "two words" if text.strip() else text  # nearly any word is a name
    for source, said in (
        (lambda: Resilience.from_env(environ={variable(key): text}), f"{variable(key)} ({key})"),
        (
            lambda: resolve(environ={}, url_options={flat(key): text}),
            f"resilientdb_{flat(key)} ({key})",
        ),
        (lambda: Resilience.from_mapping({key: text}), key),
    ):
        with pytest.raises(ConfigurationError) as caught:
            source()
        assert str(caught.value) == f"{said} must be {LEAVES[key].describe()}; got {text!r}"
        assert (caught.value.key, caught.value.value) == (key, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [(word, True) for word in ("true", "1", "yes", "on", "TRUE", " On ")]
    + [(word, False) for word in ("false", "0", "no", "off", "False", "NO")],
)
def test_booleans(text: str, value: bool) -> None:
    assert Resilience.from_env(environ={"RESILIENTDB_BREAKER_ENABLED": text}).breaker.enabled is value


def test_none_where_it_is_allowed() -> None:
    assert Resilience.from_env(environ={"RESILIENTDB_QUEUE_TIMEOUT": "None"}).queue.timeout is None
    assert (
        Resilience.from_env(environ={"RESILIENTDB_RETRY_BACKOFF_JITTER": "none"}).retry.backoff.jitter
        == "none"
    )
    with pytest.raises(ConfigurationError, match=r"retry\.attempts\) must be an int, 1 or more; got 'none'"):
        Resilience.from_env(environ={"RESILIENTDB_RETRY_ATTEMPTS": "none"})


@pytest.mark.parametrize("key", ["breaker.listeners", "breaker.storage", "retry.wait", "retry.stop"])
def test_objects_cannot_come_from_text(key: str) -> None:
    for source in (
        lambda: Resilience.from_env(environ={variable(key): "redis://:hunter2@cache"}),
        lambda: resolve(environ={}, url_options={flat(key): "redis://:hunter2@cache"}),
        lambda: Resilience.from_mapping({key: "redis://:hunter2@cache"}),
    ):
        with pytest.raises(ConfigurationError, match="must be set in code") as caught:
            source()
        assert caught.value.key == key
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant", "key"),
    [
        ("queue_max_wating", "queue_max_waiting", "queue.max_wating"),
        ("queue_timeuot", "queue_timeout", "queue.timeuot"),
        ("retry_backof_initial", "retry_backoff_initial", "retry_backof_initial"),
        ("retry_backoff_inital", "retry_backoff_initial", "retry.backoff.inital"),
        ("max_waiting", "queue_max_waiting", "max_waiting"),
        ("profil", "profile", "profil"),
        ("deadlin", "deadline", "deadlin"),
    ],
)
def test_unknown_names_name_the_nearest(name: str, meant: str, key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Resilience.from_env(environ={f"RESILIENTDB_{name.upper()}": "3"})
    start = (
        f"RESILIENTDB_{name.upper()} is not an option (got '3'); did you mean RESILIENTDB_{meant.upper()} ("
    )
    assert str(caught.value).startswith(start)
    assert (caught.value.key, caught.value.value) == (key, "3")

    with pytest.raises(ConfigurationError) as caught:
        resolve(environ={}, url_options={name: "3"})
    start = f"resilientdb_{name} is not an option (got '3'); did you mean resilientdb_{meant} ("
    assert str(caught.value).startswith(start)

    with pytest.raises(ConfigurationError, match=rf"^{name} is not an option \(got 3\); did you mean "):
        Resilience.from_mapping({name: 3})


def test_an_unknown_name_near_to_nothing_lists_what_text_can_set() -> None:
    with pytest.raises(ConfigurationError, match="valid: RESILIENTDB_QUEUE_MAX_WAITING, ") as caught:
        Resilience.from_env(environ={"RESILIENTDB_XYZZY": "3"})
    assert "LISTENERS" not in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        {"RESILIENTDB_PG_BIN": "/usr/lib/postgresql/17/bin", "RESILIENTDB_CACHE": "/tmp/x"},
        {"RESILIENTDB_SERVICE_HOST": "10.0.0.1", "RESILIENTDB_SERVICE_PORT_HTTP": "80"},
        {"RESILIENTDB_PORT": "tcp://10.0.0.1:80", "RESILIENTDB_PORT_80_TCP_ADDR": "10.0.0.1"},
        {"PATH": "/bin", "resilientdb_queue_timeout": "x", "MY_RESILIENTDB_QUEUE_TIMEOUT": "x"},
        {},
    ],
)
def test_variables_that_are_not_ours_to_judge(environ: dict[str, str]) -> None:
    assert Resilience.from_env(environ=environ) == Resilience()


def test_from_env_reads_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_QUEUE_TIMEOUT", "2.5")
    assert Resilience.from_env("APP_") == Resilience(queue=SaturationQueue(timeout=2.5))
    monkeypatch.setenv("APP_QUEUE_TIMEOUTS", "2.5")
    with pytest.raises(ConfigurationError, match="did you mean APP_QUEUE_TIMEOUT "):
        Resilience.from_env("APP_")
    with pytest.raises(ConfigurationError, match="prefix must be a non-empty string"):
        Resilience.from_env("")


def test_an_option_twice_in_a_url() -> None:
    with pytest.raises(
        ConfigurationError, match=r"resilientdb_queue_timeout .* given once in a URL; got '1', '2'"
    ):
        resolve(environ={}, url_options={"queue_timeout": ("1", "2")})
    assert resolve(environ={}, url_options={"queue_timeout": ("1",)}).resilience.queue.timeout == 1


def test_a_toml_table() -> None:
    text = """
    profile = "web"
    deadline = 3
    retry_attempts = "4"
    [queue]
    max_waiting = 10
    timeout = "none"
    [retry.backoff]
    initial = 0.1
    [retry]
    budget_ratio = 0.5
    """
    policy = Resilience.from_mapping(tomllib.loads(text))
    assert policy.given() == {
        "deadline": 3.0,
        "retry.attempts": 4,
        "queue.max_waiting": 10,
        "queue.timeout": None,
        "retry.backoff.initial": 0.1,
        "retry.budget.ratio": 0.5,
    }
    assert policy.lifecycle == Resilience.profile("web").lifecycle


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"queue": {"max_wating": 10}},
            "queue.max_wating is not an option (got 10); did you mean queue.max_waiting (",
        ),
        ({"queue": 3}, "queue must be a table of options (a mapping); got 3"),
        ({"retry": {"backoff": "fast"}}, "retry.backoff must be a table of options (a mapping); got 'fast'"),
        ({"queue": {"timeout": 1}, "queue_timeout": 1}, "queue.timeout is given twice"),
        ({"queue": {"profile": "web"}}, "queue.profile is not an option"),
        ({"quue": {"timeout": 1}}, "quue is not an option (got <dict>)"),
        ({"profile": 3}, "profile must be 'web' or 'worker' or 'batch' or 'pgbouncer'; got 3"),
        ({3: 4}, "3 is not an option (got 4)"),
        ("postgresql://a:hunter2@b", "resilience must be a table of options (a mapping); got '***'"),
    ],
)
def test_mistakes_in_a_table(table: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match="^" + re.escape(message)):
        Resilience.from_mapping(table)


SECRETS: tuple[Mapping[str, str], ...] = (
    {"RESILIENTDB_QUEUE_TIMEOUT": "postgresql+psycopg://app:hunter2@db:5432/x"},
    {"RESILIENTDB_QUEUE_TIMEOUT": "app:hunter2@db"},
    {"RESILIENTDB_QUEUE_TIMEOUT": "host=db password=hunter2"},
    {"RESILIENTDB_PROFILE": "mysql://app:hunter2@db"},
    {"RESILIENTDB_DATABASE_URL": "hunter2"},
    {"RESILIENTDB_PASSWORD": "hunter2"},
    {"RESILIENTDB_API_KEY": "hunter2"},
    {"RESILIENTDB_BREAKER_STORAGE": "redis://:hunter2@cache"},
)


@pytest.mark.parametrize("environ", SECRETS)
def test_secrets_are_hidden(environ: Mapping[str, str]) -> None:
    url_options = {name.removeprefix("RESILIENTDB_").lower(): value for name, value in environ.items()}
    for source in (
        lambda: Resilience.from_env(environ=environ),
        lambda: resolve(environ={}, url_options=url_options),
        lambda: resolve(environ={}, url_options={name: [text, text] for name, text in url_options.items()}),
        lambda: Resilience.from_mapping(url_options),
        lambda: Resilience.from_mapping({"queue": url_options}),
    ):
        with pytest.raises(ConfigurationError) as caught:
            source()
        error = caught.value
        assert "hunter2" not in f"{error} {error!r} {error.key} {error.value} {error.__context__}"


def test_a_secret_used_as_a_key_is_hidden() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Resilience.from_mapping({"postgresql://app:hunter2@db": 1})
    assert "hunter2" not in f"{caught.value!r} {caught.value.key}"


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Resilience.from_env(environ={"RESILIENTDB_DEADLINE": "x" * 10_000})
    assert len(str(caught.value)) < 200
