"""What a relay did: one event for each kind of outcome in a batch, delivered to a hook."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from idempotency._hooks import Hooks, in_one_line

RelayEventKind = Literal[
    "published",  # the broker has confirmed messages
    "duplicate",  # the broker has confirmed that it had messages before
    "retry",  # messages are not confirmed, and are published again later
    "refused",  # the broker refused messages, which are in the dead table now
    "dead",  # messages failed too often, and are in the dead table now
    "unavailable",  # the database or the broker fails as a whole: the relay waits, and goes on by itself
    "took-over",  # the relay has taken buckets of another one that ended without a word, or was paused
    "slot-lost",  # the slot of the log was gone or lost; the relay has made it anew, and scans the table
    "not-in-log",  # rows of the table that the log does not have; the relay publishes them from the table
]

WARNINGS: frozenset[RelayEventKind] = frozenset(
    {"refused", "dead", "unavailable", "took-over", "slot-lost", "not-in-log"}
)
"""The kinds that are logged as warnings: an operator should look. The others are debug lines."""


_logger = logging.getLogger("idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayEvent:
    """One kind of outcome. ``relay`` names the relay, by default after its table.

    ``count``: how many messages, or buckets. ``oldest``: the age of the oldest of the messages, in seconds. ``reason``:
    what went wrong first, without keys and payloads. ``seconds``: how long their batch took to be published;
    None for other events. It does not count when events are compared. ``traces``: the trace contexts in which the
    messages were emitted, as ``traceparent`` of W3C Trace Context, of up to 100 of them; empty if no hook but the log
    is given the event.
    """

    kind: RelayEventKind
    relay: str
    count: int = 0
    oldest: float = 0.0
    reason: str = ""
    seconds: float | None = field(default=None, compare=False)
    traces: tuple[str, ...] = ()


class RelayHook(Protocol):
    """Receive every event of a relay, in its event loop: it must not block. What it raises is logged."""

    def __call__(self, event: RelayEvent, /) -> None: ...


OnRelayEvent = RelayHook | Sequence[RelayHook]
"""The option ``on_event=`` of a relay: a hook or several, which are given each event besides the log."""


def log_relay_event(event: RelayEvent, /) -> None:
    """Log one line on the logger ``idempotency``: a warning where an operator should look, else debug."""
    level = logging.WARNING if event.kind in WARNINGS else logging.DEBUG
    if _logger.isEnabledFor(level):
        reason = f": {in_one_line(event.reason)}" if event.reason else ""
        _logger.log(level, "%s %s count=%d oldest=%.3f%s", event.kind, event.relay, event.count, event.oldest, reason)


class RelayHooks(Hooks[RelayEvent]):
    """The log and the hooks of a relay."""

    __slots__ = ()

    def __init__(self, on_event: OnRelayEvent = ()) -> None:
        super().__init__(on_event, log_relay_event)
