"""The URLs, clients and options of the Redis store, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import redis
import redis.asyncio as aioredis

from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.redis import Durability, RedisStore
from tests.kit.redis_servers import RedisProcess, free_port
from tests.kit.redis_store import new_claim


async def test_refusals_say_what_to_do(server: RedisProcess) -> None:
    """A wrong password, a replica and full memory have different errors, each with its remedy."""
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


async def test_side_without_a_client(server: RedisProcess) -> None:
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
    with RedisProcess("--unixsocket", str(tmp_path / "redis.sock")):
        store = RedisStore.from_url(f"unix://{tmp_path}/redis.sock")
        assert (await store.claim(new_claim(token="t"))).token == "t"
        assert store.renew_sync(new_claim(token="t"))
        await store.aclose()


async def test_check(mortal: RedisProcess) -> None:
    """A check tells whether the server can be used."""
    store = RedisStore.from_url(mortal.url)
    await store.check()
    mortal.kill()
    with pytest.raises(StoreError, match="start the server"):
        await store.check()
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
