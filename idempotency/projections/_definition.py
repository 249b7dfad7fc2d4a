"""What a projection is: its function and options, what it reads, and where its events are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idempotency._hooks import Hooks
from idempotency.errors import ConfigurationError
from idempotency.projections._rows import Name, Rows
from idempotency.projections.events import ProjectionEvent
from idempotency.streams import Streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The options of a projection. ``batch`` None: the function is given one event at a time."""

    function: Callable[..., Any]
    name: Name
    source: Streams | None
    sessions: Any
    batch: int | None
    attempts: int
    rows: Rows
    hooks: Hooks[ProjectionEvent]

    def feed(self) -> Streams:
        """Return the source; ConfigurationError where there is none, since another one feeds the projection."""
        if self.source is None:
            raise ConfigurationError(f"the projection {self.name.consumer!r} has no source=: it is fed by apply()")
        return self.source
