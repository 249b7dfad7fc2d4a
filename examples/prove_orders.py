"""Prove that a crash at any point of a message handler leaves one order per message.

    pip install 'asgi-idempotency[sqlite]'
    python examples/prove_orders.py

It kills a process before and after every statement and COMMIT of the handler, and at the handler's own point
``after-order``; delivers the message again, and counts the orders. Leave out ``session=`` and commit the order by
yourself: then it names the places at which a message makes two orders.
"""

from __future__ import annotations

import os
import sys
import tempfile

from sqlalchemy import String, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency.function import idempotent
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_everywhere, crash_point


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    reference: Mapped[str] = mapped_column(String(64))


class Orders:
    """The scenario: each process that is killed makes one, with its own connections."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url)
        self.sessions = sessionmaker(self.engine)
        self.store = SQLStore(self.engine)

        @idempotent(self.store, key=str, session=self.sessions)
        def place_order(reference: str, session: Session) -> None:
            session.add(Order(reference=reference))
            session.flush()
            crash_point("after-order")

        self.place_order = place_order

    def prepare(self) -> None:
        Base.metadata.create_all(self.engine)
        self.store.create_schema_sync()

    def deliver(self, key: str) -> None:
        self.place_order(key)  # type: ignore[call-arg]  # the session is given by the decorator

    def count(self, key: str) -> int:
        with self.sessions() as session:
            return session.scalar(select(func.count()).where(Order.reference == key)) or 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        url = os.environ.get("ORDERS_DB", f"sqlite:///{directory}/orders.sqlite3")
        report = crash_everywhere(Orders, url)
    print(report)
    sys.exit(not report.ok)
