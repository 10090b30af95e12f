"""The life of connections in a pool of threads: opened ahead, retired, missed when they do not come back."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine.default import DefaultDialect

import resilientdb as rdb
from resilientdb.engine.cluster import Cluster
from resilientdb.engine.control import EngineControl
from resilientdb.engine.pool import QueueDoor
from resilientdb.events import ConnectionLeaked
from resilientdb.runtime.context import recording
from tests.engine.conftest import FakeConnection, FakeDatabase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakePool = Callable[..., QueueDoor]

SOON = 0.02
EVENTS = ("connect", "checkout", "reset", "checkin", "invalidate", "close")


class Session(FakeConnection):
    """A connection that may be lost without anybody being told."""

    is_dead = False

    def ping(self) -> bool:
        if self.is_dead:
            raise OSError("the server has closed it")
        return True


class Server(FakeDatabase):
    """Knows its sessions, and how many were being opened at once. ``_lock`` guards the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.closed_at: list[float] = []
        self.attempts = 0
        self.opening = 0
        self.most_opening = 0
        self.takes = 0.0
        self.meet: threading.Barrier | None = None
        """Where those who connect wait for each other, all but the first."""

    def connect(self) -> Session:
        with self._lock:
            self.attempts += 1
            is_first = self.attempts == 1
            self.opening += 1
            self.most_opening = max(self.most_opening, self.opening)
        try:
            if self.meet is not None and not is_first:
                self.meet.wait(10)
            time.sleep(self.takes)
            session = Session(self, super().connect().number)
        finally:
            with self._lock:
                self.opening -= 1
        self.sessions.append(session)
        return session

    def close_one(self) -> None:
        super().close_one()
        self.closed_at.append(time.monotonic())

    def kill(self) -> None:
        for session in self.sessions:
            session.is_dead = True


class Dialect(DefaultDialect):
    name = "fake"
    driver = "fake"

    def do_ping(self, dbapi_connection: Any) -> bool:
        return bool(dbapi_connection.ping())


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def make(server: Server) -> Iterator[MakePool]:
    """``make(size=10, min_size=...)``: all else are ``Lifecycle``'s options."""
    made: list[QueueDoor] = []

    def make(size: int = 10, *, breaker: rdb.BreakerPolicy | None = None, **options: Any) -> QueueDoor:
        dialect = Dialect(dbapi=sqlite3)  # type: ignore[arg-type]
        resilience = rdb.Resilience(
            lifecycle=rdb.Lifecycle(**{"validate_idle": SOON, **options}),
            breaker=breaker or rdb.BreakerPolicy(),
        )
        cluster = Cluster(resilience, dialect, [("db", "unknown", None)])
        made.append(
            QueueDoor(
                server.connect, pool_size=size, max_overflow=0, dialect=dialect, resilientdb_cluster=cluster
            )
        )
        return made[-1]

    yield make
    for pool in made:
        pool.dispose()
        pool.recreate()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds:g} s"
        time.sleep(0.002)


def use(pool: QueueDoor, connections: int = 1) -> None:
    """Check so many out at once."""
    with contextlib.ExitStack() as stack:
        for _ in range(connections):
            stack.callback(pool.connect().close)


def retired(pool: QueueDoor) -> dict[str, int]:
    return dict(pool.stats().retired)


class Happened(list[str]):
    """The names of the pool's events since last asked."""

    def __init__(self, pool: QueueDoor) -> None:
        super().__init__()
        for name in EVENTS:
            event.listen(pool, name, lambda *_, name=name: self.append(name))

    def take(self) -> list[str]:
        taken = list(self)
        self.clear()
        return taken


# -- opened ahead ------------------------------------------------------------------------------------------------


def test_several_are_opened_at_once(make: MakePool, server: Server) -> None:
    pool = make(min_size=4, max_connecting=3)
    server.meet = threading.Barrier(3)  # the other three come together, or not at all
    pool.connect().close()
    until(lambda: pool.stats().idle == 4)


def test_no_more_than_so_many_are_opened_at_once(make: MakePool, server: Server) -> None:
    pool = make(min_size=10, max_connecting=2)
    server.takes = 0.01
    pool.connect().close()
    until(lambda: pool.stats().idle == 10)
    assert server.most_opening == 2
    assert server.opened == 10


def test_it_tries_until_it_can(make: MakePool, server: Server) -> None:
    pool = make(min_size=2, keepalive=0.05, breaker=rdb.BreakerPolicy(enabled=False))
    use(pool)
    until(lambda: pool.stats().idle == 2)
    server.failures.extend(OSError("the server is down") for _ in range(9))
    server.kill()
    until(lambda: not server.failures and pool.stats().total == 2, 30.0)
    until(lambda: not any(session.is_dead for session in server.sessions if session.is_open))
    assert pool.stats().connect_failures == 9
    assert server.most_open <= 2


def test_a_failure_of_all_at_once_is_not_the_end(make: MakePool, server: Server) -> None:
    """Nobody uses the pool, nothing is left of it: nobody but the background itself can go on."""
    pool = make(min_size=2, keepalive=0.03, breaker=rdb.BreakerPolicy(enabled=False))
    pool.warm(2)
    server.failures.extend(OSError("the server is down") for _ in range(4))
    server.kill()
    until(lambda: pool.stats().connect_failures == 4)
    until(lambda: pool.stats().total == 2)


def test_nothing_is_opened_against_an_open_circuit(make: MakePool, server: Server) -> None:
    pool = make(min_size=3, keepalive=0.03)
    pool.warm(3)
    pool.node.breaker.open()
    server.kill()
    until(lambda: pool.stats().total == 0)
    attempts = server.attempts
    time.sleep(0.2)  # nothing is to happen
    assert server.attempts == attempts
    pool.node.breaker.close()
    until(lambda: pool.stats().total == 3)


def test_a_listener_that_fails_costs_no_slot(make: MakePool, server: Server) -> None:
    pool = make(min_size=2, max_age=0.1)
    logging.getLogger("resilientdb").disabled = True

    @event.listens_for(pool, "close")
    def _fail(*_: object) -> None:
        raise RuntimeError("a listener's own mistake")

    try:
        pool.warm(2)
        until(lambda: retired(pool).get("age", 0) >= 4)
    finally:
        event.remove(pool, "close", _fail)
        logging.getLogger("resilientdb").disabled = False
    until(lambda: pool.stats().total == 2)
    use(pool, 10)
    assert pool.stats().total == 10


# -- no longer wanted --------------------------------------------------------------------------------------------


def test_they_do_not_end_together(make: MakePool, server: Server) -> None:
    pool = make(max_age=1.0)
    use(pool, 10)
    began = time.monotonic()
    until(lambda: server.open_now == 0)
    assert retired(pool) == {"age": 10}
    first, last = min(server.closed_at), max(server.closed_at)
    assert first - began < 1.0
    assert last - first > 0.02


def test_one_that_is_always_in_use_ends_when_it_comes_back(make: MakePool, server: Server) -> None:
    pool = make(max_age=0.1)
    happened = Happened(pool)
    held = pool.connect()
    until(lambda: all(record.owes for record in pool._slots.out()))
    assert server.open_now == 1
    happened.clear()
    held.close()
    assert server.open_now == 0
    assert happened.take() == ["reset", "checkin", "close"]
    assert retired(pool) == {"age": 1}
    use(pool)
    assert happened.take() == ["connect", "checkout", "reset", "checkin"]


def test_so_does_one_that_is_handed_from_one_to_the_next(make: MakePool, server: Server) -> None:
    """A pool so busy that its one connection is never idle."""
    pool = make(1, max_age=0.1)
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            use(pool)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        until(lambda: retired(pool).get("age", 0) >= 3)
    finally:
        ends.set()
        for worker in workers:
            worker.join()
    assert server.most_open == 1


def test_uses_are_counted_exactly(make: MakePool, server: Server) -> None:
    pool = make(1, max_uses=2)
    happened = Happened(pool)
    numbers: list[int] = []
    for _ in range(5):
        connection = pool.connect()
        numbers.append(connection.driver_connection.number)  # type: ignore[union-attr]
        connection.close()
    assert numbers == [1, 1, 2, 2, 3]
    once = ["checkout", "reset", "checkin"]
    assert happened.take() == ["connect", *once, *once, "close"] * 2 + ["connect", *once]
    assert retired(pool) == {"uses": 2}


def test_uses_count_for_those_in_line(make: MakePool, server: Server) -> None:
    pool = make(1, max_uses=1)
    workers = [threading.Thread(target=use, args=(pool,)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (server.opened, server.open_now, server.most_open) == (8, 0, 1)


def test_what_is_unused_goes_down_to_the_floor(make: MakePool, server: Server) -> None:
    pool = make(min_size=2, idle_timeout=0.1)
    use(pool, 6)
    happened = Happened(pool)
    until(lambda: pool.stats().total == 2)
    assert retired(pool) == {"idle": 4}
    assert happened.take() == ["close"] * 4
    time.sleep(0.3)  # nothing is to happen
    assert retired(pool) == {"idle": 4}


def test_what_died_is_found_by_asking(make: MakePool, server: Server) -> None:
    pool = make(keepalive=0.05)
    use(pool, 3)
    happened = Happened(pool)
    server.kill()
    until(lambda: server.open_now == 0)
    assert retired(pool) == {"keepalive": 3}
    assert happened.take() == ["invalidate", "close"] * 3


def test_what_died_is_found_when_it_is_wanted(make: MakePool, server: Server) -> None:
    pool = make()
    use(pool)
    until(lambda: len(pool._slots.dozing) == 1)
    server.kill()
    happened = Happened(pool)
    use(pool)
    assert happened.take() == ["invalidate", "close", "connect", "checkout", "reset", "checkin"]
    assert retired(pool) == {"validation": 1}


# -- not given back ----------------------------------------------------------------------------------------------


def forgetful(pool: QueueDoor) -> Any:
    return pool.connect()  # the line that the report is to show


def test_a_leak_is_told_once_with_its_place(make: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make(leak_threshold=0.1)
    told: list[Any] = []
    EngineControl(pool.cluster).on_event(told.append)
    with caplog.at_level(logging.WARNING, "resilientdb"), recording("GET /orders"):
        held = forgetful(pool)
        until(lambda: bool(told))
        (holder,) = EngineControl(pool.cluster).holders()
        time.sleep(0.3)  # nothing more is to be said
    (leak,) = told
    assert isinstance(leak, ConnectionLeaked)
    for said in (leak.holder, holder):
        assert (said.node, said.route, said.thread) == ("db", "GET /orders", threading.current_thread().name)
        assert said.seconds >= 0.1
        assert any("the line that the report is to show" in line for line in said.stack)
        assert "resilientdb/engine/upkeep.py" not in said.stack[-1]
    (record,) = [record for record in caplog.records if record.name == "resilientdb"]
    assert "GET /orders" in record.getMessage()
    assert "the line that the report is to show" in record.getMessage()
    assert pool.stats().leaks == 1
    held.close()
    assert EngineControl(pool.cluster).holders() == []
    forgetful_again = forgetful(pool)
    until(lambda: len(told) == 2)
    forgetful_again.close()


def test_the_rest_is_looked_after_while_a_leak_is_told(make: MakePool, server: Server) -> None:
    pool, other = make(leak_threshold=0.05), make(idle_timeout=0.1)
    go = threading.Event()
    EngineControl(pool.cluster).on_event(lambda _: go.wait(10))
    held = pool.connect()
    until(lambda: pool.stats().leaks == 1)
    use(other)
    until(lambda: other.stats().total == 0)
    go.set()
    held.close()


# -- what can be seen meanwhile ------------------------------------------------------------------------------------


def test_the_counts_agree_at_every_moment(make: MakePool, server: Server) -> None:
    pool = make(
        4, min_size=2, max_uses=7, idle_timeout=0.05, keepalive=0.02, max_age=0.2, validate_idle=0.005
    )
    control = EngineControl(pool.cluster)
    wrong: list[object] = []
    ends = threading.Event()
    seen = 0

    def watch() -> None:
        nonlocal seen
        while not ends.is_set():
            stats = control.get_stats()["db"]
            seen += 1
            if stats.active + stats.idle != stats.total or not 0 <= stats.total <= 4 or stats.active < 0:
                wrong.append(stats)

    def work(number: int) -> None:
        turn = number
        while not ends.is_set():
            turn += 1
            try:
                connection = pool.connect()
            except rdb.ResilienceError:
                continue
            if turn % 5 == 0:
                connection.invalidate()
            elif turn % 7 == 0:
                connection.detach()
            elif turn % 11 == 0:
                server.kill()
            connection.close()
            if turn % 13 == 0:
                pool.dispose()
            if turn % 3 == 0:
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    threads += [threading.Thread(target=watch)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        time.sleep(1.5)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not wrong, wrong[:3]
    assert seen > 100
    until(lambda: pool.checkedout() == 0)
    use(pool, 4)
    assert pool.stats().total <= 4
