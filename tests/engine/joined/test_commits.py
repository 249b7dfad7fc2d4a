"""A joined function commits by its record alone: any other commit of its transaction is refused."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from idempotency import Policy, idempotent
from idempotency.errors import (
    RecordedFailureError,
    StoreError,
    TransactionError,
)
from tests.kit.joined import commit_past_the_savepoint, order_of, until_one_waits
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_sync_ledger
from tests.kit.targets import Target

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)


@asynchronous
async def test_the_functions_own_commit_is_refused(ledger: Ledger) -> None:
    """A function that commits its session gets an error, and nothing is committed."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        await session.commit()

    with pytest.raises(TransactionError, match="flush"):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_the_functions_own_commit_is_refused_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function, and a savepoint of its own is fine."""

    @idempotent(sync_ledger.store, key=lambda commit: "k", session=sync_ledger.sessions)
    def order(commit: bool, session: Any) -> None:
        with session.begin_nested():
            session.execute(sync_ledger.insert("tea"))
        if commit:
            session.commit()

    with pytest.raises(TransactionError, match="flush"):
        order(True)
    assert sync_ledger.effects_sync() == []
    order(False)
    assert sync_ledger.effects_sync() == ["tea"]


@synchronous
def test_another_session_of_the_same_maker_commits(sync_ledger: Ledger) -> None:
    """Only the operation's own session is kept from committing."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> int:
        session.execute(sync_ledger.insert("tea"))
        with sync_ledger.sessions() as other:
            seen = len(other.execute(sync_ledger.everything).all())
            other.commit()
        return seen

    assert order() == 0
    assert sync_ledger.effects_sync() == ["tea"]


@synchronous
def test_a_commit_within_a_savepoint_is_refused(sync_ledger: Ledger) -> None:
    """``commit()`` ends the savepoints it is called in, and then the transaction, which is refused."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        with session.begin_nested():
            session.execute(sync_ledger.insert("tea"))
            session.commit()

    with pytest.raises(TransactionError, match="flush"):
        order()
    assert sync_ledger.effects_sync() == []


@pytest.mark.parametrize(
    "commit",
    [commit_past_the_savepoint, lambda session: session.connection().commit()],
    ids=["savepoint", "connection"],
)
@synchronous
def test_a_commit_past_the_session_is_refused(sync_ledger: Ledger, commit: Any) -> None:
    """The transaction cannot be committed by its connection, nor from within a savepoint; a later call runs anew."""
    commits = [commit, None]

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        if (act := commits.pop(0)) is not None:
            act(session)

    with pytest.raises(TransactionError, match="flush"):
        order()
    assert sync_ledger.effects_sync() == []
    order()
    assert sync_ledger.effects_sync() == ["tea"]


def _begin_again(connection: Any) -> None:
    connection.rollback()


def _lose_and_begin_again(connection: Any) -> None:
    connection.invalidate()
    connection.rollback()


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("begin_again", [_begin_again, _lose_and_begin_again])
@synchronous
def test_a_commit_of_what_a_connection_began_anew_is_refused(
    sync_ledger: Ledger, begin_again: Any, swallow: bool
) -> None:
    """Its record is gone with the first transaction, so nothing of the second is kept, nor left for the next user."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        connection = session.connection()
        begin_again(connection)
        connection.execute(sync_ledger.insert("tea"))
        with suppress(TransactionError if swallow else ()):
            connection.commit()

    with pytest.raises(TransactionError):
        order()
    for _ in range(2):  # the next user of the connection commits what it finds
        with sync_ledger.sessions.begin() as other:
            assert other.execute(sync_ledger.everything).all() == []


@synchronous
def test_a_refused_commit_that_is_swallowed_is_no_success(sync_ledger: Ledger) -> None:
    """The effect is rolled back where its commit is refused, whatever becomes of the error."""
    ran: list[str] = []

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        ran.append("order")
        session.execute(sync_ledger.insert("tea"))
        if len(ran) == 1:
            with suppress(TransactionError):
                session.connection().commit()

    with pytest.raises(TransactionError, match="commit past it"):
        order()
    assert sync_ledger.effects_sync() == []
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@pytest.mark.parametrize("reset", ["commit", None])
@synchronous
def test_a_pool_that_commits_or_leaves_what_comes_back(target: Target, reset: Any) -> None:
    """What a refused commit has ended is rolled back at once, and a replay leaves nothing to be refused."""
    with open_sync_ledger(target, pool_reset_on_return=reset) as ledger:
        refused = [True, False]
        lost: list[Any] = []
        sqlalchemy.event.listen(ledger.engine, "invalidate", lambda *each: lost.append(each))

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        def order(session: Any) -> None:
            session.execute(ledger.insert("tea"))
            if refused.pop(0):
                session.connection().commit()

        with pytest.raises(TransactionError):
            order()
        assert ledger.effects_sync() == []
        for _ in range(3):
            order()

        assert ledger.effects_sync() == ["tea"]
        assert lost == []


@synchronous
def test_a_commit_that_failed_is_no_success_where_the_pool_leaves_it_open(target: Target) -> None:
    """SQLAlchemy takes the transaction for ended; its record, uncommitted, is no proof that it was committed."""
    with open_sync_ledger(target, pool_reset_on_return=None) as ledger:
        failing = [True]

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        def order(session: Any) -> None:
            session.execute(ledger.insert("tea"))
            if failing:
                failing.clear()

                @sqlalchemy.event.listens_for(session.connection(), "commit")
                def fail(_: Any) -> None:
                    raise OSError("no space left")

        with pytest.raises(StoreError):
            order()
        assert ledger.effects_sync() == []
        order()
        assert ledger.effects_sync() == ["tea"]


@pytest.mark.parametrize(
    "commit",
    [lambda session: session.commit(), commit_past_the_savepoint, lambda session: session.connection().commit()],
    ids=["session", "savepoint", "connection"],
)
@synchronous
def test_a_kept_failure_after_a_refused_commit_has_no_effect(sync_ledger: Ledger, commit: Any) -> None:
    """A commit that was refused has ended the savepoint, so that only the whole transaction undoes the effect."""
    policy = Policy(outcomes={Exception: "store"})

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        commit(session)

    with pytest.raises(TransactionError):
        order()
    assert sync_ledger.effects_sync() == []
    with pytest.raises(RecordedFailureError):
        order()


@pytest.mark.parametrize("end", ["close", "rollback"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "savepoint"])
@asynchronous
async def test_a_session_that_was_ended_is_refused(ledger: Ledger, end: str, kept: bool) -> None:
    """The record went with it, so the function has failed, and nothing of it is there; a later call runs."""
    ends = [end]
    policy = Policy(outcomes={LookupError: "store"} if kept else {})

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=policy)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        if ends:
            await getattr(session, ends.pop())()
            await session.execute(ledger.insert("cup"))

    with pytest.raises(TransactionError, match="begin_nested"):
        await order()
    assert await ledger.effects() == []
    await order()
    assert await ledger.effects() == ["tea"]


@pytest.mark.parametrize("end", ["close", "rollback"])
@synchronous
def test_a_session_that_was_ended_is_refused_in_threads(sync_ledger: Ledger, end: str) -> None:
    """The same holds for a synchronous function."""
    ends = [end]

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        if ends:
            getattr(session, ends.pop())()
            session.execute(sync_ledger.insert("cup"))

    with pytest.raises(TransactionError, match="begin_nested"):
        order()
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@pytest.mark.stores("postgres")
async def test_a_refused_commit_is_told_as_such_beside_a_duplicate_that_waits(ledger: Ledger) -> None:
    """What the database refused is the function's own failure, though another has the row by now."""
    running, go_on, second = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=30)
    async def order(session: Any) -> None:
        if running.is_set():
            await second.wait()
            return
        running.set()
        await go_on.wait()
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            await session.execute(text("SELECT 1 / 0"))

    first = asyncio.create_task(order())
    await running.wait()
    duplicate = asyncio.create_task(order())
    await until_one_waits(ledger)
    go_on.set()

    with pytest.raises(sqlalchemy.exc.DBAPIError, match="aborted"):
        await asyncio.wait_for(first, 20)
    second.set()
    await duplicate


@asynchronous
async def test_transactions_of_others_are_not_listened_to(ledger: Ledger) -> None:
    """A listener on the application's engine would cost each of its statements time."""
    await order_of(ledger)("tea")

    assert not ledger.sync_engine.dispatch.commit


@pytest.mark.stores("postgres", "mariadb")
def test_commits_of_others_beside_an_operation_are_not_refused(sync_ledger: Ledger) -> None:
    """One engine serves both, and what gets the operation's connection after it."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        with sync_ledger.sessions.begin() as other:
            other.execute(sync_ledger.insert("beside"))
        session.execute(sync_ledger.insert("tea"))
        session.close()

    with pytest.raises(TransactionError, match="closed"):
        order()
    with sync_ledger.sessions.begin() as other:
        other.execute(sync_ledger.insert("after"))

    assert sync_ledger.effects_sync() == ["after", "beside"]


class Buffering(sqlalchemy.orm.Session):
    """A session with a buffer of its own, which its flush sends."""

    buffer: tuple[Any, ...] = ()

    def flush(self, objects: Any = None) -> None:
        buffer, self.buffer = self.buffer, ()
        for statement in buffer:
            self.execute(statement)
        super().flush(objects)


@synchronous
def test_what_a_session_s_own_flush_adds_is_committed(sync_ledger: Ledger) -> None:
    """Also where SQLAlchemy itself has nothing pending."""
    sessions = sqlalchemy.orm.sessionmaker(sync_ledger.sync_engine, class_=Buffering)

    @idempotent(sync_ledger.store, key=lambda: "k", session=sessions)
    def order(session: Buffering) -> None:
        session.buffer = (sync_ledger.insert("tea"),)

    order()

    assert sync_ledger.effects_sync() == ["tea"]
