"""What happened to a projection: one event per outcome, delivered to a hook. It never contains what an event holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

from idempotency._hooks import in_one_line

ProjectionEventKind = Literal[
    "applied",  # a batch is applied, and the checkpoint has moved
    "failed",  # a batch or an event has failed, and is tried again
    "stopped",  # an event has failed too often: the projection stands still until an operator decides
    "switched",  # this version is the live one from now on
    "unavailable",  # the database failed; the projection tries again
]

_LEVELS = {"stopped": logging.ERROR, "failed": logging.WARNING, "unavailable": logging.WARNING}
_logger = logging.getLogger("idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionEvent:
    """One outcome. ``position``: of the last event that was applied, or of the one that failed; empty where none was.

    ``events``: how many were applied. ``lag``: seconds between the time of the last of them and its application, by
    the database's clock. ``attempt`` counts the failures of one event that is tried alone. ``error``: a class name.
    """

    kind: ProjectionEventKind
    projection: str
    version: int
    position: str = ""
    events: int = 0
    lag: float = 0.0
    attempt: int = 0
    error: str = ""


class ProjectionHook(Protocol):
    """Receive every event of a projection, in the event loop or thread that runs it: it must not block.

    It is not awaited: a coroutine function is refused. What it raises is logged.
    """

    def __call__(self, event: ProjectionEvent, /) -> None: ...


def log_projection_event(event: ProjectionEvent, /) -> None:
    """Log one line on the logger ``idempotency``: an error for a projection that has stopped, else less."""
    level = _LEVELS.get(event.kind, logging.DEBUG)
    if _logger.isEnabledFor(level):
        _logger.log(
            level,
            "%s projection=%s version=%d position=%s events=%d lag=%.3f%s%s",
            event.kind,
            in_one_line(event.projection),
            event.version,
            event.position or "-",
            event.events,
            event.lag,
            f" attempt={event.attempt}" if event.attempt else "",
            f" error={event.error}" if event.error else "",
        )
