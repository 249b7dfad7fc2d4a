"""Open the outbox, and the publisher, that an operator names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from idempotency._cli.lookup import check_sqlite
from idempotency._cli.options import DEFAULT_OUTBOX, OutboxMode, fail
from idempotency._hooks import import_from_here
from idempotency._sql.requirements import DATABASES, sqlalchemy_not_installed
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError
from idempotency.outbox.publisher import Publisher
from idempotency.outbox.publishers import open_publisher
from idempotency.stores.base import Finding

if TYPE_CHECKING:
    from idempotency._outbox.emit import Outbox
    from idempotency.outbox._operate import OutboxOperations

T = TypeVar("T")


def run(url: str | None, table: str, work: Callable[[OutboxOperations], Awaitable[T]], *, create: bool = False) -> T:
    """Open the outbox, await ``work``, and close it. Every error ends the command with one line.

    With ``create``, a missing SQLite file is no error.
    """

    async def with_outbox() -> T:
        async with operations_on(url, table, create=create) as operations:
            return await work(operations)

    try:
        return asyncio.run(with_outbox())
    except IdempotencyError as error:
        fail(str(error))


@asynccontextmanager
async def operations_on(url: str | None, table: str, *, create: bool = False) -> AsyncIterator[OutboxOperations]:
    """Open the outbox for what an operator does, and close it at the end."""
    database, outbox = outbox_at(url, table, create=create)
    from idempotency.outbox._operate import OutboxOperations

    operations = OutboxOperations(database, outbox)
    try:
        yield operations
    finally:
        await operations.aclose()


def outbox_at(
    url: str | None, table: str, mode: OutboxMode = OutboxMode.TABLE, *, create: bool = False
) -> tuple[str, Outbox]:
    """Check the URL of the database, and return it with the outbox."""
    if not url:
        raise ConfigurationError("name the database: --store URL, or IDEMPOTENCY_STORE in the environment")
    scheme = url.partition("://")[0]
    if not is_sql(url):
        raise ConfigurationError(f"an outbox is in a SQL database, {', '.join(DATABASES.values())}: not {scheme}://")
    try:
        from idempotency._outbox.emit import OUTBOX, Outbox
        from idempotency._sql.engines import read_url
    except ImportError as error:
        raise sqlalchemy_not_installed(scheme) from error
    read_url(url)
    outbox = Outbox(table, mode=mode.value)
    if scheme.startswith("sqlite") and not create:
        check_sqlite(url, table, OUTBOX.command)
    return url, outbox


def is_sql(url: str | None) -> bool:
    """Return whether a URL names a SQL database."""
    return (url or "").partition("://")[0].partition("+")[0].lower() in DATABASES


def publisher_at(publish: str) -> Publisher:
    """Make the publisher of a URL, or import that at ``module:name``, also from the directory of the command."""
    import_from_here()
    return open_publisher(publish)


async def examine_outbox(url: str | None, table: str | None, publish: str | None, lease: float) -> list[Finding]:
    """Examine an outbox, one that is not named only if it is there. ``publish``: where its relays publish."""
    if table is None and not is_sql(url):
        return []
    async with operations_on(url, table or DEFAULT_OUTBOX, create=True) as operations:
        if table is None:
            with suppress(StoreError):
                if not await operations.exists():
                    return []
        return await examine(operations, publish, lease)


async def examine(operations: OutboxOperations, publish: str | None, lease: float) -> list[Finding]:
    """Examine an outbox that is open. ``publish``: where its relays publish."""
    if publish is None:
        return await operations.examine()
    publisher = publisher_at(publish)
    try:
        return await operations.examine(lease=lease, delivery_timeout=publisher.delivery_timeout)
    finally:
        await publisher.aclose()
