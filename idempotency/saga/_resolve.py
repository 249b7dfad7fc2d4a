"""What an operator may change in a saga by hand: how a step or an undo ended, and whether the saga is undone."""

from __future__ import annotations

from typing import Any, Literal

from idempotency._results.codec import PLAIN_RESULTS
from idempotency._sagas.journal import Amend, Entry, Phase, Progress, Saga
from idempotency.errors import ConfigurationError
from idempotency.saga._run import body, head_of, is_unknown
from idempotency.saga.errors import SagaError

Resolution = Literal["done", "not-done"]
"""Whether the effect of a step happened."""


def refused(saga: Saga, why: str) -> SagaError:
    """Return the error of something that an operator may not do with a saga."""
    error = SagaError(f"The saga {saga.row.name} {why}: nothing was changed.")
    error.name, error.key = saga.row.name, saga.row.key
    return error


def resolving(saga: Saga, step: str, outcome: Resolution, result: object, by: str) -> Amend:
    """Return the request that resolves a step, or an undo by ``undo:STEP``; SagaError where there is nothing to."""
    if outcome not in ("done", "not-done"):
        raise ConfigurationError(f'the outcome is "done" or "not-done", not {outcome!r}')
    if outcome == "not-done" and result is not None:
        raise ConfigurationError("a step that is not done has no result")
    if step.startswith("undo:"):
        return _undo_done(saga, step, outcome, result, by)
    known = _step(saga, step)
    _check_open(saga, step, known)
    if outcome == "not-done":
        # An undo of it that was begun is none any more.
        return _amend(saga, without=(known.name, f"undo:{known.name.removeprefix('step:')}"))
    head = {name: value for name, value in head_of(known).items() if name != "unknown"}
    try:
        data = PLAIN_RESULTS.encode(result)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the result of a step is JSON, as its function's annotation writes it: {error}"
        ) from error
    # An undo that was skipped, since the step had failed, is to be done.
    undo = f"undo:{known.name.removeprefix('step:')}"
    skipped = [each.name for each in saga.entries if each.name == undo and each.progress is Progress.SKIPPED]
    done = _done(saga, known.name, known.attempt, body({**head, "resolved": by}, data))
    return _amend(saga, done, without=skipped)


def failing(saga: Saga, failure: bytes) -> Amend:
    """Return the request that fails a saga, so that it is undone."""
    check_undoable(saga)
    return _amend(saga, phase=Phase.UNDOING, result=failure)


def check_undoable(saga: Saga) -> None:
    """Raise SagaError for a saga that cannot be undone, or is."""
    if saga.row.phase is Phase.UNDOING:
        raise refused(saga, "is being undone already")
    for entry in saga.entries:
        if head_of(entry).get("kind") != "pivot":
            continue
        name = entry.name.removeprefix("step:")
        if entry.progress is Progress.DONE:
            raise refused(saga, f"has done its pivot {name}, after which nothing is undone")
        if is_unknown(entry):
            raise refused(saga, f"has begun its pivot {name}, whose outcome is unknown: resolve that step first")


def _step(saga: Saga, step: str) -> Entry:
    name = step if step.startswith("step:") else f"step:{step}"
    steps = {entry.name: entry for entry in saga.entries if entry.name.startswith("step:")}
    if name not in steps:
        those = ", ".join(each.removeprefix("step:") for each in steps) or "none"
        raise refused(saga, f"has no step {step!r}, only these: {those}")
    return steps[name]


def _check_open(saga: Saga, step: str, known: Entry) -> None:
    if known.progress is Progress.DONE and "resolved" not in head_of(known):
        raise refused(saga, f"has done the step {step}, and knows its result")
    # The function went on by a failure that is final: each run must be given the same.
    if known.progress is Progress.FAILED and saga.row.phase is Phase.FORWARD and _is_final(saga, known):
        raise refused(saga, f"knows that the step {step} failed, and goes on by that: compensate undoes it")


def _is_final(saga: Saga, failed: Entry) -> bool:
    pivots = [entry for entry in saga.entries if head_of(entry).get("kind") == "pivot"]
    done = [entry.order for entry in pivots if entry.progress is Progress.DONE]
    return not (failed in pivots and is_unknown(failed)) and (not done or failed.order < min(done))


def _undo_done(saga: Saga, name: str, outcome: Resolution, result: object, by: str) -> Amend:
    step = _step(saga, name.removeprefix("undo:"))
    known = next((entry for entry in saga.entries if entry.name == name), None)
    if saga.row.phase is not Phase.UNDOING or not head_of(step).get("undo"):
        raise refused(saga, f"does not undo the step {name.removeprefix('undo:')}")
    if outcome == "not-done" or result is not None:
        raise ConfigurationError("an undo is resolved as done, without a result; one that is not done is tried again")
    if known is not None and known.progress is not Progress.BEGUN:
        raise refused(saga, f"has done {name} already")
    return _amend(saga, _done(saga, name, known.attempt if known else 0, body({"resolved": by})))


def _done(saga: Saga, name: str, attempt: int, data: bytes) -> Entry:
    order = 1 + max((entry.order for entry in saga.entries), default=0)
    return Entry(name=name, progress=Progress.DONE, order=order, attempt=attempt, body=data)


def _amend(saga: Saga, *entries: Entry, **changes: Any) -> Amend:
    row = saga.row
    return Amend(id=row.id, attempt=row.attempt, token=row.token, entries=entries, **changes)
