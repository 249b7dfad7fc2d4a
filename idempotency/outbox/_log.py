"""The relay that reads the log of PostgreSQL: messages come in the order of their commits, and none is polled for."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from idempotency._outbox.emit import Outbox
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox._deliver import Backoff
from idempotency.outbox._held import HeldConnection
from idempotency.outbox._leases import Leases
from idempotency.outbox._ledger import START, Ledger, Position
from idempotency.outbox._names import publication_of, slot_of
from idempotency.outbox._relay import Relay, Source
from idempotency.outbox._slot import Slot, SlotLostError, SlotState, end_of_log, format_lsn, is_busy, may_be_lost
from idempotency.outbox._slot_checks import check_server
from idempotency.outbox._tail import Tail
from idempotency.outbox.events import OnRelayEvent
from idempotency.outbox.publisher import Publisher

_CREATE_TIMEOUT = 600.0
"""Seconds in which a slot is created. The server waits for the transactions that are open at that moment."""


class LogRelay(Relay):
    """Publish the messages of an outbox as the log of PostgreSQL has them, each at least once, those of a key in order.

    ``engine``: an async engine, a sync engine, which is used in threads, or a URL. One relay at a time reads a slot;
    when it ends, in order or not, another one takes over within one lease. With ``Outbox(mode="message")`` the messages
    are in the log alone; else rows stay in the table until they are published, and a slot that is lost is made anew.
    ``slot`` and ``publication``: what the relay creates on the server, by default named after the table. The slots of
    all databases of a server share their names. ``allow_unlimited_wal``: run where the setting
    ``max_slot_wal_keep_size`` lets the log of a relay that is stopped fill the disk. The other options are those of
    :class:`PollingRelay`. Run no PollingRelay on the same table at the same time: each would publish all messages.
    In message mode, ``run`` and ``drain`` raise :class:`SlotLostError` where messages are lost, and publish what the
    table has too. Else they raise :class:`~idempotency.errors.ConfigurationError` for a message of this outbox in the
    log: it would be passed over.
    """

    def __init__(
        self,
        engine: Source,
        publisher: Publisher,
        *,
        outbox: Outbox | None = None,
        slot: str | None = None,
        publication: str | None = None,
        allow_unlimited_wal: bool = False,
        lease: float | timedelta = 30.0,
        batch: int = 500,
        poll: tuple[float, float] = (0.02, 1.0),
        backoff: Backoff | None = None,
        on_event: OnRelayEvent = (),
        name: str | None = None,
    ) -> None:
        super().__init__(engine, publisher, outbox, lease, batch, poll, backoff, on_event, name)
        if self._database.dialect != "postgresql":
            raise ConfigurationError(f"LogRelay reads the log of PostgreSQL; {self._database} needs a PollingRelay")
        tables = self.outbox.tables
        self._slot = Slot(
            slot or slot_of(tables),
            publication or publication_of(tables),
            tables.messages,
            self.outbox.prefix,
            messages=self.outbox.mode == "message",
        )
        self._allow_unlimited_wal = allow_unlimited_wal
        self._ledger = Ledger(tables.position, self._slot.name)
        self._leases = Leases(self._database, self._seconds)
        # A name of a slot and this prefix together may be longer than the column.
        self._lease = f"slot-{self._slot.name}"[:64]
        self._tail = Tail(self._database, self._slot, self._delivery, batch, self._remaining, lambda: self._stopping)

    async def _begin(self) -> None:
        await super()._begin()
        await self._database.run(partial(check_server, slot=self._slot, allow_unlimited_wal=self._allow_unlimited_wal))
        await self._leases.create([self._lease])

    async def _drain(self) -> int:
        before = self._tail.done
        if await self._own():
            while await self._cycle() and not self._tail.away:
                pass
        return self._tail.done - before

    async def _give_back(self) -> None:
        await self._tail.end()
        # Also where it is not known to be held: the relay may have been cancelled while it took it.
        await self._leases.release({self._lease})

    async def _step(self) -> bool:
        """Do one round; return whether there may be more to do at once."""
        try:
            if self._remaining() <= 0 and not await self._own():
                return False
            return await self._cycle()
        except SlotLostError:
            raise
        except StoreError as error:
            cause = error.__cause__
            if self._stopping.is_set() or (isinstance(cause, DBAPIError) and is_busy(cause)):
                return False  # it is to stop, or the server still works for a relay before this one
            await self._unavailable(error)
            # It begins anew: another relay may own the slot, and what was written is not known.
            await self._leave()
            self._leases.drop()
            self._failures += 1
            await self._pause()
            return True

    def _remaining(self) -> float:
        """Return for how many seconds the slot is owned."""
        return self._leases.remaining if self._leases.held else 0.0

    async def _own(self) -> bool:
        """Own the slot, if no other relay does, and find the place from which to go on."""
        before = {row.name: row for row in await self._leases.look()}.get(self._lease)
        if before is None or before.live:
            return False
        self._leases.drop()
        if not await self._leases.take([self._lease]):
            return False
        if before.owner:
            self._delivery.announce("took-over", count=1)
        try:
            state, position = await self._database.run(self._look)
            if state is None or state.lost is not None or position is None:
                position = await self._create(state, position)
            await self._tail.begin(position)
        except StoreError:
            # Its place in the log is not known: who owned the slot now would pass over messages.
            await self._leave()
            self._leases.drop()
            raise
        return True

    def _look(self, connection: Connection) -> tuple[SlotState | None, Position | None]:
        return self._slot.read(connection), self._ledger.read(connection)

    async def _create(self, state: SlotState | None, position: Position | None) -> Position:
        """Create the slot, and publish what the table has had before it. A slot that is lost is created anew."""
        usable = state is not None and state.lost is None
        if self._slot.messages and (position is not None or (state is not None and not usable)):
            raise await self._loss(state, position)
        await self._database.run(self._ledger.forget)
        await self._database.run(self._slot.create_publication)
        if not usable:
            if state is not None:
                await self._database.run(self._slot.drop)
            async with HeldConnection(self._database, _CREATE_TIMEOUT, self._stopping) as held:
                await held.run(self._slot.create)
        if position is not None:
            self._delivery.announce("slot-lost", reason=f"the slot {self._slot.name} is made anew")
        if not self._slot.messages:
            await self._tail.scan()
        await self._database.run(self._ledger.begin)
        return START

    async def _loss(self, state: SlotState | None, position: Position | None) -> SlotLostError:
        after = format_lsn(position.lsn) if position is not None else "the creation of the slot"
        until = format_lsn(await self._database.run(end_of_log))
        reason = "gone" if state is None else f"lost ({state.lost})"
        error = SlotLostError(
            f"the slot {self._slot.name} is {reason}: messages that were committed after {after} and before {until} are"
            f" lost. To go on without them, drop the slot if it is there, and delete its row in"
            f" {self.outbox.tables.position.fullname}"
        )
        error.after, error.until = after, until
        return error

    async def _cycle(self) -> bool:
        """Publish what is due in the table, and what the log has; return whether there was anything."""
        try:
            served = await self._tail.serve_table()
            moved = await self._tail.read_log()
        except StoreError as error:
            cause = error.__cause__
            if not isinstance(cause, DBAPIError) or not may_be_lost(cause):
                raise
            state, position = await self._database.run(self._look)
            await self._heal(state, position)
            return True
        if self._tail.away:
            self._failures += 1
            await self._pause()
        else:
            self._failures = 0
        return served or moved

    async def _heal(self, state: SlotState | None, position: Position | None) -> None:
        """Make the slot anew after the server refused to read it: it is gone or lost, or its publication is."""
        if self._slot.messages:
            raise await self._loss(state, position)
        if state is not None:
            await self._database.run(self._slot.drop)
        await self._tail.begin(await self._create(None, position))
