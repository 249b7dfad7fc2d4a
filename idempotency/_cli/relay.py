"""``idempotency relay``: publish the messages of an outbox until a signal says to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from idempotency._cli.open_outbox import outbox_at, publisher_at
from idempotency._cli.options import DEFAULT_LEASE, DEFAULT_OUTBOX, Lease, OutboxTable, Publish, Url, fail
from idempotency.errors import IdempotencyError

if TYPE_CHECKING:
    from idempotency.outbox._poll import PollingRelay


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
) -> None:
    """Publish the messages of an outbox for ever.

    SIGTERM or SIGINT lets it finish the batch in hand and end; a second one ends it at once.
    """

    async def work() -> None:
        publisher = publisher_at(publish)
        try:
            database, outbox = outbox_at(store, table)
            from idempotency.outbox._poll import PollingRelay

            relay = PollingRelay(database, publisher, outbox=outbox, lease=lease, batch=batch, ordering=ordering.value)
            await _run(relay, f"relaying {table} of {_database(database)} to {_place(publish or '')}")
        finally:
            await publisher.aclose()

    try:
        asyncio.run(work())
    except IdempotencyError as error:
        fail(str(error))


async def _run(relay: PollingRelay, announcement: str) -> None:
    with _stopped_by_signals(relay):
        typer.echo(announcement)
        await relay.run()


@contextmanager
def _stopped_by_signals(relay: PollingRelay) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    def stop() -> None:
        stopping.append(loop.create_task(relay.stop()))

    def first(*_: object) -> None:
        # The second signal does what it does to any process.
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
