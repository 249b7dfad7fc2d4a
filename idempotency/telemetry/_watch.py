"""Read the gauges of a store, an outbox and sagas, in a task of their own, so that a scrape asks no database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

from idempotency._durations import positive
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Resolving, Store, check_store, require
from idempotency.telemetry._instruments import (
    OUTBOX_OLDEST,
    OUTBOX_RELAYS,
    OUTBOX_ROWS,
    SAGA_LATE,
    SAGA_OLDEST,
    SAGA_STUCK,
    SLOT_RETAINED,
    UNRESOLVED,
    UNRESOLVED_SECONDS,
    WATCH_AGE,
    Measurement,
    Series,
)

if TYPE_CHECKING:
    from idempotency.outbox import OutboxOperations
    from idempotency.saga import SagaOperations

_MOST = 1000
"""Unresolved records that are counted."""

_logger = logging.getLogger("idempotency")


class Watch:
    """Read the gauges of a store, an outbox and sagas every few seconds, for the exporters that are given this.

    ``name``: the value of the label ``source``. ``store``: its unresolved records; its verbs are awaited. ``outbox``:
    its messages by state, the oldest, its relays, and on PostgreSQL what its slots retain. ``sagas``: those that are
    stuck, the oldest, and how late they are. ``every``: seconds between two readings, default 15.

    :meth:`run` reads for ever: start it as a task in the event loop of the store. Once the values are older than four
    readings they are not exported any more; ``idempotency_watch_age_seconds`` is, and says so.
    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        store: Store | None = None,
        outbox: OutboxOperations | None = None,
        sagas: SagaOperations | None = None,
        every: float | timedelta = 15.0,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"name must be text, not {name!r}")
        if store is None and outbox is None and sagas is None:
            raise ConfigurationError("a Watch needs what it is to read: give store=, outbox= or sagas=")
        self.name = name
        self._store = None if store is None else _check(store)
        self._outbox = outbox
        self._sagas = sagas
        self._every = positive("every", every)
        self._read: tuple[Measurement, ...] = ()
        self._at = monotonic()

    async def run(self) -> None:
        """Read for ever, until it is cancelled. A store that fails is logged once, and asked again."""
        failing = False
        while True:
            try:
                await self.look()
            except Exception as error:
                if not failing:
                    _logger.warning("the gauges of %s cannot be read: %s", self.name, type(error).__name__)
                failing = True
            else:
                failing = False
            await asyncio.sleep(self._every)

    async def look(self) -> None:
        """Read the gauges once.

        Raises :class:`~idempotency.errors.StoreError`; then the values are those that were read before.
        """
        found = [*await self._look_at_store(), *await self._look_at_outbox(), *await self._look_at_sagas()]
        self._read, self._at = tuple(found), monotonic()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return what was read last, and how old it is, from memory."""
        age = monotonic() - self._at
        fresh = self._read if age <= 4 * self._every else ()
        return *fresh, Measurement(Series(WATCH_AGE, (self.name,)), age)

    async def _look_at_store(self) -> list[Measurement]:
        if self._store is None:
            return []
        found = await self._store.unresolved(_MOST)
        oldest = max((entry.age for entry in found), default=0.0)
        source = (self.name,)
        return [
            Measurement(Series(UNRESOLVED, source), len(found)),
            Measurement(Series(UNRESOLVED_SECONDS, source), oldest),
        ]

    async def _look_at_outbox(self) -> list[Measurement]:
        if self._outbox is None:
            return []
        stats, slots = await self._outbox.stats(), await self._outbox.slots()
        rows = {"due": stats.due, "scheduled": stats.scheduled, "blocked": stats.blocked, "dead": stats.dead}
        return [
            Measurement(Series(OUTBOX_OLDEST, (self.name,)), stats.oldest_age),
            Measurement(Series(OUTBOX_RELAYS, (self.name,)), len(stats.relays)),
            *(Measurement(Series(OUTBOX_ROWS, (self.name, state)), count) for state, count in rows.items()),
            *(
                Measurement(Series(SLOT_RETAINED, (self.name, name)), slot.retained)
                for name, slot in slots.items()
                if slot.retained is not None
            ),
        ]

    async def _look_at_sagas(self) -> list[Measurement]:
        if self._sagas is None:
            return []
        stats = await self._sagas.stats()
        values = ((SAGA_STUCK, stats.stuck), (SAGA_OLDEST, stats.oldest_age), (SAGA_LATE, stats.late))
        return [Measurement(Series(instrument, (self.name,)), value) for instrument, value in values]


def _check(store: Store) -> Resolving:
    try:
        awaited = check_store(store, Store)
    except ConfigurationError as error:
        raise ConfigurationError(
            "a Watch awaits its store=, also where the application does not: give it another one on the same database,"
            f" such as open_store(url). {error}"
        ) from error
    return require(awaited, Resolving, "a Watch")


def check_watches(watches: object) -> tuple[Watch, ...]:
    """Return the watches of an exporter.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything else, and for two of one name, whose gauges
    would be the same series twice.
    """
    if not isinstance(watches, Sequence) or not all(isinstance(each, Watch) for each in watches):
        raise ConfigurationError(f"watches must be a sequence of Watch, not {watches!r}")
    names = [each.name for each in watches]
    if len({*names}) < len(names):
        raise ConfigurationError(f"watches need names of their own, as in Watch('orders', store=store), not {names}")
    return tuple(watches)
