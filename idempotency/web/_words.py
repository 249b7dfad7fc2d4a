"""How the page writes times, keys and names: keys are hidden, and times are UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from idempotency._cli.records import LOGGED
from idempotency._cli.words import duration
from idempotency.stores._counts import count_of
from idempotency.stores.base import Entry

_KINDS: dict[str, Any] = {"http": "request", "function": "function", "consumer": "message", "tool": "tool"}
_DIGEST = re.compile(r"(?:hmac-)?sha256:")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_SAGA_AND_KEY = re.compile(r"\b(saga|held by) ([^/]*)/.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of one answer. All times in it are so many seconds from this."""

    now: datetime

    @classmethod
    def read(cls) -> Clock:
        """Read the clock of this process."""
        return cls(datetime.now(UTC))

    @property
    def seconds(self) -> float:
        """Return the time as seconds since 1970."""
        return self.now.timestamp()

    def at(self, seconds: float) -> str:
        """Return the time in so many seconds, ``2026-11-29 14:03:12``."""
        # Up to what a datetime can show.
        moment = self.now + timedelta(seconds=min(max(seconds, -6e10), 2.5e11))
        return f"{moment:%Y-%m-%d %H:%M:%S}"

    def due(self, seconds: float) -> str:
        """Return when something comes: the time, or ``now``."""
        return f"at {self.at(seconds)}" if seconds > 0 else "now"


def hidden(key: str) -> str:
    """Return what is shown in the place of a key."""
    return f"hidden, {len(key)} character{'' if len(key) == 1 else 's'}"


def without_keys(note: str) -> str:
    """Return a note on a saga without the key of another one."""
    return _SAGA_AND_KEY.sub(r"\1 \2", note)


def short(id: str) -> str:
    """Return 12 digits of an id: the first, as in logs; of a UUID, which begins with its time, the last."""
    if len(id) == 64:
        return id[:LOGGED]
    return id[-LOGGED:] if _UUID.fullmatch(id) else id


def kind_of(entry: Entry) -> tuple[Any, str]:
    """Return what a record is of, and the name of its operation.

    Where that is not recorded, the scope of a function or consumer has it. That of a request names a caller.
    """
    surface, version, name = count_of(entry.scope)[1].partition(":1:")
    if not version or surface not in _KINDS:
        return "record", entry.name
    return _KINDS[surface], entry.name or ("" if surface == "http" or _DIGEST.match(name) else name)


def size(number: int) -> str:
    """Write a number of bytes."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"


def ago(seconds: float) -> str:
    """Write how long ago something was."""
    return f"{duration(seconds)} ago"
