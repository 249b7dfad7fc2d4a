"""A step: begun in the journal, done once, and its result or failure recorded for every later run."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from idempotency._engine.verifying import NOT_DONE
from idempotency._outbox.payload import encode_payload
from idempotency._results.by_annotation import load
from idempotency._results.codec import PLAIN_RESULTS, Results, encode_failure, results_of
from idempotency._results.failures import name_of_failure
from idempotency._sagas.journal import Entry, Progress, Write
from idempotency._signature import is_async, name_of, once_per_function
from idempotency.errors import (
    ConfigurationError,
    EmitRefusedError,
    RecordedFailureError,
    StoreError,
    UnreadableError,
)
from idempotency.saga._definition import Definition, definition_of
from idempotency.saga._effects import Call, Join, Pause, Program
from idempotency.saga._run import Run, Suspended, body, head_of, is_unknown, tail_of
from idempotency.saga._undo import check_undo, is_joined, reference
from idempotency.saga._wait import look_again, waiting_for
from idempotency.saga.errors import SagaLostError, SagaPendingError, SagaStuckError, StepFailedError
from idempotency.saga.options import Kind, OnCrash, Retry, backoff, check_exceptions, duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is given to ``step`` besides its function and the arguments of that."""

    undo: Callable[..., Any] | None
    retry: Retry | int | None
    timeout: float | timedelta | None
    on_crash: OnCrash
    verify: Callable[..., Any] | None
    kind: Kind | None
    unknown: tuple[type[BaseException], ...]

    def step(self, run: Run, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """Return the step, or raise ConfigurationError for options that cannot work."""
        check_function(run.definition, "a step", function)
        if self.verify is not None:
            check_function(run.definition, "verify=", self.verify)
        if self.on_crash not in ("rerun", "hold"):
            raise ConfigurationError(f'on_crash must be "rerun" or "hold", not {self.on_crash!r}')
        check_exceptions("unknown", self.unknown)
        return Step(
            name=name,
            function=function,
            args=args,
            kwargs=kwargs,
            undo=self.undo,
            retry=Retry(self.retry) if isinstance(self.retry, int) else self.retry or Retry(1),
            timeout=duration("timeout", self.timeout),
            on_crash=self.on_crash,
            verify=self.verify,
            kind=kind_of(self.kind, self.undo),
            unknown=self.unknown,
            results=_results(function),
            child=definition_of(function),
            joined=is_joined(run.definition, function),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of ``step``.

    ``child``: the definition of its function, if that is a saga. ``joined``: it commits with its entry.
    """

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
    results: Results
    child: Definition | None
    joined: bool


def check_function(definition: Definition, what: str, function: Any) -> None:
    """Raise ConfigurationError for a function that the saga cannot call."""
    if not callable(function):
        raise ConfigurationError(f"{what} needs a function, not {function!r}")
    child = definition_of(function)
    if not definition.asynchronous and is_async(function):
        raise ConfigurationError(f"{name_of(function)} is a coroutine function, and the saga is not: make it async")
    if child is not None and child.asynchronous is not definition.asynchronous:
        raise ConfigurationError(f"the saga {child.name} is not awaited, and {definition.name} is: make it async")


def kind_of(kind: Kind | None, undo: object) -> Kind:
    """Return the kind of a step: compensatable with an undo, else retriable, unless one is given."""
    if kind not in (None, "compensatable", "pivot", "retriable"):
        raise ConfigurationError(f'kind must be "compensatable", "pivot" or "retriable", not {kind!r}')
    if kind == "compensatable" and undo is None:
        raise ConfigurationError("a compensatable step needs undo=")
    if kind in ("pivot", "retriable") and undo is not None:
        raise ConfigurationError(f"a {kind} step is never undone: omit undo=")
    return kind or ("compensatable" if undo is not None else "retriable")


def perform(run: Run, step: Step) -> Program[Any]:
    """Do a step, unless it is done: return its result, or raise its failure."""
    name = run.next_name("step", step.name)
    known = run.entries.get(name)
    digest = _digest(step)
    if known is not None and head_of(known)["args"] != digest:
        raise ConfigurationError(
            f"the step {step.name!r} was begun with other arguments: give it another name, or let the saga pass it the"
            " same values at each run"
        )
    if known is not None and known.progress is Progress.DONE:
        return _result(step, known)
    if known is not None and known.progress is Progress.FAILED and run.is_final(known):
        raise _recorded(step, known)
    if run.called != run.wakes:
        yield from look_again(run)
    run.check()
    if step.undo is not None and run.pivoted:
        raise ConfigurationError(
            f"the step {step.name!r} has undo=, and the pivot is done: nothing is undone after it. Move the step before"
            ' the pivot, or omit undo= (kind="retriable")'
        )
    doing = Doing(run, step, name, _head(run, step, name, digest))
    if known is not None:
        doing.attempt, doing.unknown = known.attempt, is_unknown(known)
        if known.progress is Progress.BEGUN and doing.unknown and step.on_crash == "hold" and step.verify is None:
            doing.check_not_held()
    return (yield from doing.go_on())


class Doing:
    """The attempts of one step. ``unknown``: the effect of an earlier one may have happened."""

    def __init__(self, run: Run, step: Step, name: str, head: dict[str, Any]) -> None:
        self._run = run
        self._step = step
        self._name = name
        self._head = head
        self.attempt = 0
        self.unknown = False

    def check_not_held(self) -> None:
        """Let the saga be stuck: an operator has to find out whether the effect has happened."""
        if self._step.child is None:
            raise Suspended(None, {"step": self._name.removeprefix("step:"), "unknown": True})

    def go_on(self) -> Program[Any]:
        """Try until it is done, or failed as often as it may."""
        step, first = self._step, self.attempt + 1
        while True:
            if self.unknown and step.verify is not None:
                found = yield from self._verify(step.verify)
                if found is not NOT_DONE:
                    return (yield from self._record(found))
                self.unknown = False
            self.attempt += 1
            try:
                value = yield from self._try()
            except _AttemptError as failed:
                yield from self._judge(failed.error, self.attempt - first + 1)
                continue
            return value

    def _verify(self, verify: Callable[..., Any]) -> Program[Any]:
        step, operation = self._step, self._run.operation(self._name, self.attempt)
        try:
            return (yield Call(function=lambda: verify(*step.args, **step.kwargs), operation=operation))
        except (ConfigurationError, StoreError):
            raise
        except Exception as error:
            reason = {"step": self._name.removeprefix("step:"), "verify": type(error).__name__}
            raise Suspended(backoff(self._run.attempt, 1.0, 300.0), reason) from error

    def _try(self) -> Program[Any]:
        step, run = self._step, self._run
        if step.joined:
            return (yield from self._try_joined())
        yield from run.write(self._entry(Progress.BEGUN))
        run.check_owned()  # the process may have been paused meanwhile
        operation = run.operation(self._name, self.attempt)
        keywords = step.kwargs if step.child is None else {**step.kwargs, "key": _key_of_child(run, self._name)}
        call = Call(function=lambda: step.function(*step.args, **keywords), operation=operation, timeout=step.timeout)
        try:
            value = yield call
        except Exception as error:
            raise _AttemptError(error) from error
        return (yield from self._record(value))

    def _try_joined(self) -> Program[Any]:
        step, run, written = self._step, self._run, list[Entry]()

        def write(value: Any) -> Write:
            done = self._done(value)
            written[:] = [done]
            return run.write_of([done], progress=True)

        join = Join(
            function=lambda session: step.function(*step.args, **step.kwargs, session=session),
            claim=run.claim(self._name),
            operation=lambda transaction: run.operation(self._name, self.attempt, transaction),
            write=write,
            called=run.note_called,
            lost=run.lost_error,
            timeout=step.timeout,
        )
        try:
            value = yield join
        except Exception as error:
            raise _AttemptError(error) from error
        run.note(*written)
        return value

    def _record(self, value: Any) -> Program[Any]:
        yield from self._run.write(self._done(value), progress=True)
        return value

    def _done(self, value: Any) -> Entry:
        try:
            result = self._step.results.encode(value)
        except Exception as error:
            raise ConfigurationError(
                f"the result of the step {self._step.name!r} cannot be recorded: {error}. Return what another process"
                " can read, and annotate it"
            ) from error
        return self._entry(Progress.DONE, result, self._run.next_order())

    def _entry(self, progress: Progress, tail: bytes = b"", order: int = 0) -> Entry:
        head = {**self._head, "unknown": True} if self.unknown and progress is not Progress.DONE else self._head
        return Entry(name=self._name, progress=progress, attempt=self.attempt, order=order, body=body(head, tail))

    def _judge(self, error: Exception, tries: int) -> Program[None]:
        """Return where the step is tried again; else raise what its failure means."""
        step, run = self._step, self._run
        if run.lost:
            raise run.lost_error() from error
        match error:
            case ConfigurationError() | StoreError():
                raise error
            case SagaPendingError() | SagaStuckError() | SagaLostError():
                raise waiting_for(error) from error
        self.unknown = self.unknown or (isinstance(error, step.unknown) and not step.joined)
        if isinstance(error, step.retry.on) and tries < step.retry.attempts:
            yield Pause(step.retry.pause(tries))
            run.check()
            return
        if self.unknown and step.kind == "pivot":
            # Neither undone nor passed: first it has to be known whether it is done.
            reason = {"step": self._name.removeprefix("step:"), "error": type(error).__name__}
            run.emit("step-failed", step=reason["step"], attempt=self.attempt, error=error)
            raise Suspended(backoff(run.attempt, 1.0, 300.0), reason) from error
        failed = self._entry(Progress.FAILED, encode_failure(error), run.next_order())
        yield from run.write(failed)
        run.emit("step-failed", step=self._name.removeprefix("step:"), attempt=self.attempt, error=error)
        raise _recorded(step, failed) from error


class _AttemptError(Exception):
    """The function of a step, or its commit, has raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _head(run: Run, step: Step, name: str, digest: str) -> dict[str, Any]:
    """Return what the entry says of the step."""
    head: dict[str, Any] = {"args": digest, "kind": step.kind}
    if step.undo is not None:
        head["undo"] = reference(run.definition, step.undo)
        head["input"] = check_undo(run.definition, step.undo, step.results, step.args, step.kwargs)
    if step.child is not None:
        head["child"] = [step.child.name, _key_of_child(run, name)]
    return head


def _key_of_child(run: Run, name: str) -> str:
    return run.operation(name, 1).derive("child")


def _digest(step: Step) -> str:
    try:
        data = encode_payload([list(step.args), step.kwargs]) or b""
    except EmitRefusedError as error:
        raise ConfigurationError(
            f"the arguments of the step {step.name!r} cannot be recorded: pass what names the things, such as ids"
        ) from error
    # The order of keywords and of the members of a dict does not matter.
    ordered = json.dumps(load(data), sort_keys=True)
    return hashlib.sha256(ordered.encode()).hexdigest()[:32]


@once_per_function
def _results(function: Callable[..., Any]) -> Results:
    child = definition_of(function)
    if child is not None:
        return child.results
    try:
        return results_of(function)
    except ConfigurationError:
        if inspect.isfunction(inspect.unwrap(function)):
            raise
        return PLAIN_RESULTS


def _result(step: Step, entry: Entry) -> Any:
    try:
        return step.results.decode(tail_of(entry))
    except UnreadableError as error:
        raise ConfigurationError(
            f"the recorded result of the step {step.name!r} is not what its function returns: its annotation has"
            " changed, or the result that an operator gave does not fit. Put the code right, or resolve the step as"
            " done with another --result"
        ) from error


def _recorded(step: Step, entry: Entry) -> StepFailedError:
    """Return the error of a failed step, as each run raises it."""
    failure = failure_in(tail_of(entry))
    error = StepFailedError(
        f"The step {step.name!r} failed with {failure.type}; the failure is recorded and not tried again."
    )
    error.step = step.name
    error.unknown = bool(head_of(entry).get("unknown"))
    error.type, error.message = failure.type, failure.message
    error.arguments, error.attributes = failure.arguments, failure.attributes
    return error


def failure_in(data: bytes) -> RecordedFailureError:
    """Return the failure that is recorded in bytes of :func:`encode_failure`; that of a step names its step."""
    try:
        PLAIN_RESULTS.decode(data)
    except RecordedFailureError as failure:
        return _of_step(failure) if failure.type == name_of_failure(StepFailedError()) else failure
    except UnreadableError as error:
        unreadable = RecordedFailureError("The recorded failure cannot be read.")
        unreadable.type = name_of_failure(error)
        return unreadable
    raise AssertionError


def as_data(error: Exception) -> Exception:
    """Return an exception whose attributes are JSON: the failure of a step has some that are not."""
    if not isinstance(error, StepFailedError):
        return error
    found = StepFailedError(str(error))
    vars(found).update(vars(error), arguments=list(error.arguments), attributes=dict(error.attributes))
    return found


def _of_step(failure: RecordedFailureError) -> StepFailedError:
    found = failure.attributes
    error = StepFailedError(failure.message)
    error.step, error.unknown = found.get("step", ""), found.get("unknown", False)
    error.type, error.message = found.get("type", ""), found.get("message", "")
    error.arguments, error.attributes = tuple(found.get("arguments", ())), found.get("attributes", {})
    return error
