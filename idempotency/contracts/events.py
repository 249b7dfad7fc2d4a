"""What a backfill has done, and how two ways to answer compare: events, which never contain a value."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

from idempotency._hooks import discard_coroutine

_logger = logging.getLogger("idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One comparison, ``name`` as it was given.

    ``kind``: ``"same"``; ``"mismatch"``; ``"ignored"``, a mismatch that ``ignore`` expects; ``"failed"``, where the
    candidate, the comparison or ``ignore`` has raised ``error``; ``"refused"``, where the candidate wanted to emit a
    message. ``control_error`` and ``error`` are names of classes; ``control_s`` and ``candidate_s`` are seconds.
    """

    kind: Literal["same", "mismatch", "ignored", "failed", "refused"]
    name: str
    control_s: float
    candidate_s: float
    control_error: str = ""
    error: str = ""


class ComparisonHook(Protocol):
    """Receive every comparison, in the event loop or thread that made it: it must not block. It is not awaited."""

    def __call__(self, event: Comparison, /) -> None: ...


def log_comparison(event: Comparison, /) -> None:
    """Log one line on the logger ``idempotency``: debug where both are the same, else a warning."""
    _logger.log(
        logging.DEBUG if event.kind in ("same", "ignored") else logging.WARNING,
        "comparison %s name=%s control_s=%.4f candidate_s=%.4f%s%s",
        event.kind,
        _printable(event.name),
        event.control_s,
        event.candidate_s,
        f" control_error={event.control_error}" if event.control_error else "",
        f" error={event.error}" if event.error else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a backfill has come.

    ``kind``: ``"moved"``, a batch is committed; ``"waiting"``, a batch met locks, or a conflict, and is tried again
    after a pause, smaller; ``"done"``, no row is to be filled. ``position``: the last key that is filled. ``size``: how
    many rows the next batch has at most. ``batch_s``: seconds that the batch took. ``error``: the name of a class.
    """

    kind: Literal["moved", "waiting", "done"]
    name: str
    position: int
    size: int
    batch_s: float = 0.0
    error: str = ""


class ProgressHook(Protocol):
    """Receive every progress, in the event loop or thread that made it: it must not block. It is not awaited."""

    def __call__(self, event: Progress, /) -> None: ...


def log_progress(event: Progress, /) -> None:
    """Log one line on the logger ``idempotency``: a warning where a batch waits, else information."""
    _logger.log(
        logging.WARNING if event.kind == "waiting" else logging.INFO,
        "backfill %s name=%s position=%d size=%d batch_s=%.3f%s",
        event.kind,
        _printable(event.name),
        event.position,
        event.size,
        event.batch_s,
        f" error={event.error}" if event.error else "",
    )


def deliver(hook: ComparisonHook | ProgressHook, event: Comparison | Progress) -> None:
    """Deliver one event; a hook that fails changes nothing."""
    call: object = hook
    try:
        discard_coroutine("on_event", hook, call(event))  # type: ignore[operator]
    except Exception:
        _logger.exception("the event hook failed")


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
