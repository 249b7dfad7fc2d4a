"""Data that a database refuses: it is stored in another form, or refused for good; it is no store that is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from typer.testing import CliRunner

from idempotency import IdempotencyMiddleware, drain, drain_sync, idempotent, idempotent_consumer
from idempotency._cli.commands import app as command
from idempotency._rules import Claim
from idempotency.consumer import DeadLetter, Done, Failed, Replayed
from idempotency.errors import StoreRefusedError
from idempotency.events import Event
from idempotency.stores.sql import SQLStore
from tests.kit import servers
from tests.kit.asgi_calls import call
from tests.kit.servers import with_driver
from tests.kit.targets import run_on, unique_name

ODD = {
    "accents": "clé",
    "no letters of Latin": "鍵 \U0001f511",
    "lone surrogate": "order \udc80",
    "NUL": "order\x00 7",
    "escaped": r"\x00 \0 \\",
    "too long for a column": "k" * 65_536,
    "long and foreign": "鍵\ud800" * 40_000,
}
odd = pytest.mark.parametrize("key", ODD.values(), ids=ODD.keys())

DATABASES = {
    "mariadb, latin1": ("mysql+aiomysql", "latin1"),
    "mariadb, utf8mb3": ("mysql+aiomysql", "utf8mb3"),
    "asyncpg, SQL_ASCII": ("postgresql+asyncpg", "SQL_ASCII"),
    "psycopg, SQL_ASCII": ("postgresql+psycopg", "SQL_ASCII", "?client_encoding=utf8"),
    "asyncpg, LATIN1": ("postgresql+asyncpg", "LATIN1"),
    "psycopg, LATIN1": ("postgresql+psycopg", "LATIN1"),
}
"""Databases that hold only some characters: the driver, the encoding, and what the URL has to say of it."""


@pytest.fixture(scope="module")
def narrow_urls() -> Iterator[dict[str, str]]:
    """Databases of this module, by their encoding."""
    with servers.narrow_databases(unique_name("narrow")) as urls:
        yield urls


@pytest.fixture(params=DATABASES.values(), ids=DATABASES.keys())
def narrow_url(request: pytest.FixtureRequest, narrow_urls: dict[str, str]) -> str:
    """The asynchronous URL of a database that holds only some characters."""
    driver, encoding, *query = request.param
    return with_driver(narrow_urls[encoding], driver) + "".join(query)


@pytest.fixture
async def narrow(narrow_url: str) -> AsyncIterator[SQLStore]:
    """A store whose database, or table, holds only some characters."""
    engine = create_async_engine(narrow_url)
    store = SQLStore(engine, table=unique_name("records"))
    await store.create_schema()
    if engine.dialect.name == "mysql":
        async with engine.begin() as connection:
            encoding = await connection.scalar(text("SELECT @@character_set_database"))
            await connection.execute(text(f"ALTER TABLE {store._table.name} CONVERT TO CHARACTER SET {encoding}"))
    yield store
    await drain()
    await store.aclose()
    await engine.dispose()


def consumer(store: Any, name: str, **options: Any) -> Any:
    """Make a consumer that returns what it was given, and fails where it is told to."""

    @idempotent_consumer(store, consumer=name, key=lambda message: message["key"], **options)
    async def on_message(message: dict[str, Any], **_: Any) -> str:
        if "error" in message:
            raise ValueError("no")
        return "done"

    return on_message


@odd
@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
async def test_any_key_is_handled_where_the_database_holds_only_ascii(narrow: SQLStore, key: str, joined: bool) -> None:
    """A message whose key no column of the database can hold as it is takes effect once, and its failures count."""
    options = {"session": async_sessionmaker(narrow._source)} if joined else {}
    on_message = consumer(narrow, f"billing {key}", max_attempts=2, **options)

    assert await on_message.deliver({"key": key}) == Done("done")
    assert await on_message.deliver({"key": key}, attempt=2) == Replayed("done")
    poison = {"key": f"poison {key}", "error": True}
    assert isinstance(await on_message.deliver(poison, attempt=1), Failed)
    assert isinstance(await on_message.deliver(poison, attempt=2), DeadLetter)


@odd
async def test_any_key_is_found_by_the_operator(narrow: SQLStore, key: str) -> None:
    """The command finds a record by its key, whatever the key is written in."""
    claim = Claim(scope="s", key=key, fingerprint=b"f" * 32, lease=30, ttl=60)
    await narrow.claim(claim)

    assert [entry.id for entry in await narrow.find(key=key)] == [claim.id]
    assert await narrow.find(key=f"{key} ") == []


@pytest.mark.stores("sqlite", "redis", "postgres", "mariadb")
@odd
async def test_any_key_is_found_on_every_store(store: Any, key: str) -> None:
    """So it is on every store."""
    claim = Claim(scope=f"s {key}", key=key, fingerprint=b"f" * 32, lease=30, ttl=60)
    await store.claim(claim)

    assert [entry.id for entry in await store.find(key=key)] == [claim.id]


@pytest.mark.stores("sqlite", "postgres", "mariadb")
def test_a_long_key_is_inspected_by_command(store_target: Any) -> None:
    """``idempotency inspect KEY`` shows the record of a key that no column holds."""
    key = "k" * 65_536
    asyncio.run(store_target.create())

    async def claim(store: Any) -> bytes:
        claim = Claim(scope="s", key=key, fingerprint=b"f" * 32, lease=30, ttl=60)
        await store.claim(claim)
        return claim.id

    record = run_on(store_target, claim)
    names = [word for name, value in store_target.options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(command, ["inspect", key, "--store", store_target.url, *names])

    assert result.exit_code == 0, result.output
    assert record.hex() in result.output


REFUSALS = {
    "postgresql": "ALTER TABLE {table} ADD CONSTRAINT short CHECK (length(key) < 5)",
    "mysql": "ALTER TABLE {table} ADD CONSTRAINT short CHECK (length(`key`) < 5)",
}


@asynccontextmanager
async def refusing(target: Any) -> AsyncIterator[SQLStore]:
    """Open a store whose database refuses the keys that are longer than four characters."""
    engine = create_async_engine(target.url)
    async with engine.begin() as connection:
        await connection.execute(text(REFUSALS[engine.dialect.name].format(table=target.name)))
    store = SQLStore(engine, table=target.name)
    yield store
    await drain()
    await store.aclose()
    await engine.dispose()


def refusing_engine(target: Any) -> Engine:
    """Return a synchronous engine of the same."""
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        connection.execute(text(REFUSALS[engine.dialect.name].format(table=target.name)))
    return engine


refused = pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy")


@refused
@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
async def test_a_key_that_the_database_refuses_is_a_dead_letter(target: Any, joined: bool) -> None:
    """Where the database refuses a record for what is in it, the message is a dead letter at once."""
    async with refusing(target) as store:
        options = {"session": async_sessionmaker(store._source)} if joined else {}
        told: list[Event] = []
        on_message = consumer(store, "billing", on_event=told.append, **options)

        delivered = await on_message.deliver({"key": "order-7"})

    assert isinstance(delivered, DeadLetter)
    assert delivered.reason == "store-refused"
    assert [event.kind for event in told] == ["unavailable", "dead-lettered"]
    assert {event.error for event in told} == {"StoreRefusedError"}


@refused
async def test_the_count_of_a_refused_key_is_a_dead_letter_too(target: Any) -> None:
    """So is one whose attempts cannot be counted."""
    async with refusing(target) as store:
        on_message = consumer(store, "billing", max_attempts=3)

        delivered = await on_message.deliver({"key": "order-7"}, attempt=2)

    assert isinstance(delivered, DeadLetter)
    assert delivered.reason == "store-refused"


@pytest.mark.stores("postgres", "mariadb")
@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
def test_a_key_that_the_database_refuses_is_a_dead_letter_in_threads(target: Any, joined: bool) -> None:
    """A synchronous consumer does the same."""
    engine = refusing_engine(target)
    options = {"session": sessionmaker(engine)} if joined else {}

    @idempotent_consumer(SQLStore(engine, table=target.name), consumer="c", key=lambda message: message, **options)
    def on_message(message: str) -> None: ...

    delivered = on_message.deliver("order-7")
    drain_sync()
    engine.dispose()

    assert isinstance(delivered, DeadLetter)
    assert delivered.reason == "store-refused"


@refused
async def test_a_function_whose_key_is_refused_says_so(target: Any) -> None:
    """A decorated function raises an error that is not to be retried, and does not run."""
    runs: list[str] = []
    async with refusing(target) as store:

        @idempotent(store, key=lambda what: what)
        async def order(what: str) -> None:
            runs.append(what)

        with pytest.raises(StoreRefusedError, match="refused") as caught:
            await order("order-7")

    assert not caught.value.retryable
    assert not runs


@refused
async def test_a_request_whose_key_is_refused_is_not_told_to_come_again(target: Any) -> None:
    """HTTP answers 500 with a problem that is not retryable, and without Retry-After."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it ran")

    async with refusing(target) as store:
        reply = await call(IdempotencyMiddleware(app, store=store), key="order-7")

    assert (reply.status, reply.code) == (500, "store-refused")
    assert reply.header(b"retry-after") is None
