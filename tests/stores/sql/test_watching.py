"""Watchers of a SQL record: notified on PostgreSQL, polling elsewhere."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.stores.sql import SQLStore
from tests.kit.servers import with_port
from tests.kit.sql_store import POSTGRES, is_idle, new_claim, scalar, until
from tests.kit.tcp_proxy import Proxy


@pytest.mark.usefixtures("notified_only")
@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_watcher_is_notified(store: SQLStore, engine: AsyncEngine) -> None:
    """The end of a watched record wakes its watcher before it would poll, and only that one."""
    mine, other = new_claim(), new_claim("other")
    await store.claim(mine)
    await store.claim(other)
    async with store.watch(mine) as changed, store.watch(other) as other_changed:
        await store.claim(new_claim(watched=True))
        await store.claim(new_claim("other", watched=True))
        await asyncio.sleep(0.1)
        for wait in (changed, other_changed):
            await wait(0)
        assert await is_idle(engine)
        waiting = asyncio.create_task(changed(60))
        unconcerned = asyncio.create_task(other_changed(60))

        await store.complete(mine, b"done")
        async with asyncio.timeout(20):
            await waiting

        assert not unconcerned.done()
        unconcerned.cancel()


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_watcher_before_any_verb_listens(engine: AsyncEngine, table: str) -> None:
    """A store that has used no connection yet finds no pooler when it watches, and listens."""
    store = SQLStore(engine, table=table)
    async with store.watch(new_claim()):
        (side,) = store._per_loop.values()
        listening = side.watchers._listening.is_set()
    await store.aclose()

    assert listening


async def test_no_watcher_no_notification(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The end of a record that nobody watches notifies nobody."""
    heard: list[str] = []
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.add_listener(table, lambda *notification: heard.append(notification[3]))
        for claim in (new_claim("unwatched"), new_claim("released"), new_claim("watched", watched=True)):
            await store.claim(claim)
            await (store.release(claim) if claim.key == "released" else store.complete(claim, b""))
        await driver.fetchval("SELECT 1")
        await asyncio.sleep(0.05)
        await driver.reset()

    assert heard == [new_claim("watched").id.hex()]


async def test_listening_survives_a_lost_connection(url: str, proxy: Proxy, table: str) -> None:
    """When the listening connection dies its watchers are woken, poll, and are notified again later."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table)
    await store.create_schema()
    mine = new_claim()
    await store.claim(mine)
    async with store.watch(mine) as changed:
        (side,) = store._per_loop.values()
        await store.claim(new_claim(watched=True))
        waiting = asyncio.create_task(changed(60))
        proxy.cut()
        async with asyncio.timeout(20):
            await waiting
            await changed(60)

        async def listening() -> bool:
            return side.watchers._listening.is_set()

        await until(listening)
        await store.complete(mine, b"")
        await asyncio.wait_for(changed(60), 20)
    await store.aclose()


async def test_the_listening_connection_is_closed_when_idle(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine, table: str
) -> None:
    """One connection serves all watchers, and none is left when nobody watches."""
    monkeypatch.setattr("idempotency._sql.listen._LINGER", 0)
    listeners = f"SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%{table}%'"
    async with store.watch(new_claim("one")), store.watch(new_claim("two")):
        while_watched = await scalar(engine, listeners)

    async def closed() -> bool:
        return await scalar(engine, listeners) == 0

    await until(closed)
    assert while_watched == 1


@pytest.mark.parametrize("driver", ["sqlite", "mariadb"])
async def test_without_notifications_a_watcher_polls(store: SQLStore) -> None:
    """Where the database cannot notify, waiting ends after a polling interval that grows to half a second."""
    async with store.watch(new_claim()) as changed:
        intervals = []
        for _ in range(6):
            begun = time.monotonic()
            await changed(60)
            intervals.append(time.monotonic() - begun)

    expected = [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    assert all(low - 0.01 <= took < low + 20 for low, took in zip(expected, intervals, strict=True)), intervals
