"""Who owns what among relays: rows with an owner and an end, judged by the database's clock alone."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, case, delete, literal_column, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite

from idempotency._outbox.table import BUCKETS
from idempotency._sql.clock import NOW_MS
from idempotency.errors import StoreError
from idempotency.outbox._database import RelayDatabase

_MEMBER = "relay-"
_NOBODY = ""
_MARGIN = 0.1
"""Part of a lease in which its owner does nothing any more: its clock may go slower than that of the database."""

_RENEWALS = 3
"""How often a lease is renewed in its time, and how often that is tried again after a failure."""

_FORGOTTEN = 10
"""Leases after which the row of a relay that has ended without a word is deleted."""


class Lease(NamedTuple):
    """A row of the table of leases. ``live``: its time is not over."""

    name: str
    owner: str
    live: bool


class Leases:
    """What one owner holds, under names such as ``slot-orders``.

    ``seconds``: the length of a lease. Nothing may be done with what is held once :attr:`valid` is false. The process
    was paused, or the database was away, for longer than the lease; and another owner may have taken it.
    """

    def __init__(self, database: RelayDatabase, seconds: float) -> None:
        self.seconds = seconds
        self.owner = ""
        self.held: set[str] = set()
        self._database = database
        self._table = database.tables.lease
        self._milliseconds = round(seconds * 1000)
        self._now: ColumnElement[Any] = literal_column(NOW_MS[database.dialect])
        self._valid_until = 0.0
        # A renewal counts what it renews, so that nothing may be taken or released meanwhile.
        self._changing = asyncio.Lock()
        self.drop()

    @property
    def valid(self) -> bool:
        """Return whether what is held may be used: it was renewed less than a lease ago, by this process's clock."""
        return monotonic() < self._valid_until

    @property
    def remaining(self) -> float:
        """Return for how long what is held may be used, unless it is renewed."""
        return max(0.0, self._valid_until - monotonic())

    async def create(self, names: Iterable[str]) -> None:
        """Make the rows of these names where they are missing; nobody owns them."""
        rows = [{"name": name, "owner": _NOBODY, "until_ms": 0} for name in names]
        table: Any = self._table
        match self._database.dialect:
            case "postgresql":
                statement: Any = postgresql.insert(table).on_conflict_do_nothing()
            case "sqlite":
                statement = sqlite.insert(table).on_conflict_do_nothing()
            case _:
                # Not INSERT IGNORE, about which drivers warn.
                statement = mysql.insert(table).on_duplicate_key_update(name=table.c.name)
        await self._database.run(lambda connection: connection.execute(statement.values(rows)))

    async def look(self) -> list[Lease]:
        """Return all rows."""
        live = case((self._table.c.until_ms > self._now, 1), else_=0)
        statement = select(self._table.c.name, self._table.c.owner, live)

        def read(connection: Connection) -> list[Lease]:
            return [Lease(name, owner, bool(live)) for name, owner, live in connection.execute(statement)]

        return await self._database.run(read)

    async def take(self, names: Collection[str]) -> set[str]:
        """Take those of the rows whose time is over, or that nobody owns; return which are held now."""
        free = self._table.c.name.in_(sorted(names)) & (self._table.c.until_ms <= self._now)
        until = self._now + self._milliseconds
        statement = update(self._table).where(free).values(owner=self.owner, until_ms=until)
        mine = select(self._table.c.name).where(
            self._table.c.owner == self.owner, self._table.c.name.in_(sorted(names)), self._table.c.until_ms > self._now
        )

        async with self._changing:
            asked = monotonic()
            await self._database.run(lambda connection: connection.execute(statement))
            taken = await self._database.run(lambda connection: set(connection.scalars(mine))) - self.held
            if not self.held:
                self._valid_until = self._end_of_lease(asked)
            self.held |= taken
        return taken

    async def renew(self) -> bool:
        """Renew all that is held; return False, and hold nothing any more, if some of it was lost."""
        mine = (self._table.c.owner == self.owner) & (self._table.c.until_ms > self._now)
        statement = update(self._table).where(mine).values(until_ms=self._now + self._milliseconds)

        async with self._changing:
            asked = monotonic()
            renewed: int = await self._database.run(lambda connection: connection.execute(statement).rowcount)
            if renewed < len(self.held):
                self.drop()
                return False
            self._valid_until = self._end_of_lease(asked)
            return True

    async def release(self, names: Collection[str]) -> None:
        """Give back what nothing is done with any more: another owner can take it at once."""
        statement = (
            update(self._table)
            .where(self._table.c.owner == self.owner, self._table.c.name.in_(sorted(names)))
            .values(owner=_NOBODY, until_ms=0)
        )
        async with self._changing:
            self.held.difference_update(names)
            await self._database.run(lambda connection: connection.execute(statement))

    def drop(self) -> None:
        """Hold nothing any more, and be another owner from here on. Rows of the one before are free when they end."""
        self.owner = str(uuid.uuid4())
        self.held.clear()
        self._valid_until = 0.0

    async def keep(self, failed: Callable[[StoreError], Awaitable[object]]) -> None:
        """Renew for ever. ``failed`` is awaited after a failure of the database; the next try comes soon after."""
        while True:
            pause = self.seconds / _RENEWALS
            if self.held:
                try:
                    await self.renew()
                except StoreError as error:
                    await failed(error)
                    pause /= _RENEWALS
            await asyncio.sleep(pause)

    def _end_of_lease(self, asked: float) -> float:
        # From before the statement was sent: the database has set the end of the lease after that.
        return asked + self.seconds * (1 - _MARGIN)


class Buckets:
    """The share of the buckets that one relay owns."""

    def __init__(self, database: RelayDatabase, seconds: float) -> None:
        self.leases = Leases(database, seconds)
        self._database = database

    @property
    def _member(self) -> str:
        return f"{_MEMBER}{self.leases.owner}"

    @property
    def held(self) -> frozenset[int]:
        """Return the numbers of the buckets that are owned."""
        return frozenset(map(_number, self.leases.held - {self._member}))

    async def join(self) -> None:
        """Become a member, so that the other relays give up their surplus; own no bucket yet."""
        self.leases.drop()
        table = self._database.tables.lease
        ended: ColumnElement[Any] = literal_column(NOW_MS[self._database.dialect]) - round(
            _FORGOTTEN * self.leases.seconds * 1000
        )
        forget = delete(table).where(table.c.name.startswith(_MEMBER, autoescape=True), table.c.until_ms < ended)
        await self._database.run(lambda connection: connection.execute(forget))
        await self.leases.create([self._member, *map(_name, range(BUCKETS))])
        await self.leases.take([self._member])

    async def rebalance(self) -> tuple[frozenset[int], frozenset[int]]:
        """Release what is more than a fair share, or take what is missing of it and free.

        It must not be called while messages are published. Return the buckets that were taken, and those among them
        whose last owner did not release them.
        """
        rows = await self.leases.look()
        surplus, wanted = share_out(rows, self.leases.owner, self.held)
        if surplus:
            await self.leases.release([_name(number) for number in surplus])
        if not wanted:
            return frozenset(), frozenset()
        taken = frozenset(map(_number, await self.leases.take([_name(number) for number in wanted])))
        lapsed = frozenset(_number(row.name) for row in rows if row.name.startswith("bucket-") and row.owner)
        return taken, taken & lapsed

    async def leave(self) -> None:
        """Release all buckets, and be a member no more."""
        member, table = self._member, self._database.tables.lease
        await self.leases.release(self.leases.held | {member})
        self.leases.drop()
        await self._database.run(lambda connection: connection.execute(delete(table).where(table.c.name == member)))


def share_out(rows: Collection[Lease], owner: str, held: Collection[int]) -> tuple[list[int], list[int]]:
    """Return which buckets ``owner`` has too many, and which it should try to take. A share is rounded up.

    ``held``: what it knows to own. Where the answer to a take was lost, the database knows of more: those are taken
    again.
    """
    members = sum(row.live and row.name.startswith(_MEMBER) for row in rows)
    share = -(-BUCKETS // max(1, members))
    buckets = [row for row in rows if row.name.startswith("bucket-")]
    mine = [_number(row.name) for row in buckets if row.live and row.owner == owner]
    free = [_number(row.name) for row in buckets if not row.live]
    # Relays that look at the same moment should not all try the same ones.
    random.shuffle(free)
    unknown = [number for number in mine[:share] if number not in held]
    return mine[share:], [*unknown, *free[: max(0, share - len(mine))]]


def _name(bucket: int) -> str:
    return f"bucket-{bucket:02d}"


def _number(name: str) -> int:
    return int(name.removeprefix("bucket-"))
