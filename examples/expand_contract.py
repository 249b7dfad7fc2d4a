"""A column is renamed while customers use it: expand, write both, backfill, compare, read the new one, contract.

    pip install 'asgi-idempotency[sqlite]' starlette httpx
    python examples/expand_contract.py

Every release is rolled out as a canary: to 1 % of the requests, 10 %, all, back to none, and to all again. So two
releases are in use at once, in both orders, and each must read what the other one writes. What it prints at the end is
how many requests failed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy
from idempotency.contracts import Comparison, backfill, compare
from idempotency.projections import create_projections_schema
from idempotency.stores.sql import SQLStore

CUSTOMERS = 200
CLIENTS = 4
CANARY = (1, 10, 100, 0, 100)
"""Percent of the requests that the next release gets, one share after the other."""

REQUESTS = 100
"""How many requests each share gets at least."""


@dataclass(frozen=True)
class Release:
    """What one release of the code does with the two columns."""

    writes: tuple[str, ...]
    reads: str
    compares: str = ""


WRITES_OLD = Release(("name",), "name")
WRITES_BOTH = Release(("name", "full_name"), "name")
COMPARES = Release(("name", "full_name"), "name", compares="full_name")
READS_NEW = Release(("name", "full_name"), "full_name")
WRITES_NEW = Release(("full_name",), "full_name")


class Shop:
    """The service: an app whose requests are divided between two releases, and what became of them."""

    def __init__(self, directory: str) -> None:
        self.engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/shop.db", connect_args={"timeout": 30})
        self.sessions = async_sessionmaker(self.engine)
        self.store = SQLStore(self.engine, timeout=30)
        self.release, self.next, self.share = WRITES_OLD, WRITES_OLD, 0
        self.requests = itertools.count()
        self.under_way: Counter[Release] = Counter()
        self.ended = asyncio.Event()
        self.answered: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        self.wanted, self.enough = 0, asyncio.Event()
        event.listen(self.engine.sync_engine, "connect", use_wal)

        routes = [
            Route("/customers/{id:int}", self.read, methods=["GET"]),
            Route("/customers/{id:int}", self.write, methods=["PUT"]),
        ]
        app = Starlette(routes=routes)
        options: Any = {"store": self.store, "session": self.sessions, "policy": Policy(methods={"PUT"})}
        self.app = IdempotencyMiddleware(app, **options)

    @contextmanager
    def chosen(self) -> Iterator[Release]:
        """Give a request its release: of each hundred, ``share`` go to the next one."""
        release = self.next if next(self.requests) * 37 % 100 < self.share else self.release
        self.under_way[release] += 1
        try:
            yield release
        finally:
            self.under_way[release] -= 1
            self.ended.set()

    async def write(self, request: Request) -> JSONResponse:
        """Write the name of a customer, in the columns of the release."""
        session: AsyncSession = request.state.idempotency.session
        values = {"id": request.path_params["id"], "name": (await request.json())["name"]}
        with self.chosen() as release:
            changes = ", ".join(f"{column} = :name" for column in release.writes)
            await session.execute(text(f"UPDATE customer SET {changes} WHERE id = :id"), values)
        return JSONResponse(values)

    async def read(self, request: Request) -> JSONResponse:
        """Read the name of a customer, from the column of the release."""
        number = request.path_params["id"]
        with self.chosen() as release:
            if release.compares:
                name = await compare(
                    "full_name",
                    lambda: self.column(release.reads, number),
                    lambda: self.column(release.compares, number),
                    on_event=self.note,
                )
            else:
                name = await self.column(release.reads, number)
        return JSONResponse({"id": number, "name": name})

    async def column(self, column: str, number: int) -> str:
        async with self.sessions() as session:
            statement = text(f"SELECT {column} FROM customer WHERE id = :id")
            return str((await session.execute(statement, {"id": number})).scalar_one())

    def note(self, comparison: Comparison) -> None:
        self.compared[comparison.kind] += 1

    async def migrate(self, statement: str) -> None:
        """Change the schema while the service runs."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement))
        print(f"migrated: {statement}")

    async def roll_out(self, release: Release, name: str) -> None:
        """Give the next release more and more of the requests, take it back once, and give it all of them."""
        self.next = release
        for self.share in CANARY:
            self.wanted = self.answered.total() + REQUESTS
            self.enough.clear()
            await self.enough.wait()
        earlier, self.release, self.share = self.release, release, 0
        # The next change of the schema is for requests of this release alone.
        while self.under_way[earlier]:
            self.ended.clear()
            await self.ended.wait()
        print(f"rolled out: {name}")

    async def fill(self) -> None:
        """Copy the names that were written before every release wrote both columns, or by the one that did not."""

        async def batch(session: AsyncSession, after: int, most: int) -> int | None:
            rows = "SELECT id FROM customer WHERE id > :after ORDER BY id LIMIT :most"
            asked = {"after": after, "most": most}
            last: int | None = await session.scalar(text(f"SELECT max(id) FROM ({rows})"), asked)
            # IS NOT, since a release that was taken back has changed names in the old column alone.
            fill = "UPDATE customer SET full_name = name WHERE id > :after AND id <= :last AND full_name IS NOT name"
            await session.execute(text(fill), {"after": after, "last": last or after})
            return last

        last = await backfill("customer.full_name", self.sessions, batch, size=50, pause=0.02)
        print(f"filled: up to customer {last}")

    async def use(self, client: httpx.AsyncClient, own: list[int], stop: asyncio.Event) -> None:
        """Change and read the customers of one client: each answer must be what the client wrote last."""
        for number in itertools.count():
            if stop.is_set():
                return
            url, name = f"/customers/{own[number % len(own)]}", f"name {number}"
            written = await client.put(url, json={"name": name}, headers={"Idempotency-Key": f"{own[0]}-{number}"})
            found = await client.get(url)
            good = written.status_code == 200 and found.status_code == 200 and found.json()["name"] == name
            self.answered["good" if good else "failed"] += 2
            if self.answered.total() >= self.wanted:
                self.enough.set()


def use_wal(connection: Any, _: object) -> None:
    """Let readers and the writer work at once."""
    connection.execute("PRAGMA journal_mode = WAL")


async def main(directory: str) -> None:
    """Rename the column ``name`` to ``full_name`` under load, and print what became of the requests."""
    shop = Shop(directory)
    await shop.store.create_schema()
    await create_projections_schema(shop.engine)
    async with shop.engine.begin() as connection:
        # On a database where a column is NOT NULL, the expansion removes that: later releases do not write it.
        await connection.execute(text("CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT)"))
        customers = [{"id": number, "name": f"name {number}"} for number in range(1, CUSTOMERS + 1)]
        await connection.execute(text("INSERT INTO customer (id, name) VALUES (:id, :name)"), customers)

    stop, transport = asyncio.Event(), httpx.ASGITransport(shop.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop", timeout=60) as client:
        every = [list(range(first, CUSTOMERS + 1, CLIENTS)) for first in range(1, CLIENTS + 1)]
        clients = [asyncio.create_task(shop.use(client, own, stop)) for own in every]

        await shop.migrate("ALTER TABLE customer ADD COLUMN full_name TEXT")
        await shop.roll_out(WRITES_BOTH, "writes both columns")
        await shop.fill()
        await shop.roll_out(COMPARES, "compares what it reads")
        print(f"compared: {shop.compared.total() - shop.compared['same']} differ, same: {shop.compared['same'] > 50}")
        await shop.roll_out(READS_NEW, "reads the new column")
        await shop.roll_out(WRITES_NEW, "writes the new column alone")
        await shop.migrate("ALTER TABLE customer DROP COLUMN name")
        await asyncio.sleep(0.2)

        stop.set()
        await asyncio.gather(*clients)
    await shop.engine.dispose()
    print(f"{shop.answered['failed']} failed requests, more than 1000 good ones: {shop.answered['good'] > 1000}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(main(place))
