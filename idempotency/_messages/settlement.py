"""How a delivered message ended: one of five outcomes, each of which means one settlement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from idempotency.errors import IdempotencyError


@dataclass(frozen=True, slots=True)
class Done:
    """The message was handled, and what it did is committed: ack."""

    result: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """The message had been handled before: ack. ``result`` is the recorded one, None where it was not ``kept``."""

    result: Any
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Retry:
    """The message cannot be handled now: redeliver in about ``after`` seconds, and never ack.

    ``reason``: another is handling it just now, or the store does not answer.
    """

    after: float
    reason: Literal["in-progress", "unavailable"] = "in-progress"


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed and what it did in the session is rolled back: the broker's own retry."""

    error: Exception


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The message is not to be delivered again: ``reason`` is stable, such as ``"exhausted"`` or ``"key-reused"``."""

    reason: str
    error: Exception


Delivered = Done | Replayed | Retry | Failed | DeadLetter
"""How a delivery is to be settled; each means one settlement."""


Final = Literal["dead-letter", "stop"]
"""What becomes of a message that no redelivery helps: a dead letter, or an error that stops the consumer."""


class ExhaustedError(IdempotencyError):
    """The message was handled ``max_attempts`` times, in vain, and is not handled again."""

    code = "exhausted"
    title = "The message was handled too often"
