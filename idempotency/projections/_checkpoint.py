"""Checkpoints in the caller's own transaction: how far a consumer has come in a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from idempotency._outbox.payload import name_of
from idempotency._sql.sessions import as_async, as_sync
from idempotency.errors import ConfigurationError, EmitRefusedError
from idempotency.projections._rows import AnySync, Name, Rows
from idempotency.projections._table import DEFAULT_TABLE, MOST_CHARACTERS, tables_named
from idempotency.streams._position import Position

AnyPosition = int | tuple[int, int]
"""An offset of Kafka, a :class:`~idempotency.streams.Position`, or two numbers such as commit LSN and index."""

_LARGEST = 2**63 - 1


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
    return await as_async(session, "checkpoint").run_sync(_move, consumer, stream, position, table)


def checkpoint_sync(
    session: AnySync, consumer: str, stream: str, position: AnyPosition, *, table: str = DEFAULT_TABLE
) -> bool:
    """See :func:`checkpoint`."""
    return _move(as_sync(session, "checkpoint"), consumer, stream, position, table)


async def checkpoints(
    session: AsyncSession | AsyncConnection, consumer: str, *, version: int = 0, table: str = DEFAULT_TABLE
) -> Mapping[str, Position]:
    """Return the checkpoints of a consumer, by stream. ``version``: that of a projection."""
    return await as_async(session, "checkpoints").run_sync(Rows(tables_named(table)).of_consumer, consumer, version)


def checkpoints_sync(
    session: AnySync, consumer: str, *, version: int = 0, table: str = DEFAULT_TABLE
) -> Mapping[str, Position]:
    """See :func:`checkpoints`."""
    return Rows(tables_named(table)).of_consumer(as_sync(session, "checkpoints"), consumer, version)


async def create_projections_schema(engine: AsyncEngine, table: str = DEFAULT_TABLE) -> None:
    """Create the tables of checkpoints where they are missing; safe in any number of processes at once."""
    async with engine.begin() as connection:
        await connection.run_sync(tables_named(table).create)


def create_projections_schema_sync(engine: Engine, table: str = DEFAULT_TABLE) -> None:
    """See :func:`create_projections_schema`."""
    with engine.begin() as connection:
        tables_named(table).create(connection)


def position_of(position: AnyPosition) -> Position:
    """Return what was given as a position; ConfigurationError for anything else."""
    parts: tuple[Any, ...] = position if isinstance(position, tuple) else (position, 0)
    if len(parts) != 2 or any(type(part) is not int or not 0 <= part <= _LARGEST for part in parts):
        raise ConfigurationError(f"a position is a number from 0 on, or two of them, not {position!r}")
    return Position(*parts)


def checked(what: str, name: str) -> str:
    """Return a name if it can be stored; ConfigurationError if not."""
    try:
        return name_of(what, name, MOST_CHARACTERS)
    except EmitRefusedError as error:
        raise ConfigurationError(str(error)) from error


def _move(session: AnySync, consumer: str, stream: str, position: AnyPosition, table: str) -> bool:
    name = Name(checked("consumer", consumer), 0, checked("stream", stream))
    return Rows(tables_named(table)).move(session, name, position_of(position))
