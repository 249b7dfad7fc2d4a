"""How the Redis store uses connections: threads, loops, forks, and commands that are cut short."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import ssl
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import pytest
import redis
import redis.asyncio as aioredis

from idempotency._rules import Record
from idempotency.stores.redis import RedisStore
from idempotency.stores.redis._send_sync import SyncOwnPool
from tests.kit.certificates import self_signed
from tests.kit.redis_servers import RedisProcess
from tests.kit.redis_store import new_claim
from tests.kit.scripted_redis import ScriptedRedis, owned


async def test_three_hundred_claims_at_once(server: RedisProcess) -> None:
    """A default client, and one with few connections, serve any number of concurrent duplicates: one owner."""
    for key, options in (("default", {}), ("few", {"max_connections": 3})):
        async with aioredis.Redis(port=server.port, **options) as client:
            store = RedisStore(client)

            records = await asyncio.gather(*(store.claim(new_claim(key)) for _ in range(300)))

            assert len({record.token for record in records}) == 1


def test_two_hundred_threads_at_once(server: RedisProcess) -> None:
    """So does a blocking client."""
    store = RedisStore(redis.Redis(port=server.port, max_connections=20))
    with ThreadPoolExecutor(200) as threads:
        records = list(threads.map(lambda _: store.claim_sync(new_claim()), range(400)))

    assert len({record.token for record in records}) == 1
    store._clients.sync_client.close()


def test_kept_connections_are_made_anew_after_one_was_dropped(server: RedisProcess) -> None:
    """Whoever is given one later, while the thread that noticed sends its command again, has a fresh one too."""
    with redis.Redis(port=server.port) as client, server.client() as other:
        kept = SyncOwnPool(client.connection_pool)
        for connection in [kept.take(), kept.take()]:
            kept.give(connection)
        other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        kept.drop()

        for connection in [kept.take(), kept.take()]:
            connection.send_command("PING")
            assert connection.read_response() == b"PONG"


def test_interrupted_command_leaves_no_reply_behind(server: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_forked_child_has_connections_of_its_own(server: RedisProcess) -> None:
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


def test_passed_client_has_its_connections_back(server: RedisProcess) -> None:
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


def test_every_new_loop_gets_a_client(server: RedisProcess) -> None:
    """A store opened by URL works in one event loop after the other, and leaves no connection behind."""
    store = RedisStore.from_url(server.url)

    async def use(key: str) -> Record:
        async with store.watch(new_claim(key)):
            return await store.claim(new_claim(key, token=key))

    for n in range(5):
        assert asyncio.run(use(f"{n}")).token == f"{n}"
    asyncio.run(store.aclose())

    with server.client() as client:
        deadline = time.monotonic() + 30
        while len(client.client_list()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_loops_at_once(server: RedisProcess) -> None:
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


async def test_the_shared_connection_has_the_context_of_no_caller(store: RedisStore) -> None:
    """What hangs on a request's context is free after it, though its call made the connection that others use."""
    request: ContextVar[set[str]] = ContextVar("request")

    async def serve() -> weakref.ref[set[str]]:
        request.set({"body"})
        await store.claim(new_claim())
        return weakref.ref(request.get())

    served = await asyncio.create_task(serve())
    await store.claim(new_claim())
    gc.collect()

    assert served() is None


async def test_closing_in_another_thread_raises_nothing_here(server: RedisProcess) -> None:
    """A store that another thread closes ends its connections in the event loop that has them, without an error."""
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    store = RedisStore.from_url(server.url)
    await store.claim(new_claim("first"))

    with ThreadPoolExecutor(1) as threads:  # waited for without await: this loop is busy meanwhile
        threads.submit(asyncio.run, store.aclose()).result()

    assert (await store.claim(new_claim("second", token="t"))).token == "t"
    assert errors == []
    await store.aclose()


def test_two_loops_that_end_a_closed_one(server: RedisProcess) -> None:
    """Two loops that come to a store at the same time both notice that a third was closed."""
    store = RedisStore.from_url(server.url)
    used: list[str] = []

    async def use(name: str) -> None:
        used.append((await store.claim(new_claim(name, token=name))).token)

    class Meeting(asyncio.SelectorEventLoop):
        """A loop that, when one thread finds it closed, lets another thread find it too."""

        meet = True

        def is_closed(self) -> bool:
            if super().is_closed() and "ended" in used and self.meet:
                self.meet = False
                with ThreadPoolExecutor(1) as threads:
                    threads.submit(asyncio.run, use("other")).result()
            return super().is_closed()

    with asyncio.Runner(loop_factory=Meeting) as runner:
        runner.run(use("ended"))
    asyncio.run(use("one"))

    assert used == ["ended", "other", "one"]
    asyncio.run(store.aclose())


@pytest.mark.filterwarnings("error")
def test_a_store_that_is_dropped_leaves_no_socket_open(server: RedisProcess) -> None:
    """A script with asyncio.run that closes nothing: once the store is gone, its connections are closed."""

    def use() -> None:
        store = RedisStore.from_url(server.url)
        assert asyncio.run(store.claim(new_claim("k", token="t"))).token == "t"

    gc.disable()
    try:
        use()
        with server.client() as client:
            deadline = time.monotonic() + 30
            while len(client.client_list()) > 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("error")
async def test_a_store_that_is_dropped_leaves_no_tls_socket_open(tmp_path: Path) -> None:
    """So it is with TLS, whose transport has the socket of another."""
    certificate = self_signed(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    def use() -> None:
        store = RedisStore.from_url(f"{server.url}?ssl_ca_certs={certificate}")
        assert asyncio.run(store.claim(new_claim("7"))).attempt == 7

    gc.disable()
    try:
        async with ScriptedRedis(lambda _, command: owned(command), tls) as server:
            await asyncio.to_thread(use)
            async with asyncio.timeout(20):
                await server.closed.wait()
    finally:
        gc.enable()
