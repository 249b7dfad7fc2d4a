"""An invoice for each order, once, from NATS JetStream through nats-py.

    pip install 'asgi-idempotency[nats,sqlite]'
    python consumer_nats.py

NATS_URL names the server (default: NATS on this machine, with JetStream). One order is published twice, and handled.
"""

import asyncio
import json
import os
import tempfile
from uuid import uuid4

import nats
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, StreamConfig
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import idempotent_consumer
from idempotency.adapters.nats import consume
from idempotency.stores.sql import SQLStore


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]


async def main(directory: str) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/shop.db")
    store = SQLStore(engine)
    sessions = async_sessionmaker(engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    deliveries, stop = 0, asyncio.Event()

    def count(_: object) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries == 2:
            stop.set()

    @idempotent_consumer(store, consumer="billing", session=sessions, max_attempts=5, on_event=count)
    async def on_order(message: Msg, session: AsyncSession) -> None:
        session.add(Invoice(order=json.loads(message.data)["order"]))

    async with await nats.connect(os.environ.get("NATS_URL", "nats://localhost")) as client:
        jetstream, shop = client.jetstream(), f"shop-{uuid4()}"
        await jetstream.add_stream(StreamConfig(name=shop, subjects=[f"{shop}.>"]))
        await jetstream.add_consumer(shop, ConsumerConfig(durable_name="billing", filter_subject=f"{shop}.orders"))
        for _ in range(2):
            # The server itself would drop a second Nats-Msg-Id, but only for two minutes.
            named = {"Idempotency-Key": "order-placed:A-1"}
            await jetstream.publish(f"{shop}.orders", b'{"order": "A-1"}', headers=named)
        subscription = await jetstream.pull_subscribe_bind("billing", shop)
        await consume(jetstream, subscription, on_order, dead_letter=f"{shop}.dead", stop=stop)
        await jetstream.delete_stream(shop)

    async with sessions() as session:
        invoices = await session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    await engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
