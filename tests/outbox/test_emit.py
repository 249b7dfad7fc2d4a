"""What is emitted commits or vanishes with its transaction, in whatever holds it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from sqlalchemy import delete, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy, current, idempotent
from idempotency.errors import EmitRefusedError, RecordedFailureError, StoreError, TransactionError
from idempotency.outbox import Limits, Message, Outbox
from idempotency.stores.memory import MemoryStore
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger
from tests.kit.targets import unique_name

ORDER: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": 7, "type": "OrderPlaced"}


async def rows_of(ledger: Ledger, outbox: Outbox) -> list[Any]:
    async with ledger.engine.connect() as connection:
        query = select(outbox.tables.messages).order_by(outbox.tables.messages.c.seq)
        return list((await connection.execute(query)).all())


@pytest.mark.stores(*JOINED_KINDS)
async def test_a_message_commits_or_vanishes_with_its_transaction(ledger: Ledger, outbox: Outbox) -> None:
    async with ledger.sessions() as session:
        await session.execute(ledger.insert("kept"))
        told = await outbox.emit(session, **ORDER, payload=b"\xff\0\\", headers={"tenant": "blue"})
        await session.commit()
        await session.execute(ledger.insert("undone"))
        await outbox.emit(session, **ORDER, payload={})
        await session.rollback()
    async with ledger.engine.begin() as connection:
        await outbox.emit(connection, **ORDER, payload=None, available_at=1_800_000_000)
    first, second = await rows_of(ledger, outbox)
    assert (str(first.id), first.aggregatetype, first.aggregateid, first.type) == (told, "order", "7", "OrderPlaced")
    assert (bytes(first.payload), first.headers, first.available_ms) == (b"\xff\0\\", '{"tenant":"blue"}', None)
    assert (second.payload, second.headers, second.available_ms) == (None, None, 1_800_000_000_000)
    assert (first.bucket, first.attempts, first.seq < second.seq) == (53, 0, True)
    assert await ledger.effects() == ["kept"]


@pytest.mark.stores(*SYNC_JOINED_KINDS)
def test_a_message_commits_or_vanishes_with_a_transaction_of_a_thread(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    @idempotent(sync_ledger.store, key=lambda: "one", session=sync_ledger.sessions)
    def place(session: Any) -> None:
        current().emit(**ORDER, payload=b"\xff", outbox=sync_outbox)  # type: ignore[union-attr]

    with sync_ledger.sessions() as session:
        sync_outbox.emit_sync(session, **ORDER, payload=b"\0")
        session.rollback()
        sync_outbox.emit_sync(session, **ORDER, payload=b"\1")
        session.commit()
    place()
    place()
    with sync_ledger.engine.connect() as connection:
        payloads = connection.execute(select(sync_outbox.tables.messages.c.payload)).scalars()
        assert [bytes(payload) for payload in payloads] == [b"\1", b"\xff"]


@contextmanager
def counting(ledger: Ledger) -> Iterator[list[str]]:
    """Collect the statements of the ledger's engine."""
    statements: list[str] = []

    def collect(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(ledger.sync_engine, "before_cursor_execute", collect)
    yield statements
    event.remove(ledger.sync_engine, "before_cursor_execute", collect)


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_the_messages_of_an_operation_are_one_statement_before_its_commit(ledger: Ledger, outbox: Outbox) -> None:
    @idempotent(ledger.store, key=str, session=ledger.sessions)
    async def place(count: int, session: Any) -> None:
        for number in range(count):
            current().emit(**ORDER, payload=number, outbox=outbox)  # type: ignore[union-attr]

    await place(0)
    with counting(ledger) as without:
        await place(1)
    emitting = [statement for statement in without if "_out" in statement and "INSERT" in statement]
    with counting(ledger) as with_five:
        await place(5)
    assert len(emitting) == 1
    assert len(with_five) == len(without)
    assert [bytes(row.payload) for row in await rows_of(ledger, outbox)] == [b"0", b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.stores("postgres")
async def test_a_run_that_is_repeated_emits_the_same_ids(ledger: Ledger, outbox: Outbox) -> None:
    emitted: list[str] = []

    @idempotent(ledger.store, key=lambda: "one", session=ledger.sessions)
    async def place(session: Any) -> None:
        operation = current()
        assert operation is not None
        emitted.append(operation.emit(**ORDER, payload={}, outbox=outbox))
        emitted.append(await outbox.emit(session, **ORDER, payload={}))
        if len(emitted) == 2:
            raise ConnectionError("the first run fails")

    with pytest.raises(ConnectionError):
        await place()
    assert await rows_of(ledger, outbox) == []
    await place()
    assert emitted[:2] == emitted[2:]
    assert emitted[0] != emitted[1]
    # The second one was written at once, the first one before the commit.
    assert [str(row.id) for row in await rows_of(ledger, outbox)] == [emitted[3], emitted[2]]


@pytest.mark.stores("postgres", "sqlite", "mariadb")
async def test_what_was_rolled_back_gives_its_ids_to_what_is_emitted_next(ledger: Ledger, outbox: Outbox) -> None:
    """A run that had to try again commits the ids that its repetition has, which need not try again."""
    emitted: list[list[str]] = []

    @idempotent(MemoryStore(), key=lambda: "one")
    async def place() -> None:
        async with ledger.sessions() as session:
            if not emitted:
                await outbox.emit(session, **ORDER, payload={})
                await outbox.emit(session, **ORDER, payload={})
                await session.rollback()
            emitted.append([await outbox.emit(session, **ORDER, payload={})])
            await session.commit()
            emitted[-1].append(await outbox.emit(session, **ORDER, payload={}))
            await session.commit()
        if len(emitted) == 1:
            raise ConnectionError("before the record is written")

    with pytest.raises(ConnectionError):
        await place()
    # A relay has published them.
    async with ledger.sessions.begin() as session:
        await session.execute(delete(outbox.tables.messages))
    await place()

    assert emitted[0] == emitted[1]
    assert emitted[0][0] != emitted[0][1]


@pytest.mark.stores("postgres", "sqlite", "mariadb")
async def test_what_a_savepoint_took_back_gives_its_ids_to_what_is_emitted_next(ledger: Ledger, outbox: Outbox) -> None:
    """So that a repetition in which nothing fails has the same ids. What came before the savepoint keeps its own."""
    committed: list[list[str]] = []

    @idempotent(MemoryStore(), key=lambda: "one")
    async def place() -> None:
        async with ledger.sessions() as session:
            first = [await outbox.emit(session, **ORDER, payload={})]
            if not committed:
                for _ in range(2):
                    outer = await session.begin_nested()
                    await outbox.emit(session, **ORDER, payload={})
                    inner = await session.begin_nested()
                    await outbox.emit(session, **ORDER, payload={})
                    await inner.rollback()
                    async with session.begin_nested():
                        await outbox.emit(session, **ORDER, payload={})
                    await outer.rollback()
            committed.append([*first, *[await outbox.emit(session, **ORDER, payload={}) for _ in range(3)]])
            if len(committed) == 1:
                raise ConnectionError("nothing is committed")
            await session.commit()

    with pytest.raises(ConnectionError):
        await place()
    await place()
    assert committed[0] == committed[1]
    assert len(set(committed[0])) == 4


@pytest.mark.stores("postgres", "sqlite")
async def test_the_messages_of_an_effect_that_is_undone_vanish_although_its_failure_is_recorded(
    ledger: Ledger, outbox: Outbox
) -> None:
    policy = Policy(outcomes={ValueError: "store"})

    @idempotent(ledger.store, key=lambda: "one", session=ledger.sessions, policy=policy)
    async def place(session: Any) -> None:
        current().emit(**ORDER, payload={}, outbox=outbox)  # type: ignore[union-attr]
        raise ValueError("for good")

    with pytest.raises(ValueError, match="for good"):
        await place()
    with pytest.raises(RecordedFailureError):
        await place()
    assert await rows_of(ledger, outbox) == []


@pytest.mark.stores("postgres", "sqlite")
async def test_the_messages_of_a_request_commit_with_its_response(ledger: Ledger, outbox: Outbox) -> None:
    async def place(request: Request) -> Response:
        status = int(request.query_params["status"])
        request.state.idempotency.emit(**ORDER, payload=status, outbox=outbox)

        async def afterwards() -> None:
            with pytest.raises(TransactionError, match="settled"):
                request.state.idempotency.emit(**ORDER, payload="late", outbox=outbox)
            settled.append(status)

        return Response(status_code=status, background=BackgroundTask(afterwards))

    settled: list[int] = []
    shop = Starlette(routes=[Route("/orders", place, methods=["POST"])])
    app = IdempotencyMiddleware(shop, store=ledger.store, session=ledger.sessions)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        for status in (201, 201, 503, 422):
            await client.post(f"/orders?status={status}", headers={"Idempotency-Key": f"key-{status}"})
    assert settled == [201, 503, 422]
    assert [bytes(row.payload) for row in await rows_of(ledger, outbox)] == [b"201", b"422"]


async def test_a_leased_operation_has_no_transaction_to_emit_in() -> None:
    @idempotent(MemoryStore(), key=lambda: "one")
    async def place() -> None:
        current().emit(**ORDER, payload={})  # type: ignore[union-attr]

    with pytest.raises(TransactionError, match="give the middleware or decorator session=, a sessionmaker"):
        await place()


@pytest.mark.stores(*JOINED_KINDS)
async def test_a_session_without_a_transaction_is_refused(ledger: Ledger, outbox: Outbox) -> None:
    engine: AsyncEngine = ledger.engine.execution_options(isolation_level="AUTOCOMMIT")  # type: ignore[assignment]
    async with async_sessionmaker(engine)() as session:
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            await outbox.emit(session, **ORDER, payload={})
    async with async_sessionmaker(ledger.engine, autobegin=False)() as session:
        with pytest.raises(TransactionError, match="no transaction to emit in"):
            await outbox.emit(session, **ORDER, payload={})
        async with session.begin():
            await outbox.emit(session, **ORDER, payload={})
    assert len(await rows_of(ledger, outbox)) == 1


@pytest.mark.stores(*JOINED_KINDS)
async def test_a_missing_table_is_made_on_sqlite_and_else_named_with_its_remedy(ledger: Ledger) -> None:
    outbox = Outbox(unique_name("absent"))
    async with ledger.sessions() as session:
        if ledger.engine.dialect.name == "sqlite":
            await outbox.emit(session, **ORDER, payload={})
            await session.rollback()
            await outbox.emit(session, **ORDER, payload={})
            await session.commit()
            assert len(await rows_of(ledger, outbox)) == 1
        else:
            with pytest.raises(StoreError, match="has no table absent.*run `idempotency outbox schema create`"):
                await outbox.emit(session, **ORDER, payload={})


@dataclasses.dataclass
class Line:
    item: str
    price: Decimal


class Customer(BaseModel):
    id: uuid.UUID
    since: date


PAYLOADS: list[tuple[object, bytes | None]] = [
    (None, None),
    (b"", b""),
    (b"\xff\0", b"\xff\0"),
    ({}, b"{}"),
    ({"a": [1, 2.5, True, None, "ü"]}, b'{"a":[1,2.5,true,null,"\\u00fc"]}'),
    ({"price": Decimal("1.50")}, b'{"price":"1.50"}'),
    (("a", uuid.UUID(int=1)), b'["a","00000000-0000-0000-0000-000000000001"]'),
    ({"at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}, b'{"at":"2026-01-02T03:04:05+00:00"}'),
    (Line("pen", Decimal("2")), b'{"item":"pen","price":"2"}'),
    ([Line("pen", Decimal("2"))], b'[{"item":"pen","price":"2"}]'),
    (
        Customer(id=uuid.UUID(int=2), since=date(2026, 1, 2)),
        b'{"id":"00000000-0000-0000-0000-000000000002","since":"2026-01-02"}',
    ),
]


@pytest.mark.parametrize(("payload", "written"), PAYLOADS)
def test_a_payload_is_written_as_it_is_or_as_json(payload: object, written: bytes | None) -> None:
    assert Outbox().row("order", 7, "OrderPlaced", payload, None, None)["payload"] == written


class Odd:
    """Of a type that nothing can write."""


CYCLE: list[Any] = []
CYCLE.append(CYCLE)

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"payload": Odd()}, "cannot be written as JSON.*Odd"),
    ({"payload": {"deep": [Odd()]}}, "cannot be written as JSON.*Odd"),
    ({"payload": {1: 2}}, "a dict has a key of type int"),
    ({"payload": float("nan")}, "cannot be written as JSON"),
    ({"payload": CYCLE}, "nested more than 100 levels deep"),
    ({"payload": b"x" * 1_000_001}, "1000001.* bytes|1000\\d+ bytes"),
    ({"aggregate_type": ""}, "aggregate_type must be text of 1 to 255 characters"),
    ({"aggregate_type": "x" * 256}, "aggregate_type must be text"),
    ({"aggregate_id": "a\0b"}, "aggregate_id must be text"),
    ({"aggregate_id": None}, "aggregate_id must be text.*not NoneType: flush the session"),
    ({"aggregate_id": True}, "aggregate_id must be text.*not bool"),
    ({"aggregate_id": "\ud800"}, "aggregate_id must be text"),
    ({"type": 3.5}, "type must be text"),
    ({"headers": {"id": "7"}}, "the header 'id' is set by the outbox itself"),
    ({"headers": {"EventType": "7"}}, "the header 'EventType' is set by the outbox itself"),
    ({"headers": {"a b": "7"}}, "not a token"),
    ({"headers": {"a": "7\nb: 8"}}, "the header 'a' must be text in one line"),
    ({"headers": {"a": 7}}, "the header 'a' must be text in one line"),
    ({"available_at": datetime(2026, 1, 1)}, "available_at must have its time zone"),
    ({"available_at": -1}, "available_at must be a time"),
    ({"available_at": float("inf")}, "available_at must be a time"),
    ({"available_at": "tomorrow"}, "available_at must be a time"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_what_cannot_be_written_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    message = {**ORDER, "payload": {}, "headers": None, "available_at": None, **change}
    with pytest.raises(EmitRefusedError, match=reason):
        Outbox().row(**message)


def test_what_the_route_cannot_carry_is_refused() -> None:
    narrow = Outbox(limits=Limits(most_bytes=100, most_headers=2, tombstones=False, text_only=True))

    def row(payload: object, headers: dict[str, str] | None = None) -> Any:
        return narrow.row("order", 7, "T", payload, headers, None)

    assert row(b"text")["payload"] == b"text"
    for payload, headers, reason in (
        (b"x" * 90, None, "bytes with its key and headers; 100 are allowed"),
        (b"x", {"more": "y"}, "it has 3 headers"),
        (None, None, "no payload"),
        (b"\xff", None, "not text in UTF-8"),
    ):
        with pytest.raises(EmitRefusedError, match=reason):
            row(payload, headers)


def test_the_running_trace_is_in_the_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = SimpleNamespace(inject=lambda carrier: carrier.update(traceparent="00-1-2-01", baggage="a=b"))
    module: Any = ModuleType("opentelemetry.propagate")
    module.inject = tracing.inject
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.propagate", module)
    row = Outbox().row("order", 7, "T", {}, {"baggage": "mine"}, None)
    assert row["headers"] == '{"traceparent":"00-1-2-01","baggage":"mine"}'


def test_ids_outside_of_operations_are_in_the_order_of_time() -> None:
    ids = [Outbox().row("order", 7, "T", {}, None, None)["id"] for _ in range(3)]
    assert all(uuid.UUID(each).version == 7 and uuid.UUID(each).variant == uuid.RFC_4122 for each in ids)
    assert [each[:12] for each in ids] == sorted(each[:12] for each in ids)
    assert len(set(ids)) == 3


def test_a_message_has_the_headers_of_debezium_then_its_own() -> None:
    message = Message(
        id="1", aggregate_type="order", aggregate_id="7", type="Placed", payload=b"", headers={"a": "b", "id": "x"}
    )
    assert message.wire_headers() == {"id": "1", "eventType": "Placed", "a": "b"}
    assert message.key == ("order", "7")
