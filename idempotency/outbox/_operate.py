"""What an operator, or an exporter of metrics, does with an outbox."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection, Engine, inspect, select
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._durations import DAY, positive
from idempotency._outbox.emit import Outbox
from idempotency._outbox.table import Tables
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._examine import examine, read_retained
from idempotency.outbox._names import slot_of
from idempotency.outbox._redrive import dead_ids, give_up, last_dead, move, next_dead, remove, send_now
from idempotency.outbox._slot import SlotState, read_slot
from idempotency.outbox._states import OutboxEntry, OutboxStats, read_entries, read_stats
from idempotency.stores.base import Finding

T = TypeVar("T")


class OutboxOperations:
    """See what is in an outbox, and redrive or forget messages.

    ``engine`` is an ``AsyncEngine``, an ``Engine``, which is used in a thread, or a URL, whose engine :meth:`aclose`
    closes. ``timeout`` is in seconds, default 30: how long a verb may take.
    Every failure of the database is a :class:`~idempotency.errors.StoreError` that says what to do.
    """

    def __init__(
        self, engine: AsyncEngine | Engine | URL | str, outbox: Outbox | None = None, *, timeout: float = 30.0
    ) -> None:
        self._database = RelayDatabase(engine, (outbox or Outbox()).tables, positive("timeout", timeout, DAY))

    async def stats(self) -> OutboxStats:
        """Count the messages by state, and find the relays that run: one statement, which reads the whole outbox."""
        return await self._run(read_stats)

    async def retained(self) -> dict[str, int]:
        """Return the bytes of the log that the server retains for each slot of this outbox; empty without PostgreSQL.

        It reads a view of the server, and no table of messages.
        """
        return await self._run(read_retained)

    async def messages(
        self, *, dead: bool = False, key: str | None = None, limit: int = 100, payload: bool = False
    ) -> list[OutboxEntry]:
        """List the messages that wait, or the dead ones, in the order in which they were written.

        ``key``: only those of a key, ``TYPE/ID`` as in :attr:`OutboxEntry.key`. ``payload``: read the payloads too.
        """
        if key is not None and "/" not in key:
            raise ConfigurationError(f"a key is TYPE/ID, such as order/7, not {key!r}")
        return await self._run(partial(read_entries, dead=dead, key=key, limit=limit, payload=payload))

    async def blocked(self, *, limit: int = 100) -> list[OutboxEntry]:
        """List the messages that are blocked: those that wait to be sent again, and what is behind each of its key."""
        return await self._run(partial(read_entries, dead=False, blocked=True, key=None, limit=limit, payload=False))

    async def message(self, id: str) -> OutboxEntry | None:
        """Return a message, dead or not, without its payload; None if there is none."""
        for dead in (False, True):
            one = partial(read_entries, dead=dead, id=_uuid(id), key=None, limit=1, payload=False)
            for found in await self._run(one):
                return found
        return None

    async def slots(self) -> dict[str, SlotState]:
        """Return what PostgreSQL says of the slots of the relays that read its log, by name; elsewhere nothing."""
        return await self._run(_slots)

    async def retry(self, id: str) -> bool:
        """Let a message be sent at once that waits for a time; False if there is none that waits.

        Behind a message of its key that is blocked, it waits further for that one.
        """
        return await self._run(partial(send_now, id=_uuid(id)))

    async def give_up(self, id: str, reason: str) -> bool:
        """Move a message to the dead ones, so that those behind it go on; False if it does not wait.

        A relay that has read it already may still send it.
        """
        return await self._run(partial(give_up, id=_uuid(id), reason=reason))

    async def redrive(self, ids: Collection[str]) -> int:
        """Put dead messages back into the outbox, with the same ids, and return how many.

        Each goes to the end of its key's order: messages of the key that were emitted later may have gone ahead of it.
        Raises :class:`~idempotency.errors.ConfigurationError`, and moves nothing, if one of them is not dead.
        """
        return await self._run(partial(_redrive, ids=[_uuid(id) for id in ids]))

    async def redrive_all(self, *, type: str | None = None) -> int:
        """Put all dead messages, or those of a type, back into the outbox; see :meth:`redrive`.

        They are moved in batches, each in its own transaction. Messages that die meanwhile are not moved again.
        """
        last = await self._run(last_dead)
        after = total = 0
        while places := await self._run(partial(next_dead, after=after, last=last, type=type)):
            total += await self._run(partial(move, places=places))
            after = places[-1]
        return total

    async def forget(self, id: str) -> bool:
        """Delete a message for good, dead or not; False if there is none.

        A relay that has read it already may still send it.
        """
        return await self._run(partial(remove, id=_uuid(id)))

    async def exists(self) -> bool:
        """Return whether there is an outbox of this name: its messages and its leases."""
        return await self._run(_exists)

    async def create_schema(self) -> None:
        """Create the tables where they are missing; safe in any number of processes at once."""
        await self._run(_create)

    async def examine(self, *, lease: float | None = None, delivery_timeout: float | None = None) -> list[Finding]:
        """Return what an operator should know of the tables, the relays, and what keeps the database from cleaning.

        ``lease`` of the relays and ``delivery_timeout`` of their publisher, in seconds, are compared if both are given.
        A database that cannot be used is a finding too, and not an error.
        """
        findings: list[Finding] = []
        if lease is not None and delivery_timeout is not None and lease <= delivery_timeout:
            findings.append(
                Finding(
                    "fix",
                    f"the lease of {lease:g} s is not longer than the delivery time-out of {delivery_timeout:g} s: two"
                    " relays may send a message",
                )
            )
        try:
            return [*findings, *await self._run(examine)]
        except StoreError as error:
            return [*findings, Finding("fix", str(error))]

    async def aclose(self) -> None:
        """Dispose of the engine if it was opened here, by a URL."""
        await self._database.aclose()

    async def _run(self, work: Callable[..., T]) -> T:
        return await self._database.run(partial(work, tables=self._database.tables), transaction=True)


def _exists(connection: Connection, tables: Tables) -> bool:
    # A table that is named outbox may be of something else.
    inspector = inspect(connection)
    return all(
        inspector.has_table(each.name, connection.schema_for_object(each)) for each in (tables.messages, tables.lease)
    )


def _create(connection: Connection, tables: Tables) -> None:
    tables.create(connection)


def _slots(connection: Connection, tables: Tables) -> dict[str, SlotState]:
    if connection.dialect.name != "postgresql":
        return {}
    names = {slot_of(tables), *connection.execute(select(tables.position.c.slot)).scalars()}
    found = {name: read_slot(connection, name) for name in sorted(names)}
    return {name: state for name, state in found.items() if state is not None}


def _redrive(connection: Connection, tables: Tables, ids: Collection[str]) -> int:
    places = dead_ids(connection, tables, ids)
    missing = sorted(set(ids) - set(places))
    if missing:
        raise ConfigurationError(f"there is no dead message {missing[0]}: nothing was moved")
    return move(connection, tables, sorted(places.values()))


def _uuid(id: str) -> str:
    try:
        return str(UUID(id))
    except ValueError as error:
        raise ConfigurationError(f"the id of a message is a UUID, not {id!r}") from error
