"""A customer: it orders over HTTP, and sends each request again with its key until there is an answer.

python -m shop.customer
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx

from idempotency.client import AsyncIdempotentTransport, Retry
from shop.settings import API

ENDED = ("confirmed", "rejected")


@asynccontextmanager
async def client_of(customer: str) -> AsyncIterator[httpx.AsyncClient]:
    """Open a client that retries with the same key, also while the API is started again."""
    transport = AsyncIdempotentTransport(retry=Retry(attempts=50, most=2.0, deadline=120.0))
    headers = {"Authorization": f"Bearer {customer}"}
    async with httpx.AsyncClient(transport=transport, base_url=API, headers=headers, timeout=15) as client:
        yield client


async def order(client: httpx.AsyncClient, reference: str, item: str, coupon: str | None) -> dict[str, Any]:
    """Order, and order again with the same key, as after a lost answer; return the order as it ends."""
    key = {"Idempotency-Key": str(uuid4())}
    wanted = {"reference": reference, "item": item, "coupon": coupon}
    first, again = [(await client.post("/orders", json=wanted, headers=key)).raise_for_status() for _ in range(2)]
    if first.json() != again.json():
        raise AssertionError(f"{reference}: two answers to one key, {first.text} and {again.text}")
    return await ended(client, first.json()["id"], first.headers["Sync-Token"])


async def ended(client: httpx.AsyncClient, id: str, token: str) -> dict[str, Any]:
    """Read an order until the shop has decided."""
    while True:
        try:
            found = await client.get(f"/orders/{id}", headers={"Sync-Token": token})
        except httpx.TransportError:
            await asyncio.sleep(0.5)
            continue
        # With the token the read model has the order, or says that it is late. It never says that there is none.
        if found.status_code == 404:
            raise AssertionError(f"the order {id} is not in the list")
        if found.status_code == 200 and found.json()["state"] in ENDED:
            return dict(found.json())
        await asyncio.sleep(float(found.headers.get("Retry-After", 0.3)))


async def main() -> None:
    async with client_of("ann") as client:
        for reference, item, coupon in (("1", "tea", "SPRING"), ("2", "tea", "WINTER"), ("3", "milk", None)):
            print(await order(client, reference, item, coupon))


if __name__ == "__main__":
    asyncio.run(main())
