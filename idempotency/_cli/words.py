"""States and durations in the words of an operator."""

from __future__ import annotations

from typing import Literal

from idempotency._rules import State
from idempotency.stores.base import Entry

NO_VALUE = "-"
"""What is shown where there is no value. A step, an error or a payload may have the text ``none``."""


def state(entry: Entry) -> Literal["running", "lapsed", "done", "unknown", "count"]:
    """Return the name of the state.

    ``unknown`` is also that of a held record whose lease is over, as its outcome is; ``lapsed`` that of another one,
    which nobody runs; ``count`` that of a record which is no operation, but counts the deliveries of a message.
    """
    if entry.counts is not None:
        return "count"
    if entry.unresolved:
        return "unknown"
    if entry.lapsed:
        return "lapsed"
    return "done" if entry.state is State.DONE else "running"


def printable(text: str) -> str:
    """Escape what would begin a new line or control the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def duration(seconds: float) -> str:
    """Write a duration in its two largest units."""
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = [f"{value}{unit}" for value, unit in ((days, "d"), (hour, "h"), (minute, "m"), (second, "s")) if value]
    return " ".join(parts[:2]) or "0s"
