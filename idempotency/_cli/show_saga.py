"""Sagas as an operator reads them. Arguments, results and values only where they were asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from idempotency._cli import show
from idempotency._cli.records import LOGGED
from idempotency._cli.words import NO_VALUE

if TYPE_CHECKING:
    from idempotency.saga import SagaDetail, SagaFact, SagaView


def print_sagas(sagas: Sequence[SagaView]) -> None:
    """Print a line a saga, or a table on a terminal."""
    digits = LOGGED if show.on_terminal() else None
    show.print_rows([{"id": saga.id[:digits], **_columns(saga)} for saga in sagas])


def saga_as_json(saga: SagaView) -> dict[str, Any]:
    """Convert a saga, in one line or in whole, to what JSON can hold."""
    return asdict(saga)


def print_saga(saga: SagaDetail, *, values: bool) -> None:
    """Print everything that is recorded of a saga. ``values``: its arguments, results and the values of signals too."""
    crashes = f", {saga.crashes} ended without a word" if saga.crashes else ""
    lines = {
        "id": saga.id,
        "name": show.printable(saga.name),
        "key": show.printable(saga.key),
        "state": saga.state,
        "reason": show.printable(saga.reason) or NO_VALUE,
        "step": show.printable(saga.step) or NO_VALUE,
        "error": saga.error or NO_VALUE,
        "next": _next(saga),
        "owner": saga.owner or NO_VALUE,
        "attempts": f"{saga.attempts}{crashes}",
        "age": show.duration(saga.age),
        "deadline": _deadline(saga),
        "input": _text(saga.input) if values else f"{saga.input_size} bytes",
        "result": _text(saga.result) if values else _size(saga.result_size),
    }
    for name, value in lines.items():
        typer.echo(f"{name + ':':<10}{value}")
    if saga.facts:
        typer.echo()
        show.print_rows([_fact_columns(fact, values) for fact in saga.facts])


def _columns(saga: SagaView) -> dict[str, str]:
    return {
        "state": saga.state,
        "age": show.duration(saga.age),
        "attempts": str(saga.attempts),
        "next": _next(saga),
        "owner": saga.owner or NO_VALUE,
        "step": show.printable(saga.step) or NO_VALUE,
        "error": saga.error or NO_VALUE,
        "name": show.printable(saga.name),
        "key": show.printable(saga.key),
        "reason": show.printable(saga.reason) or NO_VALUE,
    }


def _fact_columns(fact: SagaFact, values: bool) -> dict[str, str]:
    to_come = fact.kind == "undo" and fact.state == "waiting"
    columns = {
        "id": show.printable(f"{fact.kind}:{fact.name}" if fact.name else fact.kind),
        "state": fact.state,
        "attempts": str(fact.attempts),
        "began": "not" if to_come else f"{show.duration(fact.began)} ago",
        "changed": "not" if to_come else f"{show.duration(fact.changed)} ago",
        "error": fact.error or NO_VALUE,
        "result": _size(fact.size),
        "note": show.printable(fact.note) or NO_VALUE,
    }
    return columns | ({"value": _text(fact.value)} if values else {})


def _next(saga: SagaView) -> str:
    if saga.next_in is None:
        return NO_VALUE
    return f"{saga.next} {f'in {show.duration(saga.next_in)}' if saga.next_in > 0 else 'now'}"


def _deadline(saga: SagaView) -> str:
    if saga.deadline_in is None:
        return NO_VALUE
    return f"in {show.duration(saga.deadline_in)}" if saga.deadline_in > 0 else "over"


def _size(size: int | None) -> str:
    return NO_VALUE if size is None else f"{size} bytes"


def _text(value: object) -> str:
    return json.dumps(value)
