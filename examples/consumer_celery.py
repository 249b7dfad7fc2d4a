"""An invoice for each order, once, by Celery, on RabbitMQ or Redis.

    pip install 'asgi-idempotency[celery,sqlite]'      # and celery[redis] for Redis
    python consumer_celery.py

CELERY_BROKER_URL names the broker (default: RabbitMQ on this machine). One order is sent twice, and handled by a worker
in this process. In production DATABASE_URL names the database, ``celery -A consumer_celery worker`` starts a worker,
and ``invoice.delay(order)`` sends an order.
"""

from __future__ import annotations

import os
import tempfile

from celery import Celery
from celery.worker import state
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency import Event
from idempotency.adapters.celery import idempotent_task
from idempotency.stores.sql import SQLStore


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]


directory = tempfile.TemporaryDirectory()
engine = create_engine(os.environ.get("DATABASE_URL", f"sqlite:///{directory.name}/shop.db"))
sessions = sessionmaker(engine)
Base.metadata.create_all(engine)
app = Celery("shop", broker=os.environ.get("CELERY_BROKER_URL", "amqp://guest:guest@localhost/"))
app.conf.update(task_default_queue=os.environ.get("SHOP_QUEUE", "shop"), worker_redirect_stdouts=False)
deliveries = 0


def count(event: Event) -> None:
    global deliveries
    deliveries += 1
    if deliveries == 2:
        state.should_stop = 0  # ends the worker


@app.task(  # type: ignore[untyped-decorator]
    name="invoice", base=idempotent_task(SQLStore(engine), session=sessions, max_attempts=5, on_event=count)
)
def invoice(order: str, session: Session) -> None:
    session.add(Invoice(order=order))


def main() -> None:
    for _ in range(2):
        invoice.apply_async(("A-1",), task_id="order-placed:A-1")
    app.worker_main(["--quiet", "worker", "--pool", "solo", "--loglevel", "WARNING", "--without-mingle"])
    with sessions() as session:
        invoices = session.scalar(select(func.count()).select_from(Invoice))
    print(f"{deliveries} deliveries, {invoices} invoice")
    engine.dispose()


if __name__ == "__main__":
    main()
