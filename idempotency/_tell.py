"""Name an event and deliver it, whatever the hook does."""

from __future__ import annotations

import logging

from idempotency._rules import Claim
from idempotency.errors import StoreError
from idempotency.events import Event, EventHook, EventKind
from idempotency.policy import Outcome

Failure = BaseException | str | None
"""What went wrong, if anything; a text is its name."""

_logger = logging.getLogger("idempotency")


def kind_of(outcome: Outcome, result: bytes | None) -> EventKind:
    """Name the event of an end that was recorded, with ``result`` or without one."""
    match outcome:
        case "store":
            return "stored" if result is not None else "stored-without-result"
        case "hold":
            return "held"
        case "release":
            return "released"


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
