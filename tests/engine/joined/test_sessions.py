"""The sessions, engines and pools that a joined function can work with, and those that are refused."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import Policy, idempotent
from idempotency._rules import Claim, Execute, Replay, judge
from idempotency.errors import (
    ConfigurationError,
    TransactionError,
)
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.kit.joined import order_of
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_ledger, open_sync_ledger
from tests.kit.servers import with_driver
from tests.kit.targets import Target

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)


def a_claim(key: str = "k") -> Claim:
    """Make a claim with a token of its own."""
    return Claim(scope="s", key=key, fingerprint=b"f" * 32, lease=30, ttl=60)


def listen(ledger: Ledger) -> list[str]:
    """Return a list that is told of each statement that writes, and to which table."""
    heard: list[str] = []

    @sqlalchemy.event.listens_for(ledger.sync_engine, "after_cursor_execute")
    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if written := re.search(r"(INSERT|UPDATE)(?: INTO)? (\w+)", statement):
            heard.append(f"{written[1]} {'effects' if written[2] == ledger.name else 'record'}")

    return heard


@asynchronous
async def test_the_claim_is_part_of_the_callers_transaction(ledger: Ledger) -> None:
    """``claim_in`` and ``complete_in`` take effect with the caller's commit, and not with a rollback."""
    first, second, third = a_claim(), a_claim(), a_claim()
    async with ledger.sessions() as session:
        record = await ledger.store.claim_in(session, first, wait=1)
        assert record is not None
        assert judge(first, record) == Execute(1)
        await session.rollback()

        record = await ledger.store.claim_in(session, second, wait=1)
        assert record is not None
        assert judge(second, record) == Execute(1)
        assert await ledger.store.complete_in(session, second, b"result")
        await session.commit()

        record = await ledger.store.claim_in(session, third, wait=1)
        assert record is not None
        assert judge(third, record) == Replay(b"result")


@asynchronous
async def test_who_listens_to_statements_sees_those_of_the_record(ledger: Ledger) -> None:
    """An engine that is listened to shows the claim before the effect and the completion after it."""
    heard = listen(ledger)
    order = order_of(ledger)

    assert await order("tea") == await order("tea") == {"ordered": "tea"}
    assert heard[:3] == ["INSERT record", "INSERT effects", "UPDATE record"]
    assert await ledger.effects() == ["tea"]


@synchronous
def test_who_listens_to_statements_sees_those_of_the_record_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    heard = listen(sync_ledger)

    @idempotent(sync_ledger.store, key=lambda what: what, session=sync_ledger.sessions)
    def order(what: str, session: Any) -> str:
        session.execute(sync_ledger.insert(what))
        return what

    assert order("tea") == order("tea") == "tea"
    assert heard[:3] == ["INSERT record", "INSERT effects", "UPDATE record"]
    assert sync_ledger.effects_sync() == ["tea"]


@synchronous
def test_sessions_on_another_database_are_refused(sync_ledger: Ledger) -> None:
    """What could not commit as one is refused when the function is decorated."""
    elsewhere = sessionmaker(sqlalchemy.create_engine("sqlite:///elsewhere.db"))
    asynchronous_sessions = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///elsewhere.db"))
    autocommit = sessionmaker(sync_ledger.sync_engine.execution_options(isolation_level="AUTOCOMMIT"))

    for sessions in (elsewhere, asynchronous_sessions, autocommit):
        with pytest.raises(ConfigurationError):
            idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(lambda: None)
    with pytest.raises(ConfigurationError, match="SQLStore"):
        idempotent(MemoryStore(), key=lambda: "k", session=sync_ledger.sessions)(lambda: None)
    with pytest.raises(ConfigurationError, match="fail_open"):
        idempotent(
            sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=Policy(on_store_error="fail_open")
        )(lambda: None)
    with pytest.raises(ConfigurationError, match="lock_timeout"):
        idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, lock_timeout=-1)(lambda: None)


@pytest.mark.stores("sqlite")
def test_sqlite_creates_the_table_in_the_first_transaction(store_target: Target) -> None:
    """A joined function on a new SQLite file needs no migration."""
    with open_sync_ledger(store_target) as ledger:

        @idempotent(ledger.store, key=lambda what: what, session=ledger.sessions)
        def order(what: str, session: Any) -> str:
            session.execute(ledger.insert(what))
            return what

        assert order("tea") == order("tea") == "tea"
        assert ledger.effects_sync() == ["tea"]


@pytest.mark.stores("postgres")
async def test_a_store_of_its_own_engine_serves_both_sides(target: Target) -> None:
    """One store opened by URL joins the sessions of async and of sync functions on the same database."""
    async with target.opened() as store, open_ledger(target) as ledger:
        engine = sqlalchemy.create_engine(with_driver(target.url, "postgresql+psycopg"))

        @idempotent(store, key=lambda what: what, name="order", session=ledger.sessions)
        async def order(what: str, session: Any) -> str:
            await session.execute(ledger.insert(what))
            return "async"

        @idempotent(store, key=lambda what: what, name="order", session=sessionmaker(engine))
        def order_sync(what: str, session: Any) -> str:
            session.execute(ledger.insert(what))
            return "sync"

        assert await order("tea") == "async"
        assert await asyncio.to_thread(order_sync, "tea") == "async"
        engine.dispose()
        assert await ledger.effects() == ["tea"]


@synchronous
def test_sessions_on_a_connection_are_refused(sync_ledger: Ledger) -> None:
    """Its transaction is its owner's to commit, and to roll back."""
    with sync_ledger.sync_engine.connect() as connection:
        sessions: Any = sessionmaker(connection)

        with pytest.raises(ConfigurationError, match="bound to a connection"):
            idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(lambda session: None)


@synchronous
def test_a_version_of_sqlalchemy_that_cannot_be_guarded_is_refused(
    sync_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What refuses a commit of the connection is a method of SQLAlchemy's own, which a later version may not have."""
    ran: list[str] = []

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        ran.append("order")

    monkeypatch.delattr(sqlalchemy.Connection, "_commit_impl")

    with pytest.raises(ConfigurationError, match="version of SQLAlchemy"):
        order()
    assert ran == []


def test_sessions_that_commit_in_two_phases_are_refused() -> None:
    """What is prepared may be committed by anybody who knows its name."""
    engine = sqlalchemy.create_engine("sqlite:///records.db")
    sessions: Any = sessionmaker(engine, twophase=True)

    with pytest.raises(ConfigurationError, match="twophase"):
        idempotent(SQLStore(engine), key=lambda: "k", session=sessions)(lambda session: None)


@pytest.mark.stores("sqlite", "postgres", "mariadb")
def test_an_engine_that_commits_by_itself_is_refused(target: Target) -> None:
    """However AUTOCOMMIT was set, the effect would stay behind a rollback, so nothing runs."""
    engine = sqlalchemy.create_engine(target.sync_url, isolation_level="AUTOCOMMIT")
    ledger = Ledger(target, engine)
    ran: list[str] = []

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    def order() -> None:
        ran.append("order")

    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        order()
    assert ran == []
    engine.dispose()


@pytest.mark.stores("sqlite")
def test_sessions_on_two_databases_are_refused(sync_ledger: Ledger) -> None:
    """What goes to another database is committed by itself."""

    class Other:
        pass

    other = sqlalchemy.create_engine("sqlite://")
    sessions = sessionmaker(sync_ledger.engine, binds={Other: other})

    def order() -> None: ...

    with pytest.raises(ConfigurationError, match="more than one bind"):
        idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(order)
    other.dispose()


@asynchronous
async def test_nothing_is_left_open_in_the_pool(target: Target) -> None:
    """A transaction that a refused commit has ended half-way is rolled back before anybody else gets its connection."""
    async with open_ledger(target, pool_size=1, max_overflow=0) as ledger:
        running = asyncio.Event()

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        async def order(session: Any) -> None:
            await session.execute(ledger.insert("tea"))
            if running.is_set():
                return
            with pytest.raises(TransactionError):
                await (await session.connection()).commit()
            running.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(order())
        await running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with ledger.sessions() as other:
            await other.execute(ledger.everything)
            await other.commit()

        assert await ledger.effects() == []
        await order()
        assert await ledger.effects() == ["tea"]


@synchronous
def test_nothing_is_left_open_in_the_pool_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for an interrupt that comes while the commit is about to be sent."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))

    interrupts = [KeyboardInterrupt()]

    @sqlalchemy.event.listens_for(sync_ledger.sync_engine, "commit")
    def interrupt(_: Any) -> None:
        if interrupts:
            raise interrupts.pop()

    with pytest.raises(KeyboardInterrupt):
        order()
    with sync_ledger.sessions() as other:
        other.execute(sync_ledger.everything)
        other.commit()

    assert sync_ledger.effects_sync() == []
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@pytest.mark.stores("sqlite")
def test_sessions_that_do_not_begin_by_themselves_are_refused(sync_ledger: Ledger) -> None:
    """Nobody would begin their transaction."""
    sessions = sessionmaker(sync_ledger.sync_engine, autobegin=False)

    with pytest.raises(ConfigurationError, match="autobegin"):
        idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(lambda: None)


@asynchronous
async def test_a_session_that_is_used_again_holds_no_connection_and_commits_nothing(target: Target) -> None:
    """What a task makes of the session after its operation is refused, each time, and leaves the pool alone."""
    async with open_ledger(target, pool_size=1, max_overflow=0) as ledger:
        kept: list[Any] = []

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        async def order(session: Any) -> None:
            kept.append(session)
            await session.execute(ledger.insert("tea"))

        await order()
        for refused in (TransactionError, sqlalchemy.exc.InvalidRequestError):
            with pytest.raises(refused):
                await kept[0].execute(ledger.insert("cup"))

        # The only connection of the pool.
        assert await ledger.effects() == ["tea"]


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite://"])
def test_a_store_whose_engine_serves_the_other_kind_of_function_is_refused(url: str) -> None:
    """Without a session the store's own engine is used, also to count attempts."""
    awaited = url.startswith("sqlite://")
    path = url + "/records.db"
    store = SQLStore(sqlalchemy.create_engine(path) if awaited else create_async_engine(path))

    async def order_async() -> None: ...

    def order() -> None: ...

    with pytest.raises(ConfigurationError, match="is awaited" if awaited else "is not awaited"):
        idempotent(store, key=lambda: "k")(order_async if awaited else order)  # type: ignore[arg-type]
