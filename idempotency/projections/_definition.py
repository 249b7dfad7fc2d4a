"""What a projection is: its function and options, what it reads, and the events that it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from idempotency._hooks import Hooks
from idempotency.errors import ConfigurationError
from idempotency.projections._rows import AnySync, Name, Rows
from idempotency.projections.events import ProjectionEvent
from idempotency.streams._position import Appended, Position, RecordedEvent


class Source(Protocol):
    """What a projection reads: :class:`~idempotency.streams.Streams`."""

    @property
    def table(self) -> str:
        """Return the name of the table of events."""
        ...

    def page_of_all(self, session: AnySync, after: Position, most: int) -> Sequence[RecordedEvent]:
        """Read events after a position."""
        ...

    def peek(self, session: AnySync, after: Position) -> tuple[Position, float] | None:
        """Return position and time of the next event."""
        ...

    def position_sync(self, session: AnySync, appended: Appended) -> Position | None:
        """Return the position of an event."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The options of a projection. ``batch`` None: the function is given one event at a time, with ``keywords``."""

    function: Callable[..., Any]
    name: Name
    source: Source | None
    sessions: Any
    batch: int | None
    attempts: int
    rows: Rows
    hooks: Hooks[ProjectionEvent]
    keywords: Mapping[str, int]

    def feed(self) -> Source:
        """Return the source; ConfigurationError where there is none, since another one feeds the projection."""
        if self.source is None:
            raise ConfigurationError(f"the projection {self.name.consumer!r} has no source=: it is fed by apply()")
        return self.source
