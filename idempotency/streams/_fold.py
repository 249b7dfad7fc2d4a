"""The state that a stream makes: its events applied one after the other, from a snapshot where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from inspect import Signature
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection

from idempotency._results.codec import return_annotation
from idempotency._results.versioned import Versioned
from idempotency.errors import ConfigurationError, UnreadableError
from idempotency.streams._reached import Reached

S = TypeVar("S")
Until = int | datetime | None
Decode = Callable[[str, str, int, str], Any]
"""Make an event of its stream, the name and version of its type, and its JSON."""

_PAGE = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


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
            if not isinstance(kind, type) or kind is Signature.empty:
                raise ConfigurationError("snapshot_every= needs the type of the state: annotate what apply returns")
            snapshot = Versioned(kind)
        return cls(apply, initial, snapshot, every)

    def load(
        self,
        reached: Reached,
        connection: Connection,
        stream: str,
        decode: Callable[[str, str, int, str], Any],
        until: Until,
    ) -> tuple[S, int]:
        """Return the state and the version of a stream."""
        last = until if isinstance(until, int) else None
        last_ms = (until - _EPOCH) // _MILLISECOND if isinstance(until, datetime) else None
        state, version = self.initial, 0
        # A snapshot has no time: of a time that is past, the events alone tell.
        if self.snapshot is not None and last_ms is None:
            state, version = self._begin(reached, connection, stream, last)
        stored, full = version, True
        while full:
            rows = reached.read(connection, stream, version, last, _PAGE)
            for row in rows:
                if last_ms is not None and row[9] > last_ms:
                    return state, version
                state, version = self.apply(state, decode(stream, *row[5:8])), row[3]
            full = len(rows) == _PAGE
        if until is None and self.snapshot is not None and self.every is not None and version - stored >= self.every:
            values = {"stream": stream, "type": self.snapshot.name, "type_version": self.snapshot.version}
            data = self.snapshot.dump(state).decode()
            reached.write_snapshot(connection, {**values, "version": version, "data": data})
        return state, version

    def _begin(self, reached: Reached, connection: Connection, stream: str, last: int | None) -> tuple[Any, int]:
        assert self.snapshot is not None
        found = reached.snapshot(connection, stream, self.snapshot.name, last)
        if found is None:
            return self.initial, 0
        version, type_version, data, whole = found
        if not whole:
            raise UnreadableError(
                f"the snapshot {self.snapshot.name} of {stream} is of version {version}, which the stream does not"
                f" have: delete its row in {reached.tables.snapshots.fullname}"
            )
        return self.snapshot.load(type_version, data), version


def check_until(until: Until) -> Until:
    """Return ``until`` if it is a version, a time with its zone, or None; else raise ConfigurationError."""
    if isinstance(until, datetime) and until.tzinfo is None:
        raise ConfigurationError("until must have its time zone, as in datetime.now(UTC)")
    if until is not None and not isinstance(until, datetime) and (type(until) is not int or until < 0):
        raise ConfigurationError(f"until must be a version of the stream or a time, not {until!r}")
    return until
