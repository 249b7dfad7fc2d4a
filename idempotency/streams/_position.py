"""Where an event is in the order of all events of a table, and what is read of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from idempotency.errors import ConfigurationError, IdempotencyError

# More digits are in no number that a database can compare.
_TEXT = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")


class Position(NamedTuple):
    """A place in the order of all events; ``Position()`` is before the first one. Compare positions, and no parts.

    ``place`` and ``seq`` order events as they were committed, not as they were written. As text it is ``"12.345"``.
    """

    place: int = 0
    seq: int = 0

    def __str__(self) -> str:
        return f"{self.place}.{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read a position as text; ConfigurationError for any other text."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ConfigurationError(f"a position is two numbers with a dot, such as 12.345, not {text!r}")
        return cls(int(found[1]), int(found[2]))


class RecordedEvent(NamedTuple):
    """One event as it is stored.

    ``version`` counts the events of its ``stream`` from 1. ``data`` is the event as your code knows it, in the newest
    version of its type. ``position`` orders it among all events; None where the database has not given it one yet.
    ``at``: seconds since the epoch, by the database's clock. ``headers`` are what was appended with it.
    """

    stream: str
    version: int
    id: str
    type: str
    data: Any
    position: Position | None
    at: float
    headers: Mapping[str, str]


class Appended(NamedTuple):
    """The last event of an append: its stream, and its version in it. ``new`` False: an earlier run appended it."""

    stream: str
    version: int
    new: bool = True


class ConflictError(IdempotencyError):
    """A stream is not at the version that an append expected: load it again, decide again, append again.

    ``expected`` is that version. Nothing was appended; roll the transaction back before you try again.
    """

    expected: int = 0
    code = "stream-conflict"
    status = 409
    title = "The stream has changed since it was read"
    retryable = True
    safe_new_key = True
