"""``idempotency relay``: publish the messages of an outbox until a signal says to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from idempotency._cli.open_outbox import outbox_at, publisher_at
from idempotency._cli.options import (
    DEFAULT_LEASE,
    DEFAULT_OUTBOX,
    Lease,
    Mode,
    OutboxMode,
    OutboxTable,
    Publish,
    Url,
    fail,
)
from idempotency._cli.signals import stopped_by_signals
from idempotency.errors import IdempotencyError

if TYPE_CHECKING:
    from idempotency._outbox.emit import Outbox
    from idempotency.outbox._log import LogRelay
    from idempotency.outbox._poll import PollingRelay
    from idempotency.outbox.publisher import Publisher

    AnyRelay = LogRelay | PollingRelay


class Ordering(StrEnum):
    """In which order messages are published."""

    KEY = "key"
    NONE = "none"


def relay(
    store: Url = None,
    publish: Publish = None,
    table: OutboxTable = DEFAULT_OUTBOX,
    lease: Lease = DEFAULT_LEASE,
    batch: Annotated[int, typer.Option(min=1, help="How many messages are published at once.")] = 500,
    ordering: Annotated[
        Ordering, typer.Option(help="key: messages of a key in order. none: a message that fails delays no other.")
    ] = Ordering.KEY,
    log: Annotated[bool, typer.Option("--log", help="Read the log of PostgreSQL, and not the table.")] = False,
    slot: Annotated[str | None, typer.Option(help="With --log: the name of the slot.")] = None,
    mode: Mode = OutboxMode.TABLE,
    unlimited: Annotated[
        bool, typer.Option("--allow-unlimited-wal", help="With --log: run although the log can fill the disk.")
    ] = False,
) -> None:
    """Publish the messages of an outbox for ever.

    SIGTERM or SIGINT lets it finish the batch in hand and end; a second one ends it at once.
    """

    def make(database: str, outbox: Outbox, publisher: Publisher) -> AnyRelay:
        from idempotency.outbox._log import LogRelay
        from idempotency.outbox._poll import PollingRelay

        common: Any = {"outbox": outbox, "lease": lease, "batch": batch}
        if log:
            return LogRelay(database, publisher, slot=slot, allow_unlimited_wal=unlimited, **common)
        return PollingRelay(database, publisher, ordering=ordering.value, **common)

    if not publish:
        fail("name the broker: --publish URL, or IDEMPOTENCY_PUBLISH in the environment")
    if log and ordering is not Ordering.KEY:
        fail("--ordering none is for a relay without --log")
    if not log and (slot is not None or mode is not OutboxMode.TABLE or unlimited):
        fail("--slot, --mode and --allow-unlimited-wal need --log")
    try:
        asyncio.run(_relay(store, publish, table, mode, make))
    except IdempotencyError as error:
        fail(str(error))


async def _relay(
    store: str | None,
    publish: str,
    table: str,
    mode: OutboxMode,
    make: Callable[[str, Outbox, Publisher], AnyRelay],
) -> None:
    publisher = publisher_at(publish)
    try:
        database, outbox = outbox_at(store, table, mode)
        relay = make(database, outbox, publisher)
        with stopped_by_signals(relay.stop):
            typer.echo(f"relaying {table} of {_database(database)} to {_place(publish)}")
            await relay.run()
    finally:
        await publisher.aclose()


def _database(url: str) -> str:
    from sqlalchemy import make_url

    from idempotency._sql.failures import describe_database

    return describe_database(make_url(url))


def _place(publish: str) -> str:
    """Name the broker without what may be a secret: the user, the path and the query."""
    if "://" not in publish:
        return publish
    parts = urlsplit(publish)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
