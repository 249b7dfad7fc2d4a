"""Two read models of one stream: read your own writes over HTTP, and build one of them anew while orders come in.

    pip install 'asgi-idempotency[sqlite]' starlette httpx
    python examples/order_views.py

Orders are events. ``order-list`` has a row for each order, ``item-count`` counts by item. A client that has ordered
gives back the ``Sync-Token`` of the answer, and reads its own order. Then version 2 of the list, which knows the price
too, is built beside version 1, while clients order and read; no reader sees fewer orders than before. ``ORDERS_DB``
names the database (default: a SQLite file).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import httpx
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency.projections import SyncTokenMiddleware, create_projections_schema, projection, sync_token
from idempotency.streams import RecordedEvent, Streams

ORDERS, MORE = 30, 20


@dataclass(frozen=True)
class OrderPlaced:
    item: str
    price: int


class Shop:
    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine.sync_engine, "connect", self._write_ahead)
        self.session = async_sessionmaker(self.engine)
        self.orders = Streams([OrderPlaced])
        self.list_1, self.list_2 = self.make_list(1), self.make_list(2)

        @projection("item-count", source=self.orders, session=self.session)
        async def item_count(event: RecordedEvent, session: AsyncSession) -> None:
            item = {"item": event.data.item}
            changed: Any = await session.execute(text("UPDATE item_count SET n = n + 1 WHERE item = :item"), item)
            if not changed.rowcount:
                await session.execute(text("INSERT INTO item_count VALUES (:item, 1)"), item)

        self.item_count = item_count
        routes = [Route("/orders", self.place, methods=["POST"]), Route("/orders", self.read)]
        self.app = SyncTokenMiddleware(Starlette(routes=routes), [self.list_1], wait=20)

    def make_list(self, version: int) -> Any:
        @projection("order-list", version=version, source=self.orders, session=self.session)
        async def order_list(event: RecordedEvent, session: AsyncSession, version: int) -> None:
            values = {"id": event.stream, "item": event.data.item, "price": event.data.price}
            columns = ":id, :item" if version == 1 else ":id, :item, :price"
            await session.execute(text(f"INSERT INTO order_list_{version} VALUES ({columns})"), values)

        return order_list

    async def create(self) -> None:
        await self.orders.create_schema(self.engine)
        await create_projections_schema(self.engine)
        async with self.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE order_list_1 (id VARCHAR(50), item VARCHAR(50))"))
            await connection.execute(text("CREATE TABLE order_list_2 (id VARCHAR(50), item VARCHAR(50), price INT)"))
            await connection.execute(text("CREATE TABLE item_count (item VARCHAR(50), n INT)"))

    async def place(self, request: Request) -> JSONResponse:
        order = await request.json()
        async with self.session() as session, session.begin():
            appended = await self.orders.append(session, order["id"], [OrderPlaced(order["item"], 3)], expected=0)
        return JSONResponse({}, 201, {"Sync-Token": sync_token(appended)})

    async def read(self, request: Request) -> JSONResponse:
        async with self.session() as session:
            version = await self.list_1.live_version(session)
            rows = await session.execute(text(f"SELECT * FROM order_list_{version}"))
            return JSONResponse({"version": version, "orders": [list(row) for row in rows]})

    @staticmethod
    def _write_ahead(connection: Any, _: object) -> None:
        for pragma in ("journal_mode=WAL", "busy_timeout=20000"):
            connection.execute(f"PRAGMA {pragma}").close()


async def order(client: httpx.AsyncClient, first: int, last: int) -> list[tuple[int, int]]:
    """Order, read at once, and return for each order which version was read, and how many orders it had."""
    seen = []
    for number in range(first, last):
        placed = await client.post("/orders", json={"id": f"order-{number}", "item": ("tea", "milk")[number % 2]})
        answer = await client.get("/orders", headers={"Sync-Token": placed.headers["sync-token"]})
        assert any(row[0] == f"order-{number}" for row in answer.json()["orders"]), "its own order is not there"
        seen.append((answer.json()["version"], len(answer.json()["orders"])))
    return seen


async def main(directory: str) -> None:
    shop = Shop(os.environ.get("ORDERS_DB", f"sqlite+aiosqlite:///{directory}/shop.db"))
    await shop.create()
    workers = [asyncio.create_task(each.run()) for each in (shop.list_1, shop.item_count)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(shop.app), base_url="http://shop", timeout=60) as client:
        seen = await order(client, 0, ORDERS)
        ordering = asyncio.create_task(order(client, ORDERS, ORDERS + MORE))
        await shop.list_2.rebuild()
        workers.append(asyncio.create_task(shop.list_2.run()))
        seen += await ordering
        seen += await order(client, ORDERS + MORE, ORDERS + MORE + 1)
    total = ORDERS + MORE + 1
    assert [count for _, count in seen] == list(range(1, total + 1)), "a reader saw fewer orders than there were"
    for each in (shop.list_1, shop.list_2, shop.item_count):
        each.stop()
    await asyncio.gather(*workers)
    await shop.item_count.catch_up()
    async with shop.session() as session:
        counts = (await session.execute(text("SELECT item, n FROM item_count ORDER BY item"))).all()
    await shop.list_2.drop(1)
    print(f"{total} orders, each read by who placed it, from version {seen[0][0]}, then {seen[-1][0]}")
    print(", ".join(f"{n} {item}" for item, n in counts))
    await shop.engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
