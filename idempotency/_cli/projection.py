"""``idempotency projection COMMAND``: what an operator does with projections and checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from idempotency._cli import show
from idempotency._cli.lookup import check_sqlite
from idempotency._cli.open_outbox import is_sql
from idempotency._cli.options import AsJson, Url, confirmed, fail
from idempotency._sql.requirements import sqlalchemy_not_installed
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.streams._position import Position

if TYPE_CHECKING:
    from idempotency.projections._operate import ProjectionOperations, ProjectionView

T = TypeVar("T")

DEFAULT_TABLE = "idempotency_checkpoint"

projection = typer.Typer(help="See how far projections are, skip an event that stops one, switch versions.")
schema = typer.Typer(help="Print the statements that create the tables, or create them.")
projection.add_typer(schema, name="schema")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of the projection.")]
Version = Annotated[int, typer.Argument(metavar="VERSION", help="Its version.", min=1)]
CheckpointTable = Annotated[str, typer.Option("--table", help="The name of the table of checkpoints.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@projection.command("list")
def list_(
    store: Url = None,
    table: CheckpointTable = DEFAULT_TABLE,
    streams: Annotated[
        str | None, typer.Option(help="The table of events, such as stream_event, to show the lag.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every checkpoint: its state, where it is, why it has stopped, and what happens next by itself."""
    found = _run(store, table, lambda operations: operations.projections(), streams=streams)
    if as_json:
        show.print_json([asdict(each) for each in found])
    elif not found:
        typer.echo("there is no checkpoint", err=True)
    else:
        show.print_rows([_columns(each) for each in found])


@projection.command()
def skip(
    name: Name,
    version: Version,
    position: Annotated[str, typer.Argument(help="The position of the event, as list shows it.")],
    reason: Annotated[str, typer.Option(help="Why it is skipped; it is written down.")],
    yes: Yes = False,
    store: Url = None,
    table: CheckpointTable = DEFAULT_TABLE,
) -> None:
    """Go on after the event at which a projection has stopped: that event is not applied."""
    _confirm(f"Skip the event at {position}, so that {name} version {version} never applies it?", yes)

    async def work(operations: ProjectionOperations) -> None:
        await operations.skip(name, version, Position.parse(position), reason)

    _run(store, table, work)
    typer.echo(f"{show.printable(name)} version {version} goes on after {position}")


@projection.command()
def resume(name: Name, version: Version, store: Url = None, table: CheckpointTable = DEFAULT_TABLE) -> None:
    """Let a projection try the event again at which it has stopped."""
    _run(store, table, lambda operations: operations.resume(name, version))
    typer.echo(f"{show.printable(name)} version {version} tries the event again")


@projection.command()
def switch(name: Name, version: Version, store: Url = None, table: CheckpointTable = DEFAULT_TABLE) -> None:
    """Make a version the live one; refused while it is behind the one that is live."""
    _run(store, table, lambda operations: operations.switch(name, version))
    typer.echo(f"{show.printable(name)} version {version} is live")


@projection.command()
def drop(
    name: Name, version: Version, yes: Yes = False, store: Url = None, table: CheckpointTable = DEFAULT_TABLE
) -> None:
    """End a version that is not live, for ever: its workers stop. Then drop the tables of your own that it had."""
    _confirm(f"End version {version} of {name} for ever?", yes)
    _run(store, table, lambda operations: operations.drop(name, version))
    typer.echo(f"{show.printable(name)} version {version} has ended")


@schema.callback(invoke_without_command=True)
def sql(
    context: typer.Context,
    dialect: Annotated[str, typer.Option(help="postgresql, mysql, mariadb or sqlite.")] = "postgresql",
    table: CheckpointTable = DEFAULT_TABLE,
) -> None:
    """Print the statements that create the tables; needs no database."""
    if context.invoked_subcommand is not None:
        return
    try:
        from idempotency.projections import projections_sql

        typer.echo(projections_sql(dialect, table), nl=False)
    except ImportError:
        fail("this needs SQLAlchemy: pip install 'asgi-idempotency[sql]'")
    except IdempotencyError as error:
        fail(str(error))


@schema.command()
def create(store: Url = None, table: CheckpointTable = DEFAULT_TABLE) -> None:
    """Create the tables where they are missing."""
    _run(store, table, lambda operations: operations.create_schema(), create=True)
    typer.echo(f"tables {table}, {table}_live and {table}_skipped are there")


def _run(
    url: str | None,
    table: str,
    work: Callable[[ProjectionOperations], Awaitable[T]],
    *,
    streams: str | None = None,
    create: bool = False,
) -> T:
    """Open the database, await ``work``, and close it. Every error ends the command with one line."""

    async def with_operations() -> T:
        operations = _open(url, table, streams, create)
        try:
            return await work(operations)
        finally:
            await operations.aclose()

    try:
        return asyncio.run(with_operations())
    except IdempotencyError as error:
        fail(str(error))


def _open(url: str | None, table: str, streams: str | None, create: bool) -> ProjectionOperations:
    if not url or not is_sql(url):
        raise ConfigurationError("name the SQL database: --store URL, or IDEMPOTENCY_STORE in the environment")
    try:
        from idempotency.projections._operate import ProjectionOperations
        from idempotency.projections._rows import PROJECTIONS
    except ImportError as error:
        raise sqlalchemy_not_installed(url.partition("://")[0]) from error
    if url.startswith("sqlite") and not create:
        check_sqlite(url, table, PROJECTIONS.command)
    return ProjectionOperations(url, table, streams)


def _confirm(question: str, yes: bool) -> None:
    if not (yes or confirmed(question)):
        fail("not confirmed, nothing was changed; --yes does it without a question")


def _columns(each: ProjectionView) -> dict[str, Any]:
    return {
        "id": show.printable(f"{each.name}/{each.version}" + (f"/{each.stream}" if each.stream else "")),
        "state": each.state,
        "live": "yes" if each.live else "no",
        "position": each.position,
        "moved": f"{show.duration(each.moved)} ago",
        "lag": "unknown" if each.lag is None else show.duration(each.lag),
        "failed": each.failed or "none",
        "error": each.error or "none",
        "attempts": str(each.attempts),
        "next": each.next,
    }
