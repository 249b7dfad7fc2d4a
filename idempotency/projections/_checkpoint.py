"""Checkpoints in the caller's own transaction: how far a consumer has come in a stream."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from idempotency._sql.sessions import as_async, as_sync
from idempotency.projections._rows import AnyPosition, AnySync, Name, rows_named
from idempotency.projections._table import DEFAULT_TABLE
from idempotency.streams._position import Position


async def checkpoint(
    session: AsyncSession | AsyncConnection,
    consumer: str,
    stream: str,
    position: AnyPosition,
    *,
    table: str = DEFAULT_TABLE,
) -> bool:
    """Move the checkpoint of a consumer in a stream, in the transaction of ``session``; False: it is a duplicate.

    Call it before the effect, in the same transaction, and leave the effect out where it is False. A second worker of
    the consumer waits here for the first one's commit. Positions of one stream come in order: one that is not after the
    checkpoint is a duplicate. Raises :class:`~idempotency.errors.TransactionError` where there is no transaction, and
    :class:`~idempotency.errors.StoreError` where the transaction must begin again.
    """
    name = Name(consumer, stream=stream)
    return await as_async(session, "checkpoint").run_sync(rows_named(table).move, name, position)


def checkpoint_sync(
    session: AnySync, consumer: str, stream: str, position: AnyPosition, *, table: str = DEFAULT_TABLE
) -> bool:
    """See :func:`checkpoint`."""
    return rows_named(table).move(as_sync(session, "checkpoint"), Name(consumer, stream=stream), position)


async def checkpoints(
    session: AsyncSession | AsyncConnection, consumer: str, *, version: int = 0, table: str = DEFAULT_TABLE
) -> Mapping[str, Position]:
    """Return the checkpoints of a consumer, by stream. ``version``: that of a projection."""
    return await as_async(session, "checkpoints").run_sync(rows_named(table).of_consumer, consumer, version)


def checkpoints_sync(
    session: AnySync, consumer: str, *, version: int = 0, table: str = DEFAULT_TABLE
) -> Mapping[str, Position]:
    """See :func:`checkpoints`."""
    return rows_named(table).of_consumer(as_sync(session, "checkpoints"), consumer, version)


async def create_projections_schema(engine: AsyncEngine, table: str = DEFAULT_TABLE) -> None:
    """Create the tables of checkpoints where they are missing; safe in any number of processes at once."""
    async with engine.begin() as connection:
        await connection.run_sync(rows_named(table).tables.create)


def create_projections_schema_sync(engine: Engine, table: str = DEFAULT_TABLE) -> None:
    """See :func:`create_projections_schema`."""
    with engine.begin() as connection:
        rows_named(table).tables.create(connection)
