"""The five settlements of a delivered message: each says how the broker is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from idempotency.errors import IdempotencyError


@dataclass(frozen=True, slots=True)
class Done:
    """The message was handled and its effect is committed: ack."""

    result: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """The message had been handled before: ack.

    ``result`` is the recorded result. ``kept``: whether a result was recorded; ``result`` is None where it was not.
    """

    result: Any
    kept: bool = True


@dataclass(frozen=True, slots=True)
class Retry:
    """The message cannot be handled now: redeliver it in about ``after`` seconds, and never ack it.

    ``reason``: another delivery of it is being handled, or the store does not answer.
    """

    after: float
    reason: Literal["in-progress", "unavailable"] = "in-progress"


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed, and its effect in the session is rolled back: the broker's own retry."""

    error: Exception


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The message must not be delivered again.

    ``reason`` is a stable word, such as ``"exhausted"`` or ``"key-reused"``.
    """

    reason: str
    error: Exception


Delivered = Done | Replayed | Retry | Failed | DeadLetter
"""How a delivery is to be settled; each means one answer to the broker."""


Final = Literal["dead-letter", "stop"]
"""How a message that no redelivery helps is settled: as a dead letter, or by an error that stops the consumer."""


class ExhaustedError(IdempotencyError):
    """The message was handled ``max_attempts`` times without success, and is not handled again."""

    code = "exhausted"
    title = "The message was handled too often"
