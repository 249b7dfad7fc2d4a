"""Steps in one transaction with their entry: both commit, or neither does, and the outcome is never unknown."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker

from idempotency import current
from idempotency._sagas.journal import Open, Write
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox import Outbox
from idempotency.saga import (
    SagaFailedError,
    SagaLostError,
    SagaPendingError,
    saga,
    step,
    step_sync,
)
from idempotency.stores.memory import MemoryStore
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_ledger
from tests.kit.sagas import FAULTS, KilledError, do, meet, meet_sync, states, take_back
from tests.kit.servers import with_port
from tests.kit.targets import Target
from tests.kit.tcp_proxy import Proxy

JOINED = pytest.mark.stores(*JOINED_KINDS)

LEDGERS: list[Ledger] = []
"""That of the running test, for functions at the top of this module."""


@pytest.fixture
async def joined(ledger: Ledger) -> Ledger:
    """A ledger with the tables of sagas."""
    await ledger.store.create_saga_schema()
    LEDGERS[:] = [ledger]
    return ledger


async def pay(what: str, *, session: Any) -> str:
    await session.execute(LEDGERS[0].insert(what))
    await meet(what)
    return f"{what} paid"


async def refund(what: str, *, result: str | None, session: Any) -> None:
    await session.execute(LEDGERS[0].insert(f"refund of {result}"))
    await meet(f"refund {what}")


def shopping(ledger: Ledger, **options: Any) -> Any:
    @saga(ledger.store, name="shop", session=ledger.sessions, **options)
    async def shop() -> str:
        paid = await step("pay", pay, "book", undo=refund)
        await step("mail", do, "mail")
        return paid

    return shop


@JOINED
async def test_effect_and_entry_commit_together(joined: Ledger, done: list[Any]) -> None:
    shop = shopping(joined)
    for _ in range(2):
        assert await shop(key="7") == "book paid"
    assert await joined.effects() == ["book"]
    assert await states(shop) == {"step:pay": "DONE", "step:mail": "DONE"}


@JOINED
async def test_an_effect_that_is_not_committed_did_not_happen(joined: Ledger, done: list[Any]) -> None:
    """A crash leaves nothing: neither is the step unknown, nor is it undone."""
    shop = shopping(joined)
    FAULTS["book"] = [KilledError(), ValueError("no")]
    with pytest.raises(KilledError):
        await shop(key="7")
    assert await joined.effects() == []
    assert await states(shop) == {}
    with pytest.raises(SagaFailedError, match="ValueError"):
        await shop(key="7")
    assert await joined.effects() == []


@JOINED
async def test_a_time_out_rolls_the_effect_back(joined: Ledger, done: list[Any]) -> None:
    @saga(joined.store, name="shop", session=joined.sessions)
    async def shop() -> str:
        return await step("pay", pay, "book", undo=refund, timeout=0.1)

    FAULTS["book"] = [asyncio.Event().wait]
    with pytest.raises(SagaFailedError) as failed:
        await shop(key="7")
    assert failed.value.failure.type == "TimeoutError"
    assert await joined.effects() == []
    assert await states(shop) == {"step:pay": "FAILED", "undo:pay": "SKIPPED"}


@JOINED
async def test_an_undo_commits_with_its_entry(joined: Ledger, done: list[Any]) -> None:
    shop = shopping(joined)
    FAULTS["mail"] = [ValueError("no")]
    FAULTS["refund book"] = [OSError(), KilledError()]
    with pytest.raises(KilledError):
        await shop(key="7")
    with pytest.raises(SagaFailedError):
        await shop(key="7")
    assert await joined.effects() == ["book", "refund of book paid"]
    assert await states(shop) == {"step:pay": "DONE", "step:mail": "FAILED", "undo:pay": "DONE"}


# SQLite has one writer at a time: the transaction of the first one would keep the second from the saga.
@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_an_owner_that_was_overtaken_commits_nothing(joined: Ledger, done: list[Any]) -> None:
    shop, owners, journal = shopping(joined, lease=2.0), list[str](), joined.store.journal

    async def without_renewals(request: Any) -> Any:
        if isinstance(request, Open):
            owners.append(request.token)
        if isinstance(request, Write) and request.token == owners[0] and not request.entries:
            raise StoreError("away")
        return await journal(request)

    async def until_lost() -> None:
        operation = current()
        assert operation is not None
        await operation.lost

    joined.store.journal = without_renewals  # type: ignore[method-assign]
    FAULTS["book"] = [until_lost]
    first = asyncio.create_task(shop(key="7"))
    async with asyncio.timeout(20):
        while not owners or FAULTS["book"]:
            await asyncio.sleep(0.01)
        while True:
            with suppress(SagaPendingError):
                assert await shop(key="7") == "book paid"
                break
            await asyncio.sleep(0.02)
    with pytest.raises(SagaLostError):
        await first
    assert await joined.effects() == ["book"]


@JOINED
async def test_a_result_that_cannot_be_recorded_rolls_the_effect_back(joined: Ledger) -> None:
    async def wrong(*, session: Any) -> Any:
        await session.execute(joined.insert("lost"))
        return object()

    @saga(joined.store, name="shop", session=joined.sessions)
    async def shop() -> None:
        await step("pay", wrong)

    with pytest.raises(ConfigurationError, match="the result of the step 'pay' cannot be recorded"):
        await shop(key="7")
    assert await joined.effects() == []


@JOINED
@pytest.mark.parametrize("end", ["rollback", "close", "commit"])
async def test_a_step_that_ends_its_transaction_itself_is_not_done(joined: Ledger, end: str) -> None:
    """Its effect would be gone, or would be there without its entry. A savepoint is its own to roll back."""

    async def wrong(*, session: Any) -> None:
        await session.execute(joined.insert("lost"))
        await getattr(session, end)()
        await session.execute(joined.insert("after it"))

    async def right(*, session: Any) -> None:
        savepoint = await session.begin_nested()
        await session.execute(joined.insert("undone"))
        await savepoint.rollback()
        await session.execute(joined.insert("kept"))

    @saga(joined.store, name="shop", session=joined.sessions)
    async def shop(well: bool) -> None:
        await step("pay", right if well else wrong)

    with pytest.raises(SagaFailedError, match="TransactionError in the step 'pay', and is undone") as failed:
        await shop(False, key="7")
    assert "commit" in failed.value.failure.message
    assert await states(shop) == {"step:pay": "FAILED"}
    assert await joined.effects() == []
    await shop(True, key="8")
    assert await joined.effects() == ["kept"]


@JOINED
async def test_a_message_of_a_step_goes_to_the_outbox_with_the_effect(joined: Ledger, done: list[Any]) -> None:
    outbox = Outbox(f"{joined.name}_out"[:50])
    await outbox.create_schema(joined.engine)

    async def order(what: str, *, session: Any) -> str:
        await session.execute(joined.insert(what))
        operation = current()
        assert operation is not None
        operation.emit(aggregate_type="order", aggregate_id=7, type="Placed", payload={"what": what}, outbox=outbox)
        await meet(what)
        return operation.derive("charge")

    @saga(joined.store, name="shop", session=joined.sessions)
    async def shop() -> str:
        return await step("order", order, "book", retry=2)

    FAULTS["book"] = [ValueError("rolled back")]
    key = await shop(key="7")
    assert await shop(key="7") == key
    async with joined.engine.connect() as connection:  # type: ignore[union-attr]
        rows = (await connection.execute(select(outbox.tables.messages))).all()
    assert [row.type for row in rows] == ["Placed"]
    assert await joined.effects() == ["book"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_commit_whose_answer_is_lost_is_found(target: Target, done: list[Any]) -> None:
    """The entry is read again, and the step goes on with the result that is committed."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_ledger(target, with_port(target.url, proxy.port)) as ledger:
            await ledger.store.create_saga_schema()
            LEDGERS[:] = [ledger]
            lose: list[int] = []

            @sqlalchemy.event.listens_for(ledger.sync_engine, "commit")
            def cut(_: Any) -> None:
                if lose:
                    proxy.lose_replies(lose.pop())

            FAULTS["book"] = [lambda: lose.append(1)]
            assert await shopping(ledger)(key="7") == "book paid"
            assert not lose
            assert not FAULTS["book"]
            assert await ledger.effects() == ["book"]


class Stalled:
    """Holds up the commit of one step, until its caller is cancelled."""

    def __init__(self, ledger: Ledger) -> None:
        self.armed = False
        self.reached = asyncio.Event()
        loop = asyncio.get_running_loop()

        @sqlalchemy.event.listens_for(ledger.sync_engine, "commit")
        def stall(_: Any) -> None:
            if self.armed:
                self.armed = False
                loop.call_soon_threadsafe(self.reached.set)

    def arm(self) -> None:
        self.armed = True

    async def fail(self) -> None:
        await self.reached.wait()
        raise ValueError("no")


@JOINED
async def test_a_step_that_is_cancelled_while_it_commits_is_undone(joined: Ledger, done: list[Any]) -> None:
    """Its commit goes on. What is undone is read from the store, and not from what this run has seen."""
    stalled = Stalled(joined)

    @saga(joined.store, name="shop", session=joined.sessions)
    async def shop() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(step("pay", pay, "book", undo=refund))
            group.create_task(stalled.fail())

    FAULTS["book"] = [stalled.arm]
    with pytest.raises(SagaFailedError, match="ValueError"):
        await shop(key="7")
    assert await joined.effects() == ["book", "refund of book paid"]
    assert await states(shop) == {"step:pay": "DONE", "undo:pay": "DONE"}


@JOINED
async def test_a_pivot_that_is_cancelled_while_it_commits_is_seen(joined: Ledger, done: list[Any]) -> None:
    """After it nothing is undone."""
    stalled = Stalled(joined)

    @saga(joined.store, name="shop", session=joined.sessions)
    async def shop() -> None:
        await step("a", do, "a", undo=take_back)
        async with asyncio.TaskGroup() as group:
            group.create_task(step("pay", pay, "book", kind="pivot"))
            group.create_task(stalled.fail())

    FAULTS["book"] = [stalled.arm]
    with pytest.raises(SagaPendingError, match="after the pivot it failed with ValueError"):
        await shop(key="7")
    assert done == ["a"]
    assert await joined.effects() == ["book"]


@JOINED
async def test_sessions_of_another_database_are_refused(joined: Ledger) -> None:
    with pytest.raises(ConfigurationError):
        saga(joined.store, name="s", session=object())(do)  # type: ignore[call-overload]


@pytest.mark.stores("postgres", "mariadb")
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
async def test_sessions_are_refused_that_could_not_commit_once_the_lease_was_renewed(
    joined: Ledger, level: str
) -> None:
    """Each run of a step that takes longer than a third of the lease would be rolled back."""
    engine: Any = joined.engine
    by_engine = async_sessionmaker(engine.execution_options(isolation_level=level))
    for sessions in (by_engine, async_sessionmaker(engine, execution_options={"isolation_level": level})):
        with pytest.raises(ConfigurationError, match="sessions|commit"):
            saga(joined.store, name="s", session=sessions)(do)


def pay_sync(what: str, *, session: Any) -> str:
    session.execute(LEDGERS[0].insert(what))
    meet_sync(what)
    return f"{what} paid"


def refund_sync(what: str, *, result: str | None, session: Any) -> None:
    session.execute(LEDGERS[0].insert(f"refund of {result}"))
    meet_sync(f"refund {what}")


@pytest.mark.stores(*SYNC_JOINED_KINDS)
def test_in_threads_too(sync_ledger: Ledger, done: list[Any]) -> None:
    sync_ledger.store.create_saga_schema_sync()
    LEDGERS[:] = [sync_ledger]

    @saga(sync_ledger.store, name="shop", session=sync_ledger.sessions)
    def shop(fails: bool) -> str:
        paid = step_sync("pay", pay_sync, "book", undo=refund_sync)
        if fails:
            raise KeyError
        return paid

    FAULTS["book"] = [KilledError(), None]
    with pytest.raises(KilledError):
        shop(False, key="7")
    for _ in range(2):
        assert shop(False, key="7") == "book paid"
    FAULTS["refund book"] = [OSError()]
    with pytest.raises(SagaFailedError):
        shop(True, key="8")
    assert sync_ledger.effects_sync() == ["book", "book", "refund of book paid"]


@pytest.mark.stores(*SYNC_JOINED_KINDS)
def test_a_step_in_a_thread_that_rolls_back_is_not_done(sync_ledger: Ledger, done: list[Any]) -> None:
    sync_ledger.store.create_saga_schema_sync()

    def wrong(*, session: Any) -> str:
        session.execute(sync_ledger.insert("lost"))
        session.rollback()
        return "booked"

    @saga(sync_ledger.store, name="shop", session=sync_ledger.sessions)
    def shop() -> str:
        return step_sync("pay", wrong)

    with pytest.raises(SagaFailedError, match="TransactionError in the step 'pay', and is undone"):
        shop(key="7")
    assert sync_ledger.effects_sync() == []


@JOINED
async def test_a_saga_is_recorded_in_the_transaction_of_its_cause(joined: Ledger, done: list[Any]) -> None:
    """The saga and the order that needs it commit together, or neither is there."""
    shop = shopping(joined)

    async with joined.sessions() as session:
        await session.execute(joined.insert("order 7"))
        await shop.start(key="7", session=session)
        await session.rollback()
    assert await shop.look("7") is None

    async with joined.sessions() as session, session.begin():
        await session.execute(joined.insert("order 7"))
        assert await shop.start(key="7", session=session) == "7"
        assert await shop.start(key="7", session=session) == "7"
    assert await shop.resume("7") == "book paid"
    assert await joined.effects() == ["book", "order 7"]


async def test_only_a_database_records_a_saga_in_a_transaction(done: list[Any]) -> None:
    @saga(MemoryStore(), name="shop")
    async def shop() -> None: ...

    with pytest.raises(ConfigurationError, match=r"start\(session=...\) needs the capability JoinedJournaling"):
        await shop.start(key="7", session=object())
