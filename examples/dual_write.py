"""Change the database and tell the world: what a crash at each line leaves behind, and what an outbox changes.

    pip install 'asgi-idempotency[sqlite]'
    python examples/dual_write.py

Three ways to store an order and send its message. Each is run again and again, and its process is killed before one
line after another. Then what is stored is compared with what was sent. A message is *lost* where there is an order and
no message. It is a *phantom* where there is a message and no order. The outbox may send a message twice, with the same
id: a consumer that looks at the id handles it once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idempotency.errors import StoreError
from idempotency.outbox import Message, Outbox, PollingRelay
from idempotency.outbox.publishers.function import FunctionPublisher

logging.getLogger("idempotency").setLevel(logging.ERROR)  # every relay here is killed on purpose
outbox = Outbox()


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(primary_key=True)


class Shop:
    """A database, and a broker: a file to which each message is added as one line."""

    def __init__(self, directory: str) -> None:
        self.engine = create_engine(f"sqlite:///{directory}/shop.db")
        self.sent = Path(directory, "sent")
        self.sent.touch()

    def publish(self, order: str) -> None:
        with self.sent.open("a") as broker:
            broker.write(f"{order}\n")

    def commit_then_publish(self) -> None:
        with Session(self.engine) as session:
            session.add(Order(id="A-1"))
            session.commit()
        self.publish("A-1")

    def publish_then_commit(self) -> None:
        with Session(self.engine) as session:
            session.add(Order(id="A-1"))
            session.flush()
            self.publish("A-1")
            session.commit()

    def with_outbox(self) -> None:
        with Session(self.engine) as session:
            session.add(Order(id="A-1"))
            outbox.emit_sync(session, aggregate_type="order", aggregate_id="A-1", type="OrderPlaced", payload={})
            session.commit()
        self.relay()

    def relay(self) -> None:
        async def deliver(message: Message) -> None:
            self.publish(message.aggregate_id)

        # A relay that is killed is missed when its lease is over: short here, 30 seconds by default.
        publisher = FunctionPublisher(deliver, delivery_timeout=0.5)
        asyncio.run(PollingRelay(self.engine, publisher, outbox=outbox, lease=1.5).drain())

    def relay_all(self) -> None:
        """Relay as the next process would, which a supervisor starts, until the outbox is empty."""
        messages = select(func.count()).select_from(outbox.tables.messages)
        with Session(self.engine) as session:
            while session.scalar(messages):
                session.commit()
                with suppress(StoreError):
                    self.relay()

    def found(self) -> str:
        """Compare what is stored with what was sent."""
        with Session(self.engine) as session:
            stored = session.scalar(select(Order.id)) is not None
        times = len(self.sent.read_text().splitlines())
        if stored and not times:
            return "lost"
        if times and not stored:
            return "phantom"
        return "both" if stored else "neither"


def kill_before(line: int) -> Callable[..., Any]:
    """Return a trace function that kills this process before the line of that number, of the lines that it runs."""
    passed = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        nonlocal passed
        if frame.f_code.co_filename != __file__:
            return None
        if event == "line":
            passed += 1
            if passed == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def run_and_kill(way: str, line: int, directory: str) -> bool:
    """Run one way in a child process; return whether it was killed, or has failed."""
    child = os.fork()
    if child == 0:
        try:
            shop = Shop(directory)
            sys.settrace(kill_before(line))
            getattr(shop, way)()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0


def try_every_line(way: str) -> Counter[str]:
    results: Counter[str] = Counter()
    line, killed = 0, True
    while killed:
        line += 1
        with tempfile.TemporaryDirectory() as directory:
            shop = Shop(directory)
            Base.metadata.create_all(shop.engine)
            outbox.create_schema_sync(shop.engine)
            shop.engine.dispose()
            killed = run_and_kill(way, line, directory)
            if way == "with_outbox":
                shop.relay_all()
            if killed:
                results[shop.found()] += 1
    return results


def main() -> None:
    columns = ("neither", "both", "lost", "phantom")
    print(f"{'killed before each line of':28}" + "".join(f"{column:>9}" for column in columns))
    for way in ("commit_then_publish", "publish_then_commit", "with_outbox"):
        results = try_every_line(way)
        print(f"{way:28}" + "".join(f"{results[column]:>9}" for column in columns))


if __name__ == "__main__":
    main()
