"""The rules by which a delivered message is settled: decisions alone, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from idempotency._engine.calls import KIND, NOTHING, Calls, Ended, Raised, Ran, refusal
from idempotency._messages.settlement import DeadLetter, Delivered, Done, ExhaustedError, Failed, Final, Replayed, Retry
from idempotency._rules import Claim, Completed, InProgress, Mismatch, Replay, record_id
from idempotency.errors import (
    IdempotencyError,
    KeyInvalidError,
    KeyMissingError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
    UnreadableError,
)
from idempotency.events import emit_event
from idempotency.operation import current
from idempotency.policy import Outcome

if TYPE_CHECKING:
    pass

SOON = 1.0
Tally = Literal["begun", "busy", "failed"]
"""What is counted of a message: how often it was begun, how often that was in vain, and how often it failed."""

TALLIES: tuple[Tally, ...] = ("begun", "busy", "failed")


@dataclass(frozen=True, slots=True)
class Rules:
    """What of a consumer does not depend on whether its handler is awaited."""

    calls: Calls
    max_attempts: int | None
    on_exhausted: Final
    on_refused: Final
    joined: bool

    @property
    def open(self) -> bool:
        """Say whether messages are handled while the store does not answer; a transaction needs it."""
        return self.calls.policy.on_store_error == "fail_open" and not self.joined

    def counts(self, attempt: int | None) -> bool:
        """Say whether the store counts this delivery before it is handled: a first one costs nothing unless it fails.

        The broker's own count is no help further on: it includes deliveries that met a running owner.
        """
        return self.max_attempts is not None and attempt != 1

    def uncounted(self, attempt: int | None, ended: Ended) -> tuple[Tally, ...]:
        """Say what is still to be counted of a delivery, also of the last: its dead letter may not arrive."""
        match ended:
            case Raised(_, "release"):
                return self.missing(attempt, ran=True)
            case InProgress() | Mismatch():
                return self.missing(attempt, ran=False)
            case _:
                return ()

    def missing(self, attempt: int | None, ran: bool) -> tuple[Tally, ...]:
        """Say what is still to be counted of a delivery whose handler ``ran`` in vain, or was not called.

        A first one that ran was not counted yet, and a later one that did not run was counted for nothing.
        """
        if self.max_attempts is None:
            return ()
        if ran:
            return ("begun", "failed") if attempt == 1 else ("failed",)
        return ("busy",) if attempt != 1 else ()

    def tally(self, kind: Tally, claim: Claim) -> Claim:
        """Make a claim that counts by its attempt: it is over at once, so the next one takes it over."""
        scope, ttl = self._tally_scope(kind), self.calls.policy.ttl
        return Claim(scope=scope, key=claim.key, fingerprint=NOTHING, lease=0.0, ttl=ttl)

    def tallies_of(self, key: str) -> list[bytes]:
        """Return the ids of what is counted under a key."""
        return [record_id(self._tally_scope(kind), key) for kind in TALLIES]

    def _tally_scope(self, kind: Tally) -> str:
        return f"{kind}:1:{self.calls.scope}"

    def busy_matters(self, begun: int) -> bool:
        """Say whether it matters how many of these met a running owner and so were none."""
        return self.max_attempts is not None and begun >= self.max_attempts

    def admitted(self, begun: int, work: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse a message that was begun too often: its handler may have taken the process down each time."""

        def refuse(*_: Any) -> Any:
            operation = current()
            if operation is not None:
                operation.release()
            raise ExhaustedError(
                f"the message was begun {begun - 1} times (max_attempts={self.max_attempts}) and never completed; "
                "forget its key to have it handled again"
            )

        return refuse if self.max_attempts is not None and begun > self.max_attempts else work

    def as_recorded(self, claim: Claim, ended: Ended) -> Claim | None:
        """Return the claim to make instead, where this one or the record compares nothing, and so none differs."""
        if isinstance(ended, Mismatch) and NOTHING in (claim.fingerprint, ended.recorded):
            return replace(claim, fingerprint=ended.recorded)
        return None

    def outcome(self, claim: Claim, ended: Ended, begun: int) -> Delivered:
        """Say how a delivery is to be settled."""
        match ended:
            case Ran(value):
                return Done(value)
            case Raised(error, outcome):
                return self._failed(claim, error, outcome, begun)
            case Completed() | Replay():
                try:
                    return Replayed(self.replay(claim, ended), kept=isinstance(ended, Replay))
                except (RecordedFailureError, UnreadableError) as error:
                    return self._final(claim, begun, error, self.on_refused)
            case InProgress(retry_after):
                self.calls.emit("in-progress", claim)
                return Retry(max(retry_after, 0.0))
            case told:
                self.calls.emit(KIND[type(told)], claim)
                return self._final(claim, begun, refusal(told), self.on_refused)

    def _failed(self, claim: Claim, error: Exception, outcome: Outcome, begun: int) -> Delivered:
        # A redelivery would only be told what is recorded now.
        if outcome != "release":
            kept: type[IdempotencyError] = RecordedFailureError if outcome == "store" else OutcomeUnknownError
            return self._final(claim, begun, error, self.on_refused, kept.code)
        if self.max_attempts is not None and begun >= self.max_attempts:
            return self._final(claim, begun, error, self.on_exhausted, ExhaustedError.code)
        return Failed(error)

    def unanswered(self, claim: Claim, error: StoreError) -> Retry | DeadLetter:
        """Say how a delivery is to be settled whose record could not be had: again later, unless that cannot help."""
        return Retry(SOON, "unavailable") if error.retryable else self._final(claim, 0, error, self.on_refused)

    def _final(self, claim: Claim, begun: int, error: Exception, rule: Final, reason: str = "") -> DeadLetter:
        if rule == "stop":
            raise error
        self.calls.emit("dead-lettered", claim, begun, error)
        return DeadLetter(reason or (error.code if isinstance(error, IdempotencyError) else "error"), error)

    def unnamed(self, error: Exception) -> DeadLetter:
        """Say how a message is settled that cannot be named or compared.

        Its data is at fault, whatever ``error`` is, and the messages after it are handled.
        """
        kind = KeyMissingError if isinstance(error, KeyMissingError) else KeyInvalidError
        return self.refused(error, kind.code)

    def unidentified(self, error: Exception, attempt: int | None) -> DeadLetter:
        """Say how a message is settled in which an adapter finds no identity, and for which there is no ``key``.

        A producer may name none of its messages, so the first delivery raises and the message stays: else a whole queue
        could go to the dead letters. One that is delivered again has stopped a consumer, and does not stop another.
        """
        if isinstance(error, KeyMissingError) and (attempt is None or attempt <= 1):
            raise error
        return self.unnamed(error)

    def refused(self, error: Exception, reason: str) -> DeadLetter:
        """Say what becomes of a message that no redelivery helps, and of which no record tells."""
        if self.on_refused == "stop":
            raise error
        emit_event(self.calls.on_event, "dead-lettered", self.calls.name, error=error)
        return DeadLetter(reason, error)

    def unsettled(self, error: BaseException) -> None:
        """Tell the event hook that the broker could not be told how a delivery ended: it delivers the message again."""
        emit_event(self.calls.on_event, "unsettled", self.calls.name, error=error)

    def replay(self, claim: Claim, told: Replay | Completed) -> Any:
        """Return the recorded result; None where it was not kept."""
        if isinstance(told, Completed):
            self.calls.emit("completed", claim)
            return None
        try:
            value = self.calls.results.decode(told.result)
        except UnreadableError as error:
            self.calls.emit("unreadable", claim, error=error)
            raise
        self.calls.emit("replayed", claim)
        return value

    def answer(self, claim: Claim, ended: Ended) -> Any:
        """Return the result, or raise: a framework that knows nothing else redelivers what raises."""
        match ended:
            case Ran(value):
                return value
            case Raised(error, _):
                raise error
            case Completed() | Replay():
                return self.replay(claim, ended)
            case told:
                self.calls.emit(KIND[type(told)], claim)
                raise refusal(told)
