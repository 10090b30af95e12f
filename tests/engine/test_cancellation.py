"""Callers that are cancelled, interrupted and timed out at every place there is: no slot is ever lost.

After each, nobody is counted as holding or waiting, and every connection can be had again. While it happens, somebody
looks at the counts all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import random
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

import resilientdb as rdb
from resilientdb.errors import DeadlineExceeded, PoolSaturated, PoolTimeout
from resilientdb.runtime.waiters import ThreadWaiter
from tests.engine.conftest import assert_whole_async, by_another, by_another_task, until, until_async

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
    from pathlib import Path

    from resilientdb.engine.pool import QueueDoor
    from tests.engine.conftest import AsyncPool, FakeDatabase

    MakePool = Callable[..., QueueDoor]
    MakeAsyncPool = Callable[..., AsyncPool]

REFUSALS = (PoolTimeout, PoolSaturated, DeadlineExceeded)


class Interrupt(BaseException):
    """What a signal handler, or a debugger, throws into a thread at any moment."""


@contextlib.contextmanager
def watched(pool: QueueDoor, *, spare: int = 0) -> Iterator[None]:
    """Somebody else looks at the counts as often as possible: they make sense at any moment. ``spare``: slots above
    the limit that may be seen for a moment, while those of a decision that was interrupted are counted anew."""
    done = threading.Event()
    seen, wrong = 0, []

    def watch() -> None:
        nonlocal seen
        while not done.is_set():
            stats = pool.stats()
            most = stats.limit + spare if stats.limit is not None else sys.maxsize
            if stats.active + stats.idle != stats.total or not 0 <= stats.total <= most or stats.waiting < 0:
                wrong.append(stats)
            seen += 1
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(10)
    assert wrong == []
    assert seen > 10


# -- a task, at every await -----------------------------------------------------------------------------------------


class Course:
    """Runs a coroutine in the task in hand, counting its awaits, and cancels the task at a given one of them."""

    def __init__(self, cancel_at: int | None, *, soon: bool = False) -> None:
        """``soon``: a turn of the loop after the task began to wait; else before, as if it had been asked to stop
        while it ran."""
        self.cancel_at = cancel_at
        self.soon = soon
        self.awaits = 0

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        return self._run(coroutine)

    @types.coroutine
    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                waits_for = coroutine.send(answer) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            self.awaits += 1
            answer = error = None
            if self.awaits == self.cancel_at:
                task = asyncio.current_task()
                assert task is not None
                if self.soon:
                    asyncio.get_running_loop().call_soon(task.cancel)
                else:
                    task.cancel()
            try:
                answer = yield waits_for
            except BaseException as raised:  # noqa: BLE001 - the coroutine's
                error = raised


async def at_every_await(once: Callable[[Course], Awaitable[None]], *, soon: bool) -> int:
    """``once`` again and again, cancelled one await further each time, until it comes to its end first; how many
    there were."""
    at = 1
    while True:
        course = Course(at, soon=soon)
        await once(course)
        if course.awaits < at:
            return at - 1
        at += 1
        assert at < 200, "it does not come to its end"


@pytest.mark.parametrize("soon", [False, True], ids=["before it waits", "while it waits"])
@pytest.mark.parametrize("bounded", [False, True], ids=["no deadline", "deadline"])
@pytest.mark.parametrize("start", ["cold", "idle", "contended", "nested", "probing"])
def test_cancelled_at_every_await(
    make_async_pool: MakeAsyncPool, start: str, *, bounded: bool, soon: bool
) -> None:
    async def once(course: Course) -> None:
        pool = make_async_pool(2, timeout=60.0)
        pool.steps = 3
        if start == "idle":
            await pool.give(await pool.take())
        if start == "probing":
            pool.node.breaker.open()
            pool.node.breaker.half_open()
        in_the_way = [
            await by_another_task(pool.take()) for _ in range({"contended": 2, "nested": 1}.get(start, 0))
        ]

        async def work() -> None:
            outer = await pool.take() if start == "nested" else None
            try:
                with rdb.deadline(30.0 if bounded else None):
                    connection = await pool.take()
                try:
                    await asyncio.sleep(0)
                finally:
                    await pool.give(connection)
            finally:
                if outer is not None:
                    await pool.give(outer)

        async def give_way() -> None:
            for connection in in_the_way:
                for _ in range(4):
                    await asyncio.sleep(0)
                await pool.give(connection)

        async def cancelled() -> None:
            await course.run(work())

        task = asyncio.create_task(cancelled())
        other = asyncio.create_task(give_way())
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await other
        pool.node.breaker.close()
        await assert_whole_async(pool, 2)
        pool.dispose()

    assert asyncio.run(at_every_await(once, soon=soon)) >= (1 if start == "idle" else 2)


@pytest.mark.parametrize("soon", [False, True], ids=["before it waits", "while it waits"])
@pytest.mark.parametrize("how", ["connection", "session"])
def test_cancelled_at_every_await_of_a_real_engine(tmp_path: Path, how: str, *, soon: bool) -> None:
    """With a connection in the pool already: half-way through opening one, the driver leaves a thread behind."""

    async def query(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) if how == "session" else engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))
            await connection.commit()

    async def main() -> None:
        engine = rdb.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db", pool_size=1, max_overflow=0)
        pool: Any = engine.pool
        await query(engine)

        async def once(course: Course) -> None:
            async def cancelled() -> None:
                await course.run(query(engine))

            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.create_task(cancelled())
            await until_async(lambda: pool.stats().active == 0)
            await query(engine)

        assert await at_every_await(once, soon=soon) >= 3
        assert (pool.stats().total, pool.stats().waiting) == (1, 0)
        await engine.dispose()

    asyncio.run(main())


# -- tasks, at random ------------------------------------------------------------------------------------------------


async def briefly(means: str, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """``work`` in one of the ways in which programs bound it."""
    with contextlib.suppress(TimeoutError, *REFUSALS):
        match means:
            case "wait_for":
                await asyncio.wait_for(work(), seconds)
            case "timeout":
                async with asyncio.timeout(seconds):
                    await work()
            case "move_on_after":
                with anyio.move_on_after(seconds):
                    await work()
            case "deadline":
                with rdb.deadline(seconds):
                    await work()
            case "task group":
                with contextlib.suppress(ExceptionGroup):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(work())
                        await asyncio.sleep(seconds)
                        raise TimeoutError
            case "cancel":
                task = asyncio.create_task(work())
                await asyncio.sleep(seconds)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


MEANS = ("wait_for", "timeout", "move_on_after", "deadline", "task group", "cancel")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_storm_of_tasks(make_async_pool: MakeAsyncPool, database: FakeDatabase, seed: int) -> None:
    """Each bounded in some way, some nested, some losing their connections; some connects fail."""

    async def main() -> None:
        policy = rdb.Resilience(
            retry=rdb.RetryPolicy(attempts=1),
            queue=rdb.SaturationQueue(max_waiting=15, target=0.001, interval=0.002),
            breaker=rdb.BreakerPolicy(minimum_calls=1_000_000),
        )
        pool = make_async_pool(2, max_overflow=2, resilience=policy, timeout=0.05)
        pool.steps = 2
        dice = random.Random(seed)
        served = 0

        async def use(depth: int) -> None:
            nonlocal served
            if dice.random() < 0.03:
                database.failures.append(ConnectionRefusedError("connection refused"))
            try:
                connection = await pool.take()
            except ConnectionRefusedError:
                return
            try:
                served += 1
                if depth and dice.random() < 0.3:
                    await use(depth - 1)
                await asyncio.sleep(dice.choice([0, 0, 0.0005]))
                if dice.random() < 0.1:
                    connection.invalidate()
            finally:
                await pool.give(connection)

        async def work() -> None:
            for _ in range(25):
                await briefly(dice.choice(MEANS), dice.choice([0, 0.0003, 0.001, 0.01]), lambda: use(2))

        with watched(pool):
            await asyncio.gather(*(work() for _ in range(20)))
        assert served > 0
        database.failures.clear()
        await assert_whole_async(pool, 4)
        pool.dispose()

    by_another(lambda: asyncio.run(main()))
    assert database.open_now == 0


# -- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _hurried() -> Iterator[None]:
    """Threads are switched as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def _forgetful(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody keeps errors, and with their tracebacks the connections that were in use, to report them later."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    for logger in ("sqlalchemy", "resilientdb"):
        caplog.set_level(logging.CRITICAL + 1, logger)


def patient_policy() -> rdb.Resilience:
    return rdb.Resilience(
        retry=rdb.RetryPolicy(attempts=1), breaker=rdb.BreakerPolicy(minimum_calls=1_000_000)
    )


def use(pool: QueueDoor, dice: random.Random, depth: int = 1) -> None:
    connection = pool.connect()
    try:
        if depth and dice.random() < 0.3:
            use(pool, dice, depth - 1)
        if dice.random() < 0.05:
            connection.invalidate()
    finally:
        connection.close()


def assert_all_can_be_had(pool: QueueDoor, size: int) -> None:
    """As ``assert_whole``, but a connection whose opening was interrupted may have been lost with its count."""
    gc.collect()
    pool._timeout = 10.0
    # Who has to wait misses a slot that nobody has given back, because an interruption arrived in a finalizer.
    held = [by_another(pool.connect) for _ in range(size)]
    pool._timeout = 0.0
    with pytest.raises(PoolTimeout, match="timed out"):
        pool.connect()
    for connection in held:
        connection.close()
    assert (pool.stats().active, pool.stats().waiting) == (0, 0)


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_interrupted_wherever_they_wait(
    make_pool: MakePool, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """In line, before and after they are served; while the driver connects; while it resets. Timed out, bounded by
    deadlines, nested and losing their connections besides."""
    pool = make_pool(2, max_overflow=1, resilience=patient_policy(), timeout=0.005)
    interruptions = dict.fromkeys(("before", "after", "connecting", "resetting"), 0)
    own = threading.local()

    def perhaps(where: str, probability: float) -> None:
        if own.dice.random() < probability:
            interruptions[where] += 1
            raise Interrupt

    class InLine(ThreadWaiter):
        def park(self, seconds: float | None) -> bool:
            perhaps("before", 0.1)
            woken = super().park(seconds)
            perhaps("after", 0.1)
            return woken

    open_physical: Any = pool.opening.physical

    def connect(record: Any) -> Any:
        if hasattr(own, "dice"):  # with a deadline, connecting is left to a helper
            perhaps("connecting", 0.3)
        connection = open_physical(record)
        connection.rollback = lambda: perhaps("resetting", 0.02)
        return connection

    monkeypatch.setattr(pool, "_make_waiter", InLine)
    monkeypatch.setattr(pool.opening, "physical", connect)

    def work(seed: int) -> None:
        own.dice = dice = random.Random(seed)
        for _ in range(150):
            with (
                contextlib.suppress(Interrupt, *REFUSALS),
                rdb.deadline(dice.choice([None, None, 0.002, 1.0])),
            ):
                use(pool, dice)
        del own.dice

    with watched(pool), ThreadPoolExecutor(10) as threads:
        for future in [threads.submit(work, 100 * seed + number) for number in range(10)]:
            future.result(60)
    assert all(interruptions.values()), interruptions
    own.dice = random.Random(0)
    monkeypatch.undo()
    for record in tuple(pool._idle):
        record.dbapi_connection.rollback = int
    assert_all_can_be_had(pool, 3)
    assert database.most_open <= 3


class Victim(threading.Thread):
    """Does its work over and over, and is interrupted in the middle of it, each time anywhere."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.is_ready = self.done = False
        self.asked_at = 0.0
        self.wrong: BaseException | None = None

    def run(self) -> None:
        with contextlib.suppress(Interrupt):  # one may arrive after the work
            while not self.done:
                try:
                    self.is_ready = True  # to be interrupted, once
                    while not self.done:
                        self.work()
                except Interrupt:
                    continue
                except BaseException as error:  # noqa: BLE001 - raised by the test
                    self.wrong = error
                    return

    def has_heard(self) -> bool:
        """Whether the last interruption has arrived; one that arrives in a finalizer is swallowed there."""
        if self.wrong is not None:
            raise self.wrong
        return self.is_ready or time.monotonic() > self.asked_at + 0.2

    def interrupt(self) -> None:
        self.is_ready = False
        self.asked_at = time.monotonic()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.ident or 0), ctypes.py_object(Interrupt)
        )


@pytest.mark.usefixtures("_hurried", "_forgetful")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_interrupted_anywhere(make_pool: MakePool, seed: int) -> None:
    """Between any two instructions, in the pool's own code too.

    Without deadlines: connecting would start threads, and ``PyThreadState_SetAsyncExc`` may hit a thread that is
    just being started by the one it is meant for.
    """
    pool = make_pool(2, max_overflow=1, resilience=patient_policy(), timeout=0.02)

    def victim(seed: int) -> Victim:
        dice = random.Random(seed)

        def work() -> None:
            with contextlib.suppress(*REFUSALS):
                use(pool, dice)

        return Victim(work)

    victims = [victim(100 * seed + number) for number in range(8)]
    dice = random.Random(seed)
    with watched(pool, spare=len(victims)):
        for thread in victims:
            thread.start()
        interruptions, give_up = 0, time.monotonic() + 40
        while interruptions < 500:
            thread = dice.choice(victims)
            if thread.has_heard():
                thread.interrupt()
                interruptions += 1
            assert time.monotonic() < give_up, "somebody hangs"
            time.sleep(0)
        until(lambda: all(thread.has_heard() for thread in victims), "the last ones arrive")
        for thread in victims:
            thread.done = True
        for thread in victims:
            thread.join(10)
            assert not thread.is_alive()
    assert_all_can_be_had(pool, 3)
