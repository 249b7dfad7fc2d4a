"""What decorated functions and consumers share: their claims, their results, and how a call can end."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from time import monotonic
from typing import Any

from idempotency._results.by_annotation import UnnamedTypeError
from idempotency._results.codec import Results
from idempotency._rules import Claim, Completed, InProgress, Known, Mismatch, Replay, Unknown, Unreadable
from idempotency._signature import close_unused
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    UnreadableError,
)
from idempotency.events import EventHooks, EventKind, Failure, Surface, emit_event
from idempotency.policy import Outcome, Policy


@dataclass(frozen=True, slots=True)
class Ran:
    """The function ran here and returned ``value``."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """The function ran here and raised ``error``; ``outcome`` is how it was recorded."""

    error: Exception
    outcome: Outcome


Ended = Ran | Raised | Known
"""How a call ended: the function ran in this call, or the record has a verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What all calls of one decorated function share. ``name`` is its name, and ``surface`` what it is, in events.

    ``result_is_needed``: whether a call that returns a type which no annotation names is refused. The result of a
    function is all that a later call gets; that of a consumer is for replies.
    """

    name: str
    scope: str
    policy: Policy
    results: Results
    hooks: EventHooks
    surface: Surface
    result_is_needed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise ConfigurationError(f"policy must be a Policy, not {type(self.policy).__name__}")

    def claim(self, key: object, compared: object) -> Claim:
        """Make the claim of one call.

        Raises :class:`~idempotency.errors.KeyMissingError` or :class:`~idempotency.errors.KeyInvalidError`: a key is
        never invented.
        """
        if key is None or (isinstance(key, str) and not key):
            raise KeyMissingError(
                f"{self.name} was called without an idempotency key: key= returned {key!r}; a key is never invented"
            )
        if not isinstance(key, str):
            close_unused(key)
            raise KeyInvalidError(f"key= must return text, not {type(key).__name__}")
        policy = self.policy
        return Claim(
            scope=self.scope,
            key=key,
            fingerprint=_digest(compared),
            lease=policy.lease,
            ttl=policy.ttl,
            hold=policy.on_crash == "hold",
            began=monotonic(),
            name=self.name,
        )

    def emit(self, kind: EventKind, claim: Claim | None, attempt: int = 0, error: Failure = None) -> None:
        """Deliver one event."""
        emit_event(self.hooks, kind, self.name, claim, attempt, error, self.surface, self.name)

    def encode(self, value: Any, consequence: str) -> tuple[bytes | None, str]:
        """Encode a result. If it cannot be recorded, return None and the name of the reason.

        The effect has happened, so the call does not fail any more because of the data that the function returned.

        Raises :class:`~idempotency.errors.ConfigurationError` where the result is needed, and the code is at fault: it
        names no type, and returns one that has to be named. Otherwise only the later calls would show that.
        ``consequence`` is what the error says about the effect.
        """
        try:
            result = self.results.encode(value)
        except Exception as error:
            if self.result_is_needed and isinstance(error, UnnamedTypeError):
                raise ConfigurationError(
                    f"{self.name} returned {error.what}, which its annotation does not name, so that its result cannot "
                    f"be recorded: {error.remedy}, or give codec=. {consequence}"
                ) from error
            return None, type(error).__name__
        return (result, "") if len(result) <= self.policy.max_response else (None, "ResultTooLarge")

    def replay(self, claim: Claim, replay: Replay) -> Any:
        """Return a recorded result. Raise UnreadableError if it cannot be decoded, or the failure that is recorded."""
        try:
            value = self.results.decode(replay.result)
        except UnreadableError as error:
            self.emit("unreadable", claim, error=error)
            raise
        self.emit("replayed", claim)
        return value

    def answer(self, claim: Claim, ended: Ended) -> Any:
        """Return the result of a call, new or recorded; raise its error, or the error of its verdict."""
        match ended:
            case Ran(value):
                return value
            case Raised(error, _):
                raise error
            case Replay():
                return self.replay(claim, ended)
            case verdict:
                self.emit(KIND[type(verdict)], claim)
                raise refusal(verdict)


FINGERPRINT_OF_NOTHING = hashlib.sha256(b"call:1").digest()
"""The fingerprint of a call that compares nothing."""


def _digest(compared: object) -> bytes:
    match compared:
        case None:
            return FINGERPRINT_OF_NOTHING
        case str():
            compared = compared.encode("utf-8", "surrogatepass")
        case bytes():
            pass
        case _:
            close_unused(compared)
            raise ConfigurationError(f"fingerprint= must return text or bytes, not {type(compared).__name__}")
    return hashlib.sha256(b"call:1:%b" % compared).digest()


KIND: dict[type[Known], EventKind] = {
    Replay: "replayed",
    Completed: "completed",
    InProgress: "in-progress",
    Mismatch: "mismatch",
    Unknown: "unknown",
    Unreadable: "unreadable",
}
"""The event of each verdict."""


def refusal(known: Completed | InProgress | Mismatch | Unknown | Unreadable) -> IdempotencyError:
    """Make the error of a verdict without a result."""
    match known:
        case Completed():
            return NotReplayableError("The operation is completed; its result was not recorded.")
        case InProgress():
            return InProgressError.of(known)
        case Mismatch():
            return KeyReusedError("The key was used for something else.")
        case Unknown():
            return OutcomeUnknownError(
                "The outcome of the operation is unknown; it is not repeated until it is resolved: see the command "
                "idempotency, list and resolve."
            )
        case Unreadable(version):
            why = f"damaged, encrypted with another key, or of a newer format ({version})"
            return UnreadableError(f"The record is {why}.")
