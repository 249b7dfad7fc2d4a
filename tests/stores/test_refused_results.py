"""A result that the store does not take: the effect stays, and its key is remembered as completed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency import IdempotencyMiddleware, Policy, idempotent
from idempotency._rules import Claim, Completed, Replay, judge
from idempotency.errors import NotReplayableError, StoreRefusedError
from idempotency.events import Event
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import call
from tests.kit.ledger import Ledger, open_ledger, open_sync_ledger
from tests.kit.servers import MariaDBServer, RedisServer, with_driver
from tests.kit.targets import Target, unique_name

MIB = 1024**2
LARGE = Policy(max_response=100 * MIB)
COMPLETED = [("stored-without-result", "StoreRefusedError"), ("completed", "")]


def new_claim(**options: Any) -> Claim:
    return Claim(**{"scope": "s", "key": "k", "fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **options})


@pytest.fixture(scope="module")
def small_packets() -> Iterator[MariaDBServer]:
    """A MariaDB that takes packets of one MiB."""
    with MariaDBServer(max_allowed_packet="1M") as server:
        yield server


def small(server: MariaDBServer, driver: str) -> Target:
    """Name a place for records on a server, by an asynchronous driver."""
    return Target("mariadb", with_driver(server.url, driver), unique_name("small"))


async def narrow(target: Target, rule: str = "{length} <= 100000") -> None:
    """Let the table of a target refuse results of more than 100,000 bytes."""
    engine = create_async_engine(target.url)
    checked = f"ALTER TABLE {target.name} ADD CONSTRAINT short CHECK ({rule.format(length='length(result)')})"
    triggered = (
        f"CREATE TRIGGER short_{target.name} BEFORE UPDATE ON {target.name}"
        f" WHEN NOT {rule.format(length='length(NEW.result)')} BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    async with engine.begin() as connection:
        await connection.execute(text(triggered if target.kind == "sqlite" else checked))
    await engine.dispose()


@asynccontextmanager
async def ledger_on(target: Target) -> AsyncIterator[Ledger]:
    """Open a ledger whose records exist."""
    await target.create()
    async with open_ledger(target) as ledger:
        yield ledger


@contextmanager
def sync_ledger_on(target: Target, driver: str) -> Iterator[Ledger]:
    """Open a ledger for threads whose records exist."""
    with open_sync_ledger(target, with_driver(target.url, driver)) as ledger:
        ledger.store.create_schema_sync()
        yield ledger


def told_of(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.error) for event in events]


async def check_function(ledger: Ledger, size: int, joined: bool) -> None:
    """Assert that a call whose result is refused has its effect once, and that the next one is told so."""
    events: list[Event] = []
    options = {"session": ledger.sessions} if joined else {}

    @idempotent(ledger.store, key=lambda what: what, policy=LARGE, on_event=events.append, **options)
    async def order(what: str, session: Any = None) -> bytes:
        async with ledger.sessions.begin() if session is None else nullcontext(session) as opened:
            await opened.execute(ledger.insert(what))
        return os.urandom(size)

    result = await order("tea")
    with pytest.raises(NotReplayableError):
        await order("tea")

    assert len(result) == size
    assert await ledger.effects() == ["tea"]
    assert told_of(events) == COMPLETED


def check_function_in_threads(ledger: Ledger, size: int, joined: bool) -> None:
    """The same for a synchronous function."""
    events: list[Event] = []
    options = {"session": ledger.sessions} if joined else {}

    @idempotent(ledger.store, key=lambda what: what, policy=LARGE, on_event=events.append, **options)
    def order(what: str, session: Any = None) -> bytes:
        with ledger.sessions.begin() if session is None else nullcontext(session) as opened:
            opened.execute(ledger.insert(what))
        return os.urandom(size)

    result = order("tea")
    with pytest.raises(NotReplayableError):
        order("tea")

    assert len(result) == size
    assert ledger.effects_sync() == ["tea"]
    assert told_of(events) == COMPLETED


async def check_request(ledger: Ledger, size: int, transactional: bool) -> None:
    """Assert the same of an HTTP request, whose client gets the whole answer."""
    events: list[Event] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        given = nullcontext(scope["state"]["idempotency"].session) if transactional else ledger.sessions.begin()
        async with given as session:
            await session.execute(ledger.insert("tea"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": os.urandom(size)})

    protected = IdempotencyMiddleware(
        app,
        store=ledger.store,
        session=ledger.sessions if transactional else None,
        policy=LARGE,
        on_event=events.append,
    )

    first, second = await call(protected, key="k"), await call(protected, key="k")

    assert (first.status, len(first.body)) == (201, size)
    assert (second.status, second.code) == (409, "completed-not-replayable")
    assert await ledger.effects() == ["tea"]
    assert told_of(events) == [COMPLETED[0], ("completed", "NotReplayableError")]


either = pytest.mark.parametrize("together", [False, True], ids=["leased", "one transaction"])
drivers = pytest.mark.parametrize("driver", ["mysql+aiomysql", "mysql+asyncmy"])
sync_drivers = pytest.mark.parametrize("driver", ["mysql+pymysql", "mysql+mysqlconnector"])


@either
@drivers
async def test_a_result_larger_than_a_packet_leaves_the_effect(
    small_packets: MariaDBServer, driver: str, together: bool
) -> None:
    """A call whose result is larger than ``max_allowed_packet`` takes effect once and is remembered as completed."""
    async with ledger_on(small(small_packets, driver)) as ledger:
        await check_function(ledger, 2 * MIB, together)


@either
@sync_drivers
def test_a_result_larger_than_a_packet_leaves_the_effect_in_threads(
    small_packets: MariaDBServer, driver: str, together: bool
) -> None:
    """So does a synchronous one."""
    with sync_ledger_on(small(small_packets, "mysql+aiomysql"), driver) as ledger:
        check_function_in_threads(ledger, 2 * MIB, together)


@either
@drivers
async def test_a_response_larger_than_a_packet_leaves_the_effect(
    small_packets: MariaDBServer, driver: str, together: bool
) -> None:
    """So does a request, whose client gets the whole answer."""
    async with ledger_on(small(small_packets, driver)) as ledger:
        await check_request(ledger, 2 * MIB, together)


@drivers
@pytest.mark.parametrize("room", [-2, -1, 0, 1, 2, 3, 4])
async def test_a_result_is_kept_up_to_the_packet(small_packets: MariaDBServer, driver: str, room: int) -> None:
    """What is near the limit is either kept or refused by us; the connection survives both."""
    engine = create_async_engine(with_driver(small_packets.url, driver), pool_size=2, max_overflow=0)
    store = SQLStore(engine, table=unique_name("near"))
    await store.create_schema()
    largest = (MIB - 4096) // 4 * 3
    claim = new_claim()
    await store.claim(claim)

    if room <= 0:
        assert await store.complete(claim, b"\xff" * (largest + room))
        assert judge(new_claim(), await store.claim(new_claim())) == Replay(b"\xff" * (largest + room))
    else:
        with pytest.raises(StoreRefusedError):
            await store.complete(claim, b"\xff" * (largest + room))
        assert await store.complete(claim, None)
        assert judge(new_claim(), await store.claim(new_claim())) == Completed()
    await store.aclose()
    await engine.dispose()


@pytest.mark.stores("mariadb", "mariadb_asyncmy")
async def test_ten_mebibytes_are_kept_by_default(target: Target) -> None:
    """Ten MiB of any bytes fit into the 16 MiB that a server takes by default."""
    data = os.urandom(10 * MIB)
    async with open_ledger(target) as ledger:

        @idempotent(ledger.store, key=lambda what: what, policy=LARGE, session=ledger.sessions)
        async def order(what: str, *, session: Any) -> bytes:
            await session.execute(ledger.insert(what))
            return data

        assert await order("tea") == data
        assert await order("tea") == data
        assert await ledger.effects() == ["tea"]


CHARSETS = ("utf8mb4", "latin1", "gbk")


@pytest.mark.parametrize("mode", ["", "NO_BACKSLASH_ESCAPES", "ANSI"])
@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("driver", ["mysql+aiomysql", "mysql+asyncmy"])
async def test_any_bytes_come_back(mariadb_url: str, driver: str, charset: str, mode: str) -> None:
    """A result comes back byte for byte, whatever the connection's character set and the server's mode."""
    data = bytes(range(256)) * 64 + os.urandom(MIB)
    url = make_url(with_driver(mariadb_url, driver)).set(query={"charset": charset})
    engine = create_async_engine(url, connect_args={"init_command": f"SET SESSION sql_mode = '{mode}'"})
    store = SQLStore(engine, table=unique_name("bytes"))
    await store.create_schema()
    claim = new_claim(fingerprint=bytes(range(0, 256, 4)))
    await store.claim(claim)

    assert await store.complete(claim, data)
    again = new_claim(fingerprint=claim.fingerprint)
    assert judge(again, await store.claim(again)) == Replay(data)
    await store.aclose()
    await engine.dispose()


@pytest.mark.parametrize("mode", ["", "NO_BACKSLASH_ESCAPES"])
@pytest.mark.parametrize("charset", ["utf8mb4", "latin1"])
@sync_drivers
def test_any_bytes_come_back_in_threads(mariadb_url: str, driver: str, charset: str, mode: str) -> None:
    """So they do by the blocking drivers."""
    data = bytes(range(256)) * 64 + os.urandom(MIB)
    url = make_url(with_driver(mariadb_url, driver)).set(query={"charset": charset})
    engine = create_engine(url, connect_args={"init_command": f"SET SESSION sql_mode = '{mode}'"})
    store = SQLStore(engine, table=unique_name("bytes"))
    store.create_schema_sync()
    claim = new_claim()
    store.claim_sync(claim)

    assert store.complete_sync(claim, data)
    again = new_claim()
    assert judge(again, store.claim_sync(again)) == Replay(data)
    engine.dispose()


@either
@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy")
async def test_a_result_that_the_table_refuses_leaves_the_effect(target: Target, together: bool) -> None:
    """Where a constraint or a trigger refuses the result, the effect is committed without it."""
    await narrow(target)
    async with open_ledger(target) as ledger:
        await check_function(ledger, 200_000, together)


@either
@pytest.mark.stores("sqlite", "postgres", "mariadb")
def test_a_result_that_the_table_refuses_leaves_the_effect_in_threads(target: Target, together: bool) -> None:
    """So it is for a synchronous function."""
    asyncio.run(narrow(target))
    with open_sync_ledger(target) as ledger:
        check_function_in_threads(ledger, 200_000, together)


@either
@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb")
async def test_a_response_that_the_table_refuses_leaves_the_effect(target: Target, together: bool) -> None:
    """So it is for a request."""
    await narrow(target)
    async with open_ledger(target) as ledger:
        await check_request(ledger, 200_000, together)


async def test_a_result_that_redis_does_not_take_is_remembered_as_completed() -> None:
    """A result over ``proto-max-bulk-len`` is not sent, by either client: the key is completed without it."""
    with RedisServer("--proto-max-bulk-len", "1mb") as server:
        store = RedisStore.from_url(server.url)
        runs: list[str] = []

        @idempotent(store, key=lambda what: what, policy=LARGE)
        async def order(what: str) -> bytes:
            runs.append(what)
            return b"x" * (2 * MIB)

        @idempotent(store, key=lambda what: what, policy=LARGE)
        def order_sync(what: str) -> bytes:
            runs.append(what)
            return b"x" * (2 * MIB)

        assert len(await order("tea")) == len(order_sync("milk")) == 2 * MIB
        with pytest.raises(NotReplayableError):
            await order("tea")
        with pytest.raises(NotReplayableError):
            order_sync("milk")
        await store.aclose()

    assert runs == ["tea", "milk"]


async def test_a_large_result_is_kept_by_redis_where_it_may_not_be_asked() -> None:
    """Where the user may not read the server's settings, a result of some MiB is sent all the same."""
    with RedisServer("--rename-command", "CONFIG", "''") as server:
        store = RedisStore.from_url(server.url)
        claim = new_claim()
        await store.claim(claim)

        assert await store.complete(claim, b"x" * (2 * MIB))
        assert judge(new_claim(), await store.claim(new_claim())) == Replay(b"x" * (2 * MIB))
        await store.aclose()


@pytest.mark.parametrize("hold", [False, True])
async def test_an_operation_that_runs_is_renewed_and_recorded_while_the_memory_is_full(hold: bool) -> None:
    """A full Redis takes no new key; what runs already keeps its lease and is recorded with its result."""
    with RedisServer("--maxmemory-policy", "noeviction") as server:
        store = RedisStore.from_url(server.url)
        claim = new_claim(hold=hold)
        await store.claim(claim)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", "1kb")
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.set("more", "x")

        assert await store.renew(claim)
        assert await store.complete(claim, b"result")
        again = new_claim()
        assert judge(again, await store.claim(again)) == Replay(b"result")
        with redis.Redis.from_url(server.url) as client:
            assert 0 < client.pttl(f"idempotency:1:{claim.id.hex()}") <= 60_000
        await store.aclose()
