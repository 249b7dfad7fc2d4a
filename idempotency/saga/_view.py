"""A saga as an operator sees it: where it is, why, and what happens next."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from idempotency._results.by_annotation import dump, load
from idempotency._results.codec import PLAIN_RESULTS
from idempotency._sagas.journal import FORMAT, Entry, Phase, Progress, Row
from idempotency.errors import RecordedFailureError, UnreadableError
from idempotency.saga._lifecycle import reason_in
from idempotency.saga._run import head_of, tail_of
from idempotency.saga._wait import signal_of
from idempotency.saga.errors import StepFailedError

SagaState = Literal["running", "waiting", "stuck", "undoing", "done", "undone"]
"""The state of a saga.

``running``: an owner runs it. ``waiting``: for what its reason says, or for a sweeper. ``stuck``: for an operator.
``undoing``: it has failed, and is being undone. ``done`` and ``undone``: it has ended.
"""

_OF_FUNCTION = frozenset({"sleep", "signal", "child", "step", "forward"})
"""What is in reasons for which the saga's function waits."""

_OWNER = 12
"""How many digits of an owner's token are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaView:
    """A saga in one line. ``age``, ``next_in`` and ``deadline_in`` are in seconds, by the clock of the store.

    ``step``: the one that was begun last and has not ended, as :meth:`SagaOperations.resolve` takes it. ``reason``:
    what the saga waits for, or why it is stuck. ``error``: the class of the last failure. ``next``: what happens by
    itself, in ``next_in``; empty and None where nothing does. ``owner``: how the token of the process begins that runs
    it. ``attempts`` counts the runs, ``crashes`` those that ended without a word since a step was done.
    """

    id: str
    name: str
    key: str
    state: SagaState
    step: str
    reason: str
    error: str
    next: str
    next_in: float | None
    owner: str
    age: float
    attempts: int
    crashes: int
    deadline_in: float | None


def view_of(row: Row, entries: Iterable[Entry] = ()) -> dict[str, Any]:
    """Return the values of a :class:`SagaView`; ``entries`` tell the step where the row does not."""
    following, following_in = _next(row)
    return {
        "id": row.id.hex(),
        "name": row.name,
        "key": row.key,
        "state": state_of(row),
        "step": step_in(row) or _last_step(row, entries),
        "reason": _in_words(row),
        "error": _error(row, entries),
        "next": following,
        "next_in": following_in,
        "owner": row.token[:_OWNER],
        "age": row.age,
        "attempts": row.attempt,
        "crashes": row.crashes,
        "deadline_in": row.deadline_in,
    }


def state_of(row: Row) -> SagaState:
    """Return the state of a saga."""
    if row.phase.ended:
        return "done" if row.phase is Phase.DONE else "undone"
    if row.due_in is None:
        return "stuck"
    if row.phase is Phase.UNDOING:
        return "undoing"
    return "running" if is_run(row) else "waiting"


def is_run(row: Row) -> bool:
    """Return whether an owner runs the saga now."""
    return bool(row.token) and (row.due_in or 0) > 0


def step_in(row: Row) -> str:
    """Return the step that the reason names; empty where it names none, or may be of an earlier run."""
    if row.token or row.phase.ended:
        return ""
    match reason_of(row):
        case {"step": name}:
            return str(name)
        case {"undo": name}:
            return f"undo:{name}"
        case {"sleep": name}:
            return f"sleep:{name}"
        case {"signal": name}:
            return f"wait:{name}"
    return ""


def plain(data: bytes | None) -> Any:
    """Return a recorded result as JSON, of a failure its type and message; None where it is none."""
    if data:
        try:
            return PLAIN_RESULTS.decode(data)
        except RecordedFailureError as failure:
            return {"type": failure.type, "message": failure.message}
        except UnreadableError:
            return None
    return None


def error_in(data: bytes | None) -> str:
    """Return the class of a recorded failure; of that of a step, the class of its cause."""
    if data:
        with suppress(UnreadableError):
            try:
                PLAIN_RESULTS.decode(data)
            except RecordedFailureError as failure:
                return str(
                    failure.attributes.get("type", failure.type) if "step" in failure.attributes else failure.type
                )
    return ""


def reason_of(row: Row) -> dict[str, Any]:
    """Return what the saga waits for, or why it is stuck, as data."""
    found: dict[str, Any] = load(row.reason) if row.reason else {}
    # One that an operator has failed has the reason of before.
    before = "undo" not in found and not _OF_FUNCTION.isdisjoint(found)
    return {} if row.phase is Phase.UNDOING and before else found


def _in_words(row: Row) -> str:
    if row.version > FORMAT:
        return "a newer release of the library has recorded it"
    if row.phase.ended:
        return ""
    if row.token:
        return "it runs" if is_run(row) else "its owner ended without a word"
    if not row.attempt:
        return "it is recorded, and not begun"
    return reason_in(dump(reason_of(row))) or "it is due"


def _next(row: Row) -> tuple[str, float | None]:
    if row.phase.ended or row.due_in is None:
        return "", None
    if is_run(row):
        return "another run, unless its owner renews the lease", row.due_in
    return "undo" if row.phase is Phase.UNDOING else "run", max(row.due_in, 0.0)


def _last_step(row: Row, entries: Iterable[Entry]) -> str:
    """Return the step that was begun last, or that fails after the pivot; while the saga is undone, the undo."""
    open_ = (Progress.BEGUN, Progress.FAILED) if reason_of(row).get("forward") else (Progress.BEGUN,)
    undoing = row.phase is Phase.UNDOING
    found = {entry.name: entry for entry in entries if entry.name.startswith("undo:") or not undoing}
    # What is held, and a wait whose signal was given, stay as they were begun.
    over = {name for name in found if name.startswith("hold:")}
    waits = {name: head_of(entry)["about"] for name, entry in found.items() if name.startswith("wait:")}
    over |= {name for name, about in waits.items() if signal_of(name.removeprefix("wait:"), about) in found}
    steps = [entry for name, entry in found.items() if entry.progress in open_ and name not in over]
    last = min(steps, key=lambda entry: entry.changed, default=None)
    return "" if last is None else last.name.removeprefix("step:")


def _error(row: Row, entries: Iterable[Entry]) -> str:
    reason = reason_of(row)
    error = str(reason.get("error") or reason.get("verify") or "")
    if error and error != StepFailedError.__name__:
        return error
    if row.phase in (Phase.UNDOING, Phase.UNDONE):
        return error_in(row.result)
    failed = [entry for entry in entries if entry.progress is Progress.FAILED]
    return error_in(tail_of(min(failed, key=lambda entry: entry.changed))) if failed else error
