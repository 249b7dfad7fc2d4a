"""The examples that no other test runs."""

from __future__ import annotations

import importlib

import httpx
import pytest

from tests.kit.paths import EXAMPLES

pytestmark = pytest.mark.processes


async def test_orders_transactional(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated order is one, a refused one leaves nothing, and without a key there is none."""
    monkeypatch.setenv("ORDERS_DB", sqlite_url)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = importlib.import_module("orders_transactional").app

    async def order(client: httpx.AsyncClient, item: str, **headers: str) -> httpx.Response:
        return await client.post("/orders", json={"item": item}, headers=headers)

    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        key = {"Idempotency-Key": "1f5a"}
        first, second = await order(client, "tea", **key), await order(client, "tea", **key)
        refused = await order(client, "milk", **{"Idempotency-Key": "2"})
        missing = await order(client, "tea")
        count = await client.get("/orders/count")

    assert (first.status_code, first.json()) == (201, {"id": 1, "item": "tea"})
    assert (second.status_code, second.json()) == (201, {"id": 1, "item": "tea"})
    assert second.headers["idempotent-replayed"] == "true"
    assert (refused.status_code, missing.status_code, count.json()) == (409, 400, 1)
