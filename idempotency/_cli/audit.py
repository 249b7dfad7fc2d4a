"""``idempotency audit``: what operators did by hand on the page, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from idempotency._cli import show
from idempotency._cli.lookup import open_named, run_on_store
from idempotency._cli.options import AsJson, Prefix, Table, Url
from idempotency._cli.words import NO_VALUE
from idempotency.stores import AnyStore
from idempotency.stores.base import Action, Auditing, require


def audit(
    limit: Annotated[int, typer.Option(min=1, help="The most actions to list; the newest come first.")] = 100,
    store: Url = None,
    table: Table = None,
    prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """List what operators did on the page: who, what, when, why, and how it ended."""

    async def actions(opened: AnyStore) -> list[Action]:
        return await require(opened, Auditing, "audit").actions(limit)

    found = run_on_store(open_named, actions, store, table, prefix)
    if as_json:
        show.print_json([asdict(action) for action in found])
    elif not found:
        typer.echo("no action is written down", err=True)
    else:
        show.print_rows([_columns(action) for action in found])


def _columns(action: Action) -> dict[str, str]:
    return {
        "id": action.id,
        "state": "not ended" if action.outcome is None else "ended",
        "age": show.duration(action.age),
        "operator": show.printable(action.operator),
        "action": show.printable(action.name),
        "thing": show.printable(action.thing),
        "reason": show.printable(action.reason),
        "outcome": show.printable(action.outcome or NO_VALUE),
    }
