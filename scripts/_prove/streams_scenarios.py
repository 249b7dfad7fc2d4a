"""The crash points of streams: an operation that loads an account with a snapshot, and appends two events to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from scenarios import LEASE, RECORDS, TTL
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idempotency import Policy, idempotent
from idempotency.events import Event
from idempotency.stores.sql import SQLStore
from idempotency.streams import Streams
from idempotency.testing import crash_point

TABLE = "prove_event"
PATIENCE = 30.0
_SYNC_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite"}


@dataclass(frozen=True)
class Deposited:
    amount: int


@dataclass(frozen=True)
class Withdrawn:
    amount: int


@dataclass(frozen=True)
class Account:
    balance: int = 0


def apply(account: Account, event: Any) -> Account:
    """Return the account after an event."""
    return Account(account.balance + (event.amount if isinstance(event, Deposited) else -event.amount))


EVENTS = (Deposited(3), Withdrawn(1))
STREAMS = Streams([Deposited, Withdrawn], TABLE)
_SNAPSHOT: Any = {"initial": Account(), "snapshot_every": 1}


def sync_url(url: str) -> str:
    """Return the URL for the driver that blocks."""
    made = make_url(url)
    return made.set(drivername=_SYNC_DRIVERS[made.get_backend_name()]).render_as_string(hide_password=False)


def _quiet(event: Event, /) -> None:
    """Log nothing: hundreds of operations are made to fail."""


class _OnStreams:
    """An account, its events and the records, in one database."""

    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url)
        self.sessions = async_sessionmaker(self.engine)
        self.store = SQLStore(self.engine, table=RECORDS)

    async def prepare(self) -> None:
        await self.store.create_schema()
        await STREAMS.create_schema(self.engine)

    async def append(self, session: AsyncSession, key: str) -> None:
        _, version = await STREAMS.load_versioned(session, key, apply, **_SNAPSHOT)
        await STREAMS.append(session, key, EVENTS, expected=version)
        crash_point("appended")
        await STREAMS.load(session, key, apply, **_SNAPSHOT)

    async def count(self, key: str) -> int:
        """Return how often the two events are there; 9 if they are not in order, or the snapshot is of others."""
        until = asyncio.get_running_loop().time() + PATIENCE
        while True:
            async with self.sessions() as session:
                own = [event async for event in STREAMS.read(session, key)]
            async with self.sessions() as session:
                of_all = [event async for event in STREAMS.read_all(session) if event.stream == key]
                state = await STREAMS.load(session, key, apply, **_SNAPSHOT)
            # On PostgreSQL, transactions of the other trials delay who reads all events.
            if len(of_all) == len(own) or asyncio.get_running_loop().time() > until:
                break
            await asyncio.sleep(0.05)
        times = len(own) // len(EVENTS)
        in_order = [event.version for event in of_all] == list(range(1, len(own) + 1))
        whole = [event.data for event in of_all] == list(EVENTS) * times
        return times if in_order and whole and state == Account(2 * times) else 9


class JoinedAppend(_OnStreams):
    """Record, events and snapshot are one transaction."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent(self.store, key=str, session=self.sessions, policy=Policy(ttl=TTL), on_event=_quiet)
        async def change(key: str, session: AsyncSession) -> None:
            await self.append(session, key)

        self.change: Any = change

    async def deliver(self, key: str) -> None:
        await self.change(key)


class AppendAndRead(JoinedAppend):
    """A reader gives places on MariaDB: it is killed also between the commit and the place of its events.

    One at a time: the places of its events are given by itself.
    """

    async def deliver(self, key: str) -> None:
        await self.change(key)
        async with self.sessions() as session:
            async for _ in STREAMS.read_all(session):
                pass


class LeasedAppend(_OnStreams):
    """The events commit in a transaction of their own: a run that comes after it meets them by their ids."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent(self.store, key=str, policy=Policy(lease=LEASE, ttl=TTL), on_event=_quiet)
        async def change(key: str) -> None:
            async with self.sessions.begin() as session:
                await STREAMS.append(session, key, EVENTS)
                crash_point("appended")
                await STREAMS.load(session, key, apply, **_SNAPSHOT)

        self.deliver: Any = change


class JoinedAppendSync(_OnStreams):
    """The same in a thread."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        engine = create_engine(sync_url(url))

        @idempotent(
            SQLStore(engine, table=RECORDS),
            key=str,
            session=sessionmaker(engine),
            policy=Policy(ttl=TTL),
            on_event=_quiet,
        )
        def change(key: str, session: Session) -> None:
            _, version = STREAMS.load_versioned_sync(session, key, apply, **_SNAPSHOT)
            STREAMS.append_sync(session, key, EVENTS, expected=version)
            crash_point("appended")
            STREAMS.load_sync(session, key, apply, **_SNAPSHOT)

        self.change: Any = change

    def deliver(self, key: str) -> None:
        self.change(key)
