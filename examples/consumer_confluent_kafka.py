"""An invoice for each order, once, from Kafka through confluent-kafka.

    pip install 'asgi-idempotency[confluent-kafka,sql]'
    python consumer_confluent_kafka.py

KAFKA_BOOTSTRAP_SERVERS names the brokers (default: Kafka on this machine), which make the topic. One order is
published twice, and handled.
"""

import json
import os
import tempfile
import threading

from confluent_kafka import Message, Producer
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency import idempotent_consumer
from idempotency.adapters.confluent_kafka import consume
from idempotency.stores.sql import SQLStore

KAFKA = {"bootstrap.servers": os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")}


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]


def main(directory: str) -> None:
    engine = create_engine(f"sqlite:///{directory}/shop.db")
    store = SQLStore(engine)
    sessions = sessionmaker(engine)
    Base.metadata.create_all(engine)
    deliveries, stop = 0, threading.Event()

    def count(_: object) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries == 2:
            stop.set()

    @idempotent_consumer(store, consumer="billing", session=sessions, max_attempts=5, on_event=count)
    def on_order(message: Message, session: Session) -> None:
        session.add(Invoice(order=json.loads(message.value() or b"")["order"]))

    producer = Producer(KAFKA)
    for _ in range(2):
        producer.produce("orders", b'{"order": "A-1"}', headers={"id": "order-placed:A-1"})
    producer.flush()
    consume({"group.id": "billing", **KAFKA}, ["orders"], on_order, producer=producer, dead_letter="dead", stop=stop)

    with sessions() as session:
        invoices = session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(directory)
