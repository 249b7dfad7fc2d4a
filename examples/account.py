"""An account as a stream of events: deposits and withdrawals, a reversal, snapshots, and the balance of any time.

    pip install 'asgi-idempotency[sqlite]'
    python examples/account.py

Nothing is changed or deleted: what was wrong is reversed by a new entry. A command that is repeated, as after a lost
answer, is one entry. ``ACCOUNT_DB`` names the database (default: a SQLite file).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency import idempotent
from idempotency.stores.sql import SQLStore
from idempotency.streams import ConflictError, Streams, Versioned


@dataclass(frozen=True)
class Deposited:
    amount: int


@dataclass(frozen=True)
class Withdrawn:
    amount: int
    purpose: str


@dataclass(frozen=True)
class Reversed:
    """The entry of this version never counted."""

    version: int
    amount: int


@dataclass(frozen=True)
class Account:
    balance: int = 0


def apply(account: Account, event: Deposited | Withdrawn | Reversed) -> Account:
    match event:
        case Withdrawn(amount):
            return Account(account.balance - amount)
        case Deposited(amount) | Reversed(amount=amount):
            return Account(account.balance + amount)


class NotCoveredError(Exception):
    """The account has less than is to be withdrawn."""


# The first version had no purpose. Its events are read for ever, by the function that adds one.
WITHDRAWN = Versioned(Withdrawn, version=2, upcast={1: lambda old: {**old, "purpose": "unknown"}})
events = Streams([Deposited, WITHDRAWN, Reversed])


@asynccontextmanager
async def opened(directory: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    engine = create_async_engine(os.environ.get("ACCOUNT_DB", f"sqlite+aiosqlite:///{directory}/account.db"))
    await events.create_schema(engine)  # in production, migrations
    await SQLStore(engine).create_schema()
    yield async_sessionmaker(engine)
    await engine.dispose()


async def main(directory: str) -> None:
    async with opened(directory) as sessions:
        store = SQLStore(sessions.kw["bind"])

        @idempotent(store, key=lambda key, _: key, session=sessions)
        async def deposit(key: str, amount: int, session: AsyncSession) -> int:
            return (await events.append(session, "account-7", [Deposited(amount)])).version

        @idempotent(store, key=lambda key, *_: key, session=sessions)
        async def withdraw(key: str, amount: int, purpose: str, session: AsyncSession) -> int:
            account, version = await events.load_versioned(
                session, "account-7", apply, initial=Account(), snapshot_every=2
            )
            if account.balance < amount:
                raise NotCoveredError(f"{account.balance} is less than {amount}")
            # Of two withdrawals that have seen the same balance, one is refused, and looks again.
            return (await events.append(session, "account-7", [Withdrawn(amount, purpose)], expected=version)).version

        pay_in: Any = deposit  # the decorator gives them their sessions
        pay_out: Any = withdraw
        for _ in range(2):  # the answer was lost, and the command is repeated
            await pay_in("d-1", 80)
        await pay_in("d-2", 40)
        rent = await pay_out("w-1", 70, "rent")
        try:
            await pay_out("w-2", 60, "a bicycle")
        except NotCoveredError as refused:
            print(f"refused: {refused}")
        async with sessions.begin() as session:
            await events.append(session, "account-7", [Reversed(rent, 70)])
        try:
            async with sessions.begin() as session:
                await events.append(session, "account-7", [Withdrawn(1, "too late")], expected=rent)
        except ConflictError as conflict:
            print(f"conflict: {conflict}")

        async with sessions() as session:
            async for event in events.read(session, "account-7"):
                then = await events.load(session, "account-7", apply, initial=Account(), until=event.version)
                print(f"{event.version}  {event.data}  balance {then.balance}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
