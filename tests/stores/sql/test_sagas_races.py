"""Requests for one saga at the same time: each sees what the others have committed, or changes nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._sagas.journal import Amend, Open, Phase, Put, Request, Write
from idempotency.stores.sql import SQLStore
from tests.kit.saga_requests import ID, entry, leave, looked_at, opening, owned, write
from tests.kit.server_side import ServerSide
from tests.kit.sql_store import DRIVERS, until

ON_EACH = pytest.mark.parametrize("driver", list(DRIVERS))
ON_SERVERS = pytest.mark.parametrize("driver", ["postgres", "psycopg", "mariadb"])


async def lapsed(saga_store: SQLStore) -> Open:
    """Open the saga, and let the lease be over."""
    await owned(saga_store, request := opening(lease=0.001))

    async def is_over() -> bool:
        return ((await looked_at(saga_store)).row.due_in or 0) < 0

    await until(is_over)
    return request


@asynccontextmanager
async def uncommitted(saga_store: SQLStore, engine: AsyncEngine, *requests: Request[Any]) -> AsyncIterator[list[Any]]:
    """Answer requests in a transaction, which is committed after the block."""

    def answer(connection: Connection) -> list[Any]:
        return [saga_store._sagas.answer(connection, request, None) for request in requests]

    async with engine.begin() as connection:
        yield await connection.run_sync(answer)


async def waits(url: str) -> None:
    """Return when a statement waits for a lock."""
    server = ServerSide(url)

    async def one() -> bool:
        return server.statements() == 1

    await until(one)


@ON_EACH
async def test_of_eight_that_open_at_once_one_owns(saga_store: SQLStore) -> None:
    """A new saga, and one whose owner has vanished, has one owner; the others see whose it is."""
    for attempt in (1, 2):
        found = await asyncio.gather(*(saga_store.journal(opening(f"{attempt}{number}")) for number in range(8)))

        rows = [saga.row for saga in found if saga is not None]
        assert len(rows) == 8
        (winner,) = {row.token for row in rows}
        assert {(row.attempt, row.crashes) for row in rows} == {(attempt, attempt - 1)}
        assert await saga_store.journal(Write(id=ID, token=winner, lease=0.001)) == 0
        await asyncio.sleep(0.01)


@ON_EACH
async def test_of_eight_that_put_at_once_one_writes(saga_store: SQLStore) -> None:
    """The first entry of a name remains, and is counted once; of other names, each is counted."""
    await owned(saga_store, opening())

    answers = await asyncio.gather(*(saga_store.journal(Put(id=ID, entry=entry("go", b"%d" % n))) for n in range(8)))
    await asyncio.gather(*(saga_store.journal(Put(id=ID, entry=entry(f"go-{n}"))) for n in range(8)))

    bodies = Counter(None if each is None else each.body for each in answers)
    saga = await looked_at(saga_store)
    assert bodies == {next(each.body for each in saga.entries if each.name == "go"): 8}
    assert saga.row.wakes == 9
    assert len(saga.entries) == 9


@ON_EACH
async def test_of_eight_that_record_an_expired_saga_one_does(saga_store: SQLStore) -> None:
    """A saga in the place of one that has expired has none of its entries, and one owner."""
    await owned(saga_store, first := opening())
    assert await saga_store.journal(leave(first, entry("old"), phase=Phase.DONE, result=b"r"))

    found = await asyncio.gather(*(saga_store.journal(opening()) for _ in range(8)))

    assert len({saga.row.token for saga in found if saga is not None}) == 1
    saga = await looked_at(saga_store)
    assert (saga.row.attempt, saga.row.result, saga.entries) == (1, None, ())


@ON_EACH
async def test_an_owner_that_writes_and_renews_at_once_is_not_refused(saga_store: SQLStore) -> None:
    """Steps that end at the same time, and renewals of the lease, are all written."""
    await owned(saga_store, request := opening())
    writes = [write(request, entry(f"step-{n}")) for n in range(8)]

    answers = await asyncio.gather(*map(saga_store.journal, [*writes, *[write(request)] * 8]))

    saga = await looked_at(saga_store)
    assert answers == [0] * 16
    assert {each.name for each in saga.entries} == {f"step-{n}" for n in range(8)}


@ON_SERVERS
async def test_an_owner_loses_to_the_takeover_for_which_it_waits(
    saga_store: SQLStore, engine: AsyncEngine, url: str
) -> None:
    """What an owner writes while another one takes over is not written once that is committed."""
    first = await lapsed(saga_store)
    async with uncommitted(saga_store, engine, second := opening()) as (saga,):
        assert saga.row.token == second.token
        writing = asyncio.create_task(saga_store.journal(write(first, entry("step"))))
        await waits(url)

    assert await writing is None
    assert await saga_store.journal(write(second)) == 0
    assert (await looked_at(saga_store)).entries == ()


@ON_SERVERS
async def test_the_next_owner_sees_what_the_last_one_has_written(
    saga_store: SQLStore, engine: AsyncEngine, url: str
) -> None:
    """An Open that waits for the commit of a Leave returns the entries of the Leave."""
    first = await lapsed(saga_store)
    async with uncommitted(saga_store, engine, leave(first, entry("step", b"done"), due=0.0)) as answers:
        assert answers == [True]
        opened = asyncio.create_task(owned(saga_store, opening()))
        await waits(url)

    saga = await opened
    assert [(each.name, each.body) for each in saga.entries] == [("step", b"done")]
    assert (saga.row.attempt, saga.row.crashes) == (2, 0)


@ON_SERVERS
async def test_the_next_owner_sees_a_signal_for_whose_commit_it_waits(
    saga_store: SQLStore, engine: AsyncEngine, url: str
) -> None:
    """An Open that waits for the commit of a Put returns its entry."""
    await lapsed(saga_store)
    async with uncommitted(saga_store, engine, Put(id=ID, entry=entry("go"))):
        opened = asyncio.create_task(owned(saga_store, opening()))
        await waits(url)

    assert [each.name for each in (await opened).entries] == ["go"]


@ON_SERVERS
async def test_an_amendment_deletes_what_is_committed_while_it_waits(
    saga_store: SQLStore, engine: AsyncEngine, url: str
) -> None:
    """An entry to be deleted is deleted, also if it is written by the Leave for which the Amend waits."""
    first = await lapsed(saga_store)
    async with uncommitted(saga_store, engine, leave(first, entry("a"), entry("b"))):
        amending = asyncio.create_task(saga_store.journal(Amend(id=ID, without=["a"], entries=[entry("c")])))
        await waits(url)

    assert await amending
    saga = await looked_at(saga_store)
    assert {each.name for each in saga.entries} == {"b", "c"}


@ON_SERVERS
async def test_a_leave_that_is_repeated_while_it_is_committed_is_answered_alike(
    saga_store: SQLStore, engine: AsyncEngine, url: str
) -> None:
    """A client that repeats a Leave before the first one is committed is told that it has succeeded."""
    await owned(saga_store, owner := opening())
    request = leave(owner)
    async with uncommitted(saga_store, engine, request):
        repeated = asyncio.create_task(saga_store.journal(request))
        await waits(url)

    assert await repeated


@ON_SERVERS
async def test_a_signal_after_the_end_for_which_it_waits_is_refused(
    saga_store: SQLStore, engine: AsyncEngine, url: str
) -> None:
    """A Put that waits for the commit of the end of the saga writes nothing."""
    await owned(saga_store, request := opening())
    async with uncommitted(saga_store, engine, leave(request, phase=Phase.DONE, result=b"r", ttl=60.0)):
        putting = asyncio.create_task(saga_store.journal(Put(id=ID, entry=entry("go"))))
        await waits(url)

    assert await putting is None
    saga = await looked_at(saga_store)
    assert (saga.row.wakes, saga.entries) == (0, ())
