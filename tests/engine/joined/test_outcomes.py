"""Effect and record of a joined function: both are committed, or neither is."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from idempotency import Policy, current, idempotent
from idempotency.errors import (
    ConfigurationError,
    NotReplayableError,
    OutcomeUnknownError,
    RecordedFailureError,
)
from idempotency.events import Event
from tests.kit.joined import order_of
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)


@asynchronous
async def test_effect_and_result_commit_together(ledger: Ledger) -> None:
    """A repeated call has no second effect and gets the recorded result, for one commit in all."""
    order = order_of(ledger)
    commits = ledger.count_commits()

    first, second = await order("tea"), await order("tea")

    assert first == second == {"ordered": "tea"}
    assert len(commits) == 1
    assert await ledger.effects() == ["tea"]


@synchronous
def test_effect_and_result_commit_together_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function with a sessionmaker."""
    commits = sync_ledger.count_commits()

    @idempotent(sync_ledger.store, key=lambda what: what, session=sync_ledger.sessions)
    def order(what: str) -> str:
        operation = current()
        assert operation is not None
        operation.session.execute(sync_ledger.insert(what))
        return f"ordered {what}"

    assert order("tea") == order("tea") == "ordered tea"
    assert len(commits) == 1
    assert sync_ledger.effects_sync() == ["tea"]


@asynchronous
async def test_a_failure_leaves_nothing(ledger: Ledger) -> None:
    """An exception rolls back effect and record, and the next call runs."""
    fails = [True]

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        if fails.pop() if fails else False:
            raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        await order()
    assert await ledger.effects() == []
    await order()
    assert await ledger.effects() == ["tea"]


@synchronous
def test_a_failure_leaves_nothing_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    fails = [True]

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        if fails.pop() if fails else False:
            raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        order()
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@asynchronous
@pytest.mark.parametrize(("outcome", "told"), [("store", RecordedFailureError), ("hold", OutcomeUnknownError)])
async def test_a_kept_failure_has_no_effect(ledger: Ledger, outcome: Any, told: type[Exception]) -> None:
    """A failure that is stored or held keeps its record and loses its effect."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=Policy(outcomes={ValueError: outcome}))
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        await order()
    with pytest.raises(told):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_a_stored_failure_is_named_in_threads(sync_ledger: Ledger) -> None:
    """A synchronous function's stored failure is replayed by its name."""
    policy = Policy(outcomes={LookupError: "store"})

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        raise KeyError("secret")

    with pytest.raises(KeyError):
        order()
    with pytest.raises(RecordedFailureError, match="KeyError") as replayed:
        order()
    assert "secret" not in str(replayed.value)
    assert sync_ledger.effects_sync() == []


@asynchronous
async def test_a_word_of_the_function_counts(ledger: Ledger) -> None:
    """``hold()`` before an exception leaves the key unknown, ``release()`` rolls a success back."""

    @idempotent(ledger.store, key=lambda word: word, session=ledger.sessions)
    async def order(word: str, session: Any) -> str:
        operation = current()
        assert operation is not None
        await session.execute(ledger.insert(word))
        if word == "release":
            operation.release()
            return "not now"
        operation.hold()
        raise ValueError(word)

    assert await order("release") == "not now"
    with pytest.raises(ValueError, match="hold"):
        await order("hold")
    with pytest.raises(OutcomeUnknownError):
        await order("hold")
    assert await ledger.effects() == []


@asynchronous
@pytest.mark.parametrize("outcomes", [{}, {ValueError: "store"}])
async def test_a_result_that_no_annotation_names_is_refused_at_the_first_call(ledger: Ledger, outcomes: Any) -> None:
    """The effect is rolled back, and the call runs once the function is annotated; no rule stores this failure."""
    events: list[Event] = []
    decorated = idempotent(
        ledger.store,
        key=lambda: "k",
        name="order",
        session=ledger.sessions,
        policy=Policy(outcomes=outcomes),
        on_event=events.append,
    )

    @decorated
    async def order(session: Any):
        await session.execute(ledger.insert("tea"))
        return Decimal("1.10")

    @decorated
    async def annotated(session: Any) -> Decimal:
        await session.execute(ledger.insert("tea"))
        return Decimal("1.10")

    with pytest.raises(ConfigurationError, match=r"order returned a Decimal.* -> Decimal, .* is rolled back"):
        await order()
    assert await ledger.effects() == []
    assert await annotated() == await annotated() == Decimal("1.10")
    assert await ledger.effects() == ["tea"]
    assert [(event.kind, event.error) for event in events[:2]] == [("released", "ConfigurationError"), ("stored", "")]


@synchronous
def test_a_result_that_no_annotation_names_is_refused_at_the_first_call_in_threads(sync_ledger: Ledger) -> None:
    """The effect is rolled back, unless the function says that it has had another one: then the key is unknown."""

    @idempotent(sync_ledger.store, key=lambda held: f"{held}", session=sync_ledger.sessions)
    def order(held: bool, session: Any):
        session.execute(sync_ledger.insert("tea"))
        operation = current()
        assert operation is not None
        if held:
            operation.hold()
        return Decimal("1.10")

    for held, again in [(False, ConfigurationError), (True, OutcomeUnknownError)]:
        with pytest.raises(ConfigurationError):
            order(held)
        with pytest.raises(again):
            order(held)
    assert sync_ledger.effects_sync() == []


@asynchronous
async def test_a_result_that_cannot_be_kept_keeps_the_effect(ledger: Ledger) -> None:
    """A result that does not fit is returned, its effect commits, and later calls are told that it is completed."""
    events: list[Event] = []

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, on_event=events.append)
    async def order(session: Any) -> int:
        await session.execute(ledger.insert("tea"))
        return "five"  # type: ignore[return-value]

    assert await order() == "five"  # type: ignore[comparison-overlap]
    with pytest.raises(NotReplayableError):
        await order()
    assert await ledger.effects() == ["tea"]
    assert [(event.kind, event.error) for event in events] == [
        ("stored-without-result", "TypeError"),
        ("completed", ""),
    ]


@asynchronous
async def test_a_refused_flush_is_the_functions_failure(ledger: Ledger) -> None:
    """What the database refuses rolls back, is raised as it is, and leaves the key free."""
    wrong = [True]

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> str:
        await session.execute(ledger.insert("tea"))
        if wrong.pop() if wrong else False:
            await session.execute(text("SELECT no_such_column FROM no_such_table"))
        return "done"

    with pytest.raises(sqlalchemy.exc.DBAPIError):
        await order()
    assert await order() == "done"
    assert await ledger.effects() == ["tea"]


@asynchronous
async def test_a_cancelled_call_leaves_nothing(ledger: Ledger) -> None:
    """A cancellation rolls back, whatever ``on_crash`` says of leases, and the next call runs."""
    running = asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=Policy(on_crash="hold"))
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        if not running.is_set():
            running.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(order())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await order()
    assert await ledger.effects() == ["tea"]


@asynchronous
async def test_a_call_longer_than_its_record_would_live_is_recorded(ledger: Ledger) -> None:
    """The row is the call's own for as long as it is locked, whatever the time it would expire at."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> str:
        await session.execute(text(f"UPDATE {ledger.store._table.name} SET lease_until_ms = 1, expires_ms = 1"))
        await session.execute(ledger.insert("tea"))
        return "done"

    assert await order() == await order() == "done"
    assert await ledger.effects() == ["tea"]


@asynchronous
async def test_a_failure_is_kept_where_its_savepoint_is_gone(ledger: Ledger) -> None:
    """Where the server has rolled everything back, as at a deadlock, the failure is recorded in a new transaction."""
    policy = Policy(outcomes={ValueError: "store"})

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=policy)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        await session.execute(text("ROLLBACK"))
        raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        await order()
    with pytest.raises(RecordedFailureError):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_a_failure_is_kept_where_its_savepoint_is_gone_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    policy = Policy(outcomes={ValueError: "store"})

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        session.execute(text("ROLLBACK"))
        raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        order()
    with pytest.raises(RecordedFailureError):
        order()
    assert sync_ledger.effects_sync() == []
