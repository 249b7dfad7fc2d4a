"""States and durations in the words of an operator."""

from __future__ import annotations

from typing import Literal

from idempotency.stores._entry import Entry, ListedState, listed_state

NO_VALUE = "-"
"""What is shown where there is no value. A step, an error or a payload may have the text ``none``."""


def state(entry: Entry) -> ListedState | Literal["count"]:
    """Return the name of the state; ``count`` is that of a record which is no operation, but counts deliveries."""
    return "count" if entry.counts is not None else listed_state(entry)


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
