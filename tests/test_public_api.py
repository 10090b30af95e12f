"""The names other people's programs call, pinned: what changes here changes for all of them.

The second half is for the type checker, which reads this file with the rest of the tests.
"""

from __future__ import annotations

import inspect
import pickle
from typing import TYPE_CHECKING, Any, assert_type

import pybreaker
import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.stats import PoolStats

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from resilientdb.events import Event
    from resilientdb.runtime.breaker import CircuitBreaker
    from resilientdb.stats import NodeStats, Snapshot

NAMES = [
    "create_engine",
    "create_async_engine",
    "Resilience",
    "SaturationQueue",
    "RetryPolicy",
    "Backoff",
    "RetryBudget",
    "BreakerPolicy",
    "Routing",
    "Lifecycle",
    "deadline",
    "read_only",
    "criticality",
    "recording",
    "run_transaction",
    "run_transaction_async",
    "transactional",
    "CommitOutcome",
    "TokenTable",
    "install",
    "install_async",
    "purge",
    "purge_async",
    "resolve",
    "resolve_async",
    "control",
    "Control",
    "EngineControl",
    "AsyncEngineControl",
    "ResilienceError",
    "PoolSaturated",
    "PoolTimeout",
    "CircuitOpen",
    "DeadlineExceeded",
    "NoPrimaryAvailable",
    "NoReplicaAvailable",
    "PoolDraining",
    "CommitOutcomeUnknown",
    "TransactionAborted",
    "ConfigurationError",
    "classify",
    "Fault",
    "__version__",
]


def test_the_names() -> None:
    assert sorted(rdb.__all__) == sorted(NAMES)
    assert all(hasattr(rdb, name) for name in NAMES)


SIGNATURES = {
    "create_engine": "(url, *, replicas=(), resilience=None, **sqlalchemy_options)",
    "create_async_engine": "(url, *, replicas=(), resilience=None, **sqlalchemy_options)",
    "deadline": "(seconds)",
    "read_only": "()",
    "criticality": "(level)",
    "recording": "(route=None)",
    "run_transaction": "(target, function, /, *args, read_only=False, "
    "exactly_once=False, isolation_level=None, **kwargs)",
    "run_transaction_async": "(target, function, /, *args, read_only=False, "
    "exactly_once=False, isolation_level=None, **kwargs)",
    "transactional": "(target, /, *, read_only=False, exactly_once=False, isolation_level=None)",
    "resolve": "(engine, key, *, table=TokenTable(name='resilientdb_token', schema=None))",
    "install": "(engine, *, table=TokenTable(name='resilientdb_token', schema=None))",
    "TokenTable": "(name='resilientdb_token', schema=None)",
    "control": "(engine)",
    "classify": "(error, phase=<Phase.STATEMENT: 'statement'>)",
    "Control.snapshot": "(self)",
    "Control.get_stats": "(self)",
    "Control.pop_stats": "(self)",
    "Control.holders": "(self)",
    "Control.validate": "(self, timeout=5.0, *, processes=1)",
    "EngineControl.warm": "(self, connections=None)",
    "EngineControl.drain": "(self, timeout=30.0)",
    "AsyncEngineControl.warm": "(self, connections=None)",
    "AsyncEngineControl.drain": "(self, timeout=30.0)",
    "Control.breaker": "(self, node=None)",
    "Control.on_event": "(self, listener)",
    "Resilience.profile": "(name)",
    "Resilience.from_env": "(prefix='RESILIENTDB_', environ=None)",
    "Resilience.from_mapping": "(table)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures(name: str) -> None:
    thing: Any = rdb
    for part in name.split("."):
        thing = getattr(thing, part)
    signature = inspect.signature(thing)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    assert (
        str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == SIGNATURES[name]
    )


OPTIONS = {
    "SaturationQueue": "max_waiting timeout target interval sheddable_plus_share sheddable_share limiter",
    "RetryPolicy": "attempts timeout wait_when_open wait stop backoff budget",
    "Backoff": "initial maximum multiplier jitter",
    "RetryBudget": "ratio window floor",
    "BreakerPolicy": "failure_rate_threshold minimum_calls window reset_timeout max_reset_timeout "
    "half_open_max_calls slow_start_calls slow_call_duration slow_call_rate_threshold probe_interval "
    "probe_timeout listeners storage shared mode enabled",
    "Routing": "fallback_to_primary",
    "Lifecycle": "connect_timeout tcp_user_timeout keepalive_idle min_size max_connecting max_age max_uses "
    "idle_timeout keepalive validate_idle validation_timeout leak_threshold",
    "Resilience": "queue retry breaker routing lifecycle deadline enabled",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_keyword_only_frozen_and_comparable(name: str) -> None:
    kind: Any = getattr(rdb, name)
    parameters = inspect.signature(kind).parameters.values()
    public = [one for one in parameters if not one.name.startswith("_")]
    assert [one.name for one in public] == OPTIONS[name].split()
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in public)
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    with pytest.raises(AttributeError):
        setattr(kind(), OPTIONS[name].split()[0], None)


ERRORS = {
    rdb.PoolSaturated: ("pool-saturated", rdb.ResilienceError),
    rdb.PoolTimeout: ("pool-timeout", sa.exc.TimeoutError),
    rdb.CircuitOpen: ("circuit-open", pybreaker.CircuitBreakerError),
    rdb.DeadlineExceeded: ("deadline-exceeded", rdb.ResilienceError),
    rdb.NoPrimaryAvailable: ("no-primary", rdb.ResilienceError),
    rdb.NoReplicaAvailable: ("no-replica", rdb.ResilienceError),
    rdb.PoolDraining: ("draining", rdb.ResilienceError),
    rdb.CommitOutcomeUnknown: ("commit-outcome-unknown", rdb.ResilienceError),
    rdb.TransactionAborted: ("transaction-aborted", rdb.ResilienceError),
    rdb.ConfigurationError: ("configuration", ValueError),
}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_the_errors(kind: type[rdb.ResilienceError]) -> None:
    reason, base = ERRORS[kind]
    error = kind("what happened")
    assert isinstance(error, base)
    assert isinstance(error, rdb.ResilienceError)
    assert isinstance(error, sa.exc.SQLAlchemyError)
    # Code that retries database errors does not retry ours, and SQLAlchemy sees no lost connection in them.
    assert not isinstance(error, sa.exc.DBAPIError | TimeoutError | OSError)
    assert (error.reason, error.retry_after, error.snapshot, str(error)) == (
        reason,
        None,
        None,
        "what happened",
    )


def test_errors_survive_a_task_queue() -> None:
    stats = PoolStats(total=1, active=1, idle=0, waiting=0, limit=1, max_waiting=2)
    for kind in ERRORS:
        error = kind("what happened")
        error.retry_after = 2.5
        error.snapshot = stats
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.retry_after, again.snapshot) == (
            kind,
            "what happened",
            2.5,
            stats,
        )


def test_the_version() -> None:
    assert rdb.__version__.split(".")[0].isdigit()


# -- for the type checker -------------------------------------------------------------------------------------------


if TYPE_CHECKING:

    def engines(engine: sa.Engine, async_engine: AsyncEngine) -> None:
        assert_type(rdb.create_engine("sqlite://", replicas=["b:5432"], pool_size=3), sa.Engine)
        assert_type(rdb.create_async_engine("sqlite+aiosqlite://", resilience=rdb.Resilience()), AsyncEngine)
        assert_type(rdb.control(engine), rdb.EngineControl)
        assert_type(rdb.control(async_engine), rdb.AsyncEngineControl)

    def handle(control: rdb.Control) -> None:
        assert_type(control.snapshot(), Snapshot)
        assert_type(control.snapshot().nodes, tuple[NodeStats, ...])
        assert_type(control.breaker(), CircuitBreaker)
        assert_type(control.resilience, rdb.Resilience)

        def listener(event: Event) -> None: ...

        control.on_event(listener)

    @rdb.read_only()
    def plain(number: int, *, text: str = "") -> float:
        return number / len(text)

    @rdb.deadline(0.5)
    async def coroutine(number: int) -> str:
        return str(number)

    async def scopes() -> None:
        with rdb.deadline(0.8), rdb.read_only(), rdb.criticality("sheddable"):
            assert_type(plain(1, text="a"), float)
            assert_type(await coroutine(1), str)
        plain("1")  # type: ignore[arg-type]
        rdb.criticality("urgent")  # type: ignore[arg-type]

    def count(connection: sa.Connection, table: str, *, minimum: int = 0) -> int: ...

    async def count_async(connection: AsyncConnection, table: str) -> int: ...

    async def transactions(engine: sa.Engine, async_engine: AsyncEngine) -> None:
        assert_type(rdb.run_transaction(engine, count, "t", minimum=1, read_only=True), int)
        assert_type(await rdb.run_transaction_async(async_engine, count_async, "t"), int)
        counted = rdb.transactional(engine, exactly_once=rdb.TokenTable(schema="app"))(count)
        assert_type(counted("t", minimum=1), int)
        assert_type(await rdb.transactional(async_engine, read_only=True)(count_async)("t"), int)
        counted(1)  # type: ignore[arg-type]
        rdb.run_transaction(engine, count, "t", isolation_level="SNAPSHOT")  # type: ignore[arg-type]
        assert_type(rdb.run_transaction(engine, count, "t", exactly_once="guarded"), int)
        rdb.run_transaction(engine, count, "t", exactly_once="gaurded")  # type: ignore[arg-type]

    def words(error: Exception) -> None:
        assert_type(rdb.classify(error), rdb.Fault)

    def profiles() -> None:
        assert_type(rdb.Resilience.profile("web"), rdb.Resilience)
        assert_type(rdb.Resilience.from_env(), rdb.Resilience)
        rdb.Resilience.profile("webb")  # type: ignore[arg-type]
