"""Joined functions that are held: their outcome is unknown until it is resolved."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from idempotency import Policy, current, idempotent
from idempotency._rules import Claim
from idempotency.errors import (
    OutcomeUnknownError,
    TransactionError,
)
from tests.kit.joined import commit_past_the_savepoint, until_one_waits
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(outcomes={Exception: "hold"}), Policy(outcomes={KeyError: "store"})]
)
@pytest.mark.parametrize(
    "end",
    [
        commit_past_the_savepoint,
        lambda session: session.connection().commit(),
        lambda session: session.connection().rollback(),
    ],
    ids=["savepoint", "commit", "rollback"],
)
@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.stores("sqlite", "postgres", "mariadb")
def test_a_hold_survives_what_the_connection_ended(
    sync_ledger: Ledger, policy: Policy, end: Any, swallow: bool
) -> None:
    """Whatever was charged before stays charged: the key is unknown, with or without a rule that keeps a savepoint."""
    ran: list[str] = []

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        ran.append("charged")
        operation = current()
        assert operation is not None
        operation.hold()
        with suppress(TransactionError if swallow else ()):
            end(session)

    with pytest.raises(TransactionError):
        order()
    with pytest.raises(OutcomeUnknownError):
        order()
    assert ran == ["charged"]


@asynchronous
async def test_a_held_call_that_is_cancelled_is_unknown(ledger: Ledger) -> None:
    """The word of the function outlives its cancellation."""
    running = asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        await session.execute(ledger.insert("tea"))
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(order())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(OutcomeUnknownError):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_a_held_call_that_is_interrupted_is_unknown(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function and a KeyboardInterrupt."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        session.execute(sync_ledger.insert("tea"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        order()
    with pytest.raises(OutcomeUnknownError):
        order()
    assert sync_ledger.effects_sync() == []


@pytest.mark.stores("postgres", "mariadb")
async def test_a_duplicate_that_waits_overtakes_a_hold(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is free between the rollback of the effect and the record of the hold, but not under a policy's rule."""
    claims, overtaken, claim_in = list[Claim](), asyncio.Event(), ledger.store.claim_in

    async def claim_last(session: Any, claim: Claim, *, wait: float) -> Any:
        claims.append(claim)
        if len(claims) == 3:  # the owner's, again
            await asyncio.wait_for(overtaken.wait(), 20)
        return await claim_in(session, claim, wait=wait)

    monkeypatch.setattr(ledger.store, "claim_in", claim_last)

    def run(**options: Any) -> Any:
        running, fail, runs = asyncio.Event(), asyncio.Event(), list[int]()

        @idempotent(ledger.store, session=ledger.sessions, key=lambda: "rule" if options else "word", **options)
        async def order() -> str:
            runs.append(1)
            if len(runs) > 1:
                overtaken.set()
                return "ran again"
            operation = current()
            assert operation is not None
            operation.hold()
            running.set()
            await fail.wait()
            raise LookupError

        async def twice() -> tuple[Any, Any]:
            first = asyncio.create_task(order())
            await running.wait()
            second = asyncio.create_task(order())
            await until_one_waits(ledger)
            fail.set()
            ended = await asyncio.gather(first, second, return_exceptions=True)
            return ended[0], ended[1]

        return twice()

    failed, overtook = await run()
    assert (type(failed), overtook) == (LookupError, "ran again")
    failed, told = await run(policy=Policy(outcomes={LookupError: "hold"}))
    assert (type(failed), type(told)) == (LookupError, OutcomeUnknownError)


def check_at_the_commit(ledger: Ledger) -> Any:
    """Make the statement after which PostgreSQL refuses equal effects, and no earlier than at their commit."""
    return text(f"ALTER TABLE {ledger.name} ADD UNIQUE (what) DEFERRABLE INITIALLY DEFERRED")


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_held_call_whose_commit_is_refused_is_unknown(ledger: Ledger) -> None:
    """So is one that said that its effect elsewhere has happened, whatever the database says of the rest."""
    async with ledger.engine.begin() as connection:  # type: ignore[union-attr]
        await connection.execute(check_at_the_commit(ledger))

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        for _ in range(2):
            await session.execute(ledger.insert("tea"))

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        await order()
    with pytest.raises(OutcomeUnknownError):
        await order()
    assert await ledger.effects() == []


@pytest.mark.stores("postgres")
def test_a_held_call_whose_commit_is_refused_is_unknown_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    with sync_ledger.sync_engine.begin() as connection:
        connection.execute(check_at_the_commit(sync_ledger))

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        for _ in range(2):
            session.execute(sync_ledger.insert("tea"))

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        order()
    with pytest.raises(OutcomeUnknownError):
        order()
    assert sync_ledger.effects_sync() == []


@asynchronous
async def test_a_held_call_that_is_cancelled_while_it_is_recorded_is_unknown(ledger: Ledger) -> None:
    """The word of the function outlives a cancellation that comes after its failure."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        operation, task = current(), asyncio.current_task()
        assert operation is not None
        assert task is not None
        operation.hold()
        await session.execute(ledger.insert("tea"))
        asyncio.get_running_loop().call_soon(task.cancel)
        raise ValueError("out of tea")

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(order())
    with pytest.raises(OutcomeUnknownError):
        await order()
    assert await ledger.effects() == []
