"""An invoice for each order, once, from RabbitMQ through dramatiq.

    pip install 'asgi-idempotency[dramatiq,sql]' 'dramatiq[rabbitmq]'
    python consumer_dramatiq.py

AMQP_URL names the broker (default: RabbitMQ on this machine). One order is sent twice, and handled by a worker in this
process; `dramatiq consumer_dramatiq` would start worker processes of the same actors.
"""

import os
import tempfile
import threading

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency.adapters.dramatiq import idempotent_actor
from idempotency.stores.sql import SQLStore

QUEUE = f"invoices_{os.getpid()}"

handled = threading.Semaphore(0)
directory = tempfile.TemporaryDirectory()
engine = create_engine(f"sqlite:///{directory.name}/shop.db")
store = SQLStore(engine)
sessions = sessionmaker(engine)
# Each message is acknowledged once its retry is enqueued: RabbitMQ has to confirm that.
broker = RabbitmqBroker(url=os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"), confirm_delivery=True)
dramatiq.set_broker(broker)


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]


once = idempotent_actor(
    store, key=lambda order: order, session=sessions, max_attempts=5, on_event=lambda _: handled.release()
)


@dramatiq.actor(queue_name=QUEUE, actor_class=once)
def invoice(order: str, session: Session) -> None:
    session.add(Invoice(order=order))


def main() -> None:
    Base.metadata.create_all(engine)
    for _ in range(2):
        # For a type checker send() has the parameter session too.
        invoice.send_with_options(args=("A-1",))
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    for _ in range(2):
        assert handled.acquire(timeout=30)
    worker.stop()
    for queue in (QUEUE, f"{QUEUE}.DQ", f"{QUEUE}.XQ"):
        broker.channel.queue_delete(queue)
    broker.close()
    with sessions() as session:
        invoices = session.scalar(select(func.count()).select_from(Invoice))
    print(f"2 deliveries, {invoices} invoice")


if __name__ == "__main__":
    main()
