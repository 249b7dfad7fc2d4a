"""How a run of a saga begins, and how it ends."""

from __future__ import annotations

import hashlib
from time import monotonic
from typing import Any

from idempotency._results.by_annotation import dump, load
from idempotency._results.codec import encode_failure
from idempotency._sagas.journal import Leave, Open, Phase, Row, Saga
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    KeyReusedError,
    StoreError,
    UnreadableError,
)
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Ask, Program
from idempotency.saga._run import Run, Suspended
from idempotency.saga._step import failure_in
from idempotency.saga._undo import undo_all
from idempotency.saga._wait import let_go
from idempotency.saga.errors import (
    SagaError,
    SagaFailedError,
    SagaLostError,
    SagaPendingError,
    SagaStuckError,
)
from idempotency.saga.options import backoff


def begin(definition: Definition, request: Open) -> Program[Run | Row]:
    """Own the saga and return its run; the row where there is nothing to run: it has ended, or cannot be owned."""
    asked = monotonic()
    opened: Saga | None = yield Ask(request)
    if opened is None:
        raise SagaError(f"There is no saga {definition.name} of this key.")
    row = opened.row
    if request.input is not None and row.fingerprint != request.fingerprint:
        raise KeyReusedError("The key was used for a saga with other arguments.")
    if row.token != request.token:
        return row
    run = Run(definition, opened, request.token, asked)
    if row.crashes >= definition.attempts:
        reason = {"stuck": f"{row.crashes} runs ended without a word"}
        yield from _leave(run, Suspended(None, reason))
    return run


def arguments(definition: Definition, run: Run, data: bytes) -> Program[dict[str, Any]]:
    """Return the recorded arguments of the saga; one that this code cannot read is stuck."""
    try:
        return definition.input.decode(data)
    except UnreadableError as error:
        yield from _leave(run, Suspended(None, {"stuck": str(error)}))
        raise


def request_of(
    definition: Definition, record: bytes, key: str, token: str, data: bytes | None, lease: float | None = None
) -> Open:
    """Return the request that opens a saga; ``data`` None: only one that is there."""
    return Open(
        id=record,
        name=definition.name,
        key=key,
        token=token,
        lease=definition.lease if lease is None else lease,
        fingerprint=hashlib.sha256(b"saga:1:%b" % (data or b"")).digest(),
        input=data,
        deadline=definition.deadline,
    )


def answer(definition: Definition, row: Row) -> Any:
    """Return the result of a saga that this process does not run, or raise how it is."""
    match row.phase:
        case Phase.DONE:
            return definition.results.decode(row.result or b"")
        case Phase.UNDONE:
            raise _failed(definition, row.key, row.result or b"")
        case _ if row.due_in is None:
            raise stuck(definition, row.key, reason_in(row.reason))
        case _:
            raise pending(definition, row.key, max(row.due_in, 0.0), reason_in(row.reason) or "it runs")


def finish(run: Run, value: Any) -> Program[Any]:
    """End a saga whose function has returned."""
    definition = run.definition
    try:
        result = definition.results.encode(value)
    except Exception as error:
        yield from _leave(run, Suspended(None, {"stuck": f"its result cannot be recorded: {error}"}))
        raise
    yield from let_go(run)
    yield from _end(run, Phase.DONE, result)
    return value


def interrupted(run: Run, error: BaseException) -> Program[Any]:
    """End or leave a saga whose function was ended by ``error``; raise what its caller is told."""
    match error:
        case SagaLostError():
            raise error
        case Suspended():
            yield from _leave(run, error)
        case StoreError():
            raise error
        case ConfigurationError() | UnreadableError():
            yield from _leave(run, Suspended(None, {"stuck": str(error)}), error)
        case Exception() if run.pivoted:
            reason = {"error": type(error).__name__, "forward": True}
            yield from _leave(run, Suspended(backoff(run.attempt, 1.0, 300.0), reason), error)
        case Exception():
            yield from fail(run, error)
        case _:
            yield Ask(_leaving(run, Phase.FORWARD, 0.0, {}))
            raise error


def fail(run: Run, error: Exception) -> Program[None]:
    """Undo a saga before its pivot."""
    failure = encode_failure(error)
    yield from run.write(phase=Phase.UNDOING, result=failure)
    run.phase = Phase.UNDOING
    yield from undo(run, failure, error)


def undo(run: Run, failure: bytes, cause: Exception | None = None) -> Program[None]:
    """Undo what the saga has done, and end it; raise SagaFailedError."""
    try:
        yield from undo_all(run, failure_in(failure))
    except Suspended as waiting:
        yield from _leave(run, waiting, cause)
    except ConfigurationError as error:
        yield from _leave(run, Suspended(None, {"stuck": str(error)}), error)
    yield from let_go(run)
    yield from _end(run, Phase.UNDONE, failure)
    raise _failed(run.definition, run.key, failure) from cause


def _end(run: Run, phase: Phase, result: bytes) -> Program[None]:
    leave = Leave(
        id=run.id, token=run.token, phase=phase, due=None, wakes=run.wakes, result=result, ttl=run.definition.ttl
    )
    if not (yield Ask(leave)):
        raise run.lost_error()


def _leave(run: Run, waiting: Suspended, cause: BaseException | None = None) -> Program[None]:
    """Leave a saga that waits or is stuck, and raise what its caller is told."""
    due = waiting.due
    if due is not None and run.phase is Phase.FORWARD and run.remaining is not None:
        due = max(0.0, min(due, run.remaining))
    if not (yield Ask(_leaving(run, run.phase, due, waiting.reason))):
        raise run.lost_error()
    reason = reason_in(dump(waiting.reason))
    if due is not None:
        raise pending(run.definition, run.key, due, reason) from cause
    if isinstance(cause, IdempotencyError):
        raise cause
    raise stuck(run.definition, run.key, reason) from cause


def _leaving(run: Run, phase: Phase, due: float | None, reason: dict[str, Any]) -> Leave:
    return Leave(
        id=run.id, token=run.token, phase=phase, due=due, wakes=run.wakes, reason=dump(reason) if reason else b""
    )


def reason_in(reason: bytes) -> str:
    """Return a reason in words."""
    found = load(reason) if reason else {}
    match found:
        case {"sleep": name}:
            return f"it sleeps: {name}"
        case {"signal": name}:
            return f"it waits for the signal {name}"
        case {"child": name, "waits": waits}:
            return f"its child {name} has not ended: {waits}"
        case {"undo": name, "error": error, "attempt": attempt}:
            return f"the undo of {name} failed {attempt} times, last with {error}; it is tried again"
        case {"step": name, "unknown": True}:
            return f"the outcome of the step {name} is unknown"
        case {"error": error, "forward": True}:
            return f"after the pivot it failed with {error}; it is tried again"
        case {"stuck": why}:
            return str(why)
        case _:
            return ""


def pending(definition: Definition, key: str, retry_after: float, reason: str) -> SagaPendingError:
    """Return the error of a saga that has not ended."""
    error = SagaPendingError(f"The saga {definition.name} has not ended: {reason}.")
    error.name, error.key, error.retry_after, error.reason = definition.name, key, retry_after, reason
    return error


def stuck(definition: Definition, key: str, reason: str) -> SagaStuckError:
    """Return the error of a saga that does not go on by itself."""
    error = SagaStuckError(f"The saga {definition.name} is stuck: {reason}. See the command idempotency saga.")
    error.name, error.key, error.reason = definition.name, key, reason
    return error


def _failed(definition: Definition, key: str, result: bytes) -> SagaFailedError:
    failure = failure_in(result)
    error = SagaFailedError(f"The saga {definition.name} failed with {failure.type}, and is undone.")
    error.name, error.key, error.failure = definition.name, key, failure
    return error
