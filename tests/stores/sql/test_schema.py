"""The table of the records: created, checked and written down as SQL."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Execute, judge
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.sql import SQLStore, records_table, schema_sql
from tests.kit.sql_store import DRIVERS, SERVERS, new_claim


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_schema_created_by_many_at_once(url: str, table: str) -> None:
    """Eight that create the schema at once all succeed, and the table and its index are there."""
    stores = [SQLStore.from_url(url, table=table, timeout=20) for _ in range(8)]

    await asyncio.gather(*(store.create_schema() for store in stores))
    await stores[0].check()

    engine = create_async_engine(url)
    async with engine.connect() as connection:
        indexes = await connection.run_sync(lambda sync: sqlalchemy.inspect(sync).get_indexes(table))
    await engine.dispose()
    for store in stores:
        await store.aclose()
    assert [index["column_names"] for index in indexes] == [["expires_ms"]]


@pytest.mark.parametrize("driver", SERVERS)
async def test_a_missing_table_says_what_to_call(url: str, table: str) -> None:
    """Without its table, a verb and the check name the call that creates it."""
    store = SQLStore.from_url(url, table=table)

    with pytest.raises(StoreError, match=f"{table}.*create_schema"):
        await store.claim(new_claim())
    with pytest.raises(StoreError, match=f"{table}.*create_schema"):
        await store.check()
    await store.aclose()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_check_misses_a_column(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The check tells a table of the right name and the wrong columns from a good one."""
    await store.check()
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} RENAME COLUMN watched TO other"))

    with pytest.raises(StoreError, match="lacks a column"):
        await store.check()


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_sqlite_creates_its_table(url: str, table: str) -> None:
    """On SQLite the first verb creates the table, and the file is in WAL mode."""
    store = SQLStore.from_url(url, table=table)

    record = await store.claim(mine := new_claim())
    await store.aclose()

    with sqlite3.connect(make_url(url).database or "") as connection:
        mode = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    assert judge(mine, record) == Execute()
    assert mode == ("wal",)


@pytest.mark.parametrize(
    ("dialect", "types"),
    [("postgresql", "BYTEA"), ("mysql", "LONGBLOB"), ("mariadb", "LONGBLOB"), ("sqlite", "BLOB")],
)
def test_schema_sql(dialect: str, types: str) -> None:
    """The DDL of each dialect creates the table, that of the audit, and their indexes."""
    ddl = schema_sql(dialect, "records")

    assert ddl.count("CREATE TABLE records (") == 1
    assert ddl.count("CREATE TABLE records_audit (") == 1
    assert ddl.count("CREATE INDEX records_expires ON records (expires_ms);") == 1
    assert f"result {types}" in ddl
    assert ("ENGINE=InnoDB" in ddl) == (types == "LONGBLOB")


def test_schema_sql_of_another_dialect() -> None:
    """A dialect that is not known is a configuration error."""
    with pytest.raises(ConfigurationError, match="postgresql"):
        schema_sql("cobol")


def test_the_table_joins_the_applications_metadata() -> None:
    """The table is declared in the metadata it is given, where Alembic finds it."""
    metadata = sqlalchemy.MetaData()

    table = records_table(metadata)

    assert metadata.tables["idempotency_record"] is table
