"""``idempotency outbox COMMAND``: what an operator does with the messages of an outbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from idempotency._cli import show
from idempotency._cli.open_outbox import examine, outbox_at, run
from idempotency._cli.options import (
    DEFAULT_LEASE,
    DEFAULT_OUTBOX,
    AsJson,
    Lease,
    Mode,
    OutboxMode,
    OutboxTable,
    Publish,
    Url,
    confirmed,
    fail,
)
from idempotency._cli.show_outbox import message_as_json, print_messages, print_stats, stats_as_json
from idempotency.errors import ConfigurationError, IdempotencyError

if TYPE_CHECKING:
    from idempotency.outbox._operate import OutboxOperations

outbox = typer.Typer(help="Inspect and manage the messages of an outbox.")
schema = typer.Typer(help="Print the statements that create the tables, or create them.")
outbox.add_typer(schema, name="schema")


@outbox.command("list")
def list_(
    dead: Annotated[bool, typer.Option("--dead", help="List the dead messages, with the reason of each.")] = False,
    key: Annotated[str | None, typer.Option(metavar="TYPE/ID", help="Only messages of this key.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most messages to list; the oldest come first.")] = 100,
    payload: Annotated[bool, typer.Option("--payload", help="Print the payloads too.")] = False,
    store: Url = None,
    table: OutboxTable = DEFAULT_OUTBOX,
    as_json: AsJson = False,
) -> None:
    """List the messages that wait, or the dead ones; payloads only with --payload."""
    messages = run(
        store, table, lambda operations: operations.messages(dead=dead, key=key, limit=limit, payload=payload)
    )
    if as_json:
        show.print_json([message_as_json(message, payload) for message in messages])
    elif not messages:
        typer.echo(f"no message {'is dead' if dead else 'waits'}", err=True)
    else:
        print_messages(messages, payload)


@outbox.command()
def stats(store: Url = None, table: OutboxTable = DEFAULT_OUTBOX, as_json: AsJson = False) -> None:
    """Count the messages by state, and show the relays that run with their buckets."""
    found = run(store, table, lambda operations: operations.stats())
    if as_json:
        show.print_json(stats_as_json(found))
    else:
        print_stats(found)


@outbox.command()
def doctor(
    store: Url = None,
    table: OutboxTable = DEFAULT_OUTBOX,
    publish: Publish = None,
    lease: Lease = DEFAULT_LEASE,
    as_json: AsJson = False,
) -> None:
    """Examine the outbox and its server, without a table of records; exit code 1 when something must be fixed."""
    show.print_findings(run(store, table, lambda operations: examine(operations, publish, lease)), as_json)


@outbox.command()
def redrive(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="The ids of dead messages.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Redrive every dead message.")] = False,
    type: Annotated[str | None, typer.Option(help="With --all: only messages of this type.")] = None,
    store: Url = None,
    table: OutboxTable = DEFAULT_OUTBOX,
) -> None:
    """Send dead messages again, with the same ids, after what waits now of their keys."""

    async def move(operations: OutboxOperations) -> int:
        if ids:
            return await operations.redrive(ids)
        return await operations.redrive_all(type=type)

    if bool(ids) == every or (ids and type is not None):
        fail("give one ID or several, or --all, with --type or without")
    moved = run(store, table, move)
    typer.echo(f"redriven {moved} message{'' if moved == 1 else 's'}")
    if moved:
        typer.echo("note: messages of the same keys that were emitted later may have gone ahead", err=True)


@outbox.command()
def forget(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of the message.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: Url = None,
    table: OutboxTable = DEFAULT_OUTBOX,
) -> None:
    """Delete a message for good, dead or not: it is never sent, unless a relay has it in hand."""

    async def drop(operations: OutboxOperations) -> None:
        if not await operations.forget(id):
            raise ConfigurationError(f"there is no message {id}: nothing was forgotten")

    if not (yes or confirmed(f"Forget the message {id}, so that it is never sent?")):
        fail("not confirmed, nothing was forgotten; --yes forgets without a question")
    run(store, table, drop)
    typer.echo(f"{id} forgotten")


@schema.callback(invoke_without_command=True)
def sql(
    context: typer.Context,
    dialect: Annotated[str, typer.Option(help="postgresql, mysql, mariadb or sqlite.")] = "postgresql",
    table: OutboxTable = DEFAULT_OUTBOX,
) -> None:
    """Print the statements that create the tables; needs no database."""
    if context.invoked_subcommand is not None:
        return
    try:
        from idempotency.outbox import outbox_sql

        typer.echo(outbox_sql(dialect, table), nl=False)
    except ImportError:
        fail("this needs SQLAlchemy: pip install 'asgi-idempotency[sql]'")
    except IdempotencyError as error:
        fail(str(error))


@schema.command()
def create(store: Url = None, table: OutboxTable = DEFAULT_OUTBOX) -> None:
    """Create the tables and their indexes where they are missing."""
    run(store, table, lambda operations: operations.create_schema(), create=True)
    typer.echo(f"tables {table}, {table}_dead, {table}_lease and {table}_position are there")


@outbox.command()
def debezium(store: Url = None, table: OutboxTable = DEFAULT_OUTBOX, mode: Mode = OutboxMode.TABLE) -> None:
    """Print the configuration of Debezium, in place of a relay; connects to nothing."""
    try:
        database, named = outbox_at(store, table, mode)
        from idempotency.outbox._debezium import connector_configuration

        typer.echo(connector_configuration(named, database))
    except IdempotencyError as error:
        fail(str(error))
