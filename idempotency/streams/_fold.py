"""The state that a stream makes: its events applied one after the other, from a snapshot where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection

from idempotency._results.codec import return_annotation
from idempotency._results.versioned import Versioned
from idempotency.errors import ConfigurationError
from idempotency.streams._reached import Reached

S = TypeVar("S")
Until = int | datetime | None
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Fold(Generic[S]):
    """How a state is made. ``every``: after so many events a snapshot is written; None: none is written or read."""

    apply: Callable[[Any, Any], S]
    initial: Any
    snapshot: Versioned[S] | None
    every: int | None

    @classmethod
    def of(
        cls, apply: Callable[[Any, Any], S], initial: Any, every: int | None, snapshot: Versioned[S] | None
    ) -> Fold[S]:
        """Check the options of a load; ConfigurationError for what cannot work."""
        if every is not None and (type(every) is not int or every < 1):
            raise ConfigurationError(f"snapshot_every must be a number of events, at least 1, not {every!r}")
        if every is None and snapshot is not None:
            raise ConfigurationError("snapshot= says what snapshots are; snapshot_every= says when they are written")
        if every is not None and snapshot is None:
            kind = return_annotation(apply)
            if not isinstance(kind, type):
                raise ConfigurationError("snapshot_every= needs the type of the state: annotate what apply returns")
            snapshot = Versioned(kind)
        return cls(apply, initial, snapshot, every)

    def load(
        self, reached: Reached, connection: Connection, stream: str, decode: Callable[[Any], Any], until: Until
    ) -> tuple[S, int]:
        """Return the state and the version of a stream."""
        last = until if isinstance(until, int) else None
        until_ms = int(until.timestamp() * 1000) if isinstance(until, datetime) else None
        state, version = self.initial, 0
        # A snapshot has no time: of a time that is past, the events alone tell.
        if self.snapshot is not None and until_ms is None:
            found = reached.snapshot(connection, stream, self.snapshot.name, last)
            if found is not None:
                version, state = found[0], self.snapshot.load(found[1], found[2])
        stored = version
        while True:
            rows = reached.read(connection, stream, version, last, until_ms, _PAGE)
            for row in rows:
                state, version = self.apply(state, decode(row)), row[3]
            if len(rows) < _PAGE:
                break
        if self.snapshot is not None and self.every is not None and version - stored >= self.every:
            values = {"stream": stream, "type": self.snapshot.name, "type_version": self.snapshot.version}
            data = self.snapshot.dump(state).decode()
            reached.write_snapshot(connection, {**values, "version": version, "data": data})
        return state, version


def check_until(until: Until) -> Until:
    """Return ``until`` if it is a version, a time with its zone, or None; else raise ConfigurationError."""
    if isinstance(until, datetime) and until.tzinfo is None:
        raise ConfigurationError("until must have its time zone, as in datetime.now(UTC)")
    if until is not None and not isinstance(until, datetime) and (type(until) is not int or until < 0):
        raise ConfigurationError(f"until must be a version of the stream or a time, not {until!r}")
    return until
