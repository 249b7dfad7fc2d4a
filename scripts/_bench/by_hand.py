"""Claim and completion of a message as an application writes them: two statements of PostgreSQL."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from sqlalchemy import Column, DateTime, MetaData, String, Table, text
from sqlalchemy.ext.asyncio import AsyncSession

_CLAIM = """
INSERT INTO {table} AS claimed (message, token, lease_until) VALUES (:message, :token, now() + interval '30 seconds')
ON CONFLICT (message) DO UPDATE SET token = excluded.token, lease_until = excluded.lease_until
WHERE claimed.result IS NULL AND claimed.lease_until < now()
RETURNING token"""
_LOOK = "SELECT result FROM {table} WHERE message = :message"
_COMPLETE = "UPDATE {table} SET result = :result WHERE message = :message AND token = :token"


class ByHand:
    """The records of the messages that were claimed by hand, in a table of their own."""

    def __init__(self, place: str) -> None:
        self.metadata = MetaData()
        name = f"{place}_by_hand"
        columns = (
            Column("message", String(64), primary_key=True),
            Column("token", String(32), nullable=False),
            Column("lease_until", DateTime(timezone=True), nullable=False),
            Column("result", String),
        )
        Table(name, self.metadata, *columns)
        self._claim, self._look, self._complete = (text(each.format(table=name)) for each in (_CLAIM, _LOOK, _COMPLETE))

    async def claim(self, session: AsyncSession, message: str | None) -> str | None:
        """Return the token of a message that is to be handled, None for one that was handled.

        Raises an error for one that another consumer handles now.
        """
        token = uuid4().hex
        if (await session.execute(self._claim, {"message": message, "token": token})).first() is not None:
            return token
        if await session.scalar(self._look, {"message": message}) is None:
            raise RuntimeError("another consumer handles the message")
        return None

    async def complete(self, session: AsyncSession, message: str | None, token: str, result: dict[str, Any]) -> None:
        """Record the result; raise an error where another consumer has taken the message over."""
        values = {"message": message, "token": token, "result": json.dumps(result)}
        completed: Any = await session.execute(self._complete, values)
        if completed.rowcount != 1:
            raise RuntimeError("another consumer has taken the message over")
