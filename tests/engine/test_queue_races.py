"""The pool's queue under threads that get in each other's way: nothing is lost, whatever the scheduler does."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import resilientdb as rdb
from resilientdb.errors import CircuitOpen, DeadlineExceeded, PoolSaturated, PoolTimeout
from resilientdb.policy.saturation import Refusal
from tests.engine.conftest import assert_whole, by_another, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from resilientdb.engine.pool import QueueDoor
    from tests.engine.conftest import FakeDatabase

    MakePool = Callable[..., QueueDoor]

REFUSALS = (PoolTimeout, PoolSaturated, DeadlineExceeded, CircuitOpen)


@pytest.fixture
def _hurried() -> Iterator[None]:
    """Threads are switched as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_together(*works: Callable[[], object]) -> None:
    """All at once; the first error of any is raised."""
    start = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        start.wait(10)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("size", [1, 4])
def test_no_wake_up_is_lost(make_pool: MakePool, database: FakeDatabase, size: int) -> None:
    """The lock-free checkin and a waiter that joins: one of them sees the other, each of thousands of times.

    Timeouts are long: a lost wake-up would end in ``PoolTimeout``, or hang.
    """
    pool = make_pool(size, timeout=20.0)

    def work() -> None:
        for _ in range(1_500):
            pool.connect().close()

    run_together(*[work] * (4 * size if size > 1 else 6))
    assert pool.stats().timeouts == 0
    assert_whole(pool, database, size)


def test_a_waiter_that_joins_in_the_middle_of_a_checkin(make_pool: MakePool) -> None:
    """After the checkin has seen an empty line, before the connection is there to be seen."""
    pool = make_pool(1, timeout=20.0)
    held = pool.connect()
    served: list[bool] = []

    def work() -> None:
        pool.connect().close()
        served.append(True)

    waiter = threading.Thread(target=work)

    class Idle(deque[Any]):
        def append(self, record: Any) -> None:
            if not waiter.ident:
                waiter.start()
                while not pool.stats().waiting:
                    time.sleep(0)
            super().append(record)

    pool._idle = pool._slots.idle = Idle()
    pool._next_idle = pool._slots.next_idle = pool._idle.popleft
    held.close()
    waiter.join(10)
    assert served == [True]


def test_a_checkin_in_the_middle_of_joining(make_pool: MakePool) -> None:
    """After the newcomer has seen no connection, before it can be seen in line."""
    pool = make_pool(1, timeout=0.0)
    held = by_another(pool.connect)
    admission = pool._admission

    def join(waiter: Any, *rest: Any) -> Any:
        held.close()
        return admission.join(waiter, *rest)

    pool._slots.admission = _Patched(admission, "join", join)  # type: ignore[assignment]
    pool.connect().close()
    assert pool.stats().waited == 1


def test_a_checkin_in_the_middle_of_being_refused(make_pool: MakePool, database: FakeDatabase) -> None:
    """What the newcomer was thought to hold, so that it would wait for itself, is there for it to take."""
    pool = make_pool(1, timeout=0.0)
    held = pool.connect()
    admission = pool._admission
    answers: list[object] = []

    def join(waiter: Any, *rest: Any) -> Any:
        held.close()
        answers.append(admission.join(waiter, *rest))
        return answers[-1]

    pool._slots.admission = _Patched(admission, "join", join)  # type: ignore[assignment]
    pool.connect().close()
    assert answers == [Refusal.DEADLOCK]
    pool._slots.admission = admission
    assert_whole(pool, database, 1)


@pytest.mark.usefixtures("_hurried")
def test_sixteen_threads_four_connections(make_pool: MakePool, database: FakeDatabase) -> None:
    """Failing connects, lost connections, short waits, deadlines and an opening circuit, all at once; somebody
    watches the counts all the time."""
    policy = rdb.Resilience(
        retry=rdb.RetryPolicy(attempts=1),
        queue=rdb.SaturationQueue(max_waiting=10),
        breaker=rdb.BreakerPolicy(minimum_calls=1_000_000),
    )
    pool = make_pool(2, max_overflow=2, resilience=policy)
    plain = database.connect
    chance = random.Random(7)

    def unreliable() -> Any:
        if chance.random() < 0.1:
            raise ConnectionRefusedError("connection refused")
        return plain()

    invoke: Any = lambda _record: unreliable()  # noqa: E731
    pool._invoke_creator = invoke
    done = threading.Event()
    wrong: list[object] = []

    def watch() -> None:
        while not done.is_set():
            seen = pool.stats()
            if seen.total != seen.active + seen.idle or not 0 <= seen.total <= 4 or seen.waiting > 10:
                wrong.append(seen)
            time.sleep(0)

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(250):
            pool._timeout = dice.choice([0.0, 0.001, 5.0])
            try:
                with rdb.deadline(dice.choice([None, 0.002, 5.0])):
                    connection = pool.connect()
                if dice.random() < 0.1:
                    connection.invalidate()
                elif dice.random() < 0.05:
                    time.sleep(0.001)
                connection.close()
            except (*REFUSALS, ConnectionRefusedError):
                pass
            if dice.random() < 0.01:
                pool.node.breaker.open()
                pool.node.breaker.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_together(*[lambda seed=seed: work(seed) for seed in range(16)])
    finally:
        done.set()
        watcher.join(10)
    deadline = time.monotonic() + 10
    while pool.stats().active and time.monotonic() < deadline:
        time.sleep(0.005)  # connects that outlived their callers
    assert wrong == []
    invoke = lambda _record: plain()  # noqa: E731
    pool._invoke_creator = invoke
    assert_whole(pool, database, 4)
    pool.dispose()
    assert database.open_now == 0


def test_sixteen_threads_on_a_sqlite_file(tmp_path: Path) -> None:
    engine = rdb.create_engine(f"sqlite:///{tmp_path}/queue.db", pool_size=4, max_overflow=0, pool_timeout=30)
    counts: list[int] = []

    def work() -> None:
        for _ in range(40):
            with engine.connect() as connection:
                counts.append(connection.scalar(sa.text("SELECT 1")) or 0)

    run_together(*[work] * 16)
    assert sum(counts) == 16 * 40
    pool: Any = engine.pool
    stats = pool.stats()
    assert (stats.checkouts, stats.active, stats.waiting, stats.rejected) == (16 * 40, 0, 0, 0)
    assert stats.total <= 4
    engine.dispose()


class Interrupt(BaseException):
    """What a signal handler, or a debugger, throws into a thread at any moment."""


@pytest.mark.usefixtures("_hurried")
def test_interrupted_waiters_lose_no_slot(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1, timeout=10.0)
    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
    interrupted = 0
    for _ in range(60):
        held = pool.connect()
        outcomes: list[str] = []

        def wait(outcomes: list[str] = outcomes) -> None:
            try:
                pool.connect().close()
                outcomes.append("served")
            except Interrupt:
                outcomes.append("interrupted")

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for number, thread in enumerate(threads):
            thread.start()
            while pool.stats().waiting <= number:
                time.sleep(0)
        for thread in threads[:2]:
            # Delivered when the thread next runs: exactly when it has been handed the slot.
            set_exception(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupt))
        held.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert outcomes[-1:] != []
        assert "served" in outcomes
        interrupted += outcomes.count("interrupted")
        assert (pool.stats().active, pool.stats().waiting) == (0, 0)
    assert interrupted == 120
    assert_whole(pool, database, 1)


def test_interrupted_while_connecting_under_a_deadline(make_pool: MakePool, database: FakeDatabase) -> None:
    """The connect goes on without its caller; its slot is given back by one of them, not by both."""
    pool = make_pool(2)
    database.gate = threading.Event()
    outcomes: list[str] = []

    def connect() -> None:
        try:
            with rdb.deadline(0.3):
                pool.connect()
        except Interrupt:
            outcomes.append("interrupted")

    thread = threading.Thread(target=connect)
    thread.start()
    assert database.connecting.acquire(timeout=10)
    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
    set_exception(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupt))
    thread.join(10)
    assert outcomes == ["interrupted"]
    assert pool.stats().active == 1
    database.gate.set()
    deadline = time.monotonic() + 10
    while pool.stats().active and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (pool.stats().total, pool.stats().idle) == (1, 1)
    assert_whole(pool, database, 2)


def test_an_idle_connection_that_another_thread_takes_first(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    """Taking one needs no lock, so what was there a moment ago may be gone."""
    pool = make_pool(2, timeout=0.0)
    pool.connect().close()
    take = pool._next_idle
    losses = [IndexError, IndexError]

    def too_late() -> Any:
        if losses:
            raise losses.pop()
        return take()

    pool._next_idle = pool._slots.next_idle = too_late
    pool.connect().close()
    assert losses == []
    assert_whole(pool, database, 2)


def test_refusing_somebody_holds_up_nobody(make_pool: MakePool, database: FakeDatabase) -> None:
    """What a refusal says is found out after the pool's lock is released: the breaker, which is asked for it, may
    be waiting for the pool in turn."""
    policy = rdb.Resilience(queue=rdb.SaturationQueue(max_waiting=0))
    pool = make_pool(1, resilience=policy)
    held = pool.connect()
    breaker = pool.node.breaker
    refused: list[BaseException] = []

    def ask() -> None:
        try:
            pool.connect()
        except PoolSaturated as error:
            refused.append(error)

    asking = threading.Thread(target=ask)
    with breaker._guard:
        asking.start()
        until(lambda: pool._tally.refused[Refusal.FULL] == 1, "being refused")
        # In the middle of it; a return that needs the pool's lock goes through.
        held.invalidate()
        returned = threading.Thread(target=pool._slots.rebalance)
        returned.start()
        returned.join(10)
        assert not returned.is_alive()
    asking.join(10)
    assert len(refused) == 1
    held.close()
    assert_whole(pool, database, 1)


# -- a garbage collection in the middle of it ----------------------------------------------------------------------


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, connection: object) -> None:
        self.connection = connection
        self.myself = self


def test_a_collection_inside_the_pool_may_return_a_connection(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    pool = make_pool(3, timeout=0.0)
    for method in ("try_take", "join", "vacate", "next_in_line", "leave"):
        plain = getattr(pool._admission, method)

        def collect_first(*arguments: Any, plain: Any = plain) -> Any:
            gc.collect()
            return plain(*arguments)

        held = [pool.connect(), pool.connect()]
        Cycle(pool.connect())
        gc.disable()
        admission = pool._admission
        patched = _Patched(admission, method, collect_first)
        pool._slots.admission = patched  # type: ignore[assignment]
        try:
            held.pop().invalidate()
            try:
                pool.connect().close()
            except PoolTimeout:
                held[0].close()
                pool.connect().close()
        finally:
            pool._slots.admission = admission
            gc.enable()
            held.clear()
            gc.collect()
        assert_whole(pool, database, 3)
        pool.dispose()


class _Patched:
    """An admission with one method replaced (its slots cannot be)."""

    def __init__(self, admission: Any, method: str, replacement: Any) -> None:
        self.__dict__["_own"] = (admission, method, replacement)

    def __getattr__(self, name: str) -> Any:
        admission, method, replacement = self.__dict__["_own"]
        return replacement if name == method else getattr(admission, name)


@pytest.mark.usefixtures("_hurried")
def test_forgotten_connections_come_back_while_everybody_works(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    pool = make_pool(4, timeout=20.0)
    pool.cluster.patient = True  # what a caller has forgotten, it is taken to hold until it is found
    before = gc.get_threshold()
    gc.set_threshold(5, 2, 2)

    def work() -> None:
        for turn in range(120):
            connection = pool.connect()
            if turn % 3:
                connection.close()
            else:
                Cycle(connection)
                del connection

    try:
        run_together(*[work] * 8)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert_whole(pool, database, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_does_not_touch_its_parents_connections(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(2)
    out, idle = pool.connect(), pool.connect()
    idle.close()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        verdict = "?"
        try:
            inherited = database.opened
            out.close()
            again = [pool.connect(), pool.connect()]
            mine = all(connection.dbapi_connection.number > inherited for connection in again)  # type: ignore[union-attr]
            verdict = f"{mine} {pool.stats().total} {database.open_now}"
        except BaseException as error:  # noqa: BLE001 - told to the parent
            verdict = repr(error)
        finally:
            os.write(writer, verdict.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        assert answers.read() == "True 2 4", "two of its own; the parent's two not closed either"
    os.waitpid(child, 0)
    out.close()
    assert_whole(pool, database, 2)
