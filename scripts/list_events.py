"""Print the tables of docs/events.md, made from the types of the events: list_events.py."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any, get_args

from idempotency import events
from idempotency.outbox import events as outbox_events
from idempotency.saga import events as saga_events

_KIND = re.compile(r'^    "(?P<kind>[a-z-]+)",  # (?P<meaning>.+)$', re.MULTILINE)

TYPES: tuple[tuple[str, ModuleType, Any], ...] = (
    ("Event", events, events.EventKind),
    ("RelayEvent", outbox_events, outbox_events.RelayEventKind),
    ("SagaEvent", saga_events, saga_events.SagaEventKind),
)
"""Each type of events, its module, and its kinds."""


def table(module: ModuleType, kinds: Any) -> str:
    """Return the table of the kinds: each with the level of its line in the log, and what it means."""
    meanings = {match["kind"]: match["meaning"] for match in _KIND.finditer(inspect.getsource(module))}
    levels = {kind: "warning" if kind in module.WARNINGS else "debug" for kind in get_args(kinds)}
    rows = [f"| `{kind}` | {levels[kind]} | {meanings[kind]} |" for kind in get_args(kinds)]
    return "\n".join(("| kind | level | meaning |", "|---|---|---|", *rows))


if __name__ == "__main__":
    for name, module, kinds in TYPES:
        print(f"## `{name}`\n\n{table(module, kinds)}\n")
