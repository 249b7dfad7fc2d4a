"""The ids of what an operation emits: the same at each run, whatever else a run emits, and from wherever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from idempotency import current, idempotent
from idempotency._outbox.emit import bucket_of
from idempotency._rules import Claim
from idempotency.errors import TransactionError
from idempotency.operation import Operation
from idempotency.outbox import Outbox
from idempotency.stores.memory import MemoryStore
from tests.kit.ledger import Ledger

ORDER: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": 7, "payload": {}}


@pytest.mark.stores("sqlite")
async def test_each_message_has_its_own_id_although_a_run_emits_fewer(ledger: Ledger, outbox: Outbox) -> None:
    runs: list[dict[str, str]] = []

    @idempotent(ledger.store, key=lambda: "one")
    async def place() -> None:
        ids: dict[str, str] = {}
        runs.append(ids)
        # The order exists at the second run: the first one has committed it, and the message beside it.
        for kind in ("Created", "Paid") if len(runs) == 1 else ("Paid",):
            async with ledger.sessions.begin() as session:
                ids[kind] = await outbox.emit(session, **ORDER, type=kind)
        if len(runs) == 1:
            raise ConnectionError("the first run fails")

    with pytest.raises(ConnectionError):
        await place()
    await place()
    assert runs[0]["Created"] != runs[0]["Paid"] == runs[1]["Paid"]


@pytest.mark.stores("postgres")
async def test_an_emit_that_got_no_connection_is_tried_again_with_the_same_id(ledger: Ledger, outbox: Outbox) -> None:
    """The engine's pool is empty for a moment at the first run, and not at the second one."""
    ids: list[str] = []
    small = create_async_engine(ledger.engine.url, pool_size=1, max_overflow=0, pool_timeout=0)

    @idempotent(MemoryStore(), key=lambda: "one")
    async def place() -> None:
        if not ids:
            async with small.connect() as only, AsyncSession(small) as session:
                assert (await only.execute(text("SELECT 1"))).scalar() == 1
                with pytest.raises(PoolTimeoutError):
                    await outbox.emit(session, **ORDER, type="Placed")
        async with ledger.sessions() as session:
            ids.append(await outbox.emit(session, **ORDER, type="Placed"))
        if len(ids) == 1:
            raise ConnectionError("the first run fails")

    with pytest.raises(ConnectionError):
        await place()
    await place()
    assert ids[0] == ids[1]
    await small.dispose()


@pytest.mark.stores("sqlite")
async def test_ids_belong_to_the_operation_that_is_asked_to_emit(ledger: Ledger, outbox: Outbox) -> None:
    runs: list[list[str]] = []

    @idempotent(ledger.store, key=lambda: "outer", session=ledger.sessions, name="outer")
    async def outer(session: Any) -> None:
        operation: Any = current()

        def emit() -> str:
            emitted: str = operation.emit(**ORDER, type="Placed", outbox=outbox)
            return emitted

        @idempotent(MemoryStore(), key=lambda: "inner")
        async def inner() -> str:
            return emit()

        # A thread of the executor does not see the operation by itself.
        loop = asyncio.get_running_loop()
        runs.append([emit(), await inner(), await loop.run_in_executor(None, emit), operation.derive("message:1")])
        if len(runs) == 1:
            raise ConnectionError("the first run fails")

    with pytest.raises(ConnectionError):
        await outer()
    await outer()
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


@pytest.mark.stores("sqlite", "postgres")
async def test_what_is_emitted_after_the_end_is_refused(ledger: Ledger, outbox: Outbox) -> None:
    ended = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    @idempotent(ledger.store, key=lambda fails: str(fails), session=ledger.sessions)
    async def place(fails: bool, session: Any) -> None:
        operation: Any = current()

        async def afterwards() -> None:
            await ended.wait()
            operation.emit(**ORDER, type="Late", outbox=outbox)

        tasks.append(asyncio.create_task(afterwards()))
        if fails:
            raise ValueError("on purpose")

    await place(False)
    with pytest.raises(ValueError, match="on purpose"):
        await place(True)
    ended.set()
    for task in tasks:
        with pytest.raises(TransactionError, match="has ended"):
            await task
    async with ledger.engine.connect() as connection:
        assert (await connection.execute(select(outbox.tables.messages))).all() == []


@pytest.mark.stores("sqlite")
def test_what_is_emitted_after_the_end_in_a_thread_is_refused(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    operations: list[Any] = []

    @idempotent(sync_ledger.store, key=lambda: "one", session=sync_ledger.sessions)
    def place(session: Any) -> None:
        operations.append(current())

    place()
    with pytest.raises(TransactionError, match="has ended"):
        operations[0].emit(**ORDER, type="Late", outbox=sync_outbox)


def test_ids_that_come_back_are_given_again_the_first_ones_first() -> None:
    """Else what is written after a conflict could have the id of the second message, and its repetition the first."""
    operation = Operation(Claim(scope="s", key="k", fingerprint=b"", lease=1.0, ttl=1.0), attempt=1)
    first, second, third = (operation.next_message_id("order") for _ in range(3))
    for returned in (third, first, second):
        operation.return_message_id(returned, "order")
    assert [operation.next_message_id("order") for _ in range(3)] == [first, second, third]


@pytest.mark.stores("mariadb")
def test_the_ids_of_a_transaction_in_two_phases_come_back_with_its_rollback_only(
    sync_ledger: Ledger, sync_outbox: Outbox
) -> None:
    """What is committed keeps its id, also where the same connection rolls back another transaction later."""

    @idempotent(MemoryStore(), key=lambda: "one")
    def place() -> list[str]:
        with sync_ledger.engine.connect() as connection:

            def emitted() -> str:
                return sync_outbox.emit_sync(connection, **ORDER, type="Placed")

            with connection.begin_twophase() as transaction:
                ids = [emitted()]
                transaction.rollback()
            with connection.begin_twophase() as transaction:
                ids.append(emitted())
                transaction.prepare()
                transaction.commit()
            with connection.begin() as later:
                ids.append(emitted())
                later.rollback()
            with connection.begin():
                ids.append(emitted())
            return ids

    undone, committed, rolled_back, last = place()
    assert undone == committed
    assert rolled_back == last != committed


def test_the_ids_and_buckets_of_released_versions_stay() -> None:
    """They are stored, here and at consumers: an upgrade in the middle of a repetition changes neither."""
    claim = Claim(scope="billing", key="order-7", fingerprint=b"f" * 32, lease=30.0, ttl=60.0)
    operation = Operation(claim, attempt=1)
    ids = [operation.next_message_id("order", "7", "Placed") for _ in range(2)]
    assert ids == ["eb7d71a6-1890-53a7-b224-2e11051234d2", "c674f97c-87f8-5577-8d42-b2dc3b74ec93"]
    keys = [("order", "7"), ("order", "ü"), ("Zahlung", "a/b")]
    assert [bucket_of(*key) for key in keys] == [53, 48, 63]
