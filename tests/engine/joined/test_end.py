"""What ends the transaction of a joined function past its session is refused, in asyncio and in threads."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, text

from idempotency import idempotent
from idempotency.errors import ConfigurationError, InProgressError, TransactionError
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_sync_ledger
from tests.kit.targets import Target

asynchronous = pytest.mark.stores(*JOINED_KINDS, "mariadb_asyncmy")
synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)


def committing(ledger: Ledger) -> list[str]:
    """Return statements by which the database commits."""
    each = ["COMMIT", "-- now\n commit"]
    return [*each, "CREATE TABLE beside (x INT)"] if ledger.sync_engine.dialect.name == "mysql" else each


@asynchronous
async def test_a_text_that_commits_is_refused_when_joined(ledger: Ledger) -> None:
    """It is not sent, also behind no effect, so that the next call runs anew at once."""
    for words in committing(ledger):
        for first in (True, False):
            failing = [True, False]

            @idempotent(ledger.store, key=lambda k: k, session=ledger.sessions)
            async def order(key: str, session: Any) -> str:
                if not first:  # noqa: B023
                    await session.execute(ledger.insert(key))
                if failing.pop(0):  # noqa: B023
                    await session.execute(text(words))  # noqa: B023
                return key

            with pytest.raises(TransactionError, match="would commit"):
                await order(f"{words} {first}")
            assert await ledger.effects() == []
            assert await order(f"{words} {first}") == f"{words} {first}"
            async with ledger.sessions.begin() as session:
                await session.execute(text(f"DELETE FROM {ledger.name}"))


@synchronous
def test_a_text_that_commits_is_refused_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    for words in committing(sync_ledger):

        @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
        def order(session: Any) -> None:
            session.execute(sync_ledger.insert("tea"))
            session.execute(text(words))  # noqa: B023

        for _ in range(2):
            with pytest.raises(TransactionError, match="would commit"):
                order()
            assert sync_ledger.effects_sync() == []


@synchronous
def test_a_commit_by_the_drivers_cursor_is_no_success(sync_ledger: Ledger) -> None:
    """What the cursor has committed stays, but no result is recorded, nor what came after."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        session.execute(sync_ledger.everything)
        with closing(session.connection().connection.cursor()) as cursor:
            cursor.execute("COMMIT")
        session.execute(sync_ledger.insert("milk"))

    with pytest.raises(TransactionError, match="past its session"):
        order()
    assert sync_ledger.effects_sync() == ["tea"]
    # The claim was committed with it, so that the key is free once its lease has ended.
    with pytest.raises(InProgressError):
        order()


@synchronous
def test_a_function_that_only_reads_is_recorded(sync_ledger: Ledger) -> None:
    """Nothing is taken for an ended transaction where a function stores nothing, or only in a savepoint it undoes."""

    @idempotent(sync_ledger.store, key=lambda undo: str(undo), session=sync_ledger.sessions)
    def order(undo: bool, session: Any) -> int:
        for _ in range(2):
            with session.begin_nested() as savepoint:
                if undo:
                    session.execute(sync_ledger.insert("tea"))
                    savepoint.rollback()
            session.execute(sync_ledger.everything)
        return 1

    for undo in (True, False):
        assert order(undo) == order(undo) == 1
    assert sync_ledger.effects_sync() == []


@pytest.mark.stores("sqlite")
def test_a_driver_that_begins_nothing_has_it_begun_in_threads(target: Target) -> None:
    """With isolation_level=None, claim and effect are in one transaction that is begun here."""
    with open_sync_ledger(target, connect_args={"isolation_level": None}) as ledger:
        failing = [True, False]

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        def order(session: Any) -> str:
            session.execute(ledger.insert("tea"))
            if failing.pop(0):
                raise ValueError("no tea")
            return "done"

        with pytest.raises(ValueError, match="no tea"):
            order()
        assert ledger.effects_sync() == []
        assert order() == order() == "done"
        assert ledger.effects_sync() == ["tea"]


@synchronous
def test_a_driver_that_commits_by_itself_is_refused_in_threads(target: Target) -> None:
    """Neither the claim nor an effect is sent on such a connection."""
    with open_sync_ledger(target) as ledger:

        def commit_by_itself(connection: Any, *_: object) -> None:
            if target.kind == "mariadb":
                connection.autocommit(True)
            else:
                connection.autocommit = True

        if target.kind == "sqlite":
            import sqlite3

            kind = type("CommitsByItself", (sqlite3.Connection,), {"autocommit": True})
            event.listen(ledger.engine, "do_connect", lambda d, r, a, options: options.update(factory=kind))
            ledger.engine.dispose()  # type: ignore[union-attr]
        else:
            ledger.store.create_schema_sync()
            event.listen(ledger.engine, "checkout", commit_by_itself)

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        def order(session: Any) -> None:
            session.execute(ledger.insert("tea"))

        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            order()
        assert ledger.effects_sync() == []


@asynchronous
async def test_statements_of_an_operation_stay_as_many(ledger: Ledger) -> None:
    """A first call sends the claim, the effect and the completion, on SQLite also a look; a replay sends one."""
    heard: list[str] = []

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> str:
        await session.execute(ledger.insert("tea"))
        return "done"

    await ledger.store.create_schema()

    @sqlalchemy.event.listens_for(ledger.sync_engine, "before_cursor_execute")
    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement.split()[0])

    assert await order() == "done"
    first = list(heard)
    heard.clear()
    assert await order() == "done"

    # SQLite looks first, together with how long its connection waits for the lock.
    looks = ["SELECT"] if ledger.sync_engine.dialect.name == "sqlite" else []
    assert len(first) == 3 + len(looks)
    assert len(heard) == 1
    assert looks in ([], heard)
