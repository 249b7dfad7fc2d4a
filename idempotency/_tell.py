"""Deliver an event, whatever the hook does."""

from __future__ import annotations

import logging

from idempotency._core import Claim
from idempotency.events import Event, EventHook, EventKind

_logger = logging.getLogger("idempotency")


def tell(
    hook: EventHook, kind: EventKind, operation: str, claim: Claim | None = None, attempt: int = 0, error: str = ""
) -> None:
    """Deliver one event."""
    record = claim.id.hex()[:12] if claim is not None else ""
    try:
        hook(Event(kind=kind, operation=operation, record=record, attempt=attempt, error=error))
    except Exception:
        # The effect has happened by now, or must not: a broken hook is no reason to answer otherwise.
        _logger.exception("the event hook failed")
