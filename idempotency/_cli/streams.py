"""The tables of streams of events and of checkpoints, as an operator creates and examines them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from idempotency._cli.open_outbox import is_sql
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.base import Finding
from idempotency.streams import Position

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

LONG = 30.0
"""After how many seconds an open transaction that delays readers is worth a note."""

_END = Position(2**63 - 1, 2**63 - 1)

StreamsTable = Annotated[
    str | None, typer.Option("--streams", metavar="TABLE", help="SQL: the table of streams of events: stream_event.")
]
CheckpointsTable = Annotated[
    str | None,
    typer.Option("--projections", metavar="TABLE", help="SQL: the table of checkpoints: idempotency_checkpoint."),
]


async def create_streams(url: str | None, table: str) -> str:
    """Create the tables of streams where they are missing; return their names."""
    async with _engine(url) as engine:
        from idempotency.streams import Streams

        await Streams([], table).create_schema(engine)
    return f"{table}, {table}_snapshot, {table}_place"


async def create_projections(url: str | None, table: str) -> str:
    """Create the tables of checkpoints where they are missing; return their names."""
    async with _engine(url, "--projections") as engine:
        from idempotency.projections import create_projections_schema

        await create_projections_schema(engine, table)
    return f"{table}, {table}_live, {table}_skipped"


async def examine_streams(url: str | None, table: str | None) -> list[Finding]:
    """Name what delays those who read all events of streams; nothing without a table."""
    if table is None:
        return []
    async with _engine(url) as engine, engine.connect() as connection:
        from idempotency.streams import Streams

        streams = Streams([], table)
        try:
            await connection.run_sync(streams.page_of_all, _END, 1)
        except StoreError as error:
            return [Finding("fix", str(error))]
        delay = await streams.delayed_by(connection)
    if delay is not None and (delay.seconds is None or delay.seconds >= LONG):
        return [Finding("note", str(delay))]
    return [Finding("ok", f"{table}: no transaction delays those who read all events")]


@asynccontextmanager
async def _engine(url: str | None, option: str = "--streams") -> AsyncIterator[AsyncEngine]:
    if not is_sql(url):
        raise ConfigurationError(f"{option} is for a SQL database")
    from idempotency._sql.engines import open_async, read_url

    engine = open_async(read_url(url or ""), 30.0)
    try:
        yield engine
    finally:
        await engine.dispose()
