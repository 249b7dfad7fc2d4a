"""Messages of an outbox and its relays as an operator reads them. A payload only where it was asked for."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from idempotency._cli import show
from idempotency._cli.words import NO_VALUE

if TYPE_CHECKING:
    from idempotency.outbox._states import OutboxEntry, OutboxStats


def print_messages(messages: Sequence[OutboxEntry], payload: bool) -> None:
    """Print a line a message, or a table on a terminal."""
    show.print_rows([_columns(message, payload) for message in messages])


def message_as_json(message: OutboxEntry, payload: bool) -> dict[str, Any]:
    """Convert a message to what JSON can hold."""
    shown = asdict(message)
    del shown["payload"]
    return {**shown, **_payload(message)} if payload else shown


def stats_as_json(stats: OutboxStats) -> dict[str, Any]:
    """Convert the stats of an outbox to what JSON can hold."""
    return asdict(stats)


def print_stats(stats: OutboxStats) -> None:
    """Print how many messages are in each state, and each relay with what it owns."""
    for name in ("due", "scheduled", "blocked", "dead"):
        typer.echo(f"{name + ':':<11}{asdict(stats)[name]}")
    typer.echo(f"{'oldest:':<11}{show.duration(stats.oldest_age)}")
    for relay in stats.relays:
        owned = [f"buckets {_ranges(relay.buckets)}"] if relay.buckets else []
        owned += [f"slot {show.printable(slot)}" for slot in relay.slots]
        typer.echo(f"{'relay:':<11}{show.printable(relay.owner)} {', '.join(owned) or 'no buckets'}")
    if not stats.relays:
        typer.echo(f"{'relay:':<11}{NO_VALUE}")


def _columns(message: OutboxEntry, payload: bool) -> dict[str, str]:
    due = "now" if message.due_in is None else f"in {show.duration(message.due_in)}"
    columns = {
        "id": message.id,
        "state": message.state,
        "age": show.duration(message.age),
        "attempts": str(message.attempts),
        "due": "never" if message.state == "dead" else due,
        "type": show.printable(message.type),
        "key": show.printable(message.key),
    }
    if message.reason is not None:
        columns["reason"] = show.printable(message.reason)
    if payload:
        columns |= {name: show.printable(value or NO_VALUE) for name, value in _payload(message).items()}
    return columns


def _payload(message: OutboxEntry) -> dict[str, str | None]:
    if message.payload is None:
        return {"payload": None}
    try:
        return {"payload": message.payload.decode()}
    except UnicodeDecodeError:
        return {"payload": f"base64:{b64encode(message.payload).decode()}"}


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges, ``0-31, 40``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
