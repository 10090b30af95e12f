"""What is tried again: how often, after which pause, and when not at all."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import random
import re
import sqlite3
import time
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import sqlalchemy as sa
import tenacity
from sqlalchemy import exc

import resilientdb as rdb
from resilientdb.engine import retrying
from resilientdb.errors import DeadlineExceeded, PoolTimeout
from resilientdb.events import AcquisitionRetried, Event, RetryBudgetExhausted, TransactionRetried
from tests.engine.conftest import by_another

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.pool import QueueDoor
    from resilientdb.testing import Postgres
    from tests.engine.conftest import FakeDatabase

    MakePool = Callable[..., QueueDoor]


class Refused(ConnectionRefusedError):
    pass


QUICK = rdb.Backoff(initial=0.001, maximum=0.002)
GENEROUS = rdb.RetryBudget(floor=1_000_000)


class Attempts:
    """A thing that fails, and what was asked in the course of it."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = list(errors)
        self.made = 0
        self.pauses: list[float] = []
        self.spent: list[BaseException] = []
        self.announced: list[tuple[int, float, BaseException]] = []
        self.budget = True

    def __call__(self) -> str:
        self.made += 1
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return f"attempt {self.made + 1}"

    async def coroutine(self) -> str:
        await asyncio.sleep(0)
        return self()

    def spend(self, error: BaseException) -> bool:
        self.spent.append(error)
        return self.budget

    def rules(self) -> dict[str, Any]:
        return {
            "is_retryable": lambda error: not isinstance(error, KeyError),
            "spend": self.spend,
            "announce": lambda *said: self.announced.append(said),
        }

    def run(self, policy: rdb.RetryPolicy, first: Exception) -> str:
        return retrying.loop(self, first, policy, self.pauses.append, **self.rules())


@pytest.mark.parametrize("attempts", [1, 2, 3, 7])
def test_attempts_count_the_first(attempts: int) -> None:
    errors = [Refused(str(number)) for number in range(10)]
    work = Attempts(*errors[1:])
    with pytest.raises(Refused) as caught:
        work.run(rdb.RetryPolicy(attempts=attempts, backoff=QUICK), errors[0])
    assert work.made == attempts - 1, "the first was made before"
    assert caught.value is errors[attempts - 1], "the last real error, itself"
    assert len(work.pauses) == len(work.announced) == len(work.spent) == attempts - 1
    assert [number for number, _, _ in work.announced] == list(range(1, attempts))
    assert [delay for _, delay, _ in work.announced] == work.pauses


def test_success_ends_it() -> None:
    work = Attempts(Refused())
    assert work.run(rdb.RetryPolicy(attempts=5, backoff=QUICK), Refused()) == "attempt 3"
    assert len(work.pauses) == 2


def test_an_error_that_no_attempt_can_mend_ends_it_too() -> None:
    work = Attempts(KeyError("no such thing"))
    with pytest.raises(KeyError):
        work.run(rdb.RetryPolicy(attempts=5, backoff=QUICK), Refused())
    assert work.made == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit()])
def test_interruptions_are_never_retried(error: BaseException) -> None:
    work = Attempts(error)
    with pytest.raises(type(error)):
        work.run(rdb.RetryPolicy(attempts=5, backoff=QUICK), Refused())
    assert work.made == 1
    coroutine = Attempts(error)
    with pytest.raises(type(error)):
        asyncio.run(
            retrying.async_loop(
                coroutine.coroutine,
                Refused(),
                rdb.RetryPolicy(attempts=5, backoff=QUICK),
                **coroutine.rules(),
            )
        )
    assert coroutine.made == 1


def refusal() -> rdb.CircuitOpen:
    return rdb.CircuitOpen("the circuit is open")


def test_a_circuit_that_opens_between_two_attempts_does_not_hide_the_real_error() -> None:
    policy = rdb.RetryPolicy(attempts=5, backoff=QUICK)
    real = Refused("connection refused")
    work = Attempts(real, refusal(), refusal(), refusal())
    with pytest.raises(Refused) as caught:
        work.run(policy, Refused("the first"))
    assert caught.value is real
    coroutine = Attempts(real, refusal(), refusal(), refusal())
    with pytest.raises(Refused) as caught:
        asyncio.run(
            retrying.async_loop(coroutine.coroutine, Refused("the first"), policy, **coroutine.rules())
        )
    assert caught.value is real
    only_refused = Attempts(*[refusal() for _ in range(4)])
    with pytest.raises(rdb.CircuitOpen):
        only_refused.run(policy, refusal())


# -- pauses ---------------------------------------------------------------------------------------------------------


def pauses_of(backoff: rdb.Backoff, attempts: int) -> list[float]:
    work = Attempts(*[Refused() for _ in range(attempts)])
    policy = rdb.RetryPolicy(attempts=attempts, timeout=None, backoff=backoff)
    with pytest.raises(Refused):
        work.run(policy, Refused())
    return work.pauses


def test_full_jitter_fills_its_bounds() -> None:
    """Uniform between nothing and the exponential: callers that failed together do not come back together."""
    random.seed(20)
    backoff = rdb.Backoff(initial=0.1, maximum=0.5, multiplier=2.0, jitter="full")
    samples = [pauses_of(backoff, 5) for _ in range(400)]
    for number, bound in enumerate([0.1, 0.2, 0.4, 0.5]):
        drawn = [sample[number] for sample in samples]
        assert 0 <= min(drawn) < 0.05 * bound
        assert 0.95 * bound < max(drawn) <= bound
        assert sum(drawn) / len(drawn) == pytest.approx(bound / 2, rel=0.15)


def test_without_jitter_each_pause_is_its_bound() -> None:
    backoff = rdb.Backoff(initial=0.1, maximum=0.5, multiplier=2.0, jitter="none")
    assert pauses_of(backoff, 5) == pytest.approx([0.1, 0.2, 0.4, 0.5])
    constant = rdb.Backoff(initial=0.1, maximum=0.5, multiplier=1.0, jitter="none")
    assert pauses_of(constant, 4) == pytest.approx([0.1, 0.1, 0.1])


# -- limits ---------------------------------------------------------------------------------------------------------


def test_no_pause_that_would_outlast_the_deadline() -> None:
    work = Attempts(Refused("second"), Refused("third"))
    backoff = rdb.Backoff(initial=0.2, maximum=10, jitter="none")
    with rdb.deadline(0.3), pytest.raises(Refused, match="second"):
        work.run(rdb.RetryPolicy(attempts=9, timeout=None, backoff=backoff), Refused("first"))
    assert work.pauses == [0.2], "0.4 would be too long"
    assert len(work.spent) == 1, "nothing is spent on a retry that is not made"


def test_no_pause_that_would_outlast_the_time_for_retries() -> None:
    work = Attempts(Refused("second"))
    backoff = rdb.Backoff(initial=0.2, maximum=10, jitter="none")
    with pytest.raises(Refused, match="second"):
        work.run(rdb.RetryPolicy(attempts=9, timeout=0.3, backoff=backoff), Refused("first"))
    assert work.pauses == [0.2]


def test_without_budget_there_is_no_retry() -> None:
    work = Attempts()
    work.budget = False
    with pytest.raises(Refused, match="first"):
        work.run(rdb.RetryPolicy(attempts=9, backoff=QUICK), Refused("first"))
    assert (work.made, work.pauses, work.announced) == (0, [], [])


def test_the_time_for_retries_begins_with_the_first_attempt() -> None:
    work = Attempts()
    with pytest.raises(Refused, match="first"):
        retrying.loop(
            work,
            Refused("first"),
            rdb.RetryPolicy(attempts=9, timeout=5.0, backoff=QUICK),
            work.pauses.append,
            began=time.monotonic() - 6.0,
            **work.rules(),
        )
    assert (work.made, work.spent) == (0, [])


def test_a_slow_first_connect_is_part_of_the_time_for_retries(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    pool = make_pool(1, resilience=policy_of(attempts=9, timeout=0.1))
    attempts: list[float] = []

    def fail_slowly(_record: object) -> NoReturn:
        attempts.append(time.monotonic())
        time.sleep(0.15)
        raise Refused

    pool._invoke_creator = fail_slowly  # type: ignore[assignment]
    with pytest.raises(Refused):
        pool.connect()
    assert len(attempts) == 1
    with rdb.deadline(20), pytest.raises(Refused):  # another thread connects, where there is a deadline
        pool.connect()
    assert len(attempts) == 2


# -- the user's own strategies --------------------------------------------------------------------------------------


def test_the_users_wait_takes_the_place_of_the_backoff() -> None:
    work = Attempts(*[Refused() for _ in range(3)])
    policy = rdb.RetryPolicy(
        attempts=4, wait=tenacity.wait_chain(*[tenacity.wait_fixed(n) for n in (0.3, 0.1)])
    )
    with pytest.raises(Refused):
        work.run(policy, Refused())
    assert work.pauses == pytest.approx([0.3, 0.1, 0.1])
    mine = Attempts(Refused("second"))
    policy = rdb.RetryPolicy(attempts=3, wait=lambda state: state.attempt_number * 0.25)
    assert mine.run(policy, Refused("first")) == "attempt 3"
    assert mine.pauses == [0.25, 0.5]


def test_the_users_stop_is_asked_in_addition() -> None:
    sooner = rdb.RetryPolicy(attempts=9, backoff=QUICK, stop=tenacity.stop_after_attempt(2))
    work = Attempts(*[Refused(str(n)) for n in range(9)])
    with pytest.raises(Refused):
        work.run(sooner, Refused())
    assert (work.made, len(work.spent)) == (1, 1), "no budget is spent on a retry that is not made"
    later = rdb.RetryPolicy(attempts=3, backoff=QUICK, stop=tenacity.stop_after_attempt(1_000))
    work = Attempts(*[Refused(str(n)) for n in range(9)])
    with pytest.raises(Refused):
        work.run(later, Refused())
    assert work.made == 2, "it lifts no limit"


def test_the_users_strategies_are_told_of_all_the_time() -> None:
    seen: list[float] = []

    def look(state: tenacity.RetryCallState) -> bool:
        seen.append(state.seconds_since_start or 0.0)
        return True

    first = Refused()
    retrying.remember_beginning(first, time.monotonic() - 3.0)
    with pytest.raises(Refused):
        Attempts().run(rdb.RetryPolicy(backoff=QUICK, stop=look), first)
    assert 3.0 <= seen[0] < 60.0


@pytest.mark.parametrize("wait", [tenacity.wait_fixed(30), lambda _state: 30])
def test_limits_bind_the_users_wait_too(wait: Any) -> None:
    work = Attempts()
    with pytest.raises(Refused):
        work.run(rdb.RetryPolicy(wait=wait), Refused())
    with rdb.deadline(20), pytest.raises(Refused):
        work.run(rdb.RetryPolicy(timeout=None, wait=wait), Refused())
    assert work.made == 0


def no_argument() -> float:
    return 1.0


async def must_be_awaited(_state: object) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wait", 0.5),
        ("wait", "fixed"),
        ("wait", tenacity.wait_fixed),
        ("wait", tenacity.stop_after_attempt(3)),
        ("wait", no_argument),
        ("wait", must_be_awaited),
        ("stop", 5),
        ("stop", tenacity.stop_after_delay),
        ("stop", tenacity.wait_fixed(1)),
        ("stop", tenacity.retry_if_exception_type(OSError)),
        ("stop", must_be_awaited),
    ],
)
def test_what_is_no_strategy_is_refused(key: str, value: Any) -> None:
    options: dict[str, Any] = {key: value}
    with pytest.raises(
        rdb.ConfigurationError, match=rf"retry\.{key} must be a tenacity {key} strategy"
    ) as caught:
        rdb.RetryPolicy(**options)
    assert caught.value.key == f"retry.{key}"


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), None, "1", True])
def test_a_wait_that_cannot_be_slept_is_said_beside_the_real_error(seconds: Any) -> None:
    real = Refused("real")
    with pytest.raises(rdb.ConfigurationError, match=r"retry\.wait must return seconds, 0 or more") as caught:
        Attempts().run(rdb.RetryPolicy(wait=lambda _state: seconds), real)
    assert caught.value.__cause__ is real


def test_a_strategy_that_raises_does_not_hide_the_real_error() -> None:
    def broken(_state: object) -> NoReturn:
        raise ZeroDivisionError

    real = Refused("real")
    with pytest.raises(ZeroDivisionError) as caught:
        Attempts().run(rdb.RetryPolicy(stop=broken), real)
    assert caught.value.__cause__ is real


def test_strategies_work_for_coroutines_and_are_kept_by_copies() -> None:
    policy = rdb.RetryPolicy(attempts=5, wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(3))
    work = Attempts(*[Refused() for _ in range(9)])
    with pytest.raises(Refused):
        asyncio.run(retrying.async_loop(work.coroutine, Refused(), policy, **work.rules()))
    assert work.made == 2
    assert dataclasses.replace(policy, attempts=7).wait is policy.wait
    assert "wait_none" in repr(policy)


# -- what the last error says ---------------------------------------------------------------------------------------


def note_on(error: BaseException) -> list[str]:
    """The lines of the one note there is."""
    [note] = error.__notes__
    return str(note).splitlines()


def test_the_last_error_says_what_came_of_each_attempt() -> None:
    work = Attempts(ConnectionResetError("b"), TimeoutError("c"))
    with pytest.raises(TimeoutError) as caught:
        work.run(rdb.RetryPolicy(attempts=3, backoff=QUICK), Refused("a"))
    first, second, third, end = note_on(caught.value)
    assert first == "attempt 1 after 0.00 s: tests.Refused"
    assert re.fullmatch(r"attempt 2 after \d+\.\d\d s: ConnectionResetError", second)
    assert re.fullmatch(r"attempt 3 after \d+\.\d\d s: TimeoutError", third)
    assert end == "no other attempt: retry.attempts is 3"


@pytest.mark.parametrize(
    ("policy", "seconds", "budget", "why"),
    [
        (rdb.RetryPolicy(attempts=2, backoff=QUICK), None, True, "retry.attempts is 2"),
        (rdb.RetryPolicy(timeout=1, wait=lambda _: 2), None, True, "retry.timeout of 1 s would end"),
        (rdb.RetryPolicy(wait=lambda _: 9), 5, True, "the deadline of 5 s would end"),
        (rdb.RetryPolicy(stop=tenacity.stop_after_attempt(1)), None, True, "retry.stop (stop_after_attempt)"),
        (rdb.RetryPolicy(), None, False, "too many retries lately (retry.budget)"),
    ],
)
def test_it_says_why_there_was_no_other_attempt(
    policy: rdb.RetryPolicy, seconds: float | None, budget: bool, why: str
) -> None:
    work = Attempts(Refused())
    work.budget = budget
    with rdb.deadline(seconds), pytest.raises(Refused) as caught:
        work.run(policy, Refused())
    assert note_on(caught.value)[-1].startswith(f"no other attempt: {why}")


def test_an_error_that_is_not_mended_says_what_came_before() -> None:
    with pytest.raises(KeyError) as caught:
        Attempts(KeyError("mine")).run(rdb.RetryPolicy(), Refused())
    assert len(note_on(caught.value)) == 3
    assert note_on(caught.value)[-1] == "no other attempt: it would not mend this"


def test_a_refusal_in_between_is_told_on_the_real_error() -> None:
    with pytest.raises(Refused) as caught:
        Attempts(refusal()).run(rdb.RetryPolicy(attempts=2, backoff=QUICK), Refused())
    assert "CircuitOpen" in note_on(caught.value)[1]


def test_the_note_is_short_however_many_attempts_there_were() -> None:
    work = Attempts(*[Refused() for _ in range(200)])
    with pytest.raises(Refused) as caught:
        work.run(rdb.RetryPolicy(attempts=100, backoff=QUICK), Refused())
    lines = note_on(caught.value)
    assert [line.split(" after")[0] for line in lines] == [
        "attempt 1",
        "attempt 2",
        "attempt 3",
        "… 94 more …",
        "attempt 98",
        "attempt 99",
        "attempt 100",
        "no other attempt: retry.attempts is 100",
    ]


def test_nothing_of_a_statement_gets_into_it() -> None:
    orig = sqlite3.OperationalError("database is locked: postgresql://app:hunter2@db/app")
    error = exc.OperationalError("SELECT card FROM customer WHERE name = 'Bob'", {"pin": "1234"}, orig)
    with pytest.raises(exc.OperationalError) as caught:
        Attempts(error).run(rdb.RetryPolicy(attempts=2, backoff=QUICK), error)
    text = "\n".join(note_on(caught.value))
    assert "sqlite3.OperationalError" in text
    assert not re.search(r"hunter2|card|Bob|1234|SELECT", text)


def test_one_note_and_notes_of_others_stay() -> None:
    error = Refused()
    error.add_note("mine")
    for attempts in (2, 3):
        with pytest.raises(Refused):
            Attempts(*[error] * 9).run(rdb.RetryPolicy(attempts=attempts, backoff=QUICK), error)
    mine, note = error.__notes__
    assert mine == "mine"
    assert note.endswith("retry.attempts is 3")


def test_a_copy_of_anothers_failure_gets_a_note_of_its_own() -> None:
    theirs = Refused("theirs")
    with pytest.raises(Refused):
        Attempts(theirs).run(rdb.RetryPolicy(attempts=2, backoff=QUICK), Refused())
    copied = copy.copy(theirs)
    with pytest.raises(Refused):
        Attempts(Refused(), copied).run(rdb.RetryPolicy(attempts=3, backoff=QUICK), Refused())
    assert note_on(theirs)[-1].endswith("is 2")
    assert note_on(copied)[-1].endswith("is 3")


def test_who_asks_for_one_attempt_is_told_nothing_of_attempts() -> None:
    with pytest.raises(Refused) as caught:
        Attempts().run(rdb.RetryPolicy(attempts=1), Refused())
    assert not hasattr(caught.value, "__notes__")


# -- whose error it is ----------------------------------------------------------------------------------------------


def lost() -> exc.OperationalError:
    return exc.OperationalError("SELECT 1", {}, ConnectionResetError("reset"), connection_invalidated=True)


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def marked(error: BaseException) -> BaseException:
    retrying.happened_at(error, "db:5432")
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (lost(), True),
        (sqlite3.OperationalError("database is locked"), True),
        (marked(ConnectionResetError("asyncpg lets it out")), True),
        (raised_from(LookupError("a repository's own"), lost()), True),
        (ConnectionResetError("the mail server"), False),
        (raised_from(LookupError("no mail"), BrokenPipeError("the mail server")), False),
        (exc.StatementError("bind", "SELECT 1", {}, ConnectionResetError("a type asks a server")), False),
        (raised_from(rdb.CommitOutcomeUnknown("?"), lost()), False),
        (exc.IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE constraint failed")), False),
        (marked(TimeoutError("slow")), False),
        (rdb.CircuitOpen("open"), False),
        (KeyError("mine"), False),
    ],
)
def test_only_the_databases_own_errors_make_a_transaction_run_again(
    error: BaseException, again: bool
) -> None:
    assert retrying.may_run_again(error) is again


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "psycopg_async", "asyncpg"])
def test_a_lost_connection_is_the_databases_and_the_event_names_the_node(
    resilientdb_postgres: Postgres, driver: str
) -> None:
    """Whatever the driver raises, raw or wrapped."""
    killed: list[int] = []
    verdicts: list[bool] = []
    fatal = sa.text("SELECT pg_terminate_backend(pg_backend_pid())")
    resilience = policy_of(attempts=3)
    events: list[Event] = []

    def once(connection: sa.Connection) -> None:
        if len(killed) < 2:
            killed.append(1)
            try:
                connection.execute(fatal)
            except Exception as error:
                verdicts.append(retrying.may_run_again(error))
                raise

    if driver in {"psycopg_async", "asyncpg"}:

        async def main() -> None:
            url = resilientdb_postgres.url(driver.removesuffix("_async"))
            engine = rdb.create_async_engine(url, resilience=resilience)
            rdb.control(engine).on_event(events.append)

            async def work(connection: Any) -> None:
                await connection.run_sync(once)

            await rdb.run_transaction_async(engine, work)
            await engine.dispose()

        asyncio.run(main())
    else:
        engine = rdb.create_engine(resilientdb_postgres.url(driver), resilience=resilience)
        rdb.control(engine).on_event(events.append)
        rdb.run_transaction(engine, once)
        engine.dispose()
    assert verdicts == [True, True]
    retried = [event for event in events if isinstance(event, TransactionRetried)]
    assert [(event.node, event.attempt) for event in retried] == [
        (resilientdb_postgres.address, 1),
        (resilientdb_postgres.address, 2),
    ]
    assert not any(re.search("SELECT|terminate", event.error) for event in retried)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_read_outside_a_transaction_is_sent_again_on_another_connection(
    resilientdb_postgres: Postgres, driver: str
) -> None:
    backends: list[int] = []

    def read(connection: sa.Connection) -> int:
        backends.append(connection.scalars(sa.text("SELECT pg_backend_pid()")).one())
        if len(backends) == 1:
            resilientdb_postgres.query(f"SELECT pg_terminate_backend({backends[0]}, 5000)")
        return int(connection.scalars(sa.text("SELECT 42")).one())

    def run() -> int:
        engine = rdb.create_engine(resilientdb_postgres.url(driver), resilience=policy_of(attempts=2))
        try:
            return rdb.run_transaction(engine, read, read_only=True)
        finally:
            engine.dispose()

    async def run_async() -> int:
        engine = rdb.create_async_engine(resilientdb_postgres.url(driver), resilience=policy_of(attempts=2))

        async def work(connection: Any) -> int:
            return int(await connection.run_sync(read))

        try:
            return await rdb.run_transaction_async(engine, work, read_only=True)
        finally:
            await engine.dispose()

    assert (run() if driver == "psycopg" else asyncio.run(run_async())) == 42
    assert len(set(backends)) == 2


# -- through a pool -------------------------------------------------------------------------------------------------


def policy_of(**retry: Any) -> rdb.Resilience:
    options = {"backoff": QUICK, "budget": GENEROUS, **retry}
    return rdb.Resilience(retry=rdb.RetryPolicy(**options), breaker=rdb.BreakerPolicy(enabled=False))


def listen(pool: QueueDoor) -> list[Event]:
    events: list[Event] = []
    pool.cluster.listen(events.append)
    return events


def test_a_connection_is_opened_at_the_third_attempt(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1, resilience=policy_of(attempts=3))
    events = listen(pool)
    database.failures.extend([Refused(), Refused()])
    pool.connect().close()
    assert [(type(event), event.node, event.attempt) for event in events] == [  # type: ignore[attr-defined]
        (AcquisitionRetried, "db", 1),
        (AcquisitionRetried, "db", 2),
    ]
    assert pool.cluster.snapshot().retries == 2


def test_after_the_last_attempt_the_last_error_is_raised(make_pool: MakePool, database: FakeDatabase) -> None:
    errors = [Refused(str(number)) for number in range(5)]
    pool = make_pool(1, resilience=policy_of(attempts=3))
    database.failures.extend(errors)
    with pytest.raises(Refused) as caught:
        pool.connect()
    assert caught.value is errors[2]
    assert list(database.failures) == errors[3:]
    assert pool.stats().active == 0


def test_the_slot_is_free_during_the_pause(make_pool: MakePool, database: FakeDatabase) -> None:
    pool = make_pool(1, resilience=policy_of(attempts=2))
    active: list[int] = []
    pause: Any = lambda _seconds: active.append(pool.stats().active)  # noqa: E731
    pool._pause = pause  # type: ignore[method-assign]
    database.failures.append(Refused())
    pool.connect().close()
    assert active == [0]


@pytest.mark.parametrize("error", [ValueError("no such option"), KeyboardInterrupt()])
def test_what_no_attempt_can_mend_is_tried_once(
    make_pool: MakePool, database: FakeDatabase, error: BaseException
) -> None:
    pool = make_pool(1, resilience=policy_of(attempts=9))
    database.failures.append(error)
    with pytest.raises(type(error)):
        pool.connect()
    assert pool.stats().opened == 0
    assert listen(pool) == []
    pool.connect().close()


def test_our_own_refusals_are_not_retried(make_pool: MakePool) -> None:
    pool = make_pool(1, timeout=0, resilience=policy_of(attempts=9))
    events = listen(pool)
    held = by_another(pool.connect)
    with pytest.raises(PoolTimeout, match="timed out"):
        pool.connect()
    with rdb.deadline(0), pytest.raises(DeadlineExceeded):
        pool.connect()
    held.close()
    held = pool.connect()
    with pytest.raises(PoolTimeout, match="wait for itself"):
        pool.connect()
    held.close()
    assert events == []


def test_an_exhausted_budget_is_said_once_and_the_real_error_is_raised(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    budget = rdb.RetryBudget(ratio=0.0, floor=2)
    pool = make_pool(1, resilience=policy_of(attempts=2, budget=budget))
    events = listen(pool)
    database.failures.extend([Refused(str(number)) for number in range(20)])
    for _ in range(6):
        with pytest.raises(Refused):
            pool.connect()
    kinds = [type(event) for event in events]
    assert kinds == [AcquisitionRetried, AcquisitionRetried, RetryBudgetExhausted]
    assert pool.cluster.snapshot().retry_budget == 0.0
    assert pool.cluster.snapshot().retries == 2


def test_never_past_the_deadline(make_pool: MakePool, database: FakeDatabase) -> None:
    slow = rdb.Backoff(initial=0.05, maximum=0.05, jitter="none")
    pool = make_pool(1, resilience=policy_of(attempts=1_000, backoff=slow, timeout=None))
    database.failures.extend([Refused() for _ in range(1_000)])
    began = time.monotonic()
    with rdb.deadline(0.2), pytest.raises(Refused):
        pool.connect()
    assert 0.1 < time.monotonic() - began < 1.0


def test_an_application_error_in_a_listener_is_raised_as_it_is(
    make_pool: MakePool, database: FakeDatabase
) -> None:
    from sqlalchemy import event

    pool = make_pool(1, resilience=policy_of(attempts=3))

    def refuse(*_: object) -> NoReturn:
        raise exc.InvalidRequestError("the application says no")

    event.listen(pool, "connect", refuse)
    with pytest.raises(exc.InvalidRequestError):
        pool.connect()
    assert database.opened == 1
    assert (pool.stats().active, database.open_now) == (0, 0)
