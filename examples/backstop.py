"""A backstop under a choreography: an event is lost on its way, and a sweeper tells it again.

    pip install 'asgi-idempotency[sqlite]'
    python examples/backstop.py

The orders of a shop are delivered by another service, which hears of them by messages. Nobody in a choreography knows
the whole: where a message is lost, as by a broker that lost its disk, the order waits for ever. So each order has a
small saga as its backstop. It waits for the signal that the order is delivered. If none comes in time, it tells the
order again; the consumer handles it once. The saga is recorded, so that it survives every process of the shop.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import current, idempotent_consumer
from idempotency.outbox import Message, Outbox, PollingRelay
from idempotency.outbox.publishers.function import FunctionPublisher
from idempotency.saga import SignalTimeoutError, Sweeper, saga, step, wait_for
from idempotency.stores.sql import SQLStore

ORDERS = 6
LOST = {2, 5}
PATIENCE = 1.5
"""Seconds until an order that is not delivered is told again."""


class Base(DeclarativeBase):
    pass


class Delivery(Base):
    __tablename__ = "backstop_deliveries"
    order: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


async def tell(number: int, session: AsyncSession) -> None:
    """Tell of an order, in the transaction of the step."""
    operation = current()
    assert operation is not None
    operation.emit(aggregate_type="order", aggregate_id=number, type="OrderPlaced", payload={"order": number})


async def order(number: int) -> str:
    await step("tell", tell, number)
    for again in range(1, 4):
        try:
            await wait_for(f"delivered, {again}", timeout=PATIENCE)
            return f"told {again} times"
        except SignalTimeoutError:
            await step("tell again", tell, number)
    raise TimeoutError("nobody delivers")


class LossyBroker:
    """A broker that loses the first message of some orders, after it has confirmed them."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._lost = set(LOST)
        self.deliveries = 0

    async def publish(self, message: Message) -> None:
        number = json.loads(message.payload or b"{}")["order"]
        if number in self._lost:
            self._lost.remove(number)
            return
        self.deliveries += 1
        await self._consumer(message)


async def main(directory: str) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/shop.db")
    store, sessions = SQLStore(engine), async_sessionmaker(engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await store.create_schema()  # in production, migrations
    await store.create_saga_schema()
    await Outbox().create_schema(engine)
    backstop = saga(store, name="order", session=sessions)(order)

    @idempotent_consumer(store, consumer="delivery", session=sessions, key=lambda message: str(message.aggregate_id))
    async def deliver(message: Message, session: AsyncSession) -> None:
        session.add(Delivery(order=int(message.aggregate_id)))

    async def deliver_and_signal(message: Message) -> None:
        handle: Any = deliver  # the decorator gives it its session
        await handle(message)
        for again in range(1, 4):
            await backstop.signal(f"order-{message.aggregate_id}", f"delivered, {again}")

    broker = LossyBroker(deliver_and_signal)
    relay = PollingRelay(engine, FunctionPublisher(broker.publish))
    sweeper = Sweeper(store, [backstop], poll=0.1)
    running = [asyncio.create_task(relay.run()), asyncio.create_task(sweeper.run())]
    for number in range(1, ORDERS + 1):
        await backstop.start(number, key=f"order-{number}")
    answers = {number: await result(backstop, f"order-{number}") for number in range(1, ORDERS + 1)}
    await asyncio.gather(relay.stop(), sweeper.stop())
    await asyncio.gather(*running)
    for number, answer in answers.items():
        print(f"order {number}: {answer}")
    async with sessions() as session:
        count = await session.scalar(select(func.count()).select_from(Delivery))
    print(f"{ORDERS} orders, {len(LOST)} messages lost, {count} deliveries")
    await engine.dispose()


async def result(backstop: Any, key: str) -> str:
    """Wait for the end of a saga, which the sweeper runs."""
    while True:
        found = await backstop.look(key)
        if found.state in ("done", "undone"):
            answer: str = await backstop.resume(key)
            return answer
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(temporary))
