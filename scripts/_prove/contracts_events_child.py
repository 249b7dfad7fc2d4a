"""One process of a proof of contracts: it emits, relays, appends events and projects them, each when it is asked to.

It runs with the library of an earlier commit as with this one, and uses what both have. What a relay publishes is a
line in the ledger; what a projection does is a row in the table ``seen``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency import current, idempotent
from idempotency.errors import StoreError
from idempotency.outbox import Outbox, PollingRelay, Sent
from idempotency.stores.sql import SQLStore

KEYS = 5
CONCURRENCY = 4


@dataclass(frozen=True)
class Moved:
    """An event, and the message of it."""

    name: str
    amount: int


@dataclass(frozen=True)
class Account:
    """The state of a stream, which is stored as a snapshot."""

    events: int = 0
    balance: int = 0


def apply(account: Account, event: Moved) -> Account:
    return Account(account.events + 1, account.balance + event.amount)


class Publisher:
    """A broker that is a file; ``side`` says which release has published."""

    delivery_timeout = 5.0

    def __init__(self, ledger: str, side: str) -> None:
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._side = side

    async def publish(self, messages: Sequence[Any], /) -> Sequence[Any]:
        """Write one line for each message."""
        for message in messages:
            found = {"side": self._side, "key": message.aggregate_id, "trace": message.headers["trace"]}
            line = json.dumps({**found, **json.loads(message.payload)})
            os.write(self._ledger, f"{line}\n".encode())
        return [Sent() for _ in messages]

    async def aclose(self) -> None: ...


class Work:
    """What a process does in one database. ``events``: the library of the process has streams and projections."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.me, self.events = given, given["me"], given["events"]
        self.engine = create_async_engine(given["url"])
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine.sync_engine, "connect", lambda own, _: own.execute("PRAGMA busy_timeout = 30000"))
        elif self.engine.dialect.name == "mysql":
            self.engine = self.engine.execution_options(isolation_level="READ COMMITTED")
        self.sessions = async_sessionmaker(self.engine)
        self.outbox, self.store = Outbox(), SQLStore(self.engine)
        self.place: Any = idempotent(self.store, key=str, name="place", session=self.sessions)(self._place)
        if self.events:
            from idempotency.projections import projection
            from idempotency.streams import Streams

            self.streams = Streams([Moved])
            self.seen = projection("seen", source=self.streams, session=self.sessions)(self._seen)

    async def create(self) -> None:
        """Create all tables."""
        await self.store.create_schema()
        await self.outbox.create_schema(self.engine)
        if self.events:
            from idempotency.projections import create_projections_schema

            await self.streams.create_schema(self.engine)
            await create_projections_schema(self.engine)
            async with self.engine.begin() as connection:
                await connection.execute(text("CREATE TABLE seen (stream VARCHAR(20), version INTEGER)"))

    async def _place(self, name: str, *, session: AsyncSession) -> str:
        payload = {"name": f"place {name}", "amount": 1}
        current().emit(  # type: ignore[union-attr]
            aggregate_type="order", aggregate_id=name, type="Placed", payload=payload, headers={"trace": "ä"}
        )
        return name

    async def _seen(self, event: Any, session: AsyncSession) -> None:
        await session.execute(
            text("INSERT INTO seen VALUES (:stream, :version)"), {"stream": event.stream, "version": event.version}
        )

    async def write(self, step: str) -> None:
        """Emit a message and append an event in one transaction, several times; do what all processes do, once."""
        await asyncio.gather(*(self._write(step, key) for key in range(KEYS)))
        for number in range(self.given["count"]):
            await again(lambda number=number: self.place(f"{step}-{number}"))

    async def _write(self, step: str, key: int) -> None:
        for number in range(self.given["count"]):
            await again(lambda number=number: self._move(f"account-{key}", Moved(f"{self.me} {step} {number}", number)))

    async def _move(self, stream: str, moved: Moved) -> None:
        async with self.sessions.begin() as session:
            if self.events:
                _, version = await self._load(session, stream)
                await self.streams.append(session, stream, [moved], expected=version)
            await self.outbox.emit(
                session,
                aggregate_type="account",
                aggregate_id=stream,
                type="Moved",
                payload={"name": f"{stream} {moved.name}", "amount": moved.amount},
                headers={"trace": "ä"},
            )

    async def _load(self, session: AsyncSession, stream: str) -> tuple[Account, int]:
        return await self.streams.load_versioned(session, stream, apply, initial=Account(), snapshot_every=4)

    async def read(self, messages: int, events: int) -> None:
        """Publish and project until so many messages are published, and so many events projected, by all processes."""
        relay = PollingRelay(
            self.engine,
            Publisher(self.given["ledger"], self.given["side"]),
            outbox=self.outbox,
            lease=10.0,
            batch=10,
            poll=(0.02, 0.05),
        )
        running = asyncio.create_task(relay.run())
        while not running.done() and not await self._is_read(messages, events):
            if self.events:
                with suppress(StoreError, DBAPIError):
                    await self.seen.catch_up()
            await asyncio.sleep(0.05)
        await relay.stop()
        await running

    async def _is_read(self, messages: int, events: int) -> bool:
        ledger = Path(self.given["ledger"])
        published = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
        if not self.events:
            return published >= messages
        async with self.sessions() as session:
            return published >= messages and await session.scalar(text("SELECT count(*) FROM seen")) >= events

    async def found(self) -> dict[str, Any]:
        """Return all streams, with and without snapshots, and all events in their order."""
        if not self.events:
            return {}
        async with self.sessions.begin() as session:
            loaded = {name: await self._load(session, name) for name in (f"account-{key}" for key in range(KEYS))}
            whole = {name: await self.streams.load(session, name, apply, initial=Account()) for name in loaded}
        async with self.sessions.begin() as session:
            events = [
                [each.stream, each.version, each.data.name, each.data.amount]
                async for each in self.streams.read_all(session)
            ]
            seen = [[*row] for row in await session.execute(text("SELECT stream, version FROM seen"))]
        states = {
            name: [state.events, state.balance, version, state == whole[name]]
            for name, (state, version) in loaded.items()
        }
        return {"states": states, "events": events, "seen": seen}


async def again(work: Any) -> None:
    """Do a transaction until it does not conflict with another one."""
    for _ in range(500):
        try:
            await work()
        except Exception as error:
            # Earlier code has no streams, and no ConflictError.
            if not isinstance(error, StoreError | DBAPIError) and type(error).__name__ != "ConflictError":
                raise
            await asyncio.sleep(0.01)
        else:
            return
    await work()


async def main(given: dict[str, Any]) -> None:
    """Do what each line of the input says, and answer it by a line."""
    work = Work(given)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *arguments = json.loads(line)
        match command:
            case "create":
                answer: Any = await work.create()
            case "write":
                answer = await work.write(arguments[0])
            case "read":
                answer = await work.read(*arguments)
            case "both":
                answer = await asyncio.gather(work.write(arguments[0]), work.read(*arguments[1:]))
            case _:
                answer = await work.found()
        print(json.dumps(answer), flush=True)
    await work.store.aclose()
    await work.engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
