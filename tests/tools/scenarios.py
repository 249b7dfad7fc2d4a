"""Tools that the crash kit kills: each call comes from a new process, as a model that plans anew makes it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency import Policy, open_store
from idempotency.errors import NotReplayableError
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_point
from idempotency.tool import NOT_DONE, idempotent_tool

POLICY = Policy(on_crash="hold", lease=1.0)


class Provider:
    """A payment provider, which does not know what an idempotency key is: its refunds are lines of a file."""

    def __init__(self, directory: str) -> None:
        self._ledger = Path(directory) / "refunds"

    def refund(self, order_id: str) -> str:
        with open(self._ledger, "a") as ledger:
            ledger.write(f"{order_id}\n")
        crash_point("effect")
        return f"refunded {order_id}"

    def count(self, order_id: str) -> int:
        return self._ledger.read_text().splitlines().count(order_id) if self._ledger.exists() else 0


class Leased:
    """A tool whose effect is at the provider, and nobody verifies it."""

    verified = False

    def __init__(self, url: str, directory: str) -> None:
        self.provider = Provider(directory)
        self.store: Any = open_store(url)

        async def verify(order_id: str) -> Any:
            return f"refunded {order_id}" if self.provider.count(order_id) else NOT_DONE

        @idempotent_tool(
            self.store, intent=("order_id",), verify=verify if self.verified else None, policy=POLICY, name="refund"
        )
        async def refund(order_id: str) -> str:
            return self.provider.refund(order_id)

        self.refund = refund

    async def prepare(self) -> None:
        await self.store.create_schema()

    async def deliver(self, key: str) -> None:
        await self.refund(key)

    async def count(self, key: str) -> int:
        return self.provider.count(key)


class Unverified(Leased):
    """An operator resolves it: the crash kit asks for that where the outcome is unknown."""

    async def deliver(self, key: str) -> None:
        # The operator knows that it is done, and not its result.
        with suppress(NotReplayableError):
            await super().deliver(key)

    async def resolve(self, key: str) -> None:
        for entry in await self.store.unresolved():
            done = self.provider.count(key) > 0
            if key in entry.key:
                await self.store.resolve(entry.id, "done" if done else "release", None)


class Verified(Leased):
    """The tool finds out by itself."""

    verified = True


class Joined:
    """A tool whose effect is in the database of its record."""

    def __init__(self, url: str, directory: str) -> None:
        self.engine = create_async_engine(url)
        self.sessions = async_sessionmaker(self.engine)
        self.store = SQLStore(self.engine)

        @idempotent_tool(self.store, intent=("order_id",), session=self.sessions, name="refund")
        async def refund(order_id: str, session: Any) -> str:
            await session.execute(text("INSERT INTO refunds (order_id) VALUES (:id)"), {"id": order_id})
            return f"refunded {order_id}"

        self.refund = refund

    async def prepare(self) -> None:
        await self.store.create_schema()
        async with self.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE refunds (order_id VARCHAR(100) NOT NULL)"))

    async def deliver(self, key: str) -> None:
        await self.refund(key)

    async def count(self, key: str) -> int:
        async with self.sessions() as session:
            found = await session.execute(text("SELECT count(*) FROM refunds WHERE order_id = :id"), {"id": key})
            return int(found.scalar_one())
