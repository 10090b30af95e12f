"""What the library does around each statement: hold it to the deadline, and learn from how it ends.

Three places see everything that is sent on a connection: the dialect's ``do_execute`` and its like (``statements``),
its ``do_commit`` and ``do_rollback``, and SQLAlchemy's event ``handle_error`` (every failure but a failed connect).
All three hang on the dialect, so that connections keep SQLAlchemy's fast path for engines without events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from resilientdb.engine import reading, statements
from resilientdb.engine.commit import without_cancelling
from resilientdb.engine.compat import record_of, record_of_connection
from resilientdb.engine.drivers import Driver
from resilientdb.engine.holding import Holding, was_cancelled
from resilientdb.engine.retrying import happened_at, remember_beginning
from resilientdb.engine.rollbacks import Rollbacks
from resilientdb.errors import (
    CommitOutcomeUnknown,
    DeadlineExceeded,
    ResilienceError,
    TransactionAborted,
)
from resilientdb.policy.faults import Fault, Phase, blame_the_application, classify, describe, evidence
from resilientdb.runtime.context import current_deadline, innermost_deadline, is_read_only

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import ExceptionContext

    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.node import Node
    from resilientdb.runtime.watchdog import Watch

__all__ = ["WITH_BEGIN", "install"]

WITH_BEGIN: Any = {"no_parameters": True, "resilientdb_with_begin": True}
"""The execution options of a statement without parameters that may go in one message with its BEGIN."""


def install(engine: Engine, cluster: Cluster) -> None:
    """Attach the library to a finished engine, once."""
    hooks = _Hooks(engine, cluster)
    reading.attach(engine, cluster.driver)
    statements.attach(engine, cluster, hooks.holding.execute)


class _Hooks:
    def __init__(self, engine: Engine, cluster: Cluster) -> None:
        self._cluster = cluster
        dialect = engine.dialect
        self.holding = Holding(cluster, is_async=dialect.is_async)
        event.listen(engine, "handle_error", self._on_error)
        self._is_idle = cluster.driver.is_idle
        self._is_known = type(cluster.driver) is not Driver
        self._is_failed = cluster.driver.is_failed
        self._answer_to_commit = cluster.driver.answer_to_commit
        rollbacks = Rollbacks(cluster.driver)
        rollbacks.attach(dialect)
        self._rollbacks = rollbacks if rollbacks.are_silent else None
        self._in_tasks = dialect.is_async and cluster.has_server
        self._commit = dialect.do_commit
        self._commit_by_driver = cluster.driver.commit
        self._rollback = dialect.do_rollback
        self._execute_no_params = dialect.do_execute_no_params
        dialect.do_execute_no_params = self._do_execute_no_params  # type: ignore[method-assign]
        dialect.do_commit = self._do_commit  # type: ignore[method-assign, assignment]
        dialect.do_rollback = self._do_rollback  # type: ignore[method-assign, assignment]

    # -- before ----------------------------------------------------------------------------------------------

    def _do_execute_no_params(self, cursor: Any, statement: Any, context: Any = None) -> None:
        if context is not None and context.execution_options.get("resilientdb_with_begin"):
            raw = context.root_connection.connection.dbapi_connection
            self._cluster.driver.begin_with(raw, cursor, statement)
        else:
            self._execute_no_params(cursor, statement, context)

    def _do_commit(self, connection: Any) -> None:
        raw = getattr(connection, "dbapi_connection", connection)
        only_reads = is_read_only()
        if only_reads and self._is_idle(raw):
            return  # nothing was written, nothing can be lost
        record = record_of(connection)
        if not only_reads and self._is_failed(raw):
            # What the server would do; SQLAlchemy will not ask for it after a COMMIT.
            self._do_rollback(connection)
            raise _aborted(record)
        deadline = current_deadline()
        if deadline is not None:
            self.holding.hold_commit(deadline, record)
        if self._rollbacks is not None and not only_reads:
            aborted = self._rollbacks.before_commit(record)
            if aborted is not None:
                self._do_rollback(connection)
                raise aborted
            self._rollbacks.forget(record)
        answer = self._answer_to_commit(raw)
        try:
            if self._in_tasks and record is not None:
                without_cancelling(self._commit, connection, lambda: self.holding.cut(record))
            else:
                self._commit_by_driver(raw, self._commit, connection)
        except BaseException as error:
            if not _cannot_have_written(record):
                _mark_as_commit(error)
            raise
        if answer is not None and not only_reads and answer() == "ROLLBACK":
            raise _aborted(record)

    def _do_rollback(self, connection: Any) -> None:
        raw = getattr(connection, "dbapi_connection", connection)
        if is_read_only() and self._is_idle(raw):
            return  # the driver would send nothing either, but take its time to find that out
        if self._rollbacks is not None:
            self._rollbacks.forget(record_of(connection))
        deadline = None if innermost_deadline() is None else current_deadline()
        if deadline is not None and (record := record_of(connection)) is not None:
            self.holding.hold_rollback(deadline, record)
        # SQLAlchemy's proxy looks for a method twice before it asks the driver's connection. But a dialect of which
        # nothing is known may count on the proxy, and a program may have put a method of its own there.
        if raw is not connection and self._is_known and "rollback" not in getattr(connection, "__dict__", ()):
            connection = raw
        self._rollback(connection)

    # -- after ------------------------------------------------------------------------------------------------

    def _on_error(self, context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        record = None if context.is_pre_ping else record_of_connection(context.connection)
        if record is None:
            return None  # a failed connect: the door settles it
        watch: Watch | None = getattr(record, "watch", None)
        cut = watch is not None and watch.fired
        if cut:
            # Ours was the hand that broke this connection; the others are not to blame.
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        if isinstance(error, ResilienceError):
            return None
        phase = Phase.COMMIT if _was_commit(error) else Phase.STATEMENT
        if classify(error) is Fault.WRONG_ROLE and self._has_declared_read_only(context, record):
            blame_the_application(error)
        late = cut or was_cancelled(error)
        self._settle(record, error, phase, cut=cut, late=late)
        fault = classify(error, phase)
        if phase is Phase.STATEMENT:
            record.failed_with = (describe(error), fault.retry_transaction)  # see _aborted
            if self._rollbacks is not None:
                self._rollbacks.note(record, error)
        self._keep_or_evict(context, record, fault, phase)
        in_doubt = phase is Phase.COMMIT and (fault is Fault.IN_DOUBT or cut)
        if in_doubt:
            self._cluster.commit_in_doubt(self._node_of(record).name, error)
        if not isinstance(error, Exception):
            # A cancellation stays one, or a task that was told to end would carry on.
            if in_doubt:
                error.add_note(
                    "COMMIT was sent and its reply was not awaited: it may have been committed or not"
                )
            return None
        if in_doubt:
            return CommitOutcomeUnknown(
                f"COMMIT was sent and its reply was lost ({describe(error)}): it may have been committed or not"
            )
        if late:
            deadline = current_deadline()
            return DeadlineExceeded(
                f"the deadline{f' of {deadline.seconds:g} s' if deadline else ''} ended during a statement"
            )
        return None

    def _keep_or_evict(self, context: ExceptionContext, record: Any, fault: Fault, phase: Phase) -> None:
        """Have SQLAlchemy keep the connection where it would give up a good one, and the other way round."""
        error = context.original_exception
        if phase is Phase.STATEMENT and self.holding.saved(
            error, record, context.statement, context.execution_context
        ):
            context.is_disconnect = False
        elif context.is_disconnect or not self._cluster.has_server:
            return
        elif fault.evicts_connection or not self._is_whole(record.dbapi_connection):
            # SQLAlchemy would keep it, and pre_ping would call it healthy for ever: it is, but it leads to the
            # wrong node, or its session is beyond repair.
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False

    def _is_whole(self, raw: Any) -> bool:
        return raw is None or self._cluster.driver.is_whole(raw)

    def _settle(self, record: Any, error: BaseException, phase: Phase, *, cut: bool, late: bool) -> None:
        """Tell the breaker of the node what the failure shows, now rather than at the checkin."""
        node = self._node_of(record)
        happened_at(error, node.name)
        remember_beginning(error, getattr(record, "since", 0.0))
        fault = evidence(error, phase)
        if cut or fault is Fault.WRONG_ROLE or fault.is_node_failure:
            node.suspect()
        permit = getattr(record, "permit", None)
        if permit is None or (fault.is_healthy_reply and not late):
            return
        record.permit = None
        # A cut shows nothing about a node that is well: the deadline may have been too short. One call that was let
        # through to see whether the node answers has seen that it does not, and leaves it work that nobody waits for.
        if permit.probe if late else fault.is_node_failure:
            node.breaker.record_failure(permit, error, no_answer=late)
        else:
            node.breaker.release(permit)

    def _node_of(self, record: Any) -> Node:
        # SQLAlchemy's StaticPool makes plain records of its own.
        node: Node = getattr(record, "node", self._cluster.nodes[0])
        return node

    def _has_declared_read_only(self, context: ExceptionContext, record: Any) -> bool:
        """Whether a write was refused because the application itself asked for a READ ONLY transaction."""
        connection = context.connection
        options = connection.get_execution_options() if connection is not None else {}
        if options.get("postgresql_readonly") or options.get(reading.READ_ONLY):
            return True
        # A pooler may have told the driver of the server that it had before.
        node = getattr(record, "node", None)
        is_replica = node is not None and node.role == "replica"
        return not is_replica and self._cluster.driver.has_declared_read_only(record.dbapi_connection)


def _cannot_have_written(record: Any) -> bool:
    """Whether a COMMIT has nothing to commit, so that nothing is in doubt when it is lost. Both the caller and the
    node must say so: a read that fell back to the primary could write, a replica may have been promoted."""
    node = getattr(record, "node", None)
    return is_read_only() and node is not None and node.role == "replica"


def _aborted(record: Any) -> TransactionAborted:
    """What to say of a COMMIT that the server answers with ROLLBACK. Of the failed statement only the words are kept:
    its traceback would keep the connection out of the pool."""
    said, retryable = getattr(record, "failed_with", None) or ("an error that was caught", False)
    error = TransactionAborted(
        f"a statement in this transaction had failed ({said}), so that the server rolls all of it back: nothing is "
        "committed; use a savepoint (begin_nested) around a statement that may fail"
    )
    error.retryable = retryable
    return error


_COMMIT_MARK = "_resilientdb_at_commit"


def _mark_as_commit(error: BaseException) -> None:
    # handle_error is not told what failed when there was no statement; the exception itself can be.
    try:
        setattr(error, _COMMIT_MARK, True)
    except AttributeError:
        error.add_note("while sending COMMIT")


def _was_commit(error: BaseException) -> bool:
    return getattr(error, _COMMIT_MARK, False) or "while sending COMMIT" in getattr(error, "__notes__", ())
