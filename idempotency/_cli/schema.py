"""Create the tables of a SQL store, or print the statements that do, or that change those of an earlier release."""

from __future__ import annotations

from typing import Annotated

import typer

from idempotency._cli.lookup import open_named, run_on_store
from idempotency._cli.options import Table, Url, fail
from idempotency._cli.streams import CheckpointsTable, StreamsTable, create_projections, create_streams
from idempotency.errors import IdempotencyError
from idempotency.stores import AnyStore
from idempotency.stores.base import CreatingSagaSchema, CreatingSchema, NamingSchema, require, supports

_NEEDS_SQLALCHEMY = "this needs SQLAlchemy: pip install 'asgi-idempotency[sql]'"

schema = typer.Typer(help="Create the tables of a SQL store, or print how.")

Sagas = Annotated[bool, typer.Option("--sagas", help="SQL: also the tables of sagas, NAME_saga and NAME_saga_entry.")]
Dialect = Annotated[str, typer.Option(help="postgresql, mysql, mariadb or sqlite.")]


@schema.command()
def create(
    store: Url = None,
    table: Table = None,
    sagas: Sagas = False,
    streams: StreamsTable = None,
    projections: CheckpointsTable = None,
) -> None:
    """Create the table, that of the audit, and their indexes where they are missing."""

    async def make(opened: AnyStore) -> str:
        await require(opened, CreatingSchema, "schema create").create_schema()
        if sagas and supports(opened, CreatingSagaSchema):
            await opened.create_saga_schema()
            typer.echo(f"{opened.saga_schema} are there")
        if streams is not None:
            typer.echo(f"{await create_streams(store, streams)} are there")
        if projections is not None:
            typer.echo(f"{await create_projections(store, projections)} are there")
        if not supports(opened, NamingSchema):
            return "the schema is there"
        return f"{opened.schema} are there" if opened.schema else f"{_name_of(opened)} needs no schema"

    typer.echo(run_on_store(lambda *names: open_named(*names, create=True), make, store, table, None))


@schema.command()
def sql(
    dialect: Dialect = "postgresql",
    table: Table = None,
    sagas: Sagas = False,
    streams: StreamsTable = None,
    projections: CheckpointsTable = None,
) -> None:
    """Print the statements that create the tables; needs no store."""
    try:
        from idempotency.stores.sql import saga_schema_sql, schema_sql
    except ImportError:
        fail(_NEEDS_SQLALCHEMY)
    try:
        typer.echo(schema_sql(dialect, table or "idempotency_record"), nl=False)
        if sagas:
            typer.echo(saga_schema_sql(dialect, table or "idempotency_record"), nl=False)
        if streams is not None:
            from idempotency.streams import streams_sql

            typer.echo(streams_sql(dialect, streams), nl=False)
        if projections is not None:
            from idempotency.projections import projections_sql

            typer.echo(projections_sql(dialect, projections), nl=False)
    except IdempotencyError as error:
        fail(str(error))


@schema.command()
def upgrade(
    dialect: Dialect = "postgresql",
    table: Table = None,
) -> None:
    """Print the statements that add the columns which the table of an earlier release lacks; needs no store."""
    try:
        from idempotency.stores.sql import upgrade_sql
    except ImportError:
        fail(_NEEDS_SQLALCHEMY)
    try:
        typer.echo(upgrade_sql(dialect, table or "idempotency_record"), nl=False)
    except IdempotencyError as error:
        fail(str(error))


def _name_of(store: object) -> str:
    return type(store).__name__.removesuffix("Store")
