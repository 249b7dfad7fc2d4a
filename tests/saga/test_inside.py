"""Sagas in an operation: the key comes from the request, the message or the call, so that a retry goes on with it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, current, idempotent
from idempotency.consumer import idempotent_consumer
from idempotency.errors import TransactionError
from idempotency.saga import SagaOperations, SagaPendingError, saga, step, step_sync, wait_for, wait_for_sync
from idempotency.testing import FaultyStore
from tests.kit.sagas import FAULTS, do, do_sync

DERIVED: list[str] = []


def shopping(faulty: FaultyStore) -> Any:
    DERIVED.clear()

    async def charge(what: str) -> str:
        operation = current()
        assert operation is not None
        DERIVED.append(operation.derive("charge"))
        return await do(what)

    @saga(faulty, name="shop")
    async def shop(what: str) -> str:
        await step("charge", charge, what)
        await wait_for("approval")
        return await step("mail", do, "mail")

    return shop


async def approve(faulty: FaultyStore, saga: Any) -> str:
    """Approve the only saga; return its key."""
    [view] = await SagaOperations(faulty).sagas(name="shop")
    await saga.signal(view.key, "approval")
    return view.key


async def test_in_a_function(faulty: FaultyStore, done: list[Any]) -> None:
    """The function is called again, since a saga that waits is no outcome; the saga goes on."""
    shop = shopping(faulty)

    @idempotent(faulty, key=lambda what: what)
    async def order(what: str) -> str:
        return str(await shop(what))

    for _ in range(2):
        with pytest.raises(SagaPendingError):
            await order("book")
    key = await approve(faulty, shop)
    for _ in range(2):
        assert await order("book") == "mail done"
    assert await shop.resume(key) == "mail done"
    assert done == ["book", "mail"]
    with pytest.raises(SagaPendingError):
        await order("pen")
    assert len(set(DERIVED)) == 2


async def test_in_a_request(faulty: FaultyStore, done: list[Any]) -> None:
    shop = shopping(faulty)

    async def order(request: Request) -> JSONResponse:
        try:
            return JSONResponse({"result": await shop((await request.body()).decode())})
        except SagaPendingError as error:
            return JSONResponse({"waits": error.reason}, 503)

    app = IdempotencyMiddleware(Starlette(routes=[Route("/orders", order, methods=["POST"])]), store=faulty)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:

        async def post(key: str) -> Any:
            return await client.post("/orders", content=b"book", headers={"Idempotency-Key": key})

        assert (await post('"7"')).json() == {"waits": "it waits for the signal approval"}
        await approve(faulty, shop)
        assert (await post('"7"')).json() == {"result": "mail done"}
        assert (await post('"7"')).json() == {"result": "mail done"}
        assert (await post('"8"')).status_code == 503
    assert done == ["book", "mail", "book"]


async def test_for_a_message(faulty: FaultyStore, done: list[Any]) -> None:
    shop = shopping(faulty)

    @idempotent_consumer(faulty, consumer="orders", key=lambda message: message["id"])
    async def handle(message: dict[str, str]) -> None:
        await shop(message["what"])

    with pytest.raises(SagaPendingError):
        await handle({"id": "1", "what": "book"})
    await approve(faulty, shop)
    for _ in range(2):
        await handle({"id": "1", "what": "book"})
    assert done == ["book", "mail"]


async def test_what_the_function_derives_does_not_depend_on_who_runs_it(faulty: FaultyStore, done: list[Any]) -> None:
    """The operation around the saga is not seen in it: a sweeper has none."""
    seen: list[Any] = []

    @saga(faulty, name="shop")
    async def shop() -> None:
        operation = current()
        assert operation is not None
        seen.append((operation.name, operation.derive("charge")))
        with pytest.raises(TransactionError):
            operation.emit(aggregate_type="order", aggregate_id=7, type="Placed", payload={})
        await wait_for("approval")

    @idempotent(faulty, key=lambda: "7")
    async def order() -> None:
        before = current()
        try:
            await shop()
        finally:
            assert current() is before

    with pytest.raises(SagaPendingError):
        await order()
    key = await approve(faulty, shop)
    await shop.resume(key)
    assert seen[0] == seen[1]
    assert seen[0][0] == "shop"


def test_in_a_function_that_is_not_awaited(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="shop")
    def shop(what: str) -> str:
        step_sync("charge", do_sync, what)
        wait_for_sync("approval")
        return step_sync("mail", do_sync, "mail")

    keys: list[str] = []

    @idempotent(faulty, key=lambda what: what)
    def order(what: str) -> str:
        operation = current()
        assert operation is not None
        keys.append(operation.derive("saga:shop"))
        return shop(what)

    with pytest.raises(SagaPendingError):
        order("book")
    shop.signal(keys[0], "approval")
    FAULTS["mail"] = [TimeoutError()]
    with pytest.raises(Exception, match="TimeoutError"):
        order("book")
    assert done == ["book", "mail"]
