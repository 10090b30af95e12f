"""Keeps an application answering while its SQLAlchemy database is slow, full, failing, failing over or coming back.

Everything a program needs by name::

    import resilientdb as rdb

    engine = rdb.create_engine("postgresql+psycopg://app@db/app", replicas=["replica:5432"])

    with rdb.deadline(0.8), engine.begin() as connection: ...
    with rdb.read_only(), engine.connect() as connection: ...
    rdb.run_transaction(engine, transfer, "alice", "bob", 10)
    rdb.control(engine).snapshot()

The web edge is in ``resilientdb.middleware``, health checks in ``resilientdb.health``, what a team needs to prove its
own stack in ``resilientdb.testing``.
"""

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
from resilientdb.engine.control import AsyncEngineControl, Control, EngineControl, control
from resilientdb.engine.create import create_async_engine, create_engine
from resilientdb.engine.outcome import TokenTable
from resilientdb.engine.token_table import (
    install,
    install_async,
    purge,
    purge_async,
    resolve,
    resolve_async,
)
from resilientdb.engine.transaction import (
    run_transaction,
    run_transaction_async,
    transactional,
)
from resilientdb.errors import (
    CircuitOpen,
    CommitOutcomeUnknown,
    ConfigurationError,
    DeadlineExceeded,
    NoPrimaryAvailable,
    NoReplicaAvailable,
    PoolDraining,
    PoolSaturated,
    PoolTimeout,
    ResilienceError,
    TransactionAborted,
)
from resilientdb.policy.faults import Fault, classify
from resilientdb.runtime.context import criticality, deadline, read_only, recording
from resilientdb.stats import CommitOutcome

__version__ = "0.1.0.dev0"

__all__ = [
    # engines
    "create_engine",
    "create_async_engine",
    # options
    "Resilience",
    "SaturationQueue",
    "RetryPolicy",
    "Backoff",
    "RetryBudget",
    "BreakerPolicy",
    "Routing",
    "Lifecycle",
    # what a caller says about its work
    "deadline",
    "read_only",
    "criticality",
    "recording",
    # transactions
    "run_transaction",
    "run_transaction_async",
    "transactional",
    # … exactly once
    "CommitOutcome",
    "TokenTable",
    "install",
    "install_async",
    "purge",
    "purge_async",
    "resolve",
    "resolve_async",
    # the handle
    "control",
    "AsyncEngineControl",
    "Control",
    "EngineControl",
    # errors
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
    # what any driver's error means
    "classify",
    "Fault",
    "__version__",
]
