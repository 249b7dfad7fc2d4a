"""Undo what a saga has done: in reverse order, what is unknown first, each until it succeeds."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, get_type_hints

from idempotency._results.codec import Results, encode_failure
from idempotency._sagas.journal import Entry, Phase, Progress
from idempotency._signature import is_async, name_of, needs_session, takes_session
from idempotency.errors import ConfigurationError, RecordedFailureError
from idempotency.saga._definition import Definition, saga_named
from idempotency.saga._effects import Call, Join, Pause, Program
from idempotency.saga._input import Input, results_named
from idempotency.saga._run import Run, Suspended, body, head_of, is_unknown, tail_of
from idempotency.saga._wait import waiting_for
from idempotency.saga.errors import SagaLostError, SagaPendingError, SagaStuckError
from idempotency.saga.options import backoff

_GIVEN = ("result", "failure", "session")
"""Keywords that an undo function is given if it has them."""

_QUICK = 3
"""How many attempts of an undo follow at once. Then the saga waits, so that others can be undone by this process."""


@lru_cache(maxsize=1024)
def undo_input(undo: Callable[..., Any]) -> Input:
    """Return how the arguments of an undo are recorded."""
    return Input(undo, _GIVEN)


@lru_cache(maxsize=1024)
def _undo_result(undo: Callable[..., Any]) -> Results:
    parameter = inspect.signature(undo).parameters["result"]
    hints = get_type_hints(inspect.unwrap(undo), include_extras=True)
    return results_named(hints.get("result", parameter.annotation))


def reference(definition: Definition, undo: Callable[..., Any]) -> str:
    """Return the name by which another process finds an undo function: that of the saga's module for it.

    Raises :class:`~idempotency.errors.ConfigurationError`, with the remedy, for a function without such a name.
    """
    name = getattr(undo, "__name__", "")
    if definition.names.get(name) == undo:
        return str(name)
    owner = getattr(undo, "__self__", None)
    module = sys.modules.get(getattr(undo, "__module__", None) or "")
    for each, value in list(definition.names.items()):
        if value is undo:
            return each
        if (value is owner or value is module) and getattr(value, name, None) == undo:
            return f"{each}.{name}"
    raise ConfigurationError(
        f"the undo {name_of(undo)} has no name in the module of the saga {definition.name}, so that another process"
        " could not find it after a crash: define it, or import it, at the top of that module; it cannot be a lambda or"
        " a function inside of a function"
    )


def _found(names: dict[str, Any], path: str) -> Any:
    first, _, rest = path.partition(".")
    found = names.get(first)
    return getattr(found, rest, None) if rest else found


def _resolve(definition: Definition, entry: Entry) -> Callable[..., Any]:
    step, path = entry.name.removeprefix("step:"), str(head_of(entry)["undo"])
    undo = definition.undos.get(step.partition("#")[0]) or _found(definition.names, path)
    # What is stored only names a function of the application, and never one of Python itself.
    package = (getattr(undo, "__module__", None) or "builtins").partition(".")[0]
    if not callable(undo) or package in sys.stdlib_module_names - {"__main__"}:
        raise ConfigurationError(
            f"the undo of the step {step!r} was {path}, which the module of the saga does not have: bring it back, or"
            f" give @saga undos={{{step.partition('#')[0]!r}: ...}}"
        )
    found: Callable[..., Any] = undo
    return found


def to_undo(entries: Iterable[Entry]) -> list[Entry]:
    """Return the steps that are to be undone: those whose outcome is unknown, then the others, latest first."""
    steps = _with_undo(entries)
    unknown = [entry for entry in steps if is_unknown(entry)]
    done = [entry for entry in steps if entry.progress is Progress.DONE]
    return [*sorted(unknown, key=lambda entry: entry.began), *sorted(done, key=lambda entry: -entry.order)]


def _with_undo(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.name.startswith("step:") and head_of(entry).get("undo")]


def _name(step: Entry) -> str:
    return f"undo:{step.name.removeprefix('step:')}"


def undo_all(run: Run, failure: RecordedFailureError) -> Program[None]:
    """Undo every step; where an undo fails, it is tried again, and what was done before it waits."""
    for child in [each for each in run.entries.values() if "child" in head_of(each) and is_unknown(each)]:
        yield from _abandon(run, child)
    steps = to_undo(run.entries.values())
    # A step that failed has no effect: nothing is to be undone, which is recorded too.
    without = [
        each for each in _with_undo(run.entries.values()) if each not in steps and _name(each) not in run.entries
    ]
    if without:
        yield from run.write(*(_entry(_name(each), Progress.SKIPPED, 0, {"failed": True}) for each in without))
    for step in steps:
        known = run.entries.get(_name(step))
        if known is None or known.progress is Progress.BEGUN:
            yield from _undo(run, step, known.attempt if known else 0, failure)


def _abandon(run: Run, step: Entry) -> Program[None]:
    """Cancel a child that may go on, and note how it ended; wait where it has not."""
    name, (saga, key) = step.name.removeprefix("step:"), head_of(step)["child"]
    child: Any = saga_named(saga, run.definition.store)
    if child is None:
        raise ConfigurationError(f"the step {name!r} is the saga {saga}, which this process does not have: import it")
    by = f"{run.definition.name}: it is undone"
    try:
        ended = yield Call(function=lambda: child._abandon(key, by), operation=run.operation(step.name, step.attempt))
    except (SagaPendingError, SagaStuckError, SagaLostError) as error:
        wait = waiting_for(error)
        raise Suspended(wait.due, {"undo": name, **wait.reason}) from error
    head = {each: value for each, value in head_of(step).items() if each != "unknown"}
    result = ended.row.result if ended is not None and ended.row.phase is Phase.DONE else None
    progress, tail = (Progress.FAILED, tail_of(step)) if result is None else (Progress.DONE, result)
    yield from run.write(replace(step, progress=progress, order=run.next_order(), body=body(head, tail)))


def _undo(run: Run, step: Entry, before: int, failure: RecordedFailureError) -> Program[None]:
    undo, name = _resolve(run.definition, step), _name(step)
    for attempt in itertools.count(before + 1):
        run.check_owned()
        error = yield from _try(run, step, attempt, undo, failure)
        if error is None:
            return
        reason = {"undo": name.removeprefix("undo:"), "error": type(error).__name__, "attempt": attempt}
        failed = Entry(name=name, progress=Progress.BEGUN, attempt=attempt, body=body(reason, encode_failure(error)))
        yield from run.write(failed)
        run.emit("undo-failed", step=name.removeprefix("undo:"), attempt=attempt, error=error)
        pause = backoff(attempt, 0.05, 300.0)
        if attempt >= _QUICK:
            raise Suspended(pause, reason) from error
        yield Pause(pause)


def _entry(name: str, progress: Progress, attempt: int, head: dict[str, Any], order: int = 0) -> Entry:
    return Entry(name=name, progress=progress, attempt=attempt, order=order, body=body(head))


def _try(
    run: Run, step: Entry, attempt: int, undo: Callable[..., Any], failure: RecordedFailureError
) -> Program[Exception | None]:
    """Call an undo once, and return its error."""
    name = _name(step)
    joined = is_joined(run.definition, undo)
    if not joined:
        yield from run.write(_entry(name, Progress.BEGUN, attempt, {}))
        run.check_owned()  # the process may have been paused meanwhile
    done = _entry(name, Progress.DONE, attempt, {}, run.next_order())
    try:
        yield _call(run, step, done, undo, _arguments(step, undo, failure), joined)
    except ConfigurationError:
        raise
    except Exception as error:
        return error
    if joined:
        run.note(done)
    else:
        yield from run.write(done, progress=True)
    return None


def _call(
    run: Run, step: Entry, done: Entry, undo: Callable[..., Any], arguments: dict[str, Any], joined: bool
) -> Call | Join:
    if not joined:
        return Call(function=lambda: undo(**arguments), operation=run.operation(done.name, done.attempt))
    return Join(
        function=lambda session: undo(**arguments, session=session),
        claim=run.claim(done.name),
        operation=lambda transaction: run.operation(done.name, done.attempt, transaction),
        write=lambda _: run.write_of([done], progress=True),
        called=run.note_called,
        lost=run.lost_error,
    )


def _arguments(step: Entry, undo: Callable[..., Any], failure: RecordedFailureError) -> dict[str, Any]:
    parameters = inspect.signature(undo).parameters
    found = undo_input(undo).decode(head_of(step)["input"].encode())
    if "failure" in parameters:
        found["failure"] = failure
    if "result" in parameters:
        known = step.progress is Progress.DONE
        found["result"] = _undo_result(undo).decode(tail_of(step)) if known else None
    return found


def is_joined(definition: Definition, function: Callable[..., Any]) -> bool:
    """Return whether a function commits with its entry; ConfigurationError where there is no session for it."""
    if definition.sessions is not None:
        return takes_session(function)
    try:
        needs = needs_session(function)
    except ValueError:  # a function that is not written in Python may have no signature
        return False
    if needs:
        raise ConfigurationError(
            f"{name_of(function)} takes a session, and the saga {definition.name} has none: give @saga session="
        )
    return False


def check_undo(
    definition: Definition, undo: Callable[..., Any], results: Results, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Return the arguments of an undo as JSON; ConfigurationError for an undo that could not run after a crash."""
    if is_async(undo) and not definition.asynchronous:
        raise ConfigurationError(f"the undo {name_of(undo)} is a coroutine function, and the saga is not")
    is_joined(definition, undo)
    if "result" in inspect.signature(undo).parameters and not _undo_result(undo).reads(results):
        raise ConfigurationError(
            f"the undo {name_of(undo)} cannot read the result of its step: annotate result= with what the step returns,"
            " or None"
        )
    try:
        return undo_input(undo).encode(args, kwargs).decode()
    except TypeError as error:
        raise ConfigurationError(
            f"the undo {name_of(undo)} is called with the arguments of its step, and result= and failure= if it has"
            f" them: {error}"
        ) from error
