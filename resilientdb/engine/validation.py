"""Start-up validation: does what was configured exist, let us in, and play the role it was given?"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

from resilientdb.engine.compat import greenlet_spawn
from resilientdb.errors import ConfigurationError
from resilientdb.policy.faults import Fault, Phase, classify, describe

if TYPE_CHECKING:
    from resilientdb.engine.cluster import Cluster
    from resilientdb.engine.node import Node
    from resilientdb.stats import Role

__all__ = ["validate"]

_REMEDIES = {
    Fault.CANNOT_CONNECT: "is the server running, and are host and port right?",
    Fault.CONFIGURATION: "check the user, password and database in the URL",
    Fault.OVERLOAD: "the server has no connection left: raise max_connections or use a smaller pool",
    Fault.WRONG_ROLE: "the server plays another role",
}


def validate(cluster: Cluster, timeout: float) -> None:
    """Ask each node once, on a connection of its own; ``ConfigurationError`` with all that is wrong."""
    problems: list[tuple[str, Exception | None]] = []
    for position, node in enumerate(cluster.nodes):
        key = "url" if position == 0 else f"replicas[{position - 1}]"
        try:
            role = _ask(cluster, node, timeout)
        except Exception as error:  # noqa: BLE001 - reported, all of them together
            fault = classify(error, Phase.CONNECT)
            remedy = _REMEDIES.get(fault, "see the cause")
            problems.append((f"{key}: {node.name} failed ({describe(error)}); {remedy}", error))
            continue
        expected: Role = "primary" if position == 0 else "replica"
        if role is not None and role != expected and len(cluster.nodes) > 1:
            problems.append((f"{key}: {node.name} is a {role}, not a {expected}; exchange the URLs", None))
    if problems:
        raise ConfigurationError(
            "the database configuration does not work: " + "; ".join(text for text, _ in problems),
            key=problems[0][0].partition(":")[0],
        ) from problems[0][1]


def _ask(cluster: Cluster, node: Node, timeout: float) -> Role | None:
    """The node's role, None where the database has none."""
    dialect, driver = cluster.dialect, cluster.driver

    def ask() -> Role | None:
        connection: Any = node.open_raw(timeout)
        try:
            if driver.role_query is None:
                dialect.do_ping(connection)
                return None
            cursor = connection.cursor()
            try:
                cursor.execute(driver.role_query)
                return driver.read_role(cursor.fetchone())
            finally:
                cursor.close()
        finally:
            with contextlib.suppress(Exception):
                dialect.do_rollback(connection)
                dialect.do_close(connection)

    if not dialect.is_async:
        return ask()

    async def ask_in_greenlet() -> Role | None:
        return await greenlet_spawn(ask)

    # A loop of its own, in a thread of its own: this may be called where a loop is running already.
    answer: list[Role | None] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(asyncio.run(ask_in_greenlet()))
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="resilientdb-validate", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]
