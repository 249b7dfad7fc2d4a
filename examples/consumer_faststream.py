"""An invoice for each order, once, from RabbitMQ through FastStream.

    pip install 'asgi-idempotency[faststream,sqlite]' 'faststream[rabbit]'
    python consumer_faststream.py

AMQP_URL names the broker (default: RabbitMQ on this machine). One order is published twice, and handled.
"""

import asyncio
import os
import tempfile
import uuid

from faststream import FastStream
from faststream.rabbit import RabbitBroker, RabbitQueue
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import current
from idempotency.adapters.faststream import IdempotencyMiddleware, check
from idempotency.stores.sql import SQLStore


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]


class Order(BaseModel):
    order: str


async def main(directory: str) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/shop.db")
    sessions = async_sessionmaker(engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    deliveries = 0

    def count(_: object) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries == 2:
            app.exit()

    idempotency = IdempotencyMiddleware(
        SQLStore(engine), consumer="billing", session=sessions, max_attempts=5, on_event=count
    )
    url = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
    broker = RabbitBroker(url, middlewares=[idempotency], logger=None)
    app = FastStream(broker, logger=None)
    queue = RabbitQueue(f"orders-{uuid.uuid4().hex}")

    @broker.subscriber(queue)
    async def on_order(order: Order) -> None:
        operation = current()
        assert operation is not None
        operation.session.add(Invoice(order=order.order))

    @app.after_startup
    async def publish() -> None:
        for _ in range(2):
            await broker.publish(Order(order="A-1"), queue, message_id="order-placed:A-1")

    check(broker)
    await app.run()

    # In production the queue is not deleted: it has the messages that are not handled yet.
    async with RabbitBroker(url, logger=None) as cleaner:
        await (await cleaner.declare_queue(queue)).delete(if_empty=False)
    async with sessions() as session:
        invoices = await session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    await engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
