"""``idempotency contracts``: whether what is stored may change as it does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from idempotency._cli.options import fail
from idempotency._hooks import import_named
from idempotency.contracts import Contracts, check
from idempotency.errors import IdempotencyError

contracts = typer.Typer(help="Check how what is stored and sent changes.")


@contracts.callback()
def root() -> None:
    """Check how what is stored and sent changes."""


@contracts.command("check")
def check_file(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="MODULE:NAME", help="Contracts, or a class, function, saga, Streams, or list of these."),
    ],
    file: Annotated[Path, typer.Option(help="The file of contracts, in your repository.")] = Path("contracts.json"),
    accept: Annotated[
        str | None, typer.Option(metavar="REASON", help="Accept changes that are not safe, and write down why.")
    ] = None,
) -> None:
    """Compare all contracts with the file, and write what is new into it.

    Exit code 1: a change is not safe, and the file is not changed. Name all contracts of the file in one command.
    """
    try:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        declared = Contracts([import_named("contracts are named as", path) for path in paths])
        found = check(declared, file, accept)
    except IdempotencyError as error:
        fail(str(error))
    for each in found.broken:
        typer.echo(f"accepted: {each}" if accept else f"{each}.", err=not accept)
    for name in found.written:
        typer.echo(f"written: {name}")
    if found.broken and not accept:
        raise typer.Exit(1)
    typer.echo(f"{file} is up to date")
