"""Watchers of a Redis record: woken over one connection, polling without it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
import redis.asyncio as aioredis

from idempotency._rules import State
from idempotency.stores.redis import RedisStore
from tests.kit.redis_servers import RedisProcess
from tests.kit.redis_store import name_of, new_claim


@pytest.mark.usefixtures("announced_only")
async def test_watcher_is_woken_at_once(store: RedisStore) -> None:
    """Completion, hold and release wake a waiting duplicate before it would look by itself."""
    for end in ("complete", "hold", "release"):
        owner = new_claim(end)
        await store.claim(owner)
        async with store.watch(owner) as changed:
            await store.claim(new_claim(end, watched=True))
            waiting = asyncio.create_task(changed(60))
            await asyncio.sleep(0)

            match end:
                case "complete":
                    await store.complete(owner, b"")
                case "hold":
                    await store.complete(owner, None, State.UNKNOWN)
                case "release":
                    await store.release(owner)

            async with asyncio.timeout(20):
                await waiting


async def test_many_watchers_share_one_connection(store: RedisStore, server: RedisProcess) -> None:
    """Two hundred keys are watched over one connection, each is woken by its own end, and none is left open."""
    claims = [new_claim(f"{n}") for n in range(200)]
    for claim in claims:
        await store.claim(claim)
    woken: list[int] = []
    async with contextlib.AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(store.watch(claim)) for claim in claims]
        await asyncio.gather(*(store.claim(new_claim(f"{n}", watched=True)) for n in range(200)))

        async def wait(n: int) -> None:
            await watches[n](5)
            woken.append(n)

        waiting = [asyncio.create_task(wait(n)) for n in range(200)]
        with server.client() as client:
            assert client.info("clients")["connected_clients"] <= 45
            assert len(client.client_list(_type="pubsub")) == 1
            await store.complete(claims[7], b"")
            await waiting[7]
            assert woken == [7]
            await asyncio.gather(*(store.complete(claim, b"") for claim in claims))
            await asyncio.gather(*waiting)

    with server.client() as client:
        async with asyncio.timeout(20):
            while client.client_list(_type="pubsub"):
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("announced_only")
async def test_watching_survives_a_lost_connection(store: RedisStore, server: RedisProcess) -> None:
    """When the subscription is cut the watcher is woken to look again, and later ends are announced again."""
    owner = new_claim()
    await store.claim(owner)
    async with store.watch(owner) as changed:
        await store.claim(new_claim(watched=True))
        with server.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            async with asyncio.timeout(20):
                await changed(60)
                while not client.pubsub_numsub(name_of(owner))[0][1]:
                    await asyncio.sleep(0.01)
            waiting = asyncio.create_task(changed(60))
            await store.complete(owner, b"")
            async with asyncio.timeout(20):
                await waiting


async def test_client_without_room_is_polled(server: RedisProcess) -> None:
    """A client with a single connection keeps it for commands: its watchers look every quarter of a second."""
    async with aioredis.Redis(port=server.port, max_connections=1) as client:
        store = RedisStore(client)
        async with store.watch(new_claim()) as changed:
            begun = time.monotonic()
            await changed(60)
            assert 0.2 < time.monotonic() - begun < 20
