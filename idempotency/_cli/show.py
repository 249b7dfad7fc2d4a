"""Records and findings as an operator reads them: lines, a table on a terminal, or JSON. Never a result."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idempotency._cli.records import LOGGED
from idempotency._cli.words import NO_VALUE
from idempotency._cli.words import duration as duration
from idempotency._cli.words import printable as printable
from idempotency._cli.words import state as state
from idempotency._rules import State
from idempotency.stores.base import Count, Entry, Finding

_NOTHING: Mapping[Count, int] = {}
_LAPSED = "its owner has vanished, and the next claim runs it"
_COUNTED: Mapping[Count, str] = {
    "begun": "deliveries that were begun",
    "busy": "deliveries that did not call the handler",
    "failed": "deliveries whose handler failed",
}


def on_terminal() -> bool:
    """Return whether the output goes to a terminal."""
    return sys.stdout.isatty()


def print_json(items: Sequence[dict[str, Any]] | dict[str, Any]) -> None:
    """Print a JSON array or object. Durations are seconds."""
    typer.echo(json.dumps(items, indent=2))


def as_json(entry: Entry, deliveries: Mapping[Count, int] = _NOTHING) -> dict[str, Any]:
    """Convert a record to what JSON can hold, with what is counted of the deliveries of its message."""
    shown = {**asdict(entry), "id": entry.id.hex(), "state": state(entry), "unresolved": entry.unresolved}
    if entry.counts is not None:
        shown["counts"] = entry.counts
    return {**shown, "deliveries": dict(deliveries)} if deliveries else shown


def print_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """Print a line for each finding, or all in JSON; end the command with exit code 1 if something must be fixed."""
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"{finding.level:<5}{finding.what}")
    if any(finding.level == "fix" for finding in findings):
        raise typer.Exit(1)


def print_entry(entry: Entry, deliveries: Mapping[Count, int] = _NOTHING) -> None:
    """Print everything that is known of one record, with what is counted of the deliveries of its message."""
    expires = "never" if entry.expires_in is None else f"in {duration(entry.expires_in)}"
    lease = f"{duration(entry.lease_left)} remaining" if entry.lease_left > 0 else "over"
    if entry.state is not State.RUNNING:
        lease = "ended"
    lines: dict[str, object] = {
        "id": entry.id.hex(),
        "name": printable(entry.name) or NO_VALUE,
        "key": printable(entry.key),
        "scope": printable(entry.scope),
        "state": f"lapsed: {_LAPSED}" if entry.lapsed else state(entry),
        "attempt": entry.attempt,
        "age": duration(entry.age),
        "lease": lease,
        "on crash": "hold" if entry.hold else "rerun",
        "expires": expires,
        "result": NO_VALUE if entry.result_size is None else f"{entry.result_size} bytes",
        "format": entry.version,
    }
    if entry.counts is not None:
        # It has no owner and no result.
        lines = {name: lines[name] for name in ("id", "name", "key", "scope", "state", "age", "expires", "format")}
        deliveries = {entry.counts: entry.attempt}
    for count, number in deliveries.items():
        lines[count] = f"{number} ({_COUNTED[count]})"
    for name, value in lines.items():
        typer.echo(f"{name + ':':<10}{value}")


def print_entries(entries: Sequence[Entry]) -> None:
    """Print a line a record, or a table on a terminal."""
    digits = LOGGED if on_terminal() else None
    print_rows([{"id": entry.id.hex()[:digits], **_columns(entry)} for entry in entries])


def print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows with the same columns, the first two of which are ``id`` and ``state``: lines, or a table."""
    if not on_terminal():
        for row in rows:
            named = (f"{name}={value}" for name, value in row.items() if name not in ("id", "state"))
            typer.echo("\t".join((row["id"], row["state"], *named)))
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        # A shortened key could not be given to the next command.
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    Console().print(table)


def _columns(entry: Entry) -> dict[str, str]:
    return {
        "state": state(entry),
        "age": duration(entry.age),
        "attempt": str(entry.attempt),
        "name": printable(entry.name) or NO_VALUE,
        "key": printable(entry.key),
        "scope": printable(entry.scope),
    }
