"""The tables of streams: what makes them, and what an operator sees of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import MetaData, create_engine, inspect, text
from typer.testing import CliRunner

from idempotency._cli.commands import app
from idempotency.errors import ConfigurationError
from idempotency.streams import Streams, streams_sql, streams_table
from tests.kit.targets import Target, unique_name
from tests.streams.kit import KINDS, TYPES, Deposited

stores = pytest.mark.stores(*KINDS)


@pytest.fixture
def name(target: Target) -> Iterator[str]:
    """The name of tables that are dropped at the end."""
    name = unique_name("ev")
    yield name
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        for each in (name, f"{name}_snapshot", f"{name}_place"):
            connection.execute(text(f"DROP TABLE IF EXISTS {each}"))
    engine.dispose()


def use(target: Target, name: str) -> None:
    """Append and read with the tables of that name."""
    engine, streams = create_engine(target.sync_url), Streams(TYPES, name)
    with engine.begin() as connection:
        streams.append_sync(connection, "a", [Deposited(1)], expected=0)
    with engine.begin() as connection:
        assert [event.data for event in streams.read_all_sync(connection)] == [Deposited(1)]
    engine.dispose()


@stores
def test_the_printed_statements_make_what_streams_need(target: Target, name: str) -> None:
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        for statement in streams_sql(engine.dialect.name, name).split(";\n"):
            if statement:
                connection.exec_driver_sql(statement)
    engine.dispose()
    use(target, name)


@stores
def test_metadata_describes_the_same_tables(target: Target, name: str) -> None:
    made, engine = MetaData(), create_engine(target.sync_url)
    events = streams_table(made, name)
    assert sorted(made.tables) == [name, f"{name}_place", f"{name}_snapshot"]
    with engine.begin() as connection:
        made.create_all(connection)
    columns = [column["name"] for column in inspect(engine).get_columns(name)]
    assert columns == [column.name for column in events.c]
    # The row of the table of places.
    Streams(TYPES, name).create_schema_sync(engine)
    engine.dispose()
    use(target, name)


@stores
def test_an_operator_creates_and_examines_them(target: Target, name: str) -> None:
    def command(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, "--store", target.url, "--table", target.name, "--streams", name])

    missing = command("doctor")
    assert missing.exit_code == 1
    assert f"has no table {name}" in " ".join(missing.stdout.split())
    for _ in range(2):
        created = command("schema", "create")
        assert f"{name}, {name}_snapshot, {name}_place are there" in created.stdout
    use(target, name)
    examined = " ".join(command("doctor").stdout.split())
    assert f"{name}: no transaction delays those who read all events" in examined
    printed = CliRunner().invoke(app, ["schema", "sql", "--streams", name]).stdout
    assert printed.endswith(streams_sql("postgresql", name))


def test_streams_of_redis_are_refused() -> None:
    refused = CliRunner().invoke(app, ["schema", "create", "--store", "redis://127.0.0.1", "--streams", "x"])
    assert refused.exit_code == 2
    assert "--streams is for a SQL database" in refused.stderr


@pytest.mark.parametrize("name", ["a b", "x" * 51, "", "a.b.c"])
def test_names_that_are_no_identifiers_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="table must be an identifier"):
        Streams(TYPES, name)


@pytest.mark.stores("sqlite", "postgres18")
def test_several_processes_create_them_at_once(target: Target, name: str) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    async def create() -> None:
        engines = [create_async_engine(target.url) for _ in range(4)]
        await asyncio.gather(*(Streams(TYPES, name).create_schema(engine) for engine in engines))
        for engine in engines:
            await engine.dispose()

    asyncio.run(create())
    use(target, name)
