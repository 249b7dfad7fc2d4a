"""The tables of the outbox: in any schema, made once by many, and described to Alembic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from idempotency import ConfigurationError
from idempotency.outbox import Outbox, outbox_sql, outbox_table
from tests.kit.ledger import Ledger
from tests.kit.targets import unique_name

SERVERS = ("postgres", "postgres_psycopg", "mariadb")


@pytest.fixture
async def schema(ledger: Ledger) -> AsyncIterator[str]:
    """A schema of its own, which is a database on MariaDB."""
    kind, name = "DATABASE" if ledger.engine.dialect.name == "mysql" else "SCHEMA", unique_name("elsewhere")
    async with ledger.engine.begin() as connection:
        await connection.execute(text(f"CREATE {kind} {name}"))
    yield name
    async with ledger.engine.begin() as connection:
        await connection.execute(text(f"DROP {kind} {name}" + (" CASCADE" if kind == "SCHEMA" else "")))


async def payloads_in(connection: AsyncConnection, table: str) -> list[bytes]:
    return [bytes(each) for each in (await connection.execute(text(f"SELECT payload FROM {table}"))).scalars()]


@pytest.mark.stores(*SERVERS)
async def test_a_schema_is_named_or_translated(ledger: Ledger, schema: str) -> None:
    name = unique_name("box")
    named, translated = Outbox(f"{schema}.{name}"), Outbox(name)
    moved: Any = ledger.engine.execution_options(schema_translate_map={None: schema})
    await named.create_schema(ledger.engine)
    await translated.create_schema(moved)
    for outbox, engine, payload in ((named, ledger.engine, b"named"), (translated, moved, b"translated")):
        async with engine.begin() as connection:
            await outbox.emit(connection, aggregate_type="order", aggregate_id=7, type="Placed", payload=payload)
    async with ledger.engine.connect() as connection:
        assert await payloads_in(connection, f"{schema}.{name}") == [b"named", b"translated"]


@pytest.mark.stores(*SERVERS, "sqlite")
async def test_the_tables_are_made_once_by_many(ledger: Ledger) -> None:
    outbox = Outbox(unique_name("box"))
    count = 1 if ledger.engine.dialect.name == "sqlite" else 5
    await asyncio.gather(*(outbox.create_schema(ledger.engine) for _ in range(count)))
    await outbox.create_schema(ledger.engine)
    async with ledger.engine.begin() as connection:
        assert await payloads_in(connection, outbox.tables.messages.name) == []


@pytest.mark.stores(*SERVERS, "sqlite")
async def test_alembic_finds_no_difference(ledger: Ledger) -> None:
    name, metadata = unique_name("box"), MetaData()
    assert outbox_table(metadata, name).name == name
    outbox = Outbox(name)
    await outbox.create_schema(ledger.engine)

    def compare(connection: Connection) -> list[Any]:
        ours = {"include_name": lambda found, kind, _: kind != "table" or found.startswith(name)}
        return list(compare_metadata(MigrationContext.configure(connection, opts=ours), metadata))

    async with ledger.engine.connect() as connection:
        assert await connection.run_sync(compare) == []


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "mariadb", "sqlite"])
def test_the_statements_are_printed_for_each_database(dialect: str) -> None:
    printed = outbox_sql(dialect, "billing.events")
    for table in ("events", "events_dead", "events_lease", "events_position"):
        assert f"CREATE TABLE billing.{table} (" in printed
    partial = "WHERE available_ms IS NOT NULL" in printed
    assert partial is (dialect in ("postgresql", "sqlite"))
    assert ("ALTER TABLE billing.events SET (autovacuum_vacuum_scale_factor = 0" in printed) is (
        dialect == "postgresql"
    )


@pytest.mark.stores("postgres")
async def test_the_printed_statements_make_what_create_schema_makes(ledger: Ledger) -> None:
    printed, made = unique_name("box"), unique_name("box")
    await Outbox(made).create_schema(ledger.engine)
    async with ledger.engine.begin() as connection:
        for statement in outbox_sql("postgresql", printed).split(";\n"):
            if statement.strip():
                await connection.execute(text(statement))
    query = (
        "SELECT replace(pg_get_indexdef(i.indexrelid), c.relname, 'T'), c.reloptions FROM pg_class c"
        " JOIN pg_index i ON i.indrelid = c.oid WHERE c.relname LIKE :name ORDER BY 1"
    )
    async with ledger.engine.connect() as connection:
        found = [
            [tuple(row) for row in await connection.execute(text(query), {"name": f"{name}%"})]
            for name in (printed, made)
        ]
    assert len(found[0]) == 5
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["", "a b", "x" * 51, "a.b.c", "1st", "outbox;"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="table must be an identifier"):
        Outbox(name)


async def test_rows_of_transactions_are_placed_after_their_transaction_has_its_number(local_postgres_url: str) -> None:
    """A sequence's number that is given out belongs to a transaction which the server lists as running."""
    engine: AsyncEngine = create_async_engine(local_postgres_url)
    outbox = Outbox(unique_name("box"))
    await outbox.create_schema(engine)
    async with engine.connect() as connection, engine.connect() as other:
        # The row waits in a trigger, after its place in the order is computed, before it is stored.
        table = outbox.tables.messages.name
        for statement in (
            f"CREATE FUNCTION {table}_wait() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_advisory_lock_shared(774411); RETURN NEW; END $$",
            f"CREATE TRIGGER wait BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {table}_wait()",
        ):
            await connection.execute(text(statement))
        await connection.commit()
        await other.execute(text("SELECT pg_advisory_lock(774411)"))
        await other.commit()
        emitting = asyncio.create_task(
            outbox.emit(connection, aggregate_type="order", aggregate_id=7, type="Placed", payload=b"")
        )
        place = f"SELECT is_called FROM {table}_seq_seq"
        while not await other.scalar(text(place)):
            await other.rollback()
        running = await other.scalar(
            text("SELECT count(*) FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND query LIKE :insert"),
            {"insert": f"INSERT INTO {table}%"},
        )
        await other.execute(text("SELECT pg_advisory_unlock(774411)"))
        await emitting
        await connection.commit()
    await engine.dispose()
    assert running == 1
