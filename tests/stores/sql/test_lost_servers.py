"""SQL servers that are frozen, restarted or absent, and what their errors say."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._rules import Execute, judge
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.stores.sql import SQLStore
from tests.kit.servers import with_port
from tests.kit.sql_store import SERVERS, is_idle, new_claim, until
from tests.kit.tcp_proxy import Proxy


@pytest.mark.parametrize("driver", SERVERS)
async def test_a_frozen_server_is_a_store_error_in_time(url: str, proxy: Proxy, table: str) -> None:
    """A server that says nothing, even to a cancel request, costs a verb its time-out; later verbs work again."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table, timeout=1)
    await store.create_schema()
    await store.claim(new_claim("before"))
    proxy.pause()

    begun = time.monotonic()
    for verb in (store.claim, store.renew, store.release):
        with pytest.raises(StoreError, match="gave no answer"):
            await verb(new_claim("before"))
    took = time.monotonic() - begun
    proxy.resume()
    record = await store.claim(mine := new_claim("after"))
    (side,) = store._per_loop.values()
    await until(lambda: is_idle(side._engine))
    await store.aclose()

    assert took < 8
    assert judge(mine, record) == Execute()


async def test_closing_does_not_wait_for_a_frozen_server(url: str, proxy: Proxy, table: str) -> None:
    """A store whose server is frozen, with a verb left behind and a watcher, closes within seconds."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table, timeout=1)
    await store.create_schema()
    async with store.watch(new_claim()):
        proxy.pause()
        with pytest.raises(StoreError):
            await store.claim(new_claim())

    async with asyncio.timeout(8):
        await store.aclose()


@pytest.mark.parametrize("driver", SERVERS)
async def test_a_restarted_server_is_not_noticed(url: str, proxy: Proxy, table: str) -> None:
    """Connections that died while they idled in the pool are replaced within the verb."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table)
    await store.create_schema()
    await asyncio.gather(*(store.claim(new_claim(f"key-{number}")) for number in range(4)))
    proxy.cut()

    records = await asyncio.gather(*(store.claim(new_claim(f"new-{number}")) for number in range(4)))
    await store.aclose()

    assert [record.attempt for record in records] == [1, 1, 1, 1]


@pytest.mark.parametrize("driver", SERVERS)
async def test_an_absent_server_is_named_without_its_password(url: str, unused_tcp_port: int) -> None:
    """The error says what to start, and neither it nor its causes say the password."""
    address = make_url(url).set(host="127.0.0.1", port=unused_tcp_port, username="somebody", password="s3cret")
    store = SQLStore.from_url(address)

    with pytest.raises(StoreError, match=f"127.0.0.1:{unused_tcp_port}.*start it") as failure:
        await store.claim(new_claim())
    await store.aclose()

    assert failure.value.__cause__ is not None
    assert "s3cret" not in f"{failure.value} {failure.value.__cause__!r}"


async def test_errors_do_not_quote_the_key(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """What the database refused is reported without the values that were sent."""
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} ADD CHECK (length(key) < 5)"))

    with pytest.raises(StoreRefusedError) as failure:
        await store.claim(new_claim("a secret key"))

    assert "a secret key" not in f"{failure.value} {failure.value.__cause__}"
