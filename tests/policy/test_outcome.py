"""Keys that sort by age, and when a transaction that stands in the way is ended."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilientdb.policy.outcome import (
    Holder,
    Life,
    forget_before,
    lock_number,
    made_at,
    new_key,
    patience,
    verdict_on,
    what_ended,
)

times = st.floats(0, 4e9)
bits = st.integers(0, (1 << 80) - 1)


@given(times, bits)
def test_a_key_is_a_uuid_that_knows_when_it_was_made(now: float, random: int) -> None:
    key = new_key(now, random)
    assert (key.version, key.variant) == (7, uuid.RFC_4122)
    assert abs(made_at(key) - now) <= 0.001
    assert uuid.UUID(str(key)) == key


@given(times, bits, bits)
def test_keys_sort_by_age_and_a_purge_takes_the_older(now: float, one: int, another: int) -> None:
    older, newer = new_key(now, one), new_key(now + 1, another)
    assert older < newer
    assert older.hex < newer.hex, "also as text, as some databases keep them"
    horizon = forget_before(now + 61, 60.5)
    assert older < horizon < newer


def test_the_random_bits_all_count() -> None:
    keys = {new_key(1.0, 1 << shift).int for shift in range(74)} | {new_key(1.0, 0).int}
    assert len(keys) == 75


@given(bits)
def test_a_lock_has_a_number_that_fits(random: int) -> None:
    number = lock_number(new_key(1.0, random))
    assert -(1 << 63) <= number < 1 << 63


def test_patience_grows_and_never_takes_all_there_is() -> None:
    assert [patience(waits, None) for waits in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert patience(10_000, None) == 2.0
    assert patience(3, 0.5) == 0.25
    assert patience(0, -1.0) > 0, "0 would be for ever"


def test_who_is_ended() -> None:
    def verdict(
        state: str | None, event: str | None = None, waited: float = 1, left: float | None = 5
    ) -> str:
        return verdict_on(Holder(1, state, event), waited, left)

    assert verdict("idle in transaction") == "terminate"
    assert verdict("idle in transaction (aborted)") == "terminate"
    assert verdict("active") == "wait", "it is committing"
    assert verdict("active", waited=5, left=4.9) == "terminate", "half of the time is over"
    assert verdict("active", "SyncRep", waited=100, left=0.1) == "wait", "never"
    assert verdict("active", waited=100, left=None) == "wait"
    assert verdict(None, waited=100, left=0.1) == "wait", "another role's: we may not see it"


LIFE = Life("00000001", "1790000000.123456", "1780000000.5")


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (LIFE._replace(timeline="00000002", started="1790000009.1", reset="1790000009.2"), "promoted"),
        (LIFE._replace(timeline="00000002"), "promoted"),
        (LIFE._replace(started="1790000009.1", reset="1790000009.2"), "started anew"),
        (LIFE._replace(reset="1790000009.2"), "recovered from a crash"),
        (LIFE._replace(reset=None), "recovered from a crash"),
    ],
)
def test_another_life_of_the_server(now: Life, says: str) -> None:
    assert says in (what_ended(LIFE, now) or "")
    assert says in (what_ended(now, LIFE) or "")


def test_the_same_life_of_the_server() -> None:
    assert what_ended(LIFE, Life(*LIFE)) is None
    silent = LIFE._replace(reset=None)
    assert what_ended(silent, silent) is not None, "it may have crashed without a word"
