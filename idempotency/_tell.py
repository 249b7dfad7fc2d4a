"""Deliver an event, whatever the hook does."""

from __future__ import annotations

import logging

from idempotency._core import Claim
from idempotency.errors import StoreError
from idempotency.events import Event, EventHook, EventKind

Failure = BaseException | str | None
"""What went wrong, if anything; a text is its name."""

_logger = logging.getLogger("idempotency")


def tell(
    hook: EventHook,
    kind: EventKind,
    operation: str,
    claim: Claim | None = None,
    attempt: int = 0,
    error: Failure = None,
) -> None:
    """Deliver one event."""
    event = Event(
        kind=kind,
        operation=operation,
        record=claim.id.hex()[:12] if claim is not None else "",
        attempt=attempt,
        error=error if isinstance(error, str) else type(error).__name__ if error is not None else "",
        # A store's words name a server and what to do; another error's may hold what the caller sent.
        detail=str(error) if isinstance(error, StoreError) else "",
    )
    try:
        hook(event)
    except Exception:
        # The effect has happened by now, or must not: a broken hook is no reason to answer otherwise.
        _logger.exception("the event hook failed")
