"""Undo what a saga has done: in reverse order, what is unknown first, each until it succeeds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any, get_type_hints

from idempotency._results.codec import Results
from idempotency._sagas.journal import Entry, Progress
from idempotency._signature import is_async, name_of, takes_session
from idempotency.errors import ConfigurationError, IdempotencyError, RecordedFailureError, UnreadableError
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Call, Join, Pause, Program
from idempotency.saga._input import Input, results_named
from idempotency.saga._run import Run, Suspended, body, head_of, tail_of
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
    space = definition.function.__globals__
    name = getattr(undo, "__name__", "")
    owner = getattr(undo, "__self__", None)
    candidates = [name]
    candidates += [f"{each}.{name}" for each, value in space.items() if value is owner or value is _module(undo)]
    for candidate in candidates:
        if _found(space, candidate) == undo:
            return candidate
    raise ConfigurationError(
        f"the undo {name_of(undo)} has no name in the module of the saga {definition.name}, so that another process"
        " could not find it after a crash: define it, or import it, at the top of that module; it cannot be a lambda or"
        " a function inside of a function"
    )


def _module(function: Callable[..., Any]) -> ModuleType | None:
    return sys.modules.get(getattr(function, "__module__", None) or "")


def _found(space: dict[str, Any], path: str) -> Any:
    first, _, rest = path.partition(".")
    found = space.get(first)
    return getattr(found, rest, None) if rest else found


def _resolve(definition: Definition, entry: Entry) -> Callable[..., Any]:
    step, path = entry.name.removeprefix("step:"), str(head_of(entry)["undo"])
    undo = definition.undos.get(step.partition("#")[0]) or _found(definition.function.__globals__, path)
    # What is stored only names a function of the application, and never one of Python itself.
    package = (getattr(undo, "__module__", None) or "builtins").partition(".")[0]
    if not callable(undo) or package in sys.stdlib_module_names - {"__main__"}:
        raise ConfigurationError(
            f"the undo of the step {step!r} was {path}, which the module of the saga does not have: bring it back, or"
            f" give @saga undos={{{step.partition('#')[0]!r}: ...}}"
        )
    found: Callable[..., Any] = undo
    return found


def to_undo(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the steps that are to be undone: those whose outcome is unknown, then the others, latest first."""
    steps = [entry for entry in entries if entry.name.startswith("step:") and head_of(entry).get("undo")]
    unknown = [entry for entry in steps if is_unknown(entry)]
    done = [entry for entry in steps if entry.progress is Progress.DONE]
    yield from sorted(unknown, key=lambda entry: entry.began)
    yield from sorted(done, key=lambda entry: -entry.order)


def is_unknown(entry: Entry) -> bool:
    """Return whether the effect of a step may have happened."""
    begun = entry.progress is Progress.BEGUN
    return begun or (entry.progress is Progress.FAILED and bool(head_of(entry).get("unknown")))


def undo_all(run: Run, failure: RecordedFailureError) -> Program[None]:
    """Undo every step; where an undo fails, it is tried again, and what was done before it waits."""
    for step in to_undo(run.entries.values()):
        name = f"undo:{step.name.removeprefix('step:')}"
        known = run.entries.get(name)
        if known is None or known.progress is Progress.BEGUN:
            yield from _undo(run, step, name, known.attempt if known else 0, failure)


def _undo(run: Run, step: Entry, name: str, attempt: int, failure: RecordedFailureError) -> Program[None]:
    undo = _resolve(run.definition, step)
    for attempt in range(attempt + 1, sys.maxsize):  # noqa: B020
        if run.lost:
            raise run.lost_error()
        try:
            yield from _try(run, step, name, attempt, undo, failure)
        except ConfigurationError:
            raise
        except (UnreadableError, Exception) as error:
            if run.lost or (isinstance(error, IdempotencyError) and error.retryable):
                raise
            reason = {"undo": name.removeprefix("undo:"), "error": type(error).__name__, "attempt": attempt}
            yield from run.write(_entry(name, Progress.BEGUN, attempt, reason))
            pause = backoff(attempt, 0.05, 300.0)
            if attempt >= _QUICK:
                raise Suspended(pause, reason) from error
            yield Pause(pause)
        else:
            return


def _entry(name: str, progress: Progress, attempt: int, head: dict[str, Any], order: int = 0) -> Entry:
    return Entry(name=name, progress=progress, attempt=attempt, order=order, body=body(head))


def _try(
    run: Run, step: Entry, name: str, attempt: int, undo: Callable[..., Any], failure: RecordedFailureError
) -> Program[None]:
    arguments = _arguments(step, undo, failure)
    operation = run.operation(name, attempt)
    if run.definition.sessions is not None and takes_session(undo):
        done = _entry(name, Progress.DONE, attempt, {}, run.next_order())
        yield Join(
            function=lambda session: undo(**arguments, session=session),
            claim=run.claim(name),
            attempt=attempt,
            name=operation.name,
            write=lambda _: run.write_of([done], progress=True),
            lost=run.lost_error,
        )
        run.note(done)
        return
    yield from run.write(_entry(name, Progress.BEGUN, attempt, {}))
    yield Call(function=lambda: undo(**arguments), operation=operation)
    yield from run.write(_entry(name, Progress.DONE, attempt, {}, run.next_order()), progress=True)


def _arguments(step: Entry, undo: Callable[..., Any], failure: RecordedFailureError) -> dict[str, Any]:
    parameters = inspect.signature(undo).parameters
    head = head_of(step)
    found = undo_input(undo).decode(head["input"].encode())
    if "failure" in parameters:
        found["failure"] = failure
    if "result" in parameters:
        known = step.progress is Progress.DONE
        found["result"] = _undo_result(undo).decode(tail_of(step)) if known else None
    return found


def check_undo(definition: Definition, undo: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments of an undo as JSON; ConfigurationError for an undo that could not run after a crash."""
    if is_async(undo) and not definition.asynchronous:
        raise ConfigurationError(f"the undo {name_of(undo)} is a coroutine function, and the saga is not")
    try:
        return undo_input(undo).encode(args, kwargs).decode()
    except TypeError as error:
        raise ConfigurationError(
            f"the undo {name_of(undo)} is called with the arguments of its step, and result= and failure= if it has"
            f" them: {error}"
        ) from error
