"""An invoice for each order, once, from RabbitMQ through aio-pika.

    pip install 'asgi-idempotency[aio-pika,sqlite]'
    python consumer_aio_pika.py

AMQP_URL names the broker (default: RabbitMQ on this machine). One order is published twice, and handled.
"""

import asyncio
import json
import os
import tempfile

from aio_pika import Message, connect_robust
from aio_pika.abc import AbstractIncomingMessage
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import idempotent_consumer
from idempotency.adapters.aio_pika import consume
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
    async def on_order(message: AbstractIncomingMessage, session: AsyncSession) -> None:
        session.add(Invoice(order=json.loads(message.body)["order"]))

    async with await connect_robust(os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")) as amqp:
        channel = await amqp.channel()
        queue = await channel.declare_queue(exclusive=True)
        for _ in range(2):
            message = Message(b'{"order": "A-1"}', message_id="order-placed:A-1")
            await channel.default_exchange.publish(message, queue.name)
        await consume(queue, on_order, stop=stop)

    async with sessions() as session:
        invoices = await session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    await engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
