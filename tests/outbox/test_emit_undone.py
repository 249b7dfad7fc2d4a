"""Messages of an operation vanish with the part of its effect that is rolled back, and only with that part."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy, current, idempotent
from idempotency.outbox import Outbox
from tests.kit.ledger import Ledger


def emit(outbox: Outbox, kind: str) -> None:
    operation: Any = current()
    operation.emit(aggregate_type="order", aggregate_id=7, type=kind, payload={}, outbox=outbox)


async def types(ledger: Ledger, outbox: Outbox) -> list[str]:
    messages = outbox.tables.messages
    async with ledger.sessions() as session:
        return list((await session.execute(select(messages.c.type).order_by(messages.c.seq))).scalars())


@pytest.mark.stores("sqlite", "postgres", "mariadb")
@pytest.mark.parametrize("policy", [Policy(), Policy(outcomes={ValueError: "store"})], ids=["plain", "in a savepoint"])
async def test_messages_of_a_savepoint_vanish_with_it(ledger: Ledger, outbox: Outbox, policy: Policy) -> None:
    @idempotent(ledger.store, key=lambda: "one", session=ledger.sessions, policy=policy)
    async def place(session: Any) -> None:
        emit(outbox, "first")
        outer = await session.begin_nested()
        async with session.begin_nested():
            emit(outbox, "undone with the outer one")
        emit(outbox, "undone")
        await outer.rollback()
        with pytest.raises(DBAPIError):
            await fail(session)
        async with session.begin_nested():
            emit(outbox, "released")
        emit(outbox, "last")

    async def fail(session: Any) -> None:
        async with session.begin_nested():
            emit(outbox, "failed")
            await session.execute(text("SELECT * FROM no_such_table"))

    await place()
    assert await types(ledger, outbox) == ["first", "released", "last"]


@pytest.mark.stores("sqlite")
def test_messages_of_a_savepoint_in_a_thread_vanish_with_it(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    @idempotent(sync_ledger.store, key=lambda: "one", session=sync_ledger.sessions)
    def place(session: Any) -> None:
        savepoint = session.begin_nested()
        emit(sync_outbox, "undone")
        savepoint.rollback()
        emit(sync_outbox, "last")

    place()
    with sync_ledger.sessions() as session:
        assert session.execute(select(sync_outbox.tables.messages.c.type)).scalars().all() == ["last"]


@pytest.mark.stores("sqlite", "postgres")
async def test_messages_of_a_request_vanish_with_its_rollback(ledger: Ledger, outbox: Outbox) -> None:
    async def place(request: Request) -> Response:
        session = request.state.idempotency.session
        emit(outbox, "before the transaction")
        await session.execute(ledger.insert("undone"))
        emit(outbox, "undone")
        await session.rollback()
        await session.execute(ledger.insert("instead"))
        emit(outbox, "instead")
        return Response(status_code=201)

    shop = Starlette(routes=[Route("/orders", place, methods=["POST"])])
    app = IdempotencyMiddleware(shop, store=ledger.store, session=ledger.sessions)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        assert (await client.post("/orders", headers={"Idempotency-Key": "one"})).status_code == 201
    assert await ledger.effects() == ["instead"]
    assert await types(ledger, outbox) == ["instead"]
