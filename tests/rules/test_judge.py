"""The rules of a key, cell by cell."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from idempotency._rules import (
    Claim,
    Completed,
    Execute,
    InProgress,
    Mismatch,
    Record,
    Replay,
    State,
    Unknown,
    Unreadable,
    Verdict,
    after_roll_back,
    judge,
    judge_row,
    judge_superseded,
    judge_with_releases,
    pause,
    record_id,
    superseded_again,
    takes_over,
)

ASKED = b"\x01" * 32
OTHER = b"\x01" * 31 + b"\x02"

LIVE = Record(token="first", fingerprint=ASKED, lease_left=4.5)
LAPSED = replace(LIVE, lease_left=0.0)
HELD_LIVE = replace(LIVE, hold=True)
HELD_LAPSED = replace(LAPSED, hold=True)
UNKNOWN = replace(LIVE, state=State.UNKNOWN)
UNKNOWN_LAPSED = replace(LAPSED, state=State.UNKNOWN)
DONE = replace(LIVE, state=State.DONE, result=b"result")
DONE_EMPTY = replace(DONE, result=b"")
DONE_NOT_KEPT = replace(DONE, result=None)
NEWER = replace(LIVE, version=2)
NEWER_DONE = replace(DONE, version=2)
DAMAGED = Record.unreadable()
DAMAGED_NEWER = Record.unreadable(7)


def a_claim(fingerprint: bytes = ASKED, token: str = "second", hold: bool = False) -> Claim:
    """Make a claim of the same key by somebody else."""
    return Claim(scope="s", key="k", fingerprint=fingerprint, lease=30.0, ttl=60.0, hold=hold, token=token)


@pytest.mark.parametrize(
    ("record", "same", "other"),
    [
        (LIVE, InProgress(4.5), Mismatch()),
        (HELD_LIVE, InProgress(4.5), Mismatch()),
        (HELD_LAPSED, Unknown(), Mismatch()),
        (replace(HELD_LAPSED, lease_left=-1e9), Unknown(), Mismatch()),
        (UNKNOWN, Unknown(), Mismatch()),
        (UNKNOWN_LAPSED, Unknown(), Mismatch()),
        (DONE, Replay(b"result"), Mismatch()),
        (replace(DONE, lease_left=-1.0), Replay(b"result"), Mismatch()),
        (DONE_EMPTY, Replay(b""), Mismatch()),
        (DONE_NOT_KEPT, Completed(), Mismatch()),
        (NEWER, Unreadable(2), Unreadable(2)),
        (NEWER_DONE, Unreadable(2), Unreadable(2)),
        (DAMAGED, Unreadable(1), Unreadable(1)),
        (DAMAGED_NEWER, Unreadable(7), Unreadable(7)),
    ],
)
@pytest.mark.parametrize("hold", [False, True])
def test_duplicate_is_told(record: Record, same: Verdict, other: Verdict, hold: bool) -> None:
    """The verdict of a claim that does not own follows from the state found, and first from the fingerprint."""
    assert judge(a_claim(hold=hold), record) == same
    assert judge(a_claim(OTHER, hold=hold), record) == other


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (LIVE, Execute(1)),
        (LAPSED, Execute(1)),
        (HELD_LAPSED, Execute(1)),
        (replace(LIVE, attempt=3), Execute(3)),
        (DONE, Replay(b"result")),
        (DONE_NOT_KEPT, Completed()),
        (UNKNOWN, Unknown()),
        (NEWER, Unreadable(2)),
    ],
)
def test_owner_is_told(record: Record, told: Verdict) -> None:
    """The owner runs what is not finished, however its answer got lost, and nothing that is."""
    assert judge(a_claim(token="first"), record) == told


@pytest.mark.parametrize("left", [0.0, -0.001, -1e9])
@pytest.mark.parametrize(("hold", "told"), [(False, InProgress(0.0)), (True, Unknown())])
def test_duplicate_of_a_lease_that_ended_since_the_store_looked(left: float, hold: bool, told: Verdict) -> None:
    """The next claim takes over what nobody holds; until then its operation may still be running."""
    assert judge(a_claim(hold=hold), replace(LAPSED, lease_left=left)) == told


def test_the_remaining_lease_is_at_most_that_of_the_claim() -> None:
    """After the clock of the store was set back by an hour, no duplicate waits for an hour."""
    assert judge(a_claim(), replace(LIVE, lease_left=3606.0)) == InProgress(30.0)


@pytest.mark.parametrize(
    ("age", "lease_left", "seconds"),
    [
        (0.0, 30.0, 1.0),
        (0.8, 29.0, 1.0),
        (2.5, 27.5, 2.5),
        (5.0, 25.0, 5.0),
        (3600.0, 30.0, 5.0),
        (-3600.0, 30.0, 1.0),
        (28.0, 2.0, 2.0),
        (29.9, 0.1, 1.0),
        (0.0, 0.0, 1.0),
    ],
)
def test_a_caller_asks_again_after_as_long_as_the_operation_has_taken(
    age: float, lease_left: float, seconds: float
) -> None:
    """Not sooner than after a second, not later than after five, and when the lease ends."""
    running = judge(a_claim(), replace(LIVE, lease_left=lease_left, age=age))

    assert isinstance(running, InProgress)
    assert pause(running) == seconds


@pytest.mark.parametrize(
    ("record", "releasing", "verdict"),
    [
        (HELD_LAPSED, {"first"}, InProgress(1.0)),
        (HELD_LAPSED, {"other"}, Unknown()),
        (UNKNOWN, {"other"}, Unknown()),
        (LIVE, {"first"}, InProgress(4.5)),
        (DONE, {"first"}, Replay(b"result")),
        (replace(LIVE, token="second"), {"first"}, Execute(1)),
        (DAMAGED, {"first"}, Unreadable(1)),
    ],
)
def test_a_claim_that_is_being_released_has_no_unknown_outcome(
    record: Record, releasing: set[str], verdict: Verdict
) -> None:
    """Nothing ran under it, so that its key is free soon; every other verdict is as ever."""
    assert judge_with_releases(a_claim(), record, releasing) == verdict


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (None, InProgress(1.0)),
        (DONE, Replay(b"result")),
        (DONE_NOT_KEPT, Completed()),
        (UNKNOWN, Unknown()),
        (replace(LIVE, token="second", attempt=2), Execute(2)),
        (NEWER, Unreadable(2)),
    ],
)
def test_a_locked_row_is_in_progress(record: Record | None, verdict: Verdict) -> None:
    """Another transaction holds the row, and does not say for how long; else the record decides."""
    assert judge_row(a_claim(), record) == verdict


@pytest.mark.parametrize(
    ("record", "known"),
    [
        (replace(LIVE, token="second"), None),
        (LIVE, InProgress(4.5)),
        (replace(LIVE, fingerprint=OTHER), Mismatch()),
        (DONE, Replay(b"result")),
        (UNKNOWN, Unknown()),
        (NEWER, Unreadable(2)),
    ],
)
def test_a_superseded_owner_answers_by_the_record_of_the_other(record: Record, known: Verdict | None) -> None:
    """Unless the other owner ended without a result, and the key is the first one's again."""
    assert judge_superseded(a_claim(), record) == known


def test_an_owner_that_is_superseded_twice_is_a_duplicate_in_progress() -> None:
    """How long the lease of the third owner lasts is not known; that of the claim is an estimate."""
    assert superseded_again(a_claim()) == InProgress(30.0)


def test_a_superseded_owner_whose_effect_was_rolled_back_can_be_retried() -> None:
    """At once, unless the operation declared that its effect happened."""
    assert after_roll_back(held=False) == InProgress(0.0)
    assert after_roll_back(held=True) == Unknown()


def test_owner_runs_whatever_the_fingerprint() -> None:
    """A record that carries the claim's own token is the claim's."""
    assert judge(a_claim(OTHER, token="first"), LIVE) == Execute(1)


@pytest.mark.parametrize(
    ("record", "token", "fingerprint", "hold", "passes"),
    [
        (LIVE, "second", ASKED, False, False),
        (LIVE, "second", OTHER, False, False),
        (LAPSED, "second", ASKED, False, True),
        (LAPSED, "second", OTHER, False, False),
        (LAPSED, "second", ASKED, True, False),
        (HELD_LIVE, "second", ASKED, False, False),
        (HELD_LAPSED, "second", ASKED, False, False),
        (HELD_LAPSED, "second", ASKED, True, False),
        (UNKNOWN_LAPSED, "second", ASKED, False, False),
        (replace(DONE, lease_left=-1.0), "second", ASKED, False, False),
        (replace(DONE_NOT_KEPT, lease_left=-1.0), "second", ASKED, False, False),
        (replace(LAPSED, version=2), "second", ASKED, False, False),
        (DAMAGED, "second", ASKED, False, False),
        (LIVE, "first", ASKED, False, True),
        (LAPSED, "first", ASKED, True, True),
        (HELD_LAPSED, "first", ASKED, False, True),
        (DONE, "first", ASKED, False, False),
        (UNKNOWN, "first", ASKED, False, False),
        (NEWER, "first", ASKED, False, False),
    ],
)
def test_takes_over(record: Record, token: str, fingerprint: bytes, hold: bool, passes: bool) -> None:
    """A record changes hands when its lease is over, nobody asks for hold, and the same is asked; or to its owner."""
    assert takes_over(a_claim(fingerprint, token, hold), record) is passes


@given(
    st.builds(
        Record,
        token=st.sampled_from(["first", "second"]),
        fingerprint=st.sampled_from([ASKED, OTHER]),
        state=st.sampled_from(State),
        attempt=st.integers(1, 5),
        lease_left=st.floats(-10, 10),
        hold=st.booleans(),
        result=st.none() | st.binary(max_size=4),
        version=st.integers(1, 3),
        readable=st.booleans(),
    ),
    st.booleans(),
)
def test_nobody_runs_what_was_not_handed_over(record: Record, hold: bool) -> None:
    """A claim whose token is not in the record is never told to run, whatever the record says."""
    claim = a_claim(hold=hold)

    if record.token != claim.token:
        assert not isinstance(judge(claim, record), Execute)


def test_every_claim_has_a_token_of_its_own() -> None:
    """Two claims of one key are two owners."""
    first, second = (Claim(scope="s", key="k", fingerprint=ASKED, lease=1.0, ttl=1.0) for _ in range(2))

    assert first.token != second.token
    assert len(first.token) == 32
    assert first.id == second.id


@given(st.text(), st.text(), st.text(), st.text())
@example("a", "bc", "ab", "c")
@example("a:b", "c", "a", "b:c")
@example("", "a", "a", "")
@example("1:a", "", "", "1:a")
@example("\ud800", "k", "\ud801", "k")
def test_record_ids_are_injective(scope: str, key: str, other_scope: str, other_key: str) -> None:
    """Two names have one record only when scope and key are both the same."""
    same_id = record_id(scope, key) == record_id(other_scope, other_key)

    assert same_id is ((scope, key) == (other_scope, other_key))


def test_record_id_is_a_stored_format() -> None:
    """The digest of a name never changes: it would make every key new."""
    assert record_id("scope", "key").hex() == "111e098959451aa27f1def1948c08cb7b47dbf183a9a256584c63bb3f77b6b79"
