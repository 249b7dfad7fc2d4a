"""What every service of the shop has: a database of its own, with its records of keys and its outbox in it."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from idempotency.outbox import Outbox
from idempotency.stores.sql import SQLStore
from shop.settings import DATABASES


class Service:
    """A database, in which an effect, its record and the messages about it commit together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.engine = create_async_engine(DATABASES.format(name))
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self.store = SQLStore(self.engine)
        self.outbox = Outbox()

    async def create(self, tables: type[DeclarativeBase] | None, *rows: Any) -> None:
        """Create the tables of the library and those of the service, and add the first rows.

        In production these are migrations.
        """
        await self.store.create_schema()
        await self.outbox.create_schema(self.engine)
        if tables is not None:
            async with self.engine.begin() as connection:
                await connection.run_sync(tables.metadata.create_all)
        async with self.sessions() as session, session.begin():
            session.add_all(rows)
