"""How a saga or a step can end for its caller, besides a result."""

from __future__ import annotations

from idempotency.errors import IdempotencyError, RecordedFailureError


class SagaError(IdempotencyError):
    """The base of what a saga raises. ``name`` and ``key`` say which one; the text never contains the key."""

    code = "saga"
    title = "A saga has no result"
    name: str = ""
    key: str = ""


class SagaEndedError(SagaError):
    """The saga has ended: what was asked of it comes too late, and nothing is changed."""

    code = "saga-ended"
    status = 409
    title = "The saga has ended"


class SagaPendingError(SagaError):
    """The saga has not ended: it waits, or another process runs it. It goes on by itself, with a :class:`Sweeper`.

    ``retry_after``: seconds until the same call may find more. ``reason`` says what it waits for.
    """

    code = "saga-pending"
    status = 409
    title = "The saga has not ended"
    retryable = True
    retry_after: float = 1.0
    reason: str = ""


class SagaStuckError(SagaError):
    """The saga does not go on by itself: ``reason`` says why. An operator decides: ``idempotency saga``."""

    code = "saga-stuck"
    status = 409
    title = "The saga is stuck"
    reason: str = ""


class SagaFailedError(SagaError):
    """The saga has failed, and what it had done is undone. ``failure`` is the recorded failure."""

    code = "saga-failed"
    status = 409
    title = "The saga failed, and is undone"
    failure: RecordedFailureError


class SagaLostError(SagaError):
    """Another process has taken the saga over, since this one did not renew its lease in time. It may be going on."""

    code = "saga-lost"
    status = 409
    title = "Another process has taken the saga over"
    retryable = True


class StepFailedError(RecordedFailureError):
    """A step has failed for good. It is raised at each run of the saga, also by one that found the failure recorded.

    Branch on ``type``, the name of the exception's class; in the run in which the step failed, ``__cause__`` is the
    exception itself. ``step`` is the name of the step. ``unknown``: the effect may have happened.
    """

    code = "step-failed"
    title = "A step of a saga failed"
    step: str = ""
    unknown: bool = False


class DeadlineError(IdempotencyError):
    """The deadline of the saga is over."""

    code = "saga-deadline"
    status = 504
    title = "The deadline of the saga is over"


class CancelledByOperatorError(IdempotencyError):
    """An operator has cancelled the saga."""

    code = "saga-cancelled"
    status = 409
    title = "An operator has cancelled the saga"


class HeldError(IdempotencyError):
    """Another saga holds the resource. ``by`` is its name and key."""

    code = "resource-held"
    status = 409
    title = "Another saga holds the resource"
    retryable = True
    by: tuple[str, str] = ("", "")


class SignalTimeoutError(IdempotencyError):
    """No signal came in time."""

    code = "signal-timeout"
    status = 504
    title = "No signal came in time"


def ended_error(name: str, key: str) -> SagaEndedError:
    """Return the error of what is asked of a saga that has ended."""
    error = SagaEndedError(f"The saga {name} has ended: nothing was changed.")
    error.name, error.key = name, key
    return error


def missing_error(name: str, key: str) -> SagaError:
    """Return the error of a saga that is not there."""
    error = SagaError(f"There is no saga {name} of this key.")
    error.name, error.key = name, key
    return error
