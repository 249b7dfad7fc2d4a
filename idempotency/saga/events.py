"""What happened to a saga: one event per outcome, delivered to a hook.

An event never contains the key of a saga, its arguments or a result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from idempotency._hooks import Hooks, in_one_line

SagaEventKind = Literal[
    "done",  # the saga has ended, and its result is recorded
    "undoing",  # the saga has failed: what it has done is undone from now on
    "undone",  # what a failed saga had done is undone
    "waiting",  # the saga waits for a time, a signal or a child
    "retry",  # after its pivot the saga failed: it goes on later, and is not undone
    "stuck",  # the saga does not go on by itself: an operator decides
    "step-failed",  # a step has failed for good, or its outcome is unknown; its failure is recorded
    "undo-failed",  # an undo has failed, and is tried again
    "took-over",  # this run goes on where another one ended without a word
    "lease-lost",  # another process has taken the saga over from this run, which is still under way
    "unavailable",  # the store failed: this run ends, and another one goes on later
]

WARNINGS: frozenset[SagaEventKind] = frozenset(
    {"undoing", "retry", "stuck", "undo-failed", "took-over", "lease-lost", "unavailable"}
)
"""The kinds that are logged as warnings: an operator should look. The others are debug lines."""


_logger = logging.getLogger("idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaEvent:
    """One outcome. ``record`` is the first 12 hex digits of the saga's id, as the commands take it.

    ``attempt`` counts the runs of the saga, or for ``step-failed`` and ``undo-failed`` the attempts of the ``step``,
    from 1. ``error`` is the class name of the failure, if any. ``reason``: what the saga waits for, or why it is stuck.
    ``seconds``: since this run of the saga began. It does not count when events are compared.
    """

    kind: SagaEventKind
    saga: str
    record: str
    attempt: int = 0
    step: str = ""
    error: str = ""
    reason: str = ""
    seconds: float = field(default=0.0, compare=False)


class SagaHook(Protocol):
    """Receive every event of a saga, in the event loop or thread that runs it: it must not block.

    It is not awaited: a coroutine function is refused. What it raises is logged.
    """

    def __call__(self, event: SagaEvent, /) -> None: ...


OnSagaEvent = SagaHook | Sequence[SagaHook]
"""The option ``on_event=`` of a saga: a hook or several, which are given each event besides the log."""


def log_saga_event(event: SagaEvent, /) -> None:
    """Log one line on the logger ``idempotency``: a warning where an operator should look, else debug."""
    level = logging.WARNING if event.kind in WARNINGS else logging.DEBUG
    if _logger.isEnabledFor(level):
        _logger.log(
            level,
            "%s %s record=%s attempt=%d%s%s%s",
            event.kind,
            in_one_line(event.saga),
            event.record,
            event.attempt,
            f" step={in_one_line(event.step)}" if event.step else "",
            f" error={event.error}" if event.error else "",
            f": {in_one_line(event.reason)}" if event.reason else "",
        )


class SagaHooks(Hooks[SagaEvent]):
    """The log and the hooks of a saga."""

    __slots__ = ()

    def __init__(self, on_event: OnSagaEvent = ()) -> None:
        super().__init__(on_event, log_saga_event)
