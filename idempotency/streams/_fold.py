"""The state that a stream makes: its events applied one after the other, from a snapshot where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from inspect import Signature
from typing import Any, Generic, TypeVar

from idempotency._results.codec import return_annotation
from idempotency._results.versioned import Versioned
from idempotency.errors import ConfigurationError
from idempotency.streams._position import RecordedEvent
from idempotency.streams._reached import MOST_VERSION, Reached

S = TypeVar("S")
Until = int | datetime | None
Events = Callable[[int, int], Iterable[RecordedEvent]]
"""Read the events of a stream after a version, up to another one."""


class Fold(Generic[S]):
    """How a state is made, by the options of a load; ConfigurationError for what cannot work."""

    def __init__(
        self,
        apply: Callable[[Any, Any], S],
        initial: Any = None,
        snapshot_every: int | None = None,
        snapshot: Versioned[S] | None = None,
        until: Until = None,
    ) -> None:
        if isinstance(until, datetime) and until.tzinfo is None:
            raise ConfigurationError("until must have its time zone, as in datetime.now(UTC)")
        if until is not None and not isinstance(until, datetime) and (type(until) is not int or until < 0):
            raise ConfigurationError(f"until must be a version of the stream or a time, not {until!r}")
        if snapshot_every is not None and (type(snapshot_every) is not int or snapshot_every < 1):
            raise ConfigurationError(f"snapshot_every must be a number of events, at least 1, not {snapshot_every!r}")
        if snapshot_every is None and snapshot is not None:
            raise ConfigurationError("snapshot= says what snapshots are; snapshot_every= says when they are written")
        if snapshot_every is not None and snapshot is None:
            kind = return_annotation(apply)
            if not isinstance(kind, type) or kind is Signature.empty:
                raise ConfigurationError("snapshot_every= needs the type of the state: annotate what apply returns")
            snapshot = Versioned(kind)
        self._apply, self._initial, self._snapshot = apply, initial, snapshot
        self._every, self._until = snapshot_every, until

    def load(self, reached: Reached, stream: str, events: Events) -> tuple[S, int]:
        """Return the state and the version of a stream."""
        until, snapshot = self._until, self._snapshot
        last = until if isinstance(until, int) else MOST_VERSION
        ended = until.timestamp() if isinstance(until, datetime) else None
        state, version = self._initial, 0
        # A snapshot has no time: of a time that is past, the events alone tell.
        if snapshot is not None and ended is None:
            found = reached.snapshot(stream, snapshot.name, last)
            if found is not None:
                state, version = snapshot.load(*found[1:]), found[0]
        stored = version
        for event in events(version, last):
            if ended is not None and event.at > ended:
                break
            state, version = self._apply(state, event.data), event.version
        if until is None and snapshot is not None and self._every is not None and version - stored >= self._every:
            values = {"stream": stream, "type": snapshot.name, "type_version": snapshot.version}
            reached.write_snapshot({**values, "version": version, "data": snapshot.dump(state).decode()})
        return state, version
