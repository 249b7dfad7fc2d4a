"""What happened to a keyed operation: one event per outcome, delivered to a hook.

Nothing else in the library logs, but for what a message handler raised in a ``consume()`` loop. An event never carries
a key or a body in clear.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

from idempotency._rules import Claim
from idempotency.errors import StoreError
from idempotency.policy import Outcome

EventKind = Literal[
    "stored",  # the operation ran and its result is recorded
    "stored-without-result",  # the operation ran; that it is done is recorded, its result was not kept
    "released",  # the operation ran, and by policy its key is free again
    "held",  # the operation ran, and by policy or by the handler's word its key is unknown until resolved
    "replayed",  # a duplicate was given the recorded result
    "completed",  # a duplicate was told that the operation is done and its result was not kept
    "in-progress",  # a duplicate was told that the first is still running
    "mismatch",  # the key was used for something else
    "unknown",  # a duplicate was told that the outcome is unknown
    "unreadable",  # the record cannot be read
    "refused",  # the request was refused before any store access: key missing, key or body malformed, body too large
    "superseded",  # the owner finished after its lease had passed to another; its result is not recorded
    "lease-lost",  # a running owner learned that its lease is gone
    "unavailable",  # the store failed before the operation, which did not run
    "unprotected",  # the store failed before the operation, which ran unprotected (fail_open)
    "dead-lettered",  # no redelivery helps this message: it was handled in vain too often, or cannot be handled
    "unsettled",  # the broker could not be told how a delivery ended; it delivers the message again
    "unrecorded",  # the store failed after the operation; its claim is kept and the record is tried again
]

_WARNINGS: frozenset[EventKind] = frozenset(
    {
        "stored-without-result",
        "held",
        "unknown",
        "unreadable",
        "superseded",
        "lease-lost",
        "unavailable",
        "unprotected",
        "unrecorded",
        "dead-lettered",
        "unsettled",
    }
)

_logger = logging.getLogger("idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One outcome. ``record`` is the first 12 hex digits of the record's id, or empty where no key was read.

    ``operation`` names what was asked, with the actual path (``"POST /orders/7"``), ``attempt`` counts from 1 (0: not
    run), ``error`` is the class name of the failure, if any, and ``detail`` what a failing store says of it.
    """

    kind: EventKind
    operation: str
    record: str = ""
    attempt: int = 0
    error: str = ""
    detail: str = ""


class EventHook(Protocol):
    """Receive every event. Called in the event loop or thread of the operation: it must not block or raise."""

    def __call__(self, event: Event, /) -> None: ...


def log_event(event: Event, /) -> None:
    """Log one line on the logger ``idempotency``: a warning where somebody should look, else debug."""
    level = logging.WARNING if event.kind in _WARNINGS else logging.DEBUG
    if _logger.isEnabledFor(level):
        _logger.log(
            level,
            "%s %s record=%s attempt=%d%s%s",
            event.kind,
            # A path may hold anything once its escapes are undone: a line break would begin a line of its own.
            event.operation if event.operation.isprintable() else ascii(event.operation),
            event.record or "-",
            event.attempt,
            f" error={event.error}" if event.error else "",
            f": {event.detail}" if event.detail else "",
        )


Failure = BaseException | str | None
"""What went wrong, if anything; a text is its name."""


def kind_of(outcome: Outcome, result: bytes | None) -> EventKind:
    """Name the event of an end that was recorded, with ``result`` or without one."""
    match outcome:
        case "store":
            return "stored" if result is not None else "stored-without-result"
        case "hold":
            return "held"
        case "release":
            return "released"


def emit_event(
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
