"""An invoice for each order, once, from Kafka through aiokafka.

    pip install 'asgi-idempotency[aiokafka,sqlite]'
    python consumer_aiokafka.py

KAFKA_BOOTSTRAP_SERVERS names the brokers (default: Kafka on this machine), which make the topic. One order is
published twice, and handled.
"""

import asyncio
import json
import os
import tempfile

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import idempotent_consumer
from idempotency.adapters.aiokafka import consume
from idempotency.stores.sql import SQLStore

SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")


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
    async def on_order(message: ConsumerRecord, session: AsyncSession) -> None:
        session.add(Invoice(order=json.loads(message.value or b"")["order"]))

    member = AIOKafkaConsumer(
        bootstrap_servers=SERVERS, group_id="billing", enable_auto_commit=False, auto_offset_reset="earliest"
    )
    async with AIOKafkaProducer(bootstrap_servers=SERVERS) as producer, member as consumer:
        for _ in range(2):
            await producer.send_and_wait("orders", b'{"order": "A-1"}', headers=[("id", b"order-placed:A-1")])
        await consume(consumer, ["orders"], on_order, producer=producer, dead_letter="orders.dead", stop=stop)

    async with sessions() as session:
        invoices = await session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    await engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
