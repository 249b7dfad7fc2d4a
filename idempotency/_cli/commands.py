"""``idempotency COMMAND``: each command opens the store, asks one thing of it, and prints the answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from idempotency._cli import show
from idempotency._cli.audit import audit
from idempotency._cli.contracts import contracts as contracts_commands
from idempotency._cli.lookup import open_named, run_on_store
from idempotency._cli.open_outbox import examine_outbox
from idempotency._cli.options import DEFAULT_LEASE, AsJson, KeyFile, Lease, Prefix, Publish, Table, Url, confirmed, fail
from idempotency._cli.outbox import outbox as outbox_commands
from idempotency._cli.projection import examine_projections
from idempotency._cli.projection import projection as projection_commands
from idempotency._cli.records import (
    deliveries,
    find,
    find_key,
    forget_counts,
    hexadecimal,
    holds_what_cannot_be_shown,
    keeps_sagas,
    one,
    waiting,
)
from idempotency._cli.relay import relay
from idempotency._cli.saga import examine_sagas
from idempotency._cli.saga import saga as saga_commands
from idempotency._cli.schema import schema
from idempotency._cli.streams import StreamsTable, examine_streams
from idempotency._http.codec import encode_response
from idempotency.errors import ConfigurationError
from idempotency.saga import SagaOperations
from idempotency.stores import AnyStore
from idempotency.stores._sealing import cannot_be_shown, needs_key
from idempotency.stores.base import (
    Count,
    Entry,
    Examining,
    Finding,
    Forgetting,
    ListedState,
    Listing,
    Purging,
    Resolving,
    require,
)

_PAUSE = 4
"""The pause of ``purge`` after a batch, in times of what the batch took: it works for a fifth of the time."""

_NONE_UNRESOLVED = (
    "no record waits to be resolved; with on_crash=hold, one whose process was killed is listed once its lease is over,"
    " 30 s by default"
)

_NONE_NAMED = "there is no such record; a store with write_version=1 writes no names"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(schema, name="schema")
app.add_typer(outbox_commands, name="outbox")
app.add_typer(saga_commands, name="saga")
app.add_typer(projection_commands, name="projection")
app.add_typer(contracts_commands, name="contracts")
app.command()(relay)
app.command()(audit)

Id = Annotated[str, typer.Argument(metavar="ID", help="The record's id in hex, or its first 12 digits as logged.")]


class Listed(StrEnum):
    """The state that can be listed."""

    UNKNOWN = "unknown"
    RUNNING = "running"
    LAPSED = "lapsed"
    DONE = "done"
    ALL = "all"


_STATES: Mapping[Listed, ListedState | None] = {
    Listed.UNKNOWN: "unknown",
    Listed.RUNNING: "running",
    Listed.LAPSED: "lapsed",
    Listed.DONE: "done",
    Listed.ALL: None,
}


class Outcome(StrEnum):
    """What the operator found out about an operation of unknown outcome."""

    DONE = "done"
    RELEASE = "release"


@app.callback()
def root() -> None:
    """Inspect and manage the records of idempotency keys."""


@app.command()
def inspect(
    key: Annotated[
        str | None, typer.Argument(help="The key; without --scope in every scope, reading all records.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="The scope of the key.")] = None,
    record: Annotated[str | None, typer.Option("--id", help="The record's id, or its first 12 digits.")] = None,
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the records of a key, or of an id; never their results.

    Of a message, also what is counted of its deliveries.
    """

    async def look(opened: AnyStore) -> list[tuple[Entry, dict[Count, int]]]:
        if record is not None:
            found = await find(opened, hexadecimal(record))
        else:
            found = await find_key(opened, key or "", scope)
        if not found:
            hidden = key is not None and scope is None and await holds_what_cannot_be_shown(opened)
            besides = ", besides those that need another key in --encryption-key-file" if hidden else ""
            raise ConfigurationError(f"there is no such record{besides}")
        return [(entry, await deliveries(opened, entry)) for entry in found]

    if (key is None) == (record is None) or (record is not None and scope is not None):
        fail("give a KEY, with or without --scope, or --id")
    entries = run_on_store(open_named, look, store, table, prefix, key_file)
    if as_json:
        show.print_json([show.as_json(*shown) for shown in entries])
    elif len(entries) == 1:
        show.print_entry(*entries[0])
    else:
        show.print_entries([entry for entry, _ in entries])


@app.command("list")
def list_(
    state: Annotated[
        Listed | None,
        typer.Option(help="The state to list; default unknown, with --name all. Any but unknown reads all records."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The name of the operation, as it is listed; reads all records.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most records to list; the oldest come first.")] = 100,
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """List the records that wait to be resolved, or those of another state or of one operation."""

    async def listed(opened: AnyStore) -> list[Entry]:
        if unresolved:
            return await require(opened, Resolving, "list").unresolved(limit)
        listing = require(opened, Listing, "list with --state or --name")
        return await listing.list_records(None if state is None else _STATES[state], name=name, limit=limit)

    unresolved = name is None and state in (None, Listed.UNKNOWN)
    entries = run_on_store(open_named, listed, store, table, prefix, key_file)
    if as_json:
        show.print_json([show.as_json(entry) for entry in entries])
    elif not entries:
        typer.echo(_NONE_UNRESOLVED if unresolved else _NONE_NAMED if name else "there is no such record", err=True)
    else:
        show.print_entries(entries)
        if len(entries) == limit:
            typer.echo(f"the oldest {limit} are listed, of perhaps more: --limit", err=True)


@app.command()
def resolve(
    record: Id,
    outcome: Annotated[Outcome, typer.Argument(help="done: the effect happened. release: it did not.")],
    status: Annotated[int | None, typer.Option(min=200, max=599, help="done: the status that duplicates get.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="A header, 'Name: value'; may be repeated.")] = None,
    body_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="The file with the response's body."),
    ] = None,
    ttl: Annotated[float, typer.Option(min=1, help="done: seconds until the record expires.")] = 86400,
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
    key_file: KeyFile = None,
) -> None:
    """Resolve a record whose outcome is unknown. Of a message, the counts of its deliveries are forgotten."""

    async def resolve_one(opened: AnyStore) -> Entry:
        resolving = require(opened, Resolving, "resolve")
        entry = await one(opened, record)
        if status is not None and needs_key(entry, key_file is not None):
            raise ConfigurationError("the record is encrypted: give --encryption-key-file, to encrypt the response too")
        if status is not None and not entry.scope.startswith("http:"):
            raise ConfigurationError("--status is for the record of an HTTP request, which this is not")
        if not await resolving.resolve(entry.id, outcome.value, result, ttl=ttl):
            raise ConfigurationError(f"{record} is {show.state(entry)}, not unknown: nothing was changed")
        await _forget_counts(opened, entry)
        return entry

    if status is None and (header or body_file):
        fail("--header and --body-file need --status")
    if status is not None and outcome is Outcome.RELEASE:
        fail("--status is for done: a released key has no response")
    result = None if status is None else _response(status, header or [], body_file)
    resolved = run_on_store(open_named, resolve_one, store, table, prefix, key_file)
    words = "released: the next request runs" if outcome is Outcome.RELEASE else "done"
    typer.echo(f"{resolved.id.hex()} {words}")


@app.command()
def forget(
    record: Id,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
    key_file: KeyFile = None,
) -> None:
    """Delete a record whose owner is not running, done or not: the next request of its key runs again.

    Of a message, the counts of its deliveries are forgotten with it.
    """

    async def drop(opened: AnyStore) -> Entry:
        forgetting = require(opened, Forgetting, "forget")
        entry = await one(opened, record)
        if not yes:
            _confirm(entry)
        if not await forgetting.forget(entry.id):
            raise ConfigurationError(f"{record} is being run, or gone: nothing was forgotten")
        await _forget_counts(opened, entry)
        return entry

    typer.echo(f"{run_on_store(open_named, drop, store, table, prefix, key_file).id.hex()} forgotten")


@app.command()
def purge(
    batch: Annotated[int, typer.Option(min=1, help="How many records one statement deletes.")] = 1000,
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
) -> None:
    """Delete every expired record and saga, with pauses between the batches; on Redis there is nothing to do."""

    async def empty(opened: AnyStore) -> tuple[int, int]:
        records = require(opened, Purging, "purge")
        with _progress() as advance:
            gone = await _purge_all(records.purge, batch, advance)
            if not await keeps_sagas(opened):
                return gone, 0
            return gone, await _purge_all(SagaOperations(opened).purge, batch, advance)

    total, of_sagas = run_on_store(open_named, empty, store, table, prefix)
    typer.echo(f"purged {total} record{'' if total == 1 else 's'}")
    if of_sagas:
        typer.echo(f"purged {of_sagas} saga{'' if of_sagas == 1 else 's'}")


@app.command()
def doctor(
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
    outbox: Annotated[str | None, typer.Option(help="SQL: the outbox's table, default outbox if it is there.")] = None,
    publish: Publish = None,
    lease: Lease = DEFAULT_LEASE,
    streams: StreamsTable = None,
    projections: Annotated[
        str | None,
        typer.Option(help="SQL: the table of checkpoints; with --streams, idempotency_checkpoint if it is there."),
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Examine the store, its server, outbox, sagas and projections; exit code 1 when something must be fixed."""

    async def examine(opened: AnyStore) -> list[Finding]:
        of_store = await require(opened, Examining, "doctor").examine()
        of_outbox = await examine_outbox(store, outbox, publish, lease)
        others = (
            *await waiting(opened),
            *of_outbox,
            *await examine_sagas(opened),
            *await examine_streams(store, streams),
            *await examine_projections(store, projections, streams is not None),
        )
        return [*of_store, *(finding for finding in others if finding not in of_store)]

    show.print_findings(run_on_store(open_named, examine, store, table, prefix, key_file), as_json)


async def _forget_counts(opened: AnyStore, entry: Entry) -> None:
    if await forget_counts(opened, entry):
        return
    what, why = "the counts of its deliveries", "its names are not whole"
    if cannot_be_shown(entry):
        what, why = "the counts of its deliveries, if it is a message,", "its names are encrypted"
    typer.echo(f"note: {what} remain until they expire: {why}", err=True)


def _confirm(entry: Entry) -> None:
    question = f"Forget the {show.state(entry)} record of key {show.printable(entry.key)}, so that it runs again?"
    if not confirmed(question):
        raise ConfigurationError("not confirmed, nothing was forgotten; --yes forgets without a question")


def _response(status: int, headers: list[str], body: Path | None) -> bytes:
    pairs: list[tuple[bytes, bytes]] = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip() or not header.isascii() or not header.isprintable():
            fail(f"a header is 'Name: value', in printable ASCII, not {header!r}")
        pairs.append((name.strip().encode(), value.strip().encode()))
    return encode_response(status, pairs, body.read_bytes() if body else b"")


async def _purge_all(purge: Callable[[int], Awaitable[int]], batch: int, advance: Callable[[int], object]) -> int:
    total, started = 0, monotonic()
    while gone := await purge(batch):
        total += gone
        advance(gone)
        # While a batch is deleted, live claims wait for the processor or the disk, or on SQLite for the lock.
        await asyncio.sleep(_PAUSE * (monotonic() - started))
        started = monotonic()
    return total


@contextmanager
def _progress() -> Iterator[Callable[[int], object]]:
    if not sys.stdout.isatty():
        yield lambda _: None
        return
    # How many are expired is not known before they are deleted: the bar only shows how many are deleted by now.
    columns = (TextColumn("purging"), BarColumn(), TextColumn("{task.completed:.0f} records"), TimeElapsedColumn())
    with Progress(*columns, console=Console(), transient=True) as progress:
        task = progress.add_task("purge", total=None)
        yield lambda gone: progress.advance(task, gone)
