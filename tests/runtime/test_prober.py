"""The thread that asks a node whether it lives: when it asks, and when it stops."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.dialects import postgresql

from resilientdb import BreakerPolicy, Resilience
from resilientdb.engine.cluster import Cluster
from resilientdb.runtime.prober import Prober, pause_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilientdb.engine.node import Node


class Probe:
    failed_at_once = False

    def __init__(self) -> None:
        self.examined = threading.Semaphore(0)
        self.closed = threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.is_needed = True
        self.error: Exception | None = None

    def examine(self) -> bool:
        self.thread = threading.current_thread()
        self.examined.release()
        if self.error is not None:
            raise self.error
        return self.is_needed

    def run(self, errand: Callable[[Any], None]) -> None:
        errand(self)

    def close(self) -> None:
        self.closed.release()


@pytest.fixture
def probes() -> list[Probe]:
    return []


@pytest.fixture
def make(probes: list[Probe]) -> Iterator[Callable[[float], Prober]]:
    made: list[Prober] = []

    def make_probe() -> Probe:
        probes.append(Probe())
        return probes[-1]

    def make(interval: float) -> Prober:
        made.append(Prober("db:5432", interval, make_probe))
        return made[-1]

    yield make
    for prober in made:
        prober.stop(timeout=10)


def until_examined(probes: list[Probe], times: int = 1) -> Probe:
    give_up = time.monotonic() + 10
    while not probes:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    for _ in range(times):
        assert probes[-1].examined.acquire(timeout=10)
    return probes[-1]


def test_it_asks_again_and_again_in_a_thread_of_its_own(
    make: Callable[[float], Prober], probes: list[Probe]
) -> None:
    prober = make(0.001)
    assert not prober.running
    prober.start()
    probe = until_examined(probes, times=5)
    assert probe.thread is not None
    assert probe.thread.daemon, "it does not keep a program from ending"
    assert probe.thread.name == "resilientdb-prober db:5432"
    assert len(probes) == 1


def test_starting_twice_is_starting_once(make: Callable[[float], Prober], probes: list[Probe]) -> None:
    prober = make(0.001)
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(10)
        prober.start()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    until_examined(probes, times=3)
    assert len(probes) == 1


def test_it_asks_at_once_when_hurried(make: Callable[[float], Prober], probes: list[Probe]) -> None:
    prober = make(600.0)
    prober.start()
    probe = until_examined(probes)
    assert not probe.examined.acquire(timeout=0.02)
    prober.hurry()
    assert probe.examined.acquire(timeout=10)


def test_a_node_that_refuses_is_asked_again_soon_and_never_as_late_as_one_that_is_well() -> None:
    assert [pause_after(refusals, 0.25) for refusals in range(5)] == [0.02, 0.04, 0.08, 0.15, 0.15]
    assert pause_after(0, 0.01) == pytest.approx(0.006)
    assert pause_after(1_000_000, 30.0) == pytest.approx(18.0)


def test_stopping_closes_its_connection_and_ends_the_thread(
    make: Callable[[float], Prober], probes: list[Probe]
) -> None:
    prober = make(600.0)
    prober.start()
    probe = until_examined(probes)
    prober.stop(timeout=10)
    assert not prober.running
    assert probe.closed.acquire(blocking=False)
    assert probe.thread is not None
    assert not probe.thread.is_alive()
    prober.stop(timeout=10)


def test_it_may_be_started_again(make: Callable[[float], Prober], probes: list[Probe]) -> None:
    prober = make(0.001)
    prober.start()
    first = until_examined(probes)
    prober.stop()
    prober.start()
    give_up = time.monotonic() + 10
    while len(probes) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    until_examined(probes, times=2)
    assert first.thread is not None
    first.thread.join(10)
    assert not first.thread.is_alive()


def test_nobody_needs_it_so_the_connection_is_given_up(
    make: Callable[[float], Prober], probes: list[Probe]
) -> None:
    prober = make(0.001)
    prober.start()
    probe = until_examined(probes)
    assert not probe.closed.acquire(blocking=False)
    probe.is_needed = False
    assert probe.closed.acquire(timeout=10)
    assert prober.running, "it goes on, should somebody come back"


def test_an_unforeseen_error_ends_neither_the_thread_nor_the_silence(
    make: Callable[[float], Prober], probes: list[Probe], caplog: pytest.LogCaptureFixture
) -> None:
    prober = make(0.001)
    prober.start()
    probe = until_examined(probes)
    probe.error = ZeroDivisionError("a mistake")
    assert probe.closed.acquire(timeout=10)
    probe.error = None
    until_examined(probes, times=3)
    prober.stop(timeout=10)
    assert "probing db:5432 failed in an unforeseen way" in caplog.text


def test_stopping_from_its_own_thread_does_not_wait_for_itself() -> None:
    stopped = threading.Event()

    class Suicidal(Probe):
        def examine(self) -> bool:
            prober.stop(timeout=60)
            stopped.set()
            return True

    prober = Prober("db", 600.0, Suicidal)
    prober.start()
    assert stopped.wait(10)


def test_an_errand_is_run_by_its_thread_and_does_not_end_it(
    make: Callable[[float], Prober], probes: list[Probe]
) -> None:
    prober = make(600.0)
    seen: list[tuple[Probe, threading.Thread]] = []
    assert not prober.send(lambda probe: seen.append((probe, threading.current_thread()))), "it does not run"
    prober.start()
    until_examined(probes)
    (probe,) = probes

    def fail(probe: Probe) -> None:
        seen.append((probe, threading.current_thread()))
        raise ConnectionError("lost with the errand")

    assert prober.send(fail)
    assert probe.closed.acquire(timeout=10), "its connection is not to be used again"
    assert seen == [(probe, probe.thread)]
    assert probe.examined.acquire(timeout=10), "and it goes on"


def test_after_a_fork_it_can_be_started(make: Callable[[float], Prober], probes: list[Probe]) -> None:
    prober = make(600.0)
    prober.start()
    until_examined(probes)
    thread = probes[0].thread
    prober.after_fork()
    assert not prober.running
    prober.start()
    give_up = time.monotonic() + 10
    while len(probes) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    assert thread is not None


def test_the_probers_thread_does_not_keep_a_forgotten_engine_alive() -> None:
    resilience = Resilience(breaker=BreakerPolicy(probe_interval=600.0))
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    dialect.driver = "psycopg"
    cluster = Cluster(resilience, dialect, [("db", "unknown", None)])
    node: Node = cluster.nodes[0]
    node.start_prober()
    threads = [one for one in threading.enumerate() if one.name == "resilientdb-prober db"]
    assert len(threads) == 1
    seen = weakref.ref(node)
    del node, cluster
    gc.collect()
    assert seen() is None
    threads[0].join(10)
    assert not threads[0].is_alive(), "the thread ends with it"
