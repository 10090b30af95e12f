"""The breaker as callers meet it: a pybreaker, without what makes pybreaker's own unfit for a pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import pybreaker
import pytest

from resilientdb import BreakerPolicy
from resilientdb.errors import CircuitOpen, ConfigurationError
from resilientdb.runtime.breaker import CircuitBreaker
from resilientdb.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

RESET = 5.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make(clock: FakeClock) -> Callable[..., CircuitBreaker]:
    def make(*, on_move: Any = None, **options: Any) -> CircuitBreaker:
        defaults = {"minimum_calls": 2, "window": 10.0, "reset_timeout": RESET}
        policy = BreakerPolicy(**{**defaults, **options})
        return CircuitBreaker(policy, name="db:5432", clock=clock, on_move=on_move, rng=lambda: 0.0)

    return make


class Broken(ConnectionError):
    """What a dead node raises."""


def fail() -> NoReturn:
    raise Broken("connection reset")


def trip(breaker: CircuitBreaker) -> None:
    for _ in range(breaker.policy.minimum_calls):
        with pytest.raises(Broken):
            breaker.call(fail)
    assert breaker.current_state == "open"


# -- what pybreaker's users rely on -------------------------------------------------------------------------------


class Diary(pybreaker.CircuitBreakerListener):
    """A listener as they exist in programs that use pybreaker."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.said.append(f"{cb.name}: {old_state.name} to {new_state.name}")

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.said.append(f"{cb.name}: {type(exc).__name__}")


def test_existing_listeners_are_told(make: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
    diary = Diary()
    breaker = make(listeners=(diary,))
    trip(breaker)
    clock.advance(RESET)
    breaker.call(int)
    assert diary.said == [
        "db:5432: Broken",
        "db:5432: Broken",
        "db:5432: closed to open",
        "db:5432: open to half-open",
        "db:5432: half-open to closed",
    ]


def test_a_listener_may_be_added_later(make: Callable[..., CircuitBreaker]) -> None:
    breaker, diary = make(), Diary()
    breaker.add_listener(diary)
    breaker.open()
    breaker.remove_listener(diary)
    breaker.close()
    assert diary.said == ["db:5432: closed to open"]


def test_the_usual_except_clause_catches_a_refusal(make: Callable[..., CircuitBreaker]) -> None:
    breaker = make()
    trip(breaker)
    with pytest.raises(pybreaker.CircuitBreakerError) as caught:
        breaker.call(int)
    assert isinstance(caught.value, CircuitOpen)
    assert isinstance(breaker, pybreaker.CircuitBreaker)
    assert caught.value.retry_after == RESET
    assert isinstance(caught.value.__cause__, Broken), "the real failure is not hidden"
    assert caught.value.__cause__.__traceback__ is None, "nor are its frames kept alive"


def test_the_call_that_trips_it_raises_its_own_error(make: Callable[..., CircuitBreaker]) -> None:
    breaker = make(minimum_calls=1)
    error = Broken("mine")
    with pytest.raises(Broken) as caught, breaker.calling():
        raise error
    assert caught.value is error


def test_its_state_object_and_name(make: Callable[..., CircuitBreaker]) -> None:
    breaker = make()
    assert isinstance(breaker.state, pybreaker.CircuitClosedState)
    breaker.open()
    assert isinstance(breaker.state, pybreaker.CircuitOpenState)
    assert (breaker.name, breaker.reset_timeout, breaker.fail_max) == ("db:5432", RESET, 2)


# -- listeners are kept at arm's length ---------------------------------------------------------------------------


def test_a_listener_that_raises_reaches_nobody(
    make: Callable[..., CircuitBreaker], caplog: pytest.LogCaptureFixture
) -> None:
    class Clumsy(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> NoReturn:
            raise RuntimeError("metrics are down")

    diary = Diary()
    breaker = make(listeners=(Clumsy(), diary))
    trip(breaker)
    assert "db:5432: closed to open" in diary.said, "the others are told"
    assert "metrics are down" in caplog.text


def test_a_listener_may_wait_for_another_thread_that_uses_the_breaker(
    make: Callable[..., CircuitBreaker],
) -> None:
    answers: list[tuple[str, float | None]] = []

    class Curious(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            def ask() -> None:
                with contextlib.suppress(CircuitOpen):
                    cb.call(int)
                cb.close()
                answers.append((cb.current_state, cb.retry_after))

            if new_state.name == "open":
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join(10)
                assert not thread.is_alive()

    breaker = make(listeners=(Curious(),))
    trip_it = threading.Thread(target=breaker.open)
    trip_it.start()
    trip_it.join(20)
    assert answers == [("closed", None)]


def test_moves_are_announced_in_order(make: Callable[..., CircuitBreaker]) -> None:
    moves: list[tuple[str, str]] = []

    def on_move(move: Any) -> None:
        moves.append((move.old, move.new))
        if move.new == "open":
            breaker.half_open()

    breaker = make(on_move=on_move)
    breaker.open()
    breaker.close()
    assert moves == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["call", "calling"])
def test_ten_calls_run_at_once(make: Callable[..., CircuitBreaker], way: str) -> None:
    """pybreaker's own holds its lock across the call: ten calls come one after another."""
    breaker = make()
    all_inside = threading.Barrier(10)

    def meet() -> bool:
        all_inside.wait(10)
        return True

    def through_block() -> bool:
        with breaker.calling():
            return meet()

    with ThreadPoolExecutor(10) as threads:
        work = (lambda: breaker.call(meet)) if way == "call" else through_block
        assert all(future.result(20) for future in [threads.submit(work) for _ in range(10)])


def test_it_can_be_opened_while_a_call_is_out(make: Callable[..., CircuitBreaker]) -> None:
    breaker = make()
    with breaker.calling(), ThreadPoolExecutor(1) as threads:
        threads.submit(breaker.open).result(10)
        assert breaker.current_state == "open"
    assert breaker.current_state == "open", "the success is a late result"


@pytest.mark.parametrize("most", [1, 3])
def test_half_open_lets_a_few_of_twenty_threads_through(
    make: Callable[..., CircuitBreaker], clock: FakeClock, most: int
) -> None:
    breaker = make(half_open_max_calls=most)
    trip(breaker)
    clock.advance(RESET)
    start, refused = threading.Barrier(20), threading.Semaphore(0)
    everybody_asked = threading.Event()

    def probe() -> str:
        start.wait(10)
        try:
            with breaker.calling():
                assert everybody_asked.wait(10)
                return "probed"
        except CircuitOpen:
            refused.release()
            return "refused"

    with ThreadPoolExecutor(20) as threads:
        futures = [threads.submit(probe) for _ in range(20)]
        for _ in range(20 - most):
            assert refused.acquire(timeout=10)
        everybody_asked.set()
        answers = sorted(future.result(10) for future in futures)
    assert answers == ["probed"] * most + ["refused"] * (20 - most)
    assert breaker.current_state == "closed"


# -- what counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_interruptions_show_nothing_about_the_node(
    make: Callable[..., CircuitBreaker], clock: FakeClock, error: type[BaseException]
) -> None:
    breaker = make(minimum_calls=1)
    for _ in range(5):
        with pytest.raises(error), breaker.calling():
            raise error
    assert breaker.current_state == "closed"
    breaker.open()
    clock.advance(RESET)
    for _ in range(5):
        with pytest.raises(error), breaker.calling():
            raise error
        assert breaker.current_state == "half-open", "and the probe's place is free again"


def test_an_error_of_the_applications_own_is_an_answer(
    make: Callable[..., CircuitBreaker], clock: FakeClock
) -> None:
    breaker = make(minimum_calls=1)
    for _ in range(5):
        with pytest.raises(KeyError), breaker.calling():
            raise KeyError("no such row")
    assert breaker.current_state == "closed"
    breaker.open()
    clock.advance(RESET)
    with pytest.raises(KeyError), breaker.calling():
        raise KeyError("no such row")
    assert breaker.current_state == "closed"


def test_coroutines_are_watched_until_they_end(make: Callable[..., CircuitBreaker]) -> None:
    """pybreaker records the success of a coroutine before it has begun."""
    breaker = make()

    async def work() -> NoReturn:
        await asyncio.sleep(0)
        raise Broken("connection reset")

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(Broken):
                await breaker.call_async(work)
        with pytest.raises(CircuitOpen):
            await breaker.call_async(work)

    asyncio.run(main())


def test_successes_added_without_the_lock_are_counted(
    make: Callable[..., CircuitBreaker], clock: FakeClock
) -> None:
    breaker = make(failure_rate_threshold=0.5)
    breaker.answered += 3
    permit = breaker.permit
    assert permit is not None
    for _ in range(2):
        breaker.record_failure(permit, Broken())
    assert breaker.current_state == "closed", "2 of 5"
    assert breaker.rate == pytest.approx(0.3)
    breaker.record_failure(permit, Broken())
    assert breaker.current_state == "open", "3 of 6"
    breaker.answered += 100
    clock.advance(RESET)
    breaker.call(int)
    assert breaker.rate == 0, "those belong to the period that has ended"


def test_a_prober_that_fails_beside_callers_who_succeed_is_not_believed(
    make: Callable[..., CircuitBreaker],
) -> None:
    breaker = make()
    asked = breaker.answered
    breaker.answered += 1
    breaker.prober_failed(Broken(), asked)
    assert breaker.current_state == "closed"
    breaker.prober_failed(Broken(), breaker.answered)
    assert breaker.current_state == "open"
    assert isinstance(breaker.last_error, Broken)
    breaker.prober_succeeded()
    assert breaker.current_state == "closed"


def test_states_set_by_hand(make: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
    breaker = make()
    breaker.open()
    with pytest.raises(CircuitOpen):
        breaker.call(int)
    clock.advance(RESET - 1)
    assert breaker.retry_after == 1.0
    breaker.half_open()
    assert (breaker.current_state, breaker.retry_after) == ("half-open", 0.0)
    breaker.close()
    assert breaker.call(int) == 0
    breaker.state = "open"
    assert breaker.current_state == "open"
    with pytest.raises(ValueError, match="unknown state 'ajar'; one of closed, open, half-open"):
        breaker.state = "ajar"


# -- the slow start ------------------------------------------------------------------------------------------------


def test_after_an_outage_few_callers_at_once_are_let_through_and_soon_all(
    make: Callable[..., CircuitBreaker],
) -> None:
    moves: list[str] = []
    breaker = make(slow_start_calls=4, on_move=lambda move: moves.append(move.new))
    breaker.prober_failed(Broken("gone"), 0)
    breaker.prober_succeeded()
    assert (breaker.current_state, breaker.permit, breaker.retry_after) == ("closed", None, None)
    first = breaker.try_acquire()
    assert first is not None
    assert breaker.try_acquire() is None
    refusal = breaker.refusal()
    assert str(refusal).startswith(
        "the circuit of db:5432 has just closed and lets only 1 call through at once until 4 more have been answered"
    )
    assert refusal.retry_after == pytest.approx(0.05)
    assert isinstance(refusal.__cause__, Broken)
    breaker.record_success(first)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(breaker.calling())
        with pytest.raises(CircuitOpen, match=r"only 2 calls through at once until 3 more have been"):
            breaker.call(int)
    breaker.call(int)
    assert breaker.permit is not None
    assert moves == ["open", "closed"], "its end is not announced: it was closed all the time"
    assert breaker.rate == pytest.approx(0.4)


def test_a_prober_that_fails_during_the_slow_start_is_not_believed_beside_callers_who_succeed(
    make: Callable[..., CircuitBreaker],
) -> None:
    breaker = make()
    breaker.prober_failed(Broken(), breaker.answered)
    breaker.prober_succeeded()
    asked = breaker.answered
    breaker.call(int)
    breaker.prober_failed(Broken(), asked)
    assert breaker.current_state == "closed"
    breaker.prober_failed(Broken(), breaker.answered)
    assert breaker.current_state == "open"


def test_an_outcome_told_the_long_way_is_known_to_the_prober_and_counted_once(
    make: Callable[..., CircuitBreaker],
) -> None:
    breaker = make()
    asked = breaker.answered
    breaker.call(int)
    breaker.prober_failed(Broken(), asked)
    assert breaker.current_state == "closed"
    assert breaker.rate == pytest.approx(0.1)


def test_what_is_given_back_without_a_permit_meanwhile_is_not_counted(
    make: Callable[..., CircuitBreaker],
) -> None:
    """A pool compares its connection's permit with the breaker's: both may be None."""
    breaker = make(slow_start_calls=1)
    breaker.prober_failed(Broken(), 0)
    breaker.answered += 10
    breaker.prober_succeeded()
    breaker.answered += 10
    breaker.call(int)
    assert breaker.permit is not None
    assert breaker.rate == pytest.approx(0.1)


# -- slow calls -----------------------------------------------------------------------------------------------------


def test_slow_answers_open_it(make: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
    assert make().slow_after is None
    breaker = make(slow_call_duration=2.0, slow_call_rate_threshold=0.5, minimum_calls=4)
    assert breaker.slow_after == 2.0
    permit = breaker.permit
    assert permit is not None
    breaker.answered += 2
    breaker.record_slow(permit)
    assert breaker.current_state == "closed", "1 of 3"
    breaker.record_slow(permit)
    assert breaker.current_state == "open", "2 of 4"
    breaker.record_slow(permit)
    clock.advance(RESET)
    probe = breaker.try_acquire()
    assert probe is not None
    breaker.record_slow(probe)
    assert (breaker.current_state, breaker.retry_after) == ("open", 2 * RESET)


# -- modes ----------------------------------------------------------------------------------------------------------


def test_metrics_only_announces_and_refuses_nothing(
    make: Callable[..., CircuitBreaker], caplog: pytest.LogCaptureFixture
) -> None:
    moves: list[Any] = []
    diary = Diary()
    breaker = make(mode="metrics_only", listeners=(diary,), on_move=moves.append)
    for _ in range(5):
        with pytest.raises(Broken):
            breaker.call(fail)
    assert breaker.call(int) == 0
    assert (breaker.current_state, breaker.would_be, breaker.retry_after) == ("closed", "open", None)
    assert breaker.permit is not None
    assert [(move.old, move.new, move.would_be) for move in moves] == [("closed", "open", True)]
    assert diary.said == ["db:5432: Broken"] * 5, "failures are real, the move is not"
    (said,) = caplog.messages
    assert said == (
        "the circuit of db:5432 would have moved from closed to open (metrics_only): 2 of 2 calls failed, "
        "last: tests.Broken connection reset"
    )


def test_disabled_lets_all_through(make: Callable[..., CircuitBreaker]) -> None:
    for breaker in (make(mode="disabled"), make(enabled=False)):
        assert breaker.mode == "disabled"
        for _ in range(50):
            with pytest.raises(Broken):
                breaker.call(fail)
        breaker.open()
        breaker.prober_failed(Broken(), breaker.answered)
        assert (breaker.current_state, breaker.would_be, breaker.call(int)) == ("closed", "closed", 0)


def test_held_open_it_refuses_until_the_mode_is_changed(
    make: Callable[..., CircuitBreaker], clock: FakeClock
) -> None:
    breaker = make(mode="forced_open")
    assert isinstance(breaker.state, pybreaker.CircuitOpenState)
    clock.advance(10 * RESET)
    breaker.prober_succeeded()
    breaker.close()
    with pytest.raises(CircuitOpen, match="held open by its mode") as caught:
        breaker.call(int)
    assert caught.value.retry_after == RESET
    breaker.mode = "normal"
    assert breaker.call(int) == 0
    assert breaker.current_state == "closed"


def test_the_mode_is_changed_while_calls_are_out(make: Callable[..., CircuitBreaker]) -> None:
    diary = Diary()
    breaker = make(listeners=(diary,), slow_start_calls=0)
    with breaker.calling():
        breaker.mode = "forced_open"
        assert breaker.permit is None
    assert breaker.rate == 0, "a late result"
    breaker.mode = "forced_open"
    breaker.mode = "disabled"
    breaker.mode = "metrics_only"
    breaker.mode = "normal"
    assert diary.said == ["db:5432: closed to open", "db:5432: open to closed"]
    with pytest.raises(ConfigurationError, match=r"mode must be one of 'normal', .*; got 'ajar'") as caught:
        breaker.mode = "ajar"  # type: ignore[assignment]
    assert caught.value.key == "breaker.mode"


# -- where locks go wrong -----------------------------------------------------------------------------------------


def test_a_finalizer_inside_the_guarded_section_does_not_deadlock(clock: FakeClock) -> None:
    """A garbage collection gives a forgotten connection back in the middle of anything, in this very thread."""
    interrupt: list[Callable[[], object]] = []

    def interrupted() -> float:
        if interrupt:
            interrupt.pop()()
        return clock()

    policy = BreakerPolicy(minimum_calls=1, reset_timeout=RESET, half_open_max_calls=1, slow_start_calls=0)
    breaker = CircuitBreaker(policy, name="db", clock=interrupted)
    breaker.open()
    clock.advance(RESET)
    probe = breaker.try_acquire()
    assert probe is not None
    done: list[str] = []

    def work() -> None:
        interrupt.append(lambda: breaker.release(probe))
        assert breaker.try_acquire() is None
        second = breaker.try_acquire()
        assert second is not None, "released once the section had ended"
        interrupt.append(lambda: breaker.record_success(second))
        assert breaker.retry_after == 0.0
        breaker.release(probe)
        done.append(breaker.current_state)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert done == ["closed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_under_the_lock_goes_on(make: Callable[..., CircuitBreaker]) -> None:
    breaker = make()
    reader, writer = os.pipe()
    with breaker._guard, ThreadPoolExecutor(1) as threads:

        def fork() -> int:
            child = os.fork()
            if child == 0:
                breaker.after_fork()
                breaker.open()
                os.write(writer, breaker.current_state.encode())
                os._exit(0)
            return child

        os.waitpid(threads.submit(fork).result(10), 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert answer.read() == "open"
    assert breaker.current_state == "closed"
