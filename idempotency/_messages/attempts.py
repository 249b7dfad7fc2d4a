"""How often a message was handled, counted in the store.

A count is a record of its own: each claim of it raises the attempt of that record by one. Its lease is over at once, so
that the next claim takes it over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idempotency._engine.calls import FINGERPRINT_OF_NOTHING, Ended, Raised
from idempotency._messages.settlement import ExhaustedError
from idempotency._rules import Claim, InProgress, Mismatch, record_id
from idempotency.operation import current
from idempotency.stores._counts import COUNTS, Count, count_scope


@dataclass(slots=True)
class Progress:
    """How far one delivery has come.

    ``handler_called``: the handler was called. ``counted``: the store has counted the delivery as begun.
    """

    handler_called: bool = False
    counted: bool = False

    @property
    def must_be_corrected(self) -> bool:
        """Return whether counts are wrong, or missing, when the store fails now."""
        return self.handler_called or self.counted

    def note_call(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``work`` such that its call is noted here."""

        def handle(*args: Any) -> Any:
            self.handler_called = True
            return work(*args)

        return handle


@dataclass(frozen=True, slots=True)
class Attempts:
    """What is counted of the messages of one consumer, and when they were handled too often.

    ``scope``: the scope of the consumer's records. ``ttl``: seconds for which a count is stored. ``max_attempts`` None:
    nothing is counted.
    """

    scope: str
    ttl: float
    max_attempts: int | None

    def counts_first(self, attempt: int | None) -> bool:
        """Return whether a delivery is counted before it is handled.

        A first delivery is counted only if it fails, so a success needs no count. The broker's own count cannot replace
        ours: it includes deliveries that met a running owner.
        """
        return self.max_attempts is not None and attempt != 1

    def after(self, attempt: int | None, ended: Ended) -> tuple[Count, ...]:
        """Return what is still to be counted of a delivery that has ended.

        The last delivery is counted too, because sending its dead letter may fail.
        """
        match ended:
            case Raised(_, "release"):
                return self.after_failure(attempt, handler_called=True)
            case InProgress() | Mismatch():
                return self.after_failure(attempt, handler_called=False)
            case _:
                return ()

    def after_failure(self, attempt: int | None, *, handler_called: bool) -> tuple[Count, ...]:
        """Return what is still to be counted of a delivery without success.

        A first delivery is not counted before it is handled; a later one is, also where the handler is then not called.
        """
        if self.max_attempts is None:
            return ()
        if handler_called:
            return ("begun", "failed") if attempt == 1 else ("failed",)
        return ("busy",) if attempt != 1 else ()

    def claim(self, count: Count, claim: Claim) -> Claim:
        """Return the claim that adds one to a count of the message of ``claim``."""
        return Claim(
            scope=count_scope(count, self.scope),
            key=claim.key,
            fingerprint=FINGERPRINT_OF_NOTHING,
            lease=0.0,
            ttl=self.ttl,
            name=claim.name,
        )

    def record_ids(self, key: str) -> list[bytes]:
        """Return the ids of the records that count the message of ``key``."""
        return [record_id(count_scope(count, self.scope), key) for count in COUNTS]

    def limit_reached(self, begun: int) -> bool:
        """Return whether a message that was begun so often is not to be begun once more."""
        return self.max_attempts is not None and begun >= self.max_attempts

    def refuse_too_many(self, begun: int, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``work``, or what refuses a message that was begun too often.

        Its handler may have ended the process each time.
        """

        def refuse(*_: Any) -> Any:
            operation = current()
            if operation is not None:
                operation.release()
            raise ExhaustedError(
                f"the message was begun {begun - 1} times (max_attempts={self.max_attempts}) and never completed; "
                "forget its key to have it handled again"
            )

        return refuse if self.max_attempts is not None and begun > self.max_attempts else work
