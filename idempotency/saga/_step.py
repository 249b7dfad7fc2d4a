"""A step: begun in the journal, done once, and its result or failure recorded for every later run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idempotency._outbox.payload import encode_payload
from idempotency._results.codec import PLAIN_RESULTS, Results, encode_failure, results_of
from idempotency._sagas.journal import Entry, Progress, Write
from idempotency._signature import is_async, name_of, takes_session
from idempotency.errors import ConfigurationError, EmitRefusedError, RecordedFailureError, StoreError
from idempotency.saga._effects import Call, Join, Pause, Program
from idempotency.saga._run import Run, Suspended, body, head_of, tail_of
from idempotency.saga._undo import check_undo, reference
from idempotency.saga._wait import look_again
from idempotency.saga.errors import SagaLostError, SagaPendingError, StepFailedError
from idempotency.saga.options import Kind, OnCrash, Retry


class NotDone:
    """What ``verify=`` returns where the effect of a step is known not to have happened."""


NOT_DONE = NotDone()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of ``step``."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    undo: Callable[..., Any] | None
    retry: Retry
    timeout: float | None
    on_crash: OnCrash
    verify: Callable[..., Any] | None
    kind: Kind
    unknown: tuple[type[BaseException], ...]

    @property
    def child(self) -> bool:
        """Return whether the function is a saga."""
        return hasattr(self.function, "_definition")


def kind_of(kind: Kind | None, undo: object) -> Kind:
    """Return the kind of a step: compensatable with an undo, else retriable, unless one is given."""
    if kind not in (None, "compensatable", "pivot", "retriable"):
        raise ConfigurationError(f'kind must be "compensatable", "pivot" or "retriable", not {kind!r}')
    if kind == "compensatable" and undo is None:
        raise ConfigurationError("a compensatable step needs undo=")
    if kind in ("pivot", "retriable") and undo is not None:
        raise ConfigurationError(f"a {kind} step is never undone: leave undo= out")
    return kind or ("compensatable" if undo is not None else "retriable")


def perform(run: Run, step: Step) -> Program[Any]:
    """Do a step, unless it is done: return its result, or raise its failure."""
    name = run.next_name("step", step.name)
    run.unvisited.discard(name)
    known = run.entries.get(name)
    head = _head(run, step, known)
    if known is not None and known.progress is Progress.DONE:
        return _results(step).decode(tail_of(known))
    if known is not None and known.progress is Progress.FAILED and not run.pivoted:
        raise _recorded(step, known)
    if run.called != run.wakes:
        yield from look_again(run)
    run.check()
    if step.undo is not None and run.pivoted:
        raise ConfigurationError(
            f"the step {step.name!r} has undo=, and the pivot is done: nothing is undone after it. Move the step before"
            ' the pivot, or leave undo= out (kind="retriable")'
        )
    with run.under_way():
        return (yield from _resume(run, step, name, known, head))


def _resume(run: Run, step: Step, name: str, known: Entry | None, head: dict[str, Any]) -> Program[Any]:
    if known is not None and not step.child:
        if step.verify is not None:
            found = yield from _verify(run, step, name, known)
            if found is not NOT_DONE:
                return (yield from _record(run, step, name, known.attempt, head, found))
        elif step.on_crash == "hold":
            reason = {"step": name.removeprefix("step:"), "unknown": True}
            raise Suspended(None, reason)
    return (yield from _attempts(run, step, name, known.attempt if known else 0, head))


def _verify(run: Run, step: Step, name: str, known: Entry) -> Program[Any]:
    verify = step.verify
    assert verify is not None
    operation = run.operation(name, known.attempt)
    return (yield Call(function=lambda: verify(*step.args, **step.kwargs), operation=operation))


def _attempts(run: Run, step: Step, name: str, before: int, head: dict[str, Any]) -> Program[Any]:
    attempt, first = before + 1, before + 1
    while True:
        try:
            return (yield from _try(run, step, name, attempt, head))
        except (ConfigurationError, SagaLostError, StoreError):
            raise
        except SagaPendingError as error:
            if not step.child:
                raise
            raise Suspended(min(error.retry_after, 60.0), {"child": error.name, "waits": error.reason}) from error
        except Exception as error:
            again = isinstance(error, step.retry.on) and attempt - first + 1 < step.retry.attempts
            if not again:
                yield from _fail(run, step, name, attempt, head, error)
            yield Pause(step.retry.pause(attempt - first + 1))
            run.check()
            attempt += 1


def _try(run: Run, step: Step, name: str, attempt: int, head: dict[str, Any]) -> Program[Any]:
    if run.definition.sessions is not None and takes_session(step.function):
        return (yield from _try_joined(run, step, name, attempt, head))
    yield from run.write(_entry(name, Progress.BEGUN, attempt, head))
    operation = run.operation(name, attempt)
    keywords = {**step.kwargs, "key": operation.derive("child")} if step.child else step.kwargs
    value = yield Call(
        function=lambda: step.function(*step.args, **keywords), operation=operation, timeout=step.timeout
    )
    return (yield from _record(run, step, name, attempt, head, value))


def _try_joined(run: Run, step: Step, name: str, attempt: int, head: dict[str, Any]) -> Program[Any]:
    written: list[Entry] = []

    def write(value: Any) -> Write:
        done = _done(run, step, name, attempt, head, value)
        written[:] = [done]
        return run.write_of([done], progress=True)

    value = yield Join(
        function=lambda session: step.function(*step.args, **step.kwargs, session=session),
        claim=run.claim(name),
        attempt=attempt,
        name=f"{run.definition.name} {name}",
        write=write,
        lost=run.lost_error,
        timeout=step.timeout,
    )
    run.note(*written)
    return value


def _record(run: Run, step: Step, name: str, attempt: int, head: dict[str, Any], value: Any) -> Program[Any]:
    done = _done(run, step, name, attempt, head, value)
    yield from run.write(done, progress=True)
    return value


def _done(run: Run, step: Step, name: str, attempt: int, head: dict[str, Any], value: Any) -> Entry:
    try:
        result = _results(step).encode(value)
    except Exception as error:
        raise ConfigurationError(
            f"the result of the step {step.name!r} cannot be recorded: {error}. Return what another process can read,"
            " and annotate it"
        ) from error
    return _entry(name, Progress.DONE, attempt, head, result, run.next_order())


def _fail(run: Run, step: Step, name: str, attempt: int, head: dict[str, Any], error: Exception) -> Program[None]:
    joined = run.definition.sessions is not None and takes_session(step.function)
    unknown = isinstance(error, step.unknown) and not joined
    failed = _entry(
        name, Progress.FAILED, attempt, {**head, "unknown": unknown}, encode_failure(error), run.next_order()
    )
    yield from run.write(failed)
    raise _recorded(step, failed) from error


def _entry(
    name: str, progress: Progress, attempt: int, head: dict[str, Any], tail: bytes = b"", order: int = 0
) -> Entry:
    return Entry(name=name, progress=progress, attempt=attempt, order=order, body=body(head, tail))


def _head(run: Run, step: Step, known: Entry | None) -> dict[str, Any]:
    """Return what the entry says of the step, which other arguments under its name must not change."""
    digest = _digest(step)
    if known is not None:
        head = head_of(known)
        if head["args"] != digest:
            raise ConfigurationError(
                f"the step {step.name!r} was begun with other arguments: give it another name, or let the saga pass it"
                " the same values at each run"
            )
        return {**head, "kind": step.kind}
    head = {"args": digest, "kind": step.kind}
    if step.undo is not None:
        head["undo"] = reference(run.definition, step.undo)
        head["input"] = check_undo(run.definition, step.undo, step.args, step.kwargs)
    return head


def _digest(step: Step) -> str:
    try:
        data = encode_payload([list(step.args), step.kwargs])
    except EmitRefusedError as error:
        raise ConfigurationError(
            f"the arguments of the step {step.name!r} cannot be recorded: pass what names the things, such as ids"
        ) from error
    return hashlib.sha256(data or b"").hexdigest()[:32]


def _results(step: Step) -> Results:
    definition = getattr(step.function, "_definition", None)
    if definition is not None:
        found: Results = definition.results
        return found
    try:
        return results_of(step.function)
    except ConfigurationError:
        if inspect.isfunction(inspect.unwrap(step.function)):
            raise
        return PLAIN_RESULTS


def _recorded(step: Step, entry: Entry) -> StepFailedError:
    """Return the error of a failed step, as each run raises it."""
    error = StepFailedError(f"The step {step.name!r} failed; the failure is recorded and not tried again.")
    error.step = step.name
    error.unknown = bool(head_of(entry).get("unknown"))
    failure = failure_in(tail_of(entry))
    error.type, error.message = failure.type, failure.message
    error.arguments, error.attributes = failure.arguments, failure.attributes
    return error


def failure_in(data: bytes) -> RecordedFailureError:
    """Return the failure that is recorded in bytes of :func:`encode_failure`."""
    try:
        PLAIN_RESULTS.decode(data)
    except RecordedFailureError as failure:
        return failure
    raise AssertionError


def check_step(
    run: Run,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    undo: Callable[..., Any] | None,
    retry: Retry | int | None,
    timeout: float | None,
    on_crash: OnCrash,
    verify: Callable[..., Any] | None,
    kind: Kind | None,
    unknown: tuple[type[BaseException], ...],
) -> Step:
    """Return a step, or raise ConfigurationError for options that cannot work."""
    if not callable(function):
        raise ConfigurationError(f"a step needs a function, not {function!r}")
    if not run.definition.asynchronous and is_async(function):
        raise ConfigurationError(f"{name_of(function)} is a coroutine function, and the saga is not: make it async")
    if on_crash not in ("rerun", "hold"):
        raise ConfigurationError(f'on_crash must be "rerun" or "hold", not {on_crash!r}')
    tries = Retry(retry) if isinstance(retry, int) else retry or Retry(1)
    return Step(
        name=name,
        function=function,
        args=args,
        kwargs=kwargs,
        undo=undo,
        retry=tries,
        timeout=timeout,
        on_crash=on_crash,
        verify=verify,
        kind=kind_of(kind, undo),
        unknown=unknown,
    )
