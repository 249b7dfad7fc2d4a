"""The one connection over which an event loop sends its commands: what is written, and whose each reply is."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import redis.asyncio as aioredis
import uvloop

from idempotency._rules import Claim
from idempotency.errors import StoreError
from idempotency.stores.redis import RedisStore
from idempotency.stores.redis._pipeline import Pipeline
from tests.kit.certificates import self_signed
from tests.kit.redis_servers import RedisProcess
from tests.kit.redis_store import name_of, new_claim
from tests.kit.scripted_redis import Peer, ScriptedRedis, owned
from tests.kit.tcp_proxy import Proxy


@pytest.fixture
def proxy(server: RedisProcess) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def url_of(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}"


def numbered(count: int, start: int = 0) -> list[Claim]:
    return [new_claim(f"{n}", token=f"t{n}") for n in range(start, start + count)]


async def attempts(store: RedisStore, claims: list[Claim]) -> list[int]:
    return [record.attempt for record in await asyncio.gather(*map(store.claim, claims))]


def connections_of(server: RedisProcess, name: str) -> list[str]:
    with server.client() as client:
        return [each["id"] for each in client.client_list() if each["name"] == name]


@pytest.mark.parametrize(("count", "writes"), [(1, 1), (16, 2), (256, 8)])
async def test_concurrent_commands_share_a_write(proxy: Proxy, count: int, writes: int) -> None:
    """The first of the commands is written at once, and all others of one iteration of the event loop together.

    256 commands are more than 64 KiB, so their one write can arrive in several parts.
    """
    store = RedisStore.from_url(url_of(proxy))
    await store.claim(new_claim("first"))
    proxy.requests.clear()

    records = await asyncio.gather(*map(store.claim, numbered(count)))

    assert [record.token for record in records] == [f"t{n}" for n in range(count)]
    assert b"".join(proxy.requests).count(b"EVALSHA") == count
    assert len(proxy.requests) <= writes
    await store.aclose()


async def test_commands_before_the_first_connection_share_a_write(proxy: Proxy) -> None:
    """The commands that waited for the connection leave in one write behind its handshake."""
    store = RedisStore.from_url(url_of(proxy))
    await store.claim(new_claim("script"))
    await store.aclose()
    proxy.requests.clear()
    store = RedisStore.from_url(url_of(proxy))

    await asyncio.gather(*map(store.claim, numbered(16)))

    assert [chunk.count(b"EVALSHA") for chunk in proxy.requests if b"EVALSHA" in chunk] == [16]
    await store.aclose()


async def test_callers_that_go_on_together_share_their_next_write() -> None:
    """Replies that arrive together wake their callers together, and what these send next is one write."""
    withheld: list[bytes] = []

    def answer(peer: Peer, command: list[bytes]) -> bytes | None:
        if peer.count > 16:
            return b":1\r\n"
        withheld.append(owned(command))
        return None

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url)
        calls = [asyncio.create_task(claim_and_complete(store, claim)) for claim in numbered(16)]
        await server.received(16)
        writes = recorded_writes(store)
        server.peers[0].send(b"".join(withheld))

        assert await asyncio.gather(*calls) == [True] * 16
        assert [write.count(b"EVALSHA") for write in writes] == [16]
        await store.aclose()


def recorded_writes(store: RedisStore) -> list[bytes]:
    """Return the list of what is written from now on: a network may join two writes."""
    writes: list[bytes] = []
    pipeline = pipeline_of(store)
    transport = pipeline._transport
    pipeline._transport = mock.Mock(wraps=transport)
    pipeline._transport.write = lambda data: (writes.append(data), transport.write(data))
    return writes


def pipeline_of(store: RedisStore) -> Pipeline:
    multiplexed = store._clients.here()._multiplexed
    assert multiplexed is not None
    assert multiplexed._pipeline is not None
    return multiplexed._pipeline


async def claim_and_complete(store: RedisStore, claim: Claim) -> bool:
    await store.claim(claim)
    return await store.complete(claim, b"result")


async def test_each_call_has_its_own_reply_in_pieces() -> None:
    """256 concurrent calls have each its own reply, however the replies are cut into pieces."""
    withheld: list[bytes] = []

    def answer(peer: Peer, command: list[bytes]) -> None:
        withheld.append(owned(command))

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url)
        calls = asyncio.create_task(attempts(store, numbered(256)))
        await server.received(256)
        replies, size = b"".join(withheld), 1
        while replies:
            server.peers[0].send(replies[:size])
            replies, size = replies[size:], size % 97 + 7
            await asyncio.sleep(0)

        assert await calls == list(range(256))
        assert len(server.peers) == 1
        await store.aclose()


async def test_pushed_messages_are_no_replies() -> None:
    """With RESP3 the server may push messages between replies; no call takes one for its reply."""

    def answer(peer: Peer, command: list[bytes]) -> bytes:
        return b">2\r\n+moving\r\n+soon\r\n" + owned(command) + b">1\r\n:7\r\n"

    async with ScriptedRedis(answer) as server, aioredis.Redis(port=server.port, protocol=3) as client:
        store = RedisStore(client)

        assert await attempts(store, numbered(20)) == list(range(20))
        assert len(server.peers) == 1
        await store.aclose()


async def test_a_reply_that_nothing_asked_for_ends_the_connection() -> None:
    """Replies that cannot belong to their commands are given to none: the connection is replaced."""

    def answer(peer: Peer, command: list[bytes]) -> bytes:
        return owned(command) + (b":1\r\n" if peer.number == 1 else b"")

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url)

        assert await attempts(store, numbered(1)) == [0]
        await server.closed.wait()
        assert await attempts(store, numbered(5, 1)) == [1, 2, 3, 4, 5]
        assert len(server.peers) == 2
        await store.aclose()


async def test_a_connection_with_a_reply_to_another_command_is_not_used() -> None:
    """It would give each call the reply of the call before: a claim could believe that it owns another key."""

    scripted = ScriptedRedis(lambda _, command: owned(command))
    async with scripted as server, aioredis.Redis(port=server.port) as client:
        server.handshake[b"PING"] = b":1\r\n"
        store = RedisStore(client)
        with pytest.raises(StoreError, match="a reply to another command"):
            await store.claim(new_claim())
        server.handshake[b"PING"] = b"+PONG\r\n"

        assert await attempts(store, numbered(5)) == [0, 1, 2, 3, 4]
        await store.aclose()


async def test_commands_in_flight_are_bounded() -> None:
    """No more than 1024 commands are in flight; the others wait in order, each within its own deadline."""
    silent = True

    def answer(peer: Peer, command: list[bytes]) -> bytes | None:
        return None if silent else owned(command)

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url, timeout=3)

        failures = await asyncio.gather(*map(store.claim, numbered(1500)), return_exceptions=True)

        assert [type(failure) for failure in failures] == [StoreError] * 1500
        assert server.peers[0].count == 1024
        silent = False
        assert await attempts(store, numbered(1500)) == list(range(1500))
        await store.aclose()


async def test_unsent_bytes_are_bounded() -> None:
    """While the server does not read, the process buffers no more than two MiB, and all calls end well when it does."""
    async with ScriptedRedis(lambda _, command: b":1\r\n") as server:
        store = RedisStore.from_url(server.url)
        await store.renew(new_claim())
        server.stop_reading()
        calls = [asyncio.create_task(store.complete(claim, bytes(60_000))) for claim in numbered(500)]
        await server.received(2)

        assert pipeline_of(store)._transport.get_write_buffer_size() < 2 * 1024**2
        server.go_on_reading()

        assert await asyncio.gather(*calls) == [True] * 500
        await store.aclose()


async def test_large_results_have_a_connection_of_their_own(server: RedisProcess) -> None:
    """A result that the server does not take fails its own call only, and does not end the connection of the others."""
    store = RedisStore.from_url(f"{server.url}?client_name=large")
    claims = numbered(20)
    await asyncio.gather(*map(store.claim, claims))
    await store.complete(claims[0], bytes(2 * 1024**2))
    shared = min(connections_of(server, "large"), key=int)
    with server.client() as client:
        before = client.config_get("proto-max-bulk-len")["proto-max-bulk-len"]
        client.config_set("proto-max-bulk-len", 1024**2)
        try:
            results: list[bytes] = [b"small"] * 18 + [bytes(3 * 1024**2)]
            answers = await asyncio.gather(*map(store.complete, claims[1:], results), return_exceptions=True)
        finally:
            client.config_set("proto-max-bulk-len", before)

    assert answers[:18] == [True] * 18
    assert isinstance(answers[18], StoreError)
    assert shared in connections_of(server, "large")
    assert (await store.claim(new_claim("0"))).result == bytes(2 * 1024**2)
    await store.aclose()


async def test_forgotten_scripts_are_sent_with_each_call(server: RedisProcess, store: RedisStore) -> None:
    """Concurrent calls whose script the server has forgotten are sent again with its text; others are not touched."""
    claims = numbered(8)
    await asyncio.gather(*map(store.claim, claims))
    with server.client() as client:
        client.script_flush()
    await store.renew(claims[0])

    renewed, records = await asyncio.gather(
        asyncio.gather(*map(store.renew, claims)), asyncio.gather(*map(store.claim, numbered(8, 8)))
    )

    assert renewed == [True] * 8
    assert [record.token for record in records] == [f"t{n}" for n in range(8, 16)]


async def test_restricted_user(server: RedisProcess) -> None:
    """The commands of an ACL user, who may not even ping, go over the connection; what he may not do is said."""
    with server.client() as client:
        client.execute_command(
            *("ACL", "SETUSER", "narrow", "on", ">pw", "~mine:*", "+eval", "+evalsha", "+time", "+hset", "+hmget"),
            *("+exists", "+pexpire", "+multi", "+select", "+client", "+hello"),
        )
    try:
        async with aioredis.Redis(port=server.port, username="narrow", password="pw") as client:
            mine, other = RedisStore(client, prefix="mine"), RedisStore(client, prefix="other")

            assert (await mine.claim(new_claim(token="t"))).token == "t"
            with pytest.raises(StoreError, match="grant it"):
                await other.claim(new_claim())
            assert len(client.connection_pool._in_use_connections) == 2
            await mine.aclose()
            await other.aclose()
    finally:
        with server.client() as admin:
            admin.execute_command("ACL", "DELUSER", "narrow")


async def test_given_client_is_shared_with_its_owner(server: RedisProcess) -> None:
    """The store holds one connection of a given client, gives it back in working order, and outlives its closing."""
    async with aioredis.Redis(port=server.port, max_connections=4) as client:
        store = RedisStore(client)
        async with store.watch(new_claim()):
            await asyncio.gather(*map(store.claim, numbered(300)))
            assert await asyncio.gather(client.ping(), client.ping()) == [True] * 2
        await client.aclose()
        assert (await store.claim(new_claim(token="t"))).token == "t"

        await store.aclose()

        assert not client.connection_pool._in_use_connections
        assert await asyncio.gather(*(client.get(name_of(new_claim("none"))) for _ in range(3))) == [None] * 3
    assert len(client.connection_pool._available_connections) <= 4


async def test_few_connections_are_used_one_by_one(server: RedisProcess) -> None:
    """A client with fewer than four connections gives none away for long."""
    async with aioredis.Redis(port=server.port, max_connections=3) as client:
        store = RedisStore(client)
        await asyncio.gather(*map(store.claim, numbered(50)))
        assert not client.connection_pool._in_use_connections


async def test_closing_ends_the_calls_in_flight() -> None:
    """A store that is closed fails the calls in flight and those that wait to connect; it works again when used."""
    async with ScriptedRedis(lambda peer, command: owned(command) if peer.number > 1 else None) as server:
        store = RedisStore.from_url(server.url)
        flying = [asyncio.create_task(store.claim(claim)) for claim in numbered(3)]
        await server.received(3)
        await store.aclose()
        assert [type(each) for each in await asyncio.gather(*flying, return_exceptions=True)] == [StoreError] * 3

        waiting = asyncio.create_task(store.claim(new_claim("5")))
        await asyncio.sleep(0)
        await store.aclose()
        with pytest.raises(StoreError, match="the store was closed"):
            await waiting
        assert await attempts(store, numbered(1, 7)) == [7]
        await store.aclose()


@pytest.mark.parametrize("given", [True, False])
async def test_dropped_store_gives_its_connection_back(server: RedisProcess, given: bool) -> None:
    """A store that is forgotten while its event loop runs has no connection any more."""
    async with aioredis.Redis(port=server.port, client_name="dropped") as client:
        store = RedisStore(client) if given else RedisStore.from_url(f"{server.url}?client_name=dropped")
        await store.claim(new_claim())
        assert len(connections_of(server, "dropped")) == 1

        del store
        gc.collect()

        async with asyncio.timeout(20):
            while connections_of(server, "dropped"):
                await asyncio.sleep(0.01)
        assert await client.ping()


def test_uvloop(server: RedisProcess) -> None:
    """The transports of uvloop are read and written the same way, also when the server closes them."""

    async def use() -> None:
        store = RedisStore.from_url(server.url)
        for start in (0, 300):
            records = await asyncio.gather(*map(store.claim, numbered(300, start)))
            assert [record.token for record in records] == [f"t{n}" for n in range(start, start + 300)]
            with server.client() as client:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await store.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(use())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tls(tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """So are the transports of TLS, also when the other side ends them."""
    certificate = self_signed(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    async def use() -> None:
        async with ScriptedRedis(lambda _, command: owned(command), tls) as server:
            store = RedisStore.from_url(f"{server.url}?ssl_ca_certs={certificate}")
            for n in range(3):
                assert await attempts(store, numbered(300)) == list(range(300))
                if n == 1:
                    server.peers[0].end()
            assert [peer.count for peer in server.peers] == [600, 300]
            await store.aclose()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(use())


def test_each_event_loop_has_a_connection(server: RedisProcess) -> None:
    """A given client works in one event loop after another, and its pool is not used up."""
    client = aioredis.Redis(port=server.port, max_connections=4)
    store = RedisStore(client)

    async def use(token: str) -> str:
        return (await store.claim(new_claim(token, token=token))).token

    assert [asyncio.run(use(f"t{n}")) for n in range(8)] == [f"t{n}" for n in range(8)]
    asyncio.run(store.aclose())
    assert not client.connection_pool._in_use_connections
