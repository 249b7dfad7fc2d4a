"""The tables of sagas: in any schema, made once by many, described to Alembic, and missed where they are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from idempotency._sagas.journal import Due, Look
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.sql import SQLStore, saga_schema_sql, saga_tables
from tests.kit.saga_requests import ID, entry, looked_at, opening, owned, write
from tests.kit.sql_store import DRIVERS, SERVERS
from tests.kit.targets import unique_name

ON_EACH = pytest.mark.parametrize("driver", list(DRIVERS))
ON_SERVERS = pytest.mark.parametrize("driver", ["postgres", "psycopg", "mariadb"])


@pytest.fixture
async def schema(engine: AsyncEngine) -> AsyncIterator[str]:
    """A schema of its own, which is a database on MariaDB."""
    kind, name = "DATABASE" if engine.dialect.name == "mysql" else "SCHEMA", unique_name("elsewhere")
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE {kind} {name}"))
    yield name
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP {kind} {name}" + (" CASCADE" if kind == "SCHEMA" else "")))


@ON_SERVERS
async def test_a_schema_is_named_or_translated(engine: AsyncEngine, schema: str, table: str) -> None:
    """Both lead to the same saga, for the store's own requests and for those in a session."""
    moved: Any = engine.execution_options(schema_translate_map={None: schema})
    named, translated = SQLStore(engine, table=f"{schema}.{table}"), SQLStore(moved, table=table)
    await translated.create_saga_schema()
    await owned(named, owner := opening())

    assert await translated.journal(write(owner, entry("first"))) == 0
    async with AsyncSession(moved) as session:
        assert await translated.journal_in(session, write(owner, entry("second"))) == 0
        await session.commit()

    assert {each.name for each in (await looked_at(named)).entries} == {"first", "second"}
    assert translated.saga_schema == f"tables {schema}.{table}_saga and {schema}.{table}_saga_entry"
    await named.aclose()
    await translated.aclose()


@ON_EACH
async def test_alembic_finds_no_difference(saga_store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """What is created is what is described for migrations."""
    metadata = MetaData()
    tables = saga_tables(metadata, table)
    assert [each.name for each in tables] == [f"{table}_saga", f"{table}_saga_entry"]

    def compare(connection: Connection) -> list[Any]:
        ours = {"include_name": lambda found, kind, _: kind != "table" or found.startswith(f"{table}_saga")}
        return list(compare_metadata(MigrationContext.configure(connection, opts=ours), metadata))

    async with engine.connect() as connection:
        assert await connection.run_sync(compare) == []


@ON_EACH
async def test_the_tables_are_made_once_by_many(url: str, table: str) -> None:
    """Five that create them at once all succeed, and do not create the table of records."""
    stores = [SQLStore.from_url(url, table=table, timeout=20) for _ in range(5)]

    await asyncio.gather(*(store.create_saga_schema() for store in stores))

    engine = create_async_engine(url)
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await engine.dispose()
    for store in stores:
        await store.aclose()
    assert {f"{table}_saga", f"{table}_saga_entry"} <= set(names)
    assert engine.dialect.name == "sqlite" or table not in names


@pytest.mark.parametrize("driver", SERVERS)
async def test_missing_tables_say_what_to_call(url: str, engine: AsyncEngine, table: str) -> None:
    """Without its tables a request names the call, and the command, that create them."""
    store = SQLStore.from_url(url, table=table)

    requests: list[Any] = [opening(), Look(id=ID), Due()]
    for request in requests:
        with pytest.raises(StoreError, match=f"no table {table}_saga: run `.*--sagas`, call SQLStore.create_saga_sch"):
            await store.journal(request)
    async with AsyncSession(engine) as session:
        with pytest.raises(StoreError, match="--sagas"):
            await store.journal_in(session, write(opening(), entry("step")))
    await store.aclose()


@pytest.mark.parametrize("driver", ["sqlite"])
@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
async def test_sqlite_creates_its_tables(url: str, table: str, options: dict[str, Any]) -> None:
    """On SQLite the first request creates them, whatever it is."""
    engine = create_async_engine(url, **options)
    requests: list[Any] = [opening(), Look(id=ID), write(opening())]
    for number, request in enumerate(requests):
        store = SQLStore(engine, table=f"{table}_{number}")
        await store.journal(request)
        await owned(store, owner := opening(key="other"))
        assert await store.journal(write(owner, entry("step"))) == 0
        await store.aclose()
    await engine.dispose()


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "mariadb", "sqlite"])
def test_the_statements_are_printed_for_each_database(dialect: str) -> None:
    """Both tables and both indexes, which are partial where that is possible."""
    printed = saga_schema_sql(dialect, "billing.records")

    assert "CREATE TABLE billing.records_saga (" in printed
    assert "CREATE TABLE billing.records_saga_entry (" in printed
    assert printed.count("CREATE INDEX ") == 2
    assert printed.count("IS NOT NULL;") == (2 if dialect in ("postgresql", "sqlite") else 0)
    assert ("name VARBINARY(1020)" in printed) is (dialect in ("mysql", "mariadb"))


def test_a_name_that_is_no_identifier_is_refused() -> None:
    """As that of the table of records."""
    with pytest.raises(ConfigurationError, match="table must be an identifier"):
        saga_tables(MetaData(), "a b")
