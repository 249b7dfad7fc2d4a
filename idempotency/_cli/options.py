"""Options that several commands have, and how a command fails."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer


class OutboxMode(StrEnum):
    """Where messages are before they are published."""

    TABLE = "table"
    MESSAGE = "message"


Url = Annotated[str | None, typer.Option("--store", envvar="IDEMPOTENCY_STORE", help="The store's URL.")]
Table = Annotated[str | None, typer.Option(help="SQL: the name of the table, default idempotency_record.")]
Prefix = Annotated[str | None, typer.Option(help="Redis: the prefix of the keys, default idempotency.")]
KeyFile = Annotated[
    str | None,
    typer.Option(
        "--encryption-key-file",
        envvar="IDEMPOTENCY_ENCRYPTION_KEY_FILE",
        help="The file with the encryption keys, one in a line; the first one writes.",
    ),
]
Publish = Annotated[
    str | None,
    typer.Option(
        "--publish",
        envvar="IDEMPOTENCY_PUBLISH",
        help="The broker's URL, or module:name of a coroutine function or a publisher.",
    ),
]
Lease = Annotated[float, typer.Option(min=1, help="Seconds after which another relay takes over from one that died.")]
DEFAULT_LEASE = 30.0
DEFAULT_OUTBOX = "outbox"
OutboxTable = Annotated[str, typer.Option("--table", help="The name of the outbox's table.")]
Mode = Annotated[
    OutboxMode, typer.Option(help="table: messages are rows. message: they are in the log of PostgreSQL alone.")
]
Names = Sequence[str | None]
"""What names a store: its URL, table, prefix, and file of keys."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def on_store(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name a store; their values are its keyword argument ``at``."""
    options = {"store": Url, "table": Table, "prefix": Prefix, "key_file": KeyFile}

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        at: Names = [values.pop(name) for name in options]
        command(**values, at=at)

    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "at"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    # What typer reads the options of a command from.
    with_options.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return with_options


def fail(message: str) -> NoReturn:
    """Print an error in one line, and end with exit code 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def confirmed(question: str) -> bool:
    """Ask on stderr; anything but a yes is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False
