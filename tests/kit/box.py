"""An outbox whose messages a test knows by names of its own."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, insert, literal, select, update

from idempotency.outbox import Outbox
from idempotency.outbox._operate import OutboxOperations

FAR = 4_000_000_000
"""A time in the next century, in seconds since the epoch."""


class Box:
    """An outbox, what is done with it, and the ids of its messages by what they are called in a test."""

    def __init__(self, engine: Any, outbox: Outbox) -> None:
        self.engine = engine
        self.outbox = outbox
        self.operations = OutboxOperations(engine, outbox)
        self.ids: dict[str, str] = {}

    async def emit(self, name: str, key: int = 1, **more: Any) -> None:
        values = {"aggregate_type": "order", "aggregate_id": key, "type": "Placed", "payload": name.encode(), **more}
        async with self.engine.begin() as connection:
            self.ids[name] = await self.outbox.emit(connection, **values)

    async def execute(self, statement: Any) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(statement)

    async def retry_later(self, name: str, until: int = FAR) -> None:
        """Let a message be one that was sent once, and is sent again at a time."""
        table = self.outbox.tables.messages
        values = {"attempts": 1, "available_ms": until * 1000}
        await self.execute(update(table).where(table.c.id == self.ids[name]).values(values))

    async def die(self, *names: str, reason: str = "too large") -> None:
        """Move messages to the dead ones, as a relay does."""
        messages, dead = self.outbox.tables.messages, self.outbox.tables.dead
        columns = [column for column in messages.c if column.name != "attempts"]
        added = {"attempts": literal(3), "reason": literal(reason), "died_ms": messages.c.created_ms}
        for name in names:
            of_id = messages.c.id == self.ids[name]
            row = select(*columns, *added.values()).where(of_id)
            await self.execute(insert(dead).from_select([*(column.name for column in columns), *added], row))
            await self.execute(delete(messages).where(of_id))

    async def waiting(self) -> list[str]:
        """Return what waits, in order, as the test calls it."""
        return self._named(await self.operations.messages())

    async def dead(self) -> list[str]:
        """Return what is dead, in order, as the test calls it."""
        return self._named(await self.operations.messages(dead=True))

    def _named(self, messages: Any) -> list[str]:
        names = {id: name for name, id in self.ids.items()}
        return [names[message.id] for message in messages]
