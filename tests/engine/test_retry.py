"""What is tried again: how often, after which pause, and when not at all."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from sqlalchemy import exc

import resilientdb as rdb
from resilientdb.engine import retrying
from resilientdb.errors import DeadlineExceeded, PoolTimeout
from resilientdb.events import AcquisitionRetried, Event, RetryBudgetExhausted
from tests.engine.conftest import by_another

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilientdb.engine.pool import QueueDoor
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
