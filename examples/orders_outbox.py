"""From an API to another service, once: order, response and message in one transaction, then a broker, then a consumer.

    pip install 'asgi-idempotency[sqlite,aio-pika]' starlette httpx
    python examples/orders_outbox.py

A client sends each order twice, as after a lost answer. The order, the recorded response and the message commit in one
transaction. A relay publishes the message, and a consumer makes one invoice for it. ``AMQP_URL`` names the broker
(default: RabbitMQ on this machine; without one, the relay calls the consumer in this process), ``ORDERS_DB`` the
database (default: a SQLite file).
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aio_pika
import httpx
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, idempotent_consumer
from idempotency.adapters.aio_pika import consume
from idempotency.outbox import Message, Outbox, PollingRelay, Publisher
from idempotency.outbox.publishers.aio_pika import AioPikaPublisher
from idempotency.outbox.publishers.function import FunctionPublisher
from idempotency.stores.sql import SQLStore

ORDERS = 5
AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "outbox_example_orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Invoice(Base):
    __tablename__ = "outbox_example_invoices"
    order: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


async def create_order(request: Request) -> JSONResponse:
    operation = request.state.idempotency
    order = Order()
    operation.session.add(order)
    await operation.session.flush()
    operation.emit(aggregate_type="order", aggregate_id=order.id, type="OrderPlaced", payload={"order": order.id})
    return JSONResponse({"order": order.id}, 201)


class Billing:
    """The other service: an invoice for each order."""

    def __init__(self, store: SQLStore, sessions: async_sessionmaker[AsyncSession]) -> None:
        self.deliveries, self.all_delivered = 0, asyncio.Event()

        def count(_: object) -> None:
            self.deliveries += 1
            if self.deliveries == ORDERS:
                self.all_delivered.set()

        def id_of(message: Any) -> str:
            return str(message.id if isinstance(message, Message) else message.headers["id"])

        @idempotent_consumer(store, consumer="billing", key=id_of, session=sessions, max_attempts=5, on_event=count)
        async def on_order(message: Any, session: AsyncSession) -> None:
            body = message.payload if isinstance(message, Message) else message.body
            session.add(Invoice(order=json.loads(body)["order"]))

        self.on_order = on_order

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Publisher]:
        """Start the consumer, and yield what publishes to it."""
        async with AsyncExitStack() as stack:
            try:
                amqp = await stack.enter_async_context(await aio_pika.connect_robust(AMQP_URL))
            except OSError:
                print("no RabbitMQ: the relay calls the consumer itself")
                yield FunctionPublisher(self.on_order)
                return
            channel = await amqp.channel()
            queue = await channel.declare_queue(exclusive=True)
            stop = asyncio.Event()
            consuming = asyncio.create_task(consume(queue, self.on_order, stop=stop))
            publisher = AioPikaPublisher(AMQP_URL, topic=lambda _: queue.name)
            yield publisher
            stop.set()
            await consuming
            await publisher.aclose()


async def order_everything_twice(app: IdempotencyMiddleware) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        for number in range(ORDERS):
            key = {"Idempotency-Key": f"order-{number}"}
            first, again = [await client.post("/orders", headers=key) for _ in range(2)]
            assert (first.status_code, again.json()) == (201, first.json())


async def main(directory: str) -> None:
    engine = create_async_engine(os.environ.get("ORDERS_DB", f"sqlite+aiosqlite:///{directory}/shop.db"))
    store, sessions, outbox = SQLStore(engine), async_sessionmaker(engine), Outbox()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await store.create_schema()  # in production, migrations
    await outbox.create_schema(engine)
    shop = Starlette(routes=[Route("/orders", create_order, methods=["POST"])])
    app = IdempotencyMiddleware(shop, store=store, session=sessions)

    billing = Billing(store, sessions)
    async with billing.connected() as publisher:
        relay = PollingRelay(engine, publisher, outbox=outbox)
        relaying = asyncio.create_task(relay.run())
        await order_everything_twice(app)
        await billing.all_delivered.wait()
        await relay.stop()
        await relaying

    async with sessions() as session:
        orders = await session.scalar(select(func.count()).select_from(Order))
        invoices = await session.scalar(select(func.count()).select_from(Invoice))
    print(f"{2 * ORDERS} requests, {orders} orders, {billing.deliveries} deliveries, {invoices} invoices")
    await engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
