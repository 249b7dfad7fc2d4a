"""``idempotency projection COMMAND``: what an operator does with projections and checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from idempotency._cli import show
from idempotency._cli.lookup import check_sqlite
from idempotency._cli.open_outbox import is_sql
from idempotency._cli.options import AsJson, Url, confirmed, fail
from idempotency._sql.requirements import sqlalchemy_not_installed
from idempotency.errors import ConfigurationError, IdempotencyError, SchemaMissingError, StoreError
from idempotency.stores.base import Finding
from idempotency.streams._position import Position

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from idempotency.projections import _rows
    from idempotency.projections._operate import ProjectionView
    from idempotency.projections._rows import Mark, Rows

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
        str | None, typer.Option(help="The table of events, such as stream_event: with it, the lag is shown.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every checkpoint: its state, where it is, why it has stopped, and what happens next by itself.

    Its lag is unknown without --streams.
    """

    def work(session: Session, rows: Rows) -> list[ProjectionView]:
        from idempotency.projections._operate import views

        return views(session, rows, streams)

    found = _run(store, table, work)
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

    _run(
        store,
        table,
        lambda session, rows: rows.skip(session, _named(name, version), Position.parse(position), reason),
    )
    typer.echo(f"{show.printable(name)} version {version} goes on after {position}")


@projection.command()
def resume(name: Name, version: Version, store: Url = None, table: CheckpointTable = DEFAULT_TABLE) -> None:
    """Let a projection try the event again at which it has stopped."""
    _run(store, table, lambda session, rows: rows.resume(session, _named(name, version)))
    typer.echo(f"{show.printable(name)} version {version} tries the event again")


@projection.command()
def switch(name: Name, version: Version, store: Url = None, table: CheckpointTable = DEFAULT_TABLE) -> None:
    """Make a version the live one; refused while it is behind the one that is live."""
    _run(store, table, lambda session, rows: rows.switch(session, _named(name, version), attrgetter("position")))
    typer.echo(f"{show.printable(name)} version {version} is live")


@projection.command()
def drop(
    name: Name, version: Version, yes: Yes = False, store: Url = None, table: CheckpointTable = DEFAULT_TABLE
) -> None:
    """End a version that is not live, for ever: its workers stop. Then drop the tables of your own that it had."""
    _confirm(f"End version {version} of {name} for ever?", yes)
    _run(store, table, lambda session, rows: rows.drop(session, _named(name, version)))
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
    _run(store, table, lambda session, rows: rows.tables.create(session.connection()), create=True)
    typer.echo(f"tables {table}, {table}_live and {table}_skipped are there")


async def examine_projections(url: str | None, table: str | None, expected: bool) -> list[Finding]:
    """Name the projections that have stopped. A table that is not named is examined only if ``expected`` and there."""
    if table is None and not expected:
        return []
    if not url or not is_sql(url):
        raise ConfigurationError("--projections is for a SQL database")
    from idempotency.projections._operate import operate, stopped

    name = table or DEFAULT_TABLE
    try:
        found = await operate(url, name, stopped)
    except SchemaMissingError as error:
        return [] if table is None else [Finding("fix", str(error))]
    except StoreError as error:
        return [Finding("fix", str(error))]
    return [Finding("fix", _stopped(mark)) for mark in found] or [Finding("ok", f"{name}: no projection has stopped")]


def _stopped(mark: Mark) -> str:
    name = show.printable(str(mark.name))
    return f"projection {name} is stopped at {mark.failed}: {mark.error}; see idempotency projection list"


def _run(url: str | None, table: str, work: Callable[[Session, Rows], T], *, create: bool = False) -> T:
    """Do ``work`` in one transaction of the database. Every error ends the command with one line."""
    try:
        if not url or not is_sql(url):
            raise ConfigurationError("name the SQL database: --store URL, or IDEMPOTENCY_STORE in the environment")
        try:
            from idempotency.projections._operate import operate
            from idempotency.projections._rows import PROJECTIONS
        except ImportError as error:
            raise sqlalchemy_not_installed(url.partition("://")[0]) from error
        if url.startswith("sqlite") and not create:
            check_sqlite(url, table, PROJECTIONS.command)
        return asyncio.run(operate(url, table, work))
    except IdempotencyError as error:
        fail(str(error))


def _named(name: str, version: int) -> _rows.Name:
    from idempotency.projections import _rows

    return _rows.Name(name, version)


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
        "lag": _lag(each),
        "failed": each.failed or "none",
        "error": each.error or "none",
        "attempts": str(each.attempts),
        "next": each.next,
    }


def _lag(each: ProjectionView) -> str:
    if each.lag is not None:
        return show.duration(each.lag)
    return "none" if each.state == "dropped" else "unknown"
