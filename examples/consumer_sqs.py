"""An invoice for each order, once, from Amazon SQS through boto3.

    pip install 'asgi-idempotency[sqs,sql]'
    python consumer_sqs.py

boto3 finds the credentials, the region and, for a local SQS, AWS_ENDPOINT_URL in the environment. The program makes a
queue, sends one order twice, handles both, and removes the queue.
"""

import json
import signal
import tempfile
import threading
import uuid
from typing import Any

import boto3
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency import idempotent_consumer
from idempotency.adapters.sqs import consume
from idempotency.stores.sql import SQLStore


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
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def count(_: object) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries == 2:
            stop.set()

    @idempotent_consumer(store, consumer="billing", session=sessions, max_attempts=5, on_event=count)
    def on_order(message: dict[str, Any], session: Session) -> None:
        session.add(Invoice(order=json.loads(message["Body"])["order"]))

    sqs = boto3.client("sqs")
    name = f"orders-{uuid.uuid4()}"
    queue, dead = (sqs.create_queue(QueueName=each)["QueueUrl"] for each in (name, f"{name}-dead"))
    key = {"DataType": "String", "StringValue": "order-placed:A-1"}
    for _ in range(2):
        sqs.send_message(QueueUrl=queue, MessageBody='{"order": "A-1"}', MessageAttributes={"Idempotency-Key": key})
    consume(sqs, queue, on_order, poll=1, dead_letter=dead, stop=stop)
    for each in (queue, dead):
        sqs.delete_queue(QueueUrl=each)

    with sessions() as session:
        invoices = session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(directory)
