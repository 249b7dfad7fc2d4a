"""Relays under test: publishers that do what a test says, and rows to publish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Message, Outbox, Outcome, Sent
from idempotency.outbox._poll import PollingRelay
from idempotency.outbox.events import RelayEvent

Answer = Callable[[Message], Outcome]


def send(_: Message) -> Outcome:
    """Confirm every message."""
    return Sent()


@dataclass
class ScriptedPublisher:
    """Note what is published, as (aggregate id, type) and by batch, and answer as ``answer`` says."""

    answer: Answer = send
    delivery_timeout: float = 1.0
    batches: list[list[tuple[str, str]]] = field(default_factory=list)
    confirmed: list[Message] = field(default_factory=list)

    async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
        self.batches.append([(message.aggregate_id, message.type) for message in batch])
        outcomes = [self.answer(message) for message in batch]
        self.confirmed += [message for message, one in zip(batch, outcomes, strict=True) if isinstance(one, Sent)]
        return outcomes

    async def aclose(self) -> None: ...

    @property
    def types(self) -> list[str]:
        """The types of the messages that were confirmed, in their order."""
        return [message.type for message in self.confirmed]


def relay_on(
    engine: Any, outbox: Outbox, publisher: Any, events: list[RelayEvent] | None = None, **options: Any
) -> PollingRelay:
    """Make a relay whose events go into a list."""
    noted = [] if events is None else events
    return PollingRelay(engine, publisher, outbox=outbox, on_event=noted.append, **options)


async def emit(engine: AsyncEngine, outbox: Outbox, *messages: tuple[object, str], **options: Any) -> None:
    """Emit messages, given as (aggregate id, type), in a transaction of their own."""
    async with engine.begin() as connection:
        for aggregate_id, kind in messages:
            await outbox.emit(
                connection, aggregate_type="order", aggregate_id=aggregate_id, type=kind, payload={}, **options
            )


async def write(engine: AsyncEngine, outbox: Outbox, messages: Iterable[tuple[object, str]]) -> None:
    """Write many messages by one statement."""
    rows = [outbox.row("order", aggregate_id, kind, {}, None, None) for aggregate_id, kind in messages]
    async with engine.begin() as connection:
        await connection.run_sync(outbox.write, rows)


async def count(engine: AsyncEngine, table: Any) -> int:
    """Count the rows of a table."""
    async with engine.connect() as connection:
        found: int = await connection.scalar(select(func.count()).select_from(table))
    return found
