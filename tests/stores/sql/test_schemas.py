"""The table of records in a schema: named in full, or where SQLAlchemy's schema_translate_map moves it.

A schema is a database on MariaDB, and an attached file on SQLite.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idempotency import ConfigurationError, IdempotencyMiddleware, idempotent
from idempotency._rules import Execute, Replay, judge
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore, records_table, schema_sql
from tests.kit.asgi_calls import call, respond
from tests.kit.servers import with_driver
from tests.kit.sql_store import POSTGRES, new_claim
from tests.kit.targets import unique_name

ON_EACH = pytest.mark.parametrize("driver", ["postgres", "psycopg", "mariadb", "sqlite"])


class Tenants:
    """Two schemas in one database: each has its records, and effects beside them."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.names = (unique_name("tenant_a"), unique_name("tenant_b"))

    async def create(self, directory: Path) -> None:
        statement = {"postgresql": "CREATE SCHEMA", "mysql": "CREATE DATABASE"}.get(self.engine.dialect.name)
        if statement is None:
            event.listen(self.engine.sync_engine, "connect", lambda opened, _: self.attach(opened, directory))
        else:
            await self.execute(*(f"{statement} {name}" for name in self.names))
        await self.execute(*(f"CREATE TABLE {name}.effects (what VARCHAR(50))" for name in self.names))

    def attach(self, opened: Any, directory: Path) -> None:
        cursor = opened.cursor()
        for name in self.names:
            cursor.execute(f"ATTACH '{directory / name}' AS {name}")
        cursor.close()

    async def drop(self) -> None:
        statement = {"postgresql": "DROP SCHEMA {} CASCADE", "mysql": "DROP DATABASE {}"}.get(self.engine.dialect.name)
        if statement is not None:
            await self.execute(*(statement.format(name) for name in self.names))

    async def execute(self, *statements: str) -> None:
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))

    async def counted(self, table: str) -> list[int]:
        """Count the rows of a table in each schema."""
        async with self.engine.connect() as connection:
            return [await connection.scalar(text(f"SELECT count(*) FROM {name}.{table}")) or 0 for name in self.names]

    def translated(self, name: str) -> AsyncEngine:
        """Return an engine on which tables without a schema are in the schema ``name``."""
        return self.engine.execution_options(schema_translate_map={None: name})


@pytest.fixture
async def tenants(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Tenants]:
    made = Tenants(engine)
    await made.create(tmp_path)
    yield made
    await made.drop()


def stores_of(tenants: Tenants, way: str, table: str) -> list[SQLStore]:
    """Make the store of each tenant."""
    if way == "engine":
        return [SQLStore(tenants.translated(name), table=table) for name in tenants.names]
    if way == "metadata":
        return [
            SQLStore(tenants.engine, table=records_table(MetaData(schema=name), table).fullname)
            for name in tenants.names
        ]
    moved = [tenants.engine.execution_options(schema_translate_map={"place": name}) for name in tenants.names]
    return [SQLStore(engine, table=f"place.{table}") for engine in moved]


@ON_EACH
@pytest.mark.parametrize("way", ["engine", "metadata", "moved"])
async def test_each_tenant_has_its_own_records(tenants: Tenants, way: str, table: str) -> None:
    """Of one key each tenant has a record of its own, which every verb finds and no other tenant sees."""
    stores = stores_of(tenants, way, table)
    for number, store in enumerate(stores):
        await store.create_schema()
        await store.check()
        claim = new_claim(hold=True)
        assert judge(claim, await store.claim(claim)) == Execute()
        assert await store.renew(claim)
        assert await store.complete(claim, b"result %d" % number)
        assert judge(new_claim(), await store.claim(new_claim())) == Replay(b"result %d" % number)
    first, second = stores
    assert await tenants.counted(table) == [1, 1]

    assert await first.forget(new_claim().id)

    assert await tenants.counted(table) == [0, 1]
    assert await first.inspect(new_claim().id) is None
    assert (await second.inspect(new_claim().id)) is not None
    assert (await first.find(), len(await second.find(key="key"))) == ([], 1)
    await second.claim(lapsed := new_claim("lapsed", lease=0, ttl=0))
    assert (await first.purge(), await second.purge()) == (0, 1)
    assert not await second.release(lapsed)
    assert [finding for finding in await second.examine() if finding.level == "fix" and table in finding.what] == []
    assert second.schema == f"tables {tenants.names[1]}.{table} and {tenants.names[1]}.{table}_audit"
    for store in stores:
        await store.aclose()


@ON_EACH
async def test_tenants_in_the_unresolved_list(tenants: Tenants, table: str) -> None:
    """A held record is listed and resolved in its own schema only."""
    first, second = stores_of(tenants, "engine", table)
    for store in (first, second):
        await store.create_schema()
    await second.claim(held := new_claim(hold=True, lease=0))

    assert (await first.unresolved(), len(await second.unresolved())) == ([], 1)
    assert not await first.resolve(held.id, "done", b"")
    assert await second.resolve(held.id, "done", b"")
    await first.aclose()
    await second.aclose()


@pytest.mark.parametrize("driver", ["postgres", "psycopg", "mariadb"])
async def test_no_table_in_the_schema(tenants: Tenants, table: str) -> None:
    """A table that is only where the map does not lead is missing, by its full name; it is not used instead."""
    await SQLStore(tenants.engine, table=table).create_schema()
    store = SQLStore(tenants.translated(tenants.names[0]), table=table)

    with pytest.raises(StoreError, match=rf"no table {tenants.names[0]}\.{table}.*create_schema"):
        await store.claim(new_claim())
    await store.aclose()


@ON_EACH
async def test_no_such_schema(engine: AsyncEngine, table: str) -> None:
    """A schema that is missing is named: the library creates tables only."""
    store = SQLStore(engine, table=f"nowhere.{table}")

    with pytest.raises(StoreError, match="no schema nowhere: create it"):
        await store.create_schema()
    await store.aclose()


@pytest.mark.parametrize("driver", POSTGRES)
async def test_the_search_path_is_obeyed(tenants: Tenants, url: str, driver: str, table: str) -> None:
    """Verbs and DDL follow the search path of the connection: two tenants share nothing."""
    for name in tenants.names:
        settings: dict[str, Any] = {
            "postgres": {"server_settings": {"search_path": name}},
            "psycopg": {"options": f"-c search_path={name}"},
        }[driver]
        engine = create_async_engine(url, connect_args=settings)
        store = SQLStore(engine, table=table)
        await store.create_schema()
        claim = new_claim()
        assert judge(claim, await store.claim(claim)) == Execute()
        await store.aclose()
        await engine.dispose()

    assert await tenants.counted(table) == [1, 1]


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_handler_that_sets_its_search_path(tenants: Tenants, table: str) -> None:
    """With its schema named the record is found where it was claimed; without, nothing is committed."""
    first, second = tenants.names
    for schema in tenants.names:
        await SQLStore(tenants.engine, table=f"{schema}.{table}").create_schema()
    sessions = async_sessionmaker(tenants.engine)
    named, unnamed = SQLStore(tenants.engine, table=f"{first}.{table}"), SQLStore(tenants.engine, table=table)
    await unnamed.create_schema()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = scope["state"]["idempotency"].session
        await session.execute(text(f"SET LOCAL search_path TO {second}"))
        await session.execute(text("INSERT INTO effects VALUES ('effect')"))
        await respond(send)

    async def statuses(store: SQLStore) -> list[int]:
        guarded = IdempotencyMiddleware(app, store=store, session=sessions, scope=None)
        return [(await call(guarded, key="key")).status for _ in range(2)]

    moved, found = await statuses(unnamed), await statuses(named)
    await unnamed.aclose()
    await named.aclose()
    await tenants.execute(f"DROP TABLE {table}")

    assert 201 not in moved
    assert found == [201, 201]
    assert await tenants.counted("effects") == [0, 1]


@pytest.mark.usefixtures("notified_only")
@pytest.mark.parametrize("driver", POSTGRES)
async def test_tenants_wake_their_own_waiters(tenants: Tenants, table: str) -> None:
    """A waiter is notified of the end of its record, also while another tenant has a waiter for the same key."""
    stores = stores_of(tenants, "metadata", table)
    for store in stores:
        await store.create_schema()
    first, second = stores
    await first.claim(new_claim())
    await second.claim(mine := new_claim())
    async with first.watch(new_claim()) as first_changed, second.watch(new_claim()) as changed:
        for store in stores:
            await store.claim(new_claim(watched=True))
        await asyncio.sleep(0.1)
        for wait in (first_changed, changed):
            await wait(0)
        waiting = asyncio.create_task(changed(60))

        await second.complete(mine, b"")
        async with asyncio.timeout(20):
            await waiting
    for store in stores:
        await store.aclose()


@ON_EACH
async def test_transactional_requests_of_tenants(tenants: Tenants, table: str) -> None:
    """A transactional request claims and completes in its tenant's schema, and is replayed there."""
    for number, store in enumerate(stores_of(tenants, "engine", table)):
        await store.create_schema()
        engine = tenants.translated(tenants.names[number])
        app = IdempotencyMiddleware(
            effects_of(tenants.names[number]), store=store, session=async_sessionmaker(engine), scope=None
        )

        first, retry = await call(app, key="key"), await call(app, key="key")

        assert (first.status, first.replayed, retry.status, retry.replayed) == (201, False, 201, True)
        await store.aclose()
    assert await tenants.counted(table) == [1, 1]
    assert await tenants.counted("effects") == [1, 1]


def effects_of(name: str, options: dict[str, Any] | None = None) -> Any:
    """Make an application that has one effect in the schema ``name``, in a session with these execution options."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = scope["state"]["idempotency"].session
        await session.connection(execution_options=options)
        await session.execute(text(f"INSERT INTO {name}.effects VALUES ('effect')"))
        await respond(send)

    return app


async def test_sessions_of_another_schema_are_refused(tenants: Tenants, table: str) -> None:
    """A transactional application whose store and sessions have different schemas does not start."""
    first, second = tenants.names
    store = SQLStore(tenants.translated(first), table=table)
    for engine in (tenants.engine, tenants.translated(second)):
        with pytest.raises(ConfigurationError, match=rf"{first}\.{table}, and the session has the table"):
            IdempotencyMiddleware(effects_of(first), store=store, session=async_sessionmaker(engine), scope=None)


@ON_EACH
async def test_a_handler_that_moves_its_session_is_refused(tenants: Tenants, table: str) -> None:
    """A handler whose own map leads to another table than the claim's gets an error, and nothing is committed."""
    store = SQLStore(tenants.engine, table=table)
    await store.create_schema()
    second = tenants.names[1]
    app = effects_of(second, {"schema_translate_map": {None: second}})
    guarded = IdempotencyMiddleware(app, store=store, session=async_sessionmaker(tenants.engine), scope=None)

    with pytest.raises(ConfigurationError, match=rf"{second}\.{table}"):
        await call(guarded, key="key")

    assert await tenants.counted("effects") == [0, 0]
    assert await store.find() == []
    await store.aclose()


@ON_EACH
async def test_one_application_with_a_table_for_all_tenants(tenants: Tenants, table: str) -> None:
    """A store whose schema is named serves handlers that each choose their tenant's schema."""
    first, second = tenants.names
    store = SQLStore(tenants.engine, table=f"{first}.{table}")
    await store.create_schema()
    app = effects_of(second, {"schema_translate_map": {None: second}})
    guarded = IdempotencyMiddleware(app, store=store, session=async_sessionmaker(tenants.engine), scope=None)

    assert [(await call(guarded, key="key")).status for _ in range(2)] == [201, 201]

    assert await tenants.counted("effects") == [0, 1]
    assert len(await store.find()) == 1
    await store.aclose()


TENANT: ContextVar[str] = ContextVar("tenant")
ENGINES: dict[str, Any] = {}


class OfTenant(Session):
    """A session on the schema of the tenant that is being served."""

    def get_bind(self, *args: Any, **options: Any) -> Any:
        return ENGINES[TENANT.get()]


@ON_EACH
async def test_joined_calls_of_tenants(tenants: Tenants, table: str) -> None:
    """One joined function serves all tenants: claim, effect and result are where its session leads."""
    for tenant in stores_of(tenants, "engine", table):
        await tenant.create_schema()
        await tenant.aclose()
    store = SQLStore(tenants.engine, table=table)
    sessions = async_sessionmaker(tenants.engine, sync_session_class=OfTenant)
    ENGINES.update({name: tenants.translated(name).sync_engine for name in tenants.names})

    @idempotent(store, key=lambda: "key", session=sessions)
    async def order(*, session: AsyncSession) -> str:
        await session.execute(text(f"INSERT INTO {TENANT.get()}.effects VALUES ('effect')"))
        return TENANT.get()

    answers = []
    for name in tenants.names * 2:
        TENANT.set(name)
        answers.append(await order())
    await store.aclose()

    assert answers == [*tenants.names, *tenants.names]
    assert await tenants.counted(table) == [1, 1]
    assert await tenants.counted("effects") == [1, 1]


@pytest.mark.parametrize("blocking", ["postgresql+psycopg", "postgresql+psycopg2", "postgresql+pg8000"])
async def test_blocking_calls_of_a_tenant(tenants: Tenants, url: str, blocking: str, table: str) -> None:
    """A joined function in a thread claims in its tenant's schema, and so do the blocking verbs."""
    engine = create_engine(
        with_driver(url, blocking), execution_options={"schema_translate_map": {None: tenants.names[0]}}
    )
    store = SQLStore(engine, table=table)
    await asyncio.to_thread(store.create_schema_sync)
    runs = []

    @idempotent(store, key=lambda: "key", session=sessionmaker(engine))
    def order(*, session: Session) -> str:
        runs.append(session)
        return "ordered"

    answers = [await asyncio.to_thread(order) for _ in range(2)]
    await asyncio.to_thread(store.claim_sync, new_claim())
    engine.dispose()

    assert (answers, len(runs)) == (["ordered", "ordered"], 1)
    async with tenants.engine.connect() as connection:
        assert await connection.scalar(text(f"SELECT count(*) FROM {tenants.names[0]}.{table}")) == 2


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb", "sqlite"])
def test_schema_sql_of_a_schema(dialect: str) -> None:
    """The DDL of a table with a schema names it in the table and in its index."""
    ddl = schema_sql(dialect, "tenant.records")

    assert "CREATE TABLE tenant.records" in ddl
    assert "tenant.records_expires ON records" in ddl or "records_expires ON tenant.records" in ddl


@pytest.mark.parametrize(
    "name", ["a.b.c", ".records", "tenant.", 'a"b.records', "tenant.re cords", "x" * 64 + ".records"]
)
def test_a_name_that_is_no_name(name: str) -> None:
    """Schema and table must be identifiers."""
    with pytest.raises(ConfigurationError, match="identifier"):
        SQLStore.from_url("postgresql+asyncpg://localhost/db", table=name)


def test_the_schema_of_the_metadata() -> None:
    """Without a schema of its own, the table has that of the metadata."""
    assert records_table(MetaData(schema="tenant")).fullname == "tenant.idempotency_record"
    assert records_table(MetaData(schema="tenant"), "other.records").fullname == "other.records"


async def test_a_schema_that_text_cannot_hold(engine: AsyncEngine, table: str) -> None:
    """A map to a schema whose name would be read as a parameter is refused."""
    store = SQLStore(engine.execution_options(schema_translate_map={None: "a:b"}), table=table)

    with pytest.raises(ConfigurationError, match="a : or % or backslash"):
        await store.claim(new_claim())
    await store.aclose()
