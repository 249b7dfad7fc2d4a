"""An append that fails in the middle, or before it began: nothing of it stays, and it is repeated with the same ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from idempotency import idempotent
from idempotency.errors import ConfigurationError, EmitRefusedError
from idempotency.outbox import Outbox
from idempotency.stores.memory import MemoryStore
from idempotency.streams import Appended, ConflictError, Streams, Versioned
from tests.kit.ledger import Ledger
from tests.streams.kit import KINDS, TYPES, Deposited, Withdrawn, all_of, append


@pytest.mark.stores(*KINDS)
async def test_other_events_of_a_repeated_command_leave_none_behind(ledger: Ledger, streams: Streams) -> None:
    """Its events are inserted in parts, and one of the last part is there: the others are not inserted either."""
    many = [Deposited(1)] * 100
    conflicts: list[ConflictError] = []

    @idempotent(MemoryStore(), key=lambda: "order")
    async def order() -> None:
        async with ledger.sessions.begin() as session:
            if conflicts:
                with pytest.raises(ConflictError, match="has appended other events"):
                    await streams.append(session, "a", [*many, Withdrawn(1)])
                await session.execute(ledger.insert("after"))
                return
            with pytest.raises(ConflictError, match="is not at version 7") as conflict:
                await streams.append(session, "a", [*many, Withdrawn(1)], expected=7)
            conflicts.append(conflict.value)
            await streams.append(session, "a", [Withdrawn(1)])
        raise ConnectionError("before the record is written")

    with pytest.raises(ConnectionError):
        await order()
    await order()

    assert await ledger.effects() == ["after"]
    assert [event.data for event in await all_of(ledger, streams)] == [Withdrawn(1)]


@pytest.mark.stores("postgres18")
async def test_more_events_than_a_statement_has_parameters_meet_another_version(
    ledger: Ledger, streams: Streams
) -> None:
    """An operation looks for the events of an earlier run, by ids of which a statement can name 32,767."""

    @idempotent(MemoryStore(), key=lambda: "order")
    async def order() -> None:
        await append(ledger, streams, "a", *range(33_000), expected=1)

    with pytest.raises(ConflictError, match="a is not at version 1"):
        await order()


@pytest.mark.stores("postgres18")
async def test_an_append_that_got_no_connection_is_tried_again_with_the_same_ids(
    ledger: Ledger, streams: Streams
) -> None:
    """The engine's pool is empty for a moment, and later the process dies before the record is written."""
    runs: list[Appended] = []
    small = create_async_engine(ledger.engine.url, pool_size=1, max_overflow=0, pool_timeout=0)

    @idempotent(MemoryStore(), key=lambda: "deposit")
    async def deposit() -> None:
        if not runs:
            async with small.connect() as only, AsyncSession(small) as session:
                assert (await only.execute(text("SELECT 1"))).scalar() == 1
                with pytest.raises(PoolTimeoutError):
                    await streams.append(session, "a", [Deposited(1)])
        runs.append(await append(ledger, streams, "a", 1))
        if len(runs) == 1:
            raise ConnectionError("before the record is written")

    with pytest.raises(ConnectionError):
        await deposit()
    await deposit()

    assert runs == [Appended("a", 1), Appended("a", 1, new=False)]
    await small.dispose()


@pytest.mark.stores("sqlite")
async def test_an_event_whose_message_is_refused_is_not_appended(ledger: Ledger) -> None:
    outbox = Outbox(f"{ledger.name}_o"[:50])
    await outbox.create_schema(ledger.engine)
    emitting = Streams(TYPES, f"{ledger.name}_ev"[:50], outbox=outbox)
    await emitting.create_schema(ledger.engine)
    async with ledger.sessions.begin() as session:
        with pytest.raises(EmitRefusedError, match="cannot be carried"):
            await emitting.append(session, "a", [Withdrawn(1), Withdrawn(2, "why " * 300_000)])

    assert await all_of(ledger, emitting) == []


@dataclass(frozen=True)
class Noted:
    """An event of any value."""

    value: Any


@pytest.mark.stores("sqlite")
async def test_an_event_that_is_nested_too_deeply_is_refused(ledger: Ledger) -> None:
    streams = Streams([Noted], f"{ledger.name}_ev"[:50])
    await streams.create_schema(ledger.engine)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    async with ledger.sessions.begin() as session:
        with pytest.raises(ConfigurationError, match="Noted cannot be written: it is nested too deeply"):
            await streams.append(session, "a", [Noted(deep)])

    assert await all_of(ledger, streams) == []


@pytest.mark.parametrize("name", ["a\0", "\ud800", "b\udfff"])
def test_a_type_whose_name_cannot_be_stored_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="without NUL"):
        Versioned(Deposited, name=name)
