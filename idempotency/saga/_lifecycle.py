"""How a run of a saga begins, and how it ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic
from typing import Any

from idempotency._durations import LONGEST
from idempotency._results.by_annotation import dump, load
from idempotency._results.codec import encode_failure
from idempotency._sagas.journal import Leave, Look, Open, Phase, Row, Saga, Write, saga_id
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    KeyReusedError,
    StoreError,
    StoreRefusedError,
    UnreadableError,
)
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Ask, Pause, Play, Program
from idempotency.saga._run import Run, Suspended
from idempotency.saga._step import as_data, failure_in
from idempotency.saga._undo import undo_all
from idempotency.saga._wait import let_go, waiting_for
from idempotency.saga.errors import (
    SagaFailedError,
    SagaLostError,
    SagaPendingError,
    SagaStuckError,
    StepFailedError,
    missing_error,
)
from idempotency.saga.events import SagaEventKind
from idempotency.saga.options import backoff

_UNREADABLE = 10.0
"""Seconds until a saga is due again that a process could not read."""


def begin(definition: Definition, request: Open) -> Program[Run | Row]:
    """Own the saga and return its run; the row where there is nothing to run: it has ended, or cannot be owned."""
    asked = monotonic()
    try:
        opened: Saga | None = yield Ask(request)
    except UnreadableError:
        yield from _hand_back(request)
        raise
    if opened is None:
        raise missing_error(definition.name, request.key)
    if request.input is not None and opened.row.fingerprint != request.fingerprint:
        raise KeyReusedError("The key was used for a saga with other arguments.")
    if opened.row.token != request.token:
        return opened.row
    run = Run(definition, opened, request.token, asked)
    try:
        yield Pause(0.0)  # where the caller was cancelled meanwhile, that is raised here
    except BaseException as error:
        yield from _give_up(run, error)
        raise
    return run


def _hand_back(request: Open) -> Program[None]:
    """Let go of a saga that this process owns and cannot read: another one may have its key, or be a newer release."""
    with suppress(StoreError, UnreadableError):
        wakes: int | None = yield Ask(Write(id=request.id, token=request.token, lease=request.lease))
        if wakes is not None:
            # Not at once, so that those that can be read come first.
            reason = dump({"error": UnreadableError.__name__})
            yield Ask(
                Leave(id=request.id, token=request.token, phase=None, due=_UNREADABLE, wakes=wakes, reason=reason)
            )


def live(run: Run) -> Program[Any]:
    """Go on with a saga that is owned: to its end, or until it waits."""
    if run.crashes:
        run.emit("took-over")
    try:
        if run.crashes >= run.definition.attempts:
            yield from _leave(run, Suspended(None, {"stuck": f"{run.crashes} runs ended without a word"}))
        if run.phase is not Phase.UNDOING:
            value, error = yield Play(run, (yield from _arguments(run)))
            if (yield from _finish(run, value, error)):
                return value
        yield from _undo(run)
    except BaseException as error:
        yield from _give_up(run, error)
        raise


def _arguments(run: Run) -> Program[dict[str, Any]]:
    try:
        return run.definition.input.decode(run.input)
    except UnreadableError as error:
        yield from _leave(run, Suspended(None, {"stuck": str(error)}), error)
        raise


def _finish(run: Run, value: Any, error: BaseException | None) -> Program[bool]:
    """End a saga whose function has returned or raised; False where it is to be undone now."""
    ended_by = what_ended(run, error)
    if ended_by is None:
        yield from _succeed(run, value)
        return True
    match ended_by:
        case Suspended():
            yield from _leave(run, earliest(run.waits))
        case ConfigurationError() | UnreadableError() | StoreRefusedError():
            yield from _leave(run, Suspended(None, {"stuck": str(ended_by)}), ended_by)
        case SagaLostError() | StoreError():
            raise ended_by
        case SagaPendingError() | SagaStuckError() as child:
            yield from _leave(run, waiting_for(child), child)
        case Exception() if (yield from _goes_forward(run)):
            yield from _leave(run, Suspended(backoff(run.attempt, 1.0, 300.0), _of_forward(ended_by)), error)
        case Exception():
            yield from _fail(run, ended_by, error)
        case _:
            raise ended_by
    return False


def _of_forward(failure: Exception) -> dict[str, Any]:
    """Return why a saga is tried again that failed after its pivot."""
    if isinstance(failure, StepFailedError):
        return {"error": failure.type, "step": failure.step, "forward": True}
    return {"error": type(failure).__name__, "forward": True}


def _goes_forward(run: Run) -> Program[bool]:
    """Return whether nothing may be undone any more."""
    if run.unsure:
        # A step that was cancelled may commit all the same. This write waits for its transaction.
        yield from run.write()
        asked = monotonic()
        saga: Saga | None = yield Ask(Look(id=run.id))
        if saga is None or saga.row.token != run.token:
            raise run.lost_error()
        run.read(saga.entries, asked)
    return run.forward_only


def what_ended(run: Run, error: BaseException | None) -> BaseException | None:
    """Return what ended a run whose function raised ``error``, or returned; None where the saga has succeeded.

    A function cannot stop what ended its run in the middle, such as a wait: it may only fail before it.
    """
    if error is not None and not isinstance(error, Exception | Suspended | BaseExceptionGroup):
        return error  # it was cancelled, or the process ends
    errors = _single(error)
    if isinstance(run.stopped, Suspended):
        failures = [each for each in errors if any(each is failure for failure in run.failures)]
        return failures[0] if failures else run.stopped
    return run.stopped or next(iter(errors), None)


def _single(error: BaseException | None) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [each for part in error.exceptions for each in _single(part)]
    return [] if error is None else [error]


def earliest(waits: list[Suspended]) -> Suspended:
    """Return the wait that is over first. One that an operator has to end is not hidden by others, beside which it is.

    Where the others are for signals only, the saga is stuck: a signal makes it go on all the same.
    """
    first = min(waits, key=lambda wait: LONGEST if wait.due is None else wait.due)
    for wait in waits:
        if wait.due is None:
            due = [each.due for each in waits if each.due is not None and each.timed]
            return Suspended(min(due, default=None), wait.reason)
    return first


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
        fingerprint=b"" if data is None else definition.input.fingerprint(data),
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
            reason = "it runs" if row.token else reason_in(row.reason) or "it is due"
            raise pending(definition, row.key, max(row.due_in, 0.0), reason)


def _succeed(run: Run, value: Any) -> Program[None]:
    definition = run.definition
    try:
        result = definition.results.encode(value)
    except Exception as error:
        reason = f"its result cannot be recorded: {error}. Return what another process can read, and annotate it"
        yield from _leave(run, Suspended(None, {"stuck": reason}), error)
        raise
    yield from _end(run, Phase.DONE, result)


def _fail(run: Run, failure: Exception, cause: BaseException | None) -> Program[None]:
    """Begin to undo a saga before its pivot."""
    result = encode_failure(as_data(failure))
    yield from run.write(phase=Phase.UNDOING, result=result)
    run.phase, run.result, run.cause = Phase.UNDOING, result, cause
    run.emit("undoing", error=failure_in(result).type)


def _undo(run: Run) -> Program[None]:
    """Undo what the saga has done, and end it; raise SagaFailedError."""
    result = run.result or b""
    try:
        yield from undo_all(run, failure_in(result))
    except Suspended as waiting:
        yield from _leave(run, waiting, run.cause)
    except (ConfigurationError, StoreRefusedError) as error:
        yield from _leave(run, Suspended(None, {"stuck": str(error)}), error)
    yield from _end(run, Phase.UNDONE, result)
    raise _failed(run.definition, run.key, result) from run.cause


def _end(run: Run, phase: Phase, result: bytes) -> Program[None]:
    leave = Leave(
        id=run.id, token=run.token, phase=phase, due=None, wakes=run.wakes, result=result, ttl=run.definition.ttl
    )
    if not (yield Ask(leave)):
        raise run.lost_error()
    run.owned = False
    run.emit("done" if phase is Phase.DONE else "undone")
    yield from let_go(run)


def _leave(run: Run, waiting: Suspended, cause: BaseException | None = None) -> Program[None]:
    """Leave a saga that waits or is stuck, and raise what its caller is given."""
    due = waiting.due
    if due is not None and run.phase is Phase.FORWARD and run.remaining is not None:
        due = max(0.0, min(due, run.remaining))
    if not (yield Ask(_leaving(run, due, waiting.reason))):
        raise run.lost_error()
    run.owned = False
    reason = reason_in(dump(waiting.reason))
    if "undo" not in waiting.reason:  # that an undo has failed was an event already
        run.emit(_kind_of(waiting), error=waiting.reason.get("error"), reason=reason)
    if due is not None:
        raise pending(run.definition, run.key, due, reason) from cause
    if isinstance(cause, IdempotencyError):
        raise cause
    raise stuck(run.definition, run.key, reason) from cause


def _kind_of(waiting: Suspended) -> SagaEventKind:
    if waiting.due is None:
        return "stuck"
    return "waiting" if waiting.reason.keys() & {"sleep", "signal", "child"} else "retry"


def _give_up(run: Run, error: BaseException) -> Program[None]:
    """Let others go on with a saga whose run was interrupted."""
    # One that is closed can send nothing.
    if not run.owned or run.lost or run.active or isinstance(error, GeneratorExit) or _is_its_own(error):
        return
    failed = isinstance(error, Exception)
    if isinstance(error, StoreError):
        run.emit("unavailable", error=error, reason=str(error))
    due = backoff(run.attempt, 1.0, 300.0) if failed else 0.0
    with suppress(StoreError):
        yield Ask(_leaving(run, due, {"error": type(error).__name__} if failed else {}))


def _is_its_own(error: BaseException) -> bool:
    """Return whether a function of the saga has ended its run: each run would end so. It counts as a crash."""
    if isinstance(error, asyncio.CancelledError):
        # What it awaited was cancelled, and not the task in which it runs.
        with suppress(RuntimeError):
            task = asyncio.current_task()
            return task is None or not task.cancelling()
    return isinstance(error, SystemExit | asyncio.CancelledError)


def _leaving(run: Run, due: float | None, reason: dict[str, Any]) -> Leave:
    return Leave(
        id=run.id, token=run.token, phase=run.phase, due=due, wakes=run.wakes, reason=dump(reason) if reason else b""
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
        case {"step": name, "error": error, "forward": True}:
            return f"after the pivot its step {name} failed with {error}; it is tried again"
        case {"step": name, "verify": error}:
            return f"whether the step {name} is done cannot be found out: {error}; it is asked again"
        case {"step": name, "error": error}:
            return f"the outcome of the step {name} is unknown: {error}; it is tried again"
        case {"step": name, "unknown": True}:
            return f"the outcome of the step {name} is unknown"
        case {"error": error, "forward": True}:
            return f"after the pivot it failed with {error}; it is tried again"
        case {"stuck": why}:
            return str(why)
        case {"error": error}:
            return f"it was interrupted by {error}; it is tried again"
        case _:
            return ""


def pending(definition: Definition, key: str, retry_after: float, reason: str) -> SagaPendingError:
    """Return the error of a saga that has not ended."""
    error = SagaPendingError(f"The saga {definition.name} has not ended: {reason}.")
    error.name, error.key, error.retry_after, error.reason = definition.name, key, retry_after, reason
    return error


def stuck(definition: Definition, key: str, reason: str) -> SagaStuckError:
    """Return the error of a saga that does not go on by itself."""
    record = saga_id(definition.name, key).hex()[:12]
    error = SagaStuckError(f"The saga {definition.name} is stuck: {reason}. See: idempotency saga inspect {record}.")
    error.name, error.key, error.reason = definition.name, key, reason
    return error


def _failed(definition: Definition, key: str, result: bytes) -> SagaFailedError:
    failure = failure_in(result)
    where = f" in the step {failure.step!r}" if isinstance(failure, StepFailedError) else ""
    error = SagaFailedError(f"The saga {definition.name} failed with {failure.type}{where}, and is undone.")
    error.name, error.key, error.failure = definition.name, key, failure
    return error
