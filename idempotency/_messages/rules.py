"""The rules by which a delivered message is settled: decisions alone, without I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from idempotency._engine.calls import FINGERPRINT_OF_NOTHING, KIND, Calls, Ended, Raised, Ran, refusal
from idempotency._messages.attempts import Attempts
from idempotency._messages.settlement import DeadLetter, Delivered, Done, ExhaustedError, Failed, Final, Replayed, Retry
from idempotency._rules import Claim, Completed, InProgress, Mismatch, Replay
from idempotency.errors import (
    IdempotencyError,
    KeyInvalidError,
    KeyMissingError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
    UnreadableError,
)
from idempotency.policy import Outcome

SOON = 1.0
"""Seconds before a message is redelivered that could not be begun."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one consumer: the same whether its handler is awaited or not.

    ``joined``: whether the effect and the record are one transaction.
    """

    calls: Calls
    attempts: Attempts
    on_exhausted: Final
    on_refused: Final
    joined: bool

    @property
    def fail_open(self) -> bool:
        """Return whether messages are handled while the store does not answer; a transaction needs the store."""
        return self.calls.policy.on_store_error == "fail_open" and not self.joined

    def claim_of_record(self, claim: Claim, ended: Ended) -> Claim | None:
        """Return the claim to try next, with the record's fingerprint; None where the delivery has ended.

        Where the message or its record compares nothing, there is no mismatch: only the key counts.
        """
        if isinstance(ended, Mismatch) and FINGERPRINT_OF_NOTHING in (claim.fingerprint, ended.recorded):
            return replace(claim, fingerprint=ended.recorded)
        return None

    def settlement(self, claim: Claim, ended: Ended, begun: int) -> Delivered:
        """Return how a delivery is to be settled. ``begun``: how often its message was begun."""
        match ended:
            case Ran(value):
                return Done(value)
            case Raised(error, outcome):
                return self._settlement_of_failure(claim, error, outcome, begun)
            case Completed():
                self.calls.emit("completed", claim)
                return Replayed(None, kept=False)
            case Replay():
                try:
                    return Replayed(self.calls.replay(claim, ended))
                except (RecordedFailureError, UnreadableError) as error:
                    return self._final(claim, begun, error, self.on_refused)
            case InProgress(retry_after):
                self.calls.emit("in-progress", claim)
                return Retry(max(retry_after, 0.0))
            case verdict:
                self.calls.emit(KIND[type(verdict)], claim)
                return self._final(claim, begun, refusal(verdict), self.on_refused)

    def _settlement_of_failure(self, claim: Claim, error: Exception, outcome: Outcome, begun: int) -> Delivered:
        # A redelivery would only get the failure that is recorded now.
        if outcome != "release":
            recorded: type[IdempotencyError] = RecordedFailureError if outcome == "store" else OutcomeUnknownError
            return self._final(claim, begun, error, self.on_refused, recorded.code)
        if self.attempts.limit_reached(begun):
            return self._final(claim, begun, error, self.on_exhausted, ExhaustedError.code)
        return Failed(error)

    def settlement_without_store(self, claim: Claim, error: StoreError) -> Retry | DeadLetter:
        """Return how a delivery is to be settled for which the store failed: again later, unless that cannot help."""
        return Retry(SOON, "unavailable") if error.retryable else self._final(claim, 0, error, self.on_refused)

    def _final(self, claim: Claim, begun: int, error: Exception, rule: Final, reason: str = "") -> DeadLetter:
        if rule == "stop":
            raise error
        self.calls.emit("dead-lettered", claim, begun, error)
        return DeadLetter(reason or (error.code if isinstance(error, IdempotencyError) else "error"), error)

    def refuse_unreadable(self, error: Exception) -> DeadLetter:
        """Refuse a message of which the key or the fingerprint cannot be read.

        Its data is at fault, whatever ``error`` is, and the messages after it are handled.
        """
        kind = KeyMissingError if isinstance(error, KeyMissingError) else KeyInvalidError
        return self.refuse(error, kind.code)

    def refuse_unidentified(self, error: Exception, attempt: int | None) -> DeadLetter:
        """Refuse a message in which an adapter finds no identity, where the consumer has no ``key=``.

        The producer may give none of its messages an identity, and then all of the queue would become dead letters. So
        the first delivery raises ``error``, which stops the consumer, and the message stays in the queue. When it is
        delivered again it has stopped a consumer once; it must not stop another, and becomes a dead letter.
        """
        if isinstance(error, KeyMissingError) and (attempt is None or attempt <= 1):
            raise error
        return self.refuse_unreadable(error)

    def refuse(self, error: Exception, reason: str) -> DeadLetter:
        """Refuse a message that no redelivery helps, and whose key is not known or free."""
        if self.on_refused == "stop":
            raise error
        self.calls.emit("dead-lettered", None, error=error)
        return DeadLetter(reason, error)

    def unsettled(self, error: BaseException) -> None:
        """Emit the event of a delivery that could not be settled: the broker delivers the message again."""
        self.calls.emit("unsettled", None, error=error)

    def answer(self, claim: Claim, ended: Ended) -> Any:
        """Return the result, None where it was not recorded; raise where the message must be redelivered.

        It is for a framework without an adapter, which redelivers a message whose handler raises.
        """
        if isinstance(ended, Completed):
            self.calls.emit("completed", claim)
            return None
        return self.calls.answer(claim, ended)
