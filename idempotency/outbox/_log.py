"""The relay that reads the log of PostgreSQL: messages come in the order of their commits, and none is polled for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._durations import positive
from idempotency._hooks import check_callable
from idempotency._outbox.emit import Outbox
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._deliver import Backoff, Delivery, ExponentialBackoff
from idempotency.outbox._held import HeldConnection
from idempotency.outbox._leases import Leases
from idempotency.outbox._ledger import START, Ledger, Position
from idempotency.outbox._names import publication_of, slot_of
from idempotency.outbox._slot import Slot, SlotLostError, SlotState, end_of_log, format_lsn, is_busy, may_be_lost
from idempotency.outbox._slot_checks import check_server
from idempotency.outbox._tail import Tail
from idempotency.outbox._wake import Wake
from idempotency.outbox.events import RelayHook, log_relay_event
from idempotency.outbox.publisher import Publisher

_TIMEOUT = 10.0
"""Seconds after which a statement is abandoned; a third of the lease if that is shorter."""

_CREATE_TIMEOUT = 600.0
"""Seconds in which a slot is created. The server waits for the transactions that are open at that moment."""

_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0
"""Seconds between two tries while the broker or the database is away."""

_LEAVE = 2.0
"""Seconds for giving back the slot when the relay is cancelled."""


class LogRelay:
    """Publish the messages of an outbox as the log of PostgreSQL has them, each at least once, those of a key in order.

    ``engine``: an async engine, a sync engine, which is used in threads, or a URL. One relay at a time reads a slot;
    when it ends, in order or not, another one takes over within one lease. With ``Outbox(mode="message")`` the messages
    are in the log alone; else rows stay in the table until they are published, and a slot that is lost is made anew.
    ``slot`` and ``publication``: what the relay creates on the server, by default named after the table. The slots of
    all databases of a server share their names. ``allow_unlimited_wal``: run where the setting
    ``max_slot_wal_keep_size`` lets the log of a relay that is stopped fill the disk. The other options are those of
    :class:`PollingRelay`. Run no PollingRelay on the same table at the same time: each would publish all messages.
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine | URL | str,
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
        on_event: RelayHook = log_relay_event,
        name: str | None = None,
    ) -> None:
        self.outbox = outbox or Outbox()
        seconds = positive("lease", lease)
        if seconds <= publisher.delivery_timeout:
            raise ConfigurationError(
                f"lease must be longer than the publisher's delivery time-out, {publisher.delivery_timeout:g} s: else"
                f" another relay would take over what is still being published; it is {seconds:g} s"
            )
        if not isinstance(batch, int) or batch < 1:
            raise ConfigurationError(f"batch must be a number of messages, not {batch!r}")
        check_callable("on_event", on_event)
        self._poll = positive("poll", poll[0]), positive("poll", poll[1])
        tables = self.outbox.tables
        self._database = RelayDatabase(engine, tables, min(_TIMEOUT, seconds / 3))
        if self._database.dialect != "postgresql":
            raise ConfigurationError(f"LogRelay reads the log of PostgreSQL; {self._database} needs a PollingRelay")
        prefix = self.outbox.prefix if self.outbox.mode == "message" else None
        self._slot = Slot(slot or slot_of(tables), publication or publication_of(tables), tables.messages, prefix)
        self._allow_unlimited_wal = allow_unlimited_wal
        self._ledger = Ledger(tables.position, self._slot.name)
        self._leases = Leases(self._database, seconds)
        self._lease = f"slot-{self._slot.name}"[:64]
        self._delivery = Delivery(
            publisher, backoff or ExponentialBackoff(), on_event, name or tables.messages.fullname
        )
        self._tail = Tail(self._database, self._slot, self._delivery, batch, lambda: self._leases.remaining)
        self._wake = Wake(self._database)
        self._failures = 0
        self._stopping = asyncio.Event()
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Publish for ever, until :meth:`stop` or a cancellation. A database or broker that is away is waited for.

        Raises :class:`~idempotency.errors.ConfigurationError` if the tables are missing, or if the server does not let
        a slot be read, and :class:`SlotLostError` if messages are lost, which can happen in message mode only.
        """
        async with self._working():
            idle = self._poll[0]
            while not self._stopping.is_set():
                found = await self._step()
                idle = self._poll[0] if found else min(idle * 2, self._poll[1])
                wait = idle * random.uniform(0.75, 1.25)  # noqa: S311
                if not found and not self._stopping.is_set() and await self._wake.wait(wait):
                    idle = self._poll[0]

    async def drain(self) -> int:
        """Publish what is due, once, and return how many messages are done with: for tests, and for jobs of cron.

        It publishes nothing while another relay owns the slot. Raises :class:`~idempotency.errors.StoreError` where the
        database is away.
        """
        before = self._tail.done
        async with self._working():
            if await self._own():
                while await self._cycle():
                    pass
        return self._tail.done - before

    async def stop(self) -> None:
        """End :meth:`run`: finish the slice in hand, give back the slot, and return when that is done."""
        self._stop()
        if self._stopped is not None:
            await self._stopped.wait()

    def run_sync(self) -> None:
        """See :meth:`run`: for a thread of an application that has no event loop."""
        asyncio.run(self.run())

    def stop_sync(self, timeout: float | None = None) -> None:
        """See :meth:`stop`: for another thread than that of :meth:`run_sync`."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it has ended
                asyncio.run_coroutine_threadsafe(self.stop(), loop).result(timeout)

    def _stop(self) -> None:
        self._stopping.set()
        self._tail.stop()
        self._wake.wake()

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        if self._stopped is not None:
            raise ConfigurationError("this relay is running already")
        self._stopping = asyncio.Event()
        self._stopped = stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        keeper: asyncio.Task[None] | None = None
        try:
            await self._prepare()
            keeper = self._loop.create_task(self._leases.keep(self._unavailable))
            async with self._wake.listening(self.outbox.notify):
                yield
        finally:
            if keeper is not None:
                keeper.cancel()
            await self._leave()
            await self._database.aclose()
            self._stopped = None
            stopped.set()

    async def _prepare(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._database.prepare()
                await self._database.run(
                    partial(check_server, slot=self._slot, allow_unlimited_wal=self._allow_unlimited_wal)
                )
                await self._leases.create([self._lease])
                return
            except StoreError as error:
                await self._unavailable(error)
                await self._pause()

    async def _leave(self) -> None:
        await self._tail.end()
        if self._leases.held:
            with suppress(StoreError, TimeoutError):
                await asyncio.wait_for(self._leases.release({self._lease}), _LEAVE)

    async def _unavailable(self, error: StoreError) -> None:
        self._delivery.announce("unavailable", reason=str(error))

    async def _step(self) -> bool:
        """Do one round; return whether there may be more to do at once."""
        try:
            if not self._leases.valid and not await self._own():
                return False
            return await self._cycle()
        except SlotLostError:
            raise
        except StoreError as error:
            cause = error.__cause__
            if isinstance(cause, DBAPIError) and is_busy(cause):
                return False  # the server still works for a relay before this one
            await self._unavailable(error)
            # It begins anew: another relay may own the slot, and what was written is not known.
            await self._leave()
            self._leases.drop()
            self._failures += 1
            await self._pause()
            return True

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
            async with HeldConnection(self._database, _CREATE_TIMEOUT) as held:
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

    async def _pause(self) -> None:
        pause = min(_LAST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures, 20)) * random.uniform(0.75, 1.25)  # noqa: S311
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopping.wait()
