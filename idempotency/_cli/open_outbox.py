"""Open the outbox that an operator names."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from idempotency._cli.lookup import TIMEOUT, check_sqlite
from idempotency._cli.options import DEFAULT_OUTBOX, fail
from idempotency._sql.requirements import DATABASES, sqlalchemy_not_installed
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError
from idempotency.outbox.publisher import Publisher
from idempotency.outbox.publishers import open_publisher
from idempotency.stores.base import Finding

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from idempotency._outbox.emit import Outbox
    from idempotency.outbox._operate import OutboxOperations

T = TypeVar("T")


class Opened(NamedTuple):
    """An outbox and the engine of its database."""

    engine: AsyncEngine
    outbox: Outbox
    operations: OutboxOperations


def run(url: str | None, table: str, work: Callable[[Opened], Awaitable[T]], *, create: bool = False) -> T:
    """Open the outbox, await ``work``, and close the engine. Every error ends the command with one line.

    With ``create``, a missing SQLite file is no error.
    """

    async def with_outbox() -> T:
        async with opened_outbox(url, table, create=create) as opened:
            return await work(opened)

    try:
        return asyncio.run(with_outbox())
    except IdempotencyError as error:
        fail(str(error))


@asynccontextmanager
async def opened_outbox(url: str | None, table: str, *, create: bool = False) -> AsyncIterator[Opened]:
    """Open the outbox, and close the engine at the end. A failure of the database becomes a StoreError."""
    engine, outbox, operations = _open(url, table, create)
    try:
        yield Opened(engine, outbox, operations)
    finally:
        await engine.dispose()


def is_sql(url: str | None) -> bool:
    """Return whether a URL names a SQL database."""
    return (url or "").partition("://")[0].partition("+")[0].lower() in DATABASES


def _open(url: str | None, table: str, create: bool) -> Opened:
    if not url:
        raise ConfigurationError("name the database: --store URL, or IDEMPOTENCY_STORE in the environment")
    scheme = url.partition("://")[0]
    if not is_sql(url):
        raise ConfigurationError(f"an outbox is in a SQL database, {', '.join(DATABASES.values())}: not {scheme}://")
    try:
        from idempotency._outbox.emit import OUTBOX, Outbox
        from idempotency._sql.engines import open_async, read_url
        from idempotency._sql.pooler import read_pooler
        from idempotency.outbox._operate import OutboxOperations
    except ImportError as error:
        raise sqlalchemy_not_installed(scheme) from error
    parsed, pooler = read_pooler(read_url(url), None)
    outbox = Outbox(table)
    if scheme.startswith("sqlite") and not create:
        check_sqlite(url, table, OUTBOX.command)
    engine = open_async(parsed, TIMEOUT, pooler)
    return Opened(engine, outbox, OutboxOperations(engine, outbox))


async def examine_outbox(url: str | None, table: str | None, publish: str | None, lease: float) -> list[Finding]:
    """Examine an outbox, one that is not named only if it is there. ``publish``: where its relays publish."""
    if table is None and not is_sql(url):
        return []
    delivery_timeout = None if publish is None else await _delivery_timeout(publish)
    async with opened_outbox(url, table or DEFAULT_OUTBOX, create=True) as opened:
        if table is None:
            with suppress(StoreError):
                if not await opened.operations.exists():
                    return []
        return await opened.operations.examine(lease=lease, delivery_timeout=delivery_timeout)


async def _delivery_timeout(publish: str) -> float:
    publisher = publisher_at(publish)
    try:
        return publisher.delivery_timeout
    finally:
        await publisher.aclose()


def publisher_at(publish: str | None) -> Publisher:
    """Make the publisher of a URL, or import that at ``module:name``, also from the directory of the command."""
    if not publish:
        raise ConfigurationError("name the broker: --publish URL, or IDEMPOTENCY_PUBLISH in the environment")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return open_publisher(publish)
