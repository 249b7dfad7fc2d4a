"""An invoice for each order, once, from RabbitMQ through taskiq.

    pip install 'asgi-idempotency[taskiq,sqlite]' taskiq-aio-pika
    python consumer_taskiq.py

AMQP_URL names the broker (default: RabbitMQ on this machine). One order is sent twice, and handled by a worker in this
process; `taskiq worker consumer_taskiq:broker` would start worker processes of the same tasks.
"""

import asyncio
import os
import tempfile

from aio_pika import Message
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from taskiq import TaskiqMessage
from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

from idempotency import current
from idempotency.adapters.taskiq import idempotent_task
from idempotency.stores.sql import SQLStore

NAME = f"invoices_{os.getpid()}"
DEAD = f"{NAME}_dead"

handled = asyncio.Semaphore(0)
directory = tempfile.TemporaryDirectory()
engine = create_async_engine(f"sqlite+aiosqlite:///{directory.name}/shop.db")
store = SQLStore(engine)
sessions = async_sessionmaker(engine)
broker = AioPikaBroker(
    os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"),
    exchange=Exchange(name=NAME),
    task_queues=[Queue(name=NAME)],
    dead_letter_queue=Queue(name=DEAD),
    qos=1,
)


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]


async def dead_letter(message: TaskiqMessage, reason: str) -> None:
    assert broker.write_channel is not None
    dead = Message(broker.formatter.dumps(message).message, headers={"reason": reason})
    await broker.write_channel.default_exchange.publish(dead, DEAD)


@broker.task
@idempotent_task(
    store,
    consumer="billing",
    dead_letter=dead_letter,
    key=lambda order: order,
    session=sessions,
    max_attempts=5,
    on_event=lambda _: handled.release(),
)
async def invoice(order: str) -> None:
    operation = current()
    assert operation is not None
    operation.session.add(Invoice(order=order))


async def main() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    broker.is_worker_process = True
    await broker.startup()
    for _ in range(2):
        await invoice.kiq("A-1")
    worker = asyncio.create_task(run_receiver_task(broker, max_async_tasks=1))
    for _ in range(2):
        await asyncio.wait_for(handled.acquire(), 30)
    worker.cancel()
    await asyncio.wait([worker])
    assert broker.write_channel is not None
    for queue in (NAME, DEAD):
        await broker.write_channel.queue_delete(queue)
    await broker.write_channel.exchange_delete(NAME)
    await broker.shutdown()
    async with sessions() as session:
        invoices = await session.scalar(select(func.count()).select_from(Invoice))
    print(f"2 deliveries, {invoices} invoice")
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
