"""What happened to a keyed operation: one event per outcome, delivered to a hook.

An event never contains the text of a key or a body. Each is logged, and delivered to the hooks of ``on_event=``.

Besides events, these are logged on the same logger, ``idempotency``: the exception of a message handler and the reason
of a dead letter, where no framework logs them; what stops a subscriber of FastStream; warnings about how a consumer is
configured, when it is made or started; and the exceptions of an event hook or of a background thread.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import field
from time import monotonic
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from idempotency._hooks import Hooks, in_one_line
from idempotency._rules import Claim
from idempotency.errors import StoreError
from idempotency.policy import Outcome

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:
    from idempotency._rules import value

EventKind = Literal[
    "stored",  # the operation ran and its result is recorded
    "stored-without-result",  # the operation ran; it is recorded as done, without its result
    "released",  # the operation ran, and by policy its key is free again
    "held",  # the operation ran, and by policy or as its handler asked, its outcome is unknown until resolved
    "replayed",  # a duplicate was given the recorded result
    "completed",  # a duplicate was answered that the operation is done and its result was not recorded
    "in-progress",  # a duplicate was answered that the first is still running
    "mismatch",  # the key was used for something else
    "unknown",  # a duplicate was answered that the outcome is unknown
    "unreadable",  # the record cannot be read
    "refused",  # refused before any store access: key missing, key or body malformed, body too large, caller unknown
    "superseded",  # the owner finished after another claim had taken over; its result is not recorded
    "lease-lost",  # a running owner found that its lease is gone
    "unavailable",  # the store failed before the operation, which did not run, or at the commit of its transaction
    "unprotected",  # the store failed before the operation, which ran unprotected (fail_open)
    "session-unused",  # the operation ran and is recorded, and its handler did not use the session of session=
    "dead-lettered",  # no redelivery helps this message: it failed too often, or cannot be handled
    "unsettled",  # the broker could not be answered for a delivery; it delivers the message again
    "unrecorded",  # the store failed after the operation; its key stays claimed and the record is tried again
]

WARNINGS: frozenset[EventKind] = frozenset(
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
        "session-unused",
        "dead-lettered",
        "unsettled",
    }
)
"""The kinds that are logged as warnings: an operator should look. The others are debug lines."""


Surface = Literal[
    "http",  # a request
    "message",  # a delivery to a consumer
    "function",  # a call of a function that @idempotent decorates
    "tool",  # a call of a tool
]
"""Where an operation comes from."""

OTHER = "other"
"""What stands for the path of a request in its route where no template is known."""

_logger = logging.getLogger("idempotency")

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@value(frozen=True, slots=True, kw_only=True)
class Event:
    """One outcome. ``record`` is the first 12 hex digits of the record's id, or empty where no key was read.

    ``operation`` names what was asked, with the actual path (``"POST /orders/7"``); in ``session-unused``, the route
    (``"POST /orders/{id}"``). ``attempt`` counts from 1 (0: not run). ``error`` is the class name of the failure, if
    any, and ``detail`` the message of a failing store.

    ``surface`` says where the operation comes from. ``route`` names all operations of its kind, and never contains what
    a caller has sent: ``"POST /orders/{id}"`` for a request, ``"POST other"`` where its template is not known; else the
    name of the consumer, function or tool. It is empty if no hook but the log is given the event. ``seconds`` is how
    long the operation took, or the answer to a duplicate, up to this event; None if that is not known. It does not
    count when events are compared. ``first_trace`` is the trace context, as ``traceparent`` of W3C Trace Context, in
    which a replayed result was recorded; empty if that is not known.
    """

    kind: EventKind
    operation: str
    record: str = ""
    attempt: int = 0
    error: str = ""
    detail: str = ""
    surface: Surface = "http"
    route: str = ""
    seconds: float | None = field(default=None, compare=False)
    first_trace: str = ""


class EventHook(Protocol):
    """Receive every event. Called in the event loop or thread of the operation: it must not block or raise.

    It is not awaited: a coroutine function is refused.
    """

    def __call__(self, event: Event, /) -> None: ...


OnEvent = EventHook | Sequence[EventHook]
"""The option ``on_event=``: a hook or several, which are given each event besides the log. Default ``()``: the log."""


@runtime_checkable
class Tracing(Protocol):
    """A hook that knows the trace context of the code that runs."""

    def traceparent(self) -> str:
        """Return the context as ``traceparent`` of W3C Trace Context, empty if there is none."""
        ...


def log_event(event: Event, /) -> None:
    """Log one line on the logger ``idempotency``: a warning where an operator should look, else debug."""
    level = _level_of(event.kind)
    if _logger.isEnabledFor(level):
        _logger.log(
            level,
            "%s %s record=%s attempt=%d%s%s",
            event.kind,
            in_one_line(event.operation),
            event.record or "-",
            event.attempt,
            f" error={event.error}" if event.error else "",
            f": {in_one_line(event.detail)}" if event.detail else "",
        )


def _level_of(kind: EventKind) -> int:
    return logging.WARNING if kind in WARNINGS else logging.DEBUG


Failure = BaseException | str | None
"""What went wrong, if anything; a text is its name."""


def kind_of(outcome: Outcome, result: bytes | None) -> EventKind:
    """Return the event of an outcome that was recorded, with ``result`` or without one."""
    match outcome:
        case "store":
            return "stored" if result is not None else "stored-without-result"
        case "hold":
            return "held"
        case "release":
            return "released"


class EventHooks(Hooks[Event]):
    """The log and the hooks of ``on_event=``, for one adapter.

    ``silent``: nothing is logged either. Raises :class:`~idempotency.errors.ConfigurationError` as :class:`Hooks` does.
    """

    __slots__ = ("_tracing",)

    def __init__(self, on_event: OnEvent = (), *, silent: bool = False) -> None:
        super().__init__(on_event, None if silent else log_event)
        self._tracing: Tracing | None = None
        for each in self.hooks:
            if isinstance(each, Tracing) and callable(each.traceparent):
                self._tracing = each

    def traceparent(self) -> str:
        """Return the trace context of the code that runs; empty if there is none, or no hook knows it.

        What the hook raises is logged, and what is no ``traceparent`` is not returned: results are recorded without.
        """
        if self._tracing is None:
            return ""
        try:
            found: object = self._tracing.traceparent()
        except Exception:
            _logger.exception("the event hook failed")
            return ""
        return found if isinstance(found, str) and _TRACEPARENT.fullmatch(found) else ""

    def wants(self, kind: EventKind) -> bool:
        """Return whether an event of this kind is given to a hook or logged. Most are not, if there is no hook."""
        return bool(self.hooks) or (self.log is not None and _logger.isEnabledFor(_level_of(kind)))


def hooks_of(on_event: OnEvent | EventHooks) -> EventHooks:
    """Return the hooks of the option ``on_event=``."""
    return on_event if isinstance(on_event, EventHooks) else EventHooks(on_event)


def emit_event(
    hooks: EventHooks,
    kind: EventKind,
    operation: str,
    claim: Claim | None = None,
    attempt: int = 0,
    error: Failure = None,
    surface: Surface = "http",
    route: str = "",
    first_trace: str = "",
) -> None:
    """Deliver one event; see :class:`Event`."""
    if not hooks.wants(kind):
        return
    event = Event(
        kind=kind,
        operation=operation,
        record=claim.id[:6].hex() if claim is not None else "",
        attempt=attempt,
        error=error if isinstance(error, str) else type(error).__name__ if error is not None else "",
        # The message of a store error names a server and a remedy. Other messages may hold what the caller sent.
        detail=str(error) if isinstance(error, StoreError) else "",
        surface=surface,
        route=route,
        seconds=monotonic() - claim.began if claim is not None and claim.began else None,
        first_trace=first_trace,
    )
    hooks.deliver(event)
