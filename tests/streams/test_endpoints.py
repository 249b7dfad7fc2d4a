"""Append in an endpoint of FastAPI, in the session that commits with the recorded response."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from idempotency import IdempotencyMiddleware
from idempotency.adapters.fastapi import session_of
from idempotency.streams import ConflictError, Streams
from tests.kit.ledger import Ledger
from tests.streams.kit import KINDS, NEW, Deposited, Withdrawn, all_of, append, apply

stores = pytest.mark.stores(*KINDS)


@stores
async def test_a_conflict_in_an_endpoint_is_answered_with_409_and_tried_again(ledger: Ledger, streams: Streams) -> None:
    """Another request has changed the account meanwhile. The retry, with the same key, runs again, and is replayed."""
    app = FastAPI()
    given: Any = Depends(session_of(ledger.sessions), scope="function")
    others = [5]

    @app.exception_handler(ConflictError)
    async def changed(_: object, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "changed meanwhile"}, 409)

    @app.post("/withdrawals")
    async def withdraw(session: AsyncSession = given) -> dict[str, int]:
        account, version = await streams.load_versioned(session, "a", apply, initial=NEW)
        if others:
            await append(ledger, streams, "a", others.pop())
        await streams.append(session, "a", [Withdrawn(1)], expected=version)
        return {"before": account.balance}

    app.add_middleware(IdempotencyMiddleware, store=ledger.store, session=ledger.sessions)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bank")
    await append(ledger, streams, "a", 1)
    async with client:
        answers: list[Any] = [await client.post("/withdrawals", headers={"Idempotency-Key": "k"}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [409, 200, 200]
    assert [answer.json() for answer in answers[1:]] == [{"before": 6}] * 2
    assert answers[2].headers["idempotent-replayed"] == "true"
    assert [event.data for event in await all_of(ledger, streams)] == [Deposited(1), Deposited(5), Withdrawn(1)]
