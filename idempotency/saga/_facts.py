"""Everything that is recorded of a saga, for an operator: its steps, undos, waits, signals and resources."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from idempotency._sagas.journal import Entry, Phase, Progress, Saga
from idempotency.saga._run import head_of, is_unknown, tail_of
from idempotency.saga._undo import to_undo
from idempotency.saga._view import SagaView, error_in, is_run, plain
from idempotency.saga._wait import ABOUT, signal_of

FactKind = Literal["step", "undo", "sleep", "wait", "signal", "patch", "hold", "cancel"]

FactState = Literal[
    "running",  # its function is called now
    "unknown",  # it was begun, and how it ended is not known
    "waiting",  # a wait or a child has not ended; an undo has not begun
    "failing",  # an undo has failed, and is tried again
    "failed",
    "done",
    "timed-out",  # no signal came in time
    "old",  # of a patch: the saga goes on by the old code
    "skipped",  # an undo of a step that failed: nothing is to be undone
    "held",  # of a resource: this saga holds it
    "busy",  # of a resource: another saga holds it
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaFact:
    """One thing that is recorded of a saga. ``began`` and ``changed``: seconds since its first and its last write.

    ``note``: what else is to be known, in words. ``size``: bytes of the result of a step. ``value``: the result of a
    step, the failure of a step or of an undo, or the value of a signal, only if it was asked for, and is JSON.
    """

    kind: FactKind
    name: str
    state: FactState
    attempts: int
    began: float
    changed: float
    note: str = ""
    error: str = ""
    size: int | None = None
    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaDetail(SagaView):
    """Everything that is recorded of a saga. ``facts`` are in the order in which they began.

    ``input`` and ``result``: only if they were asked for, and are JSON; their sizes are in bytes. The result of a saga
    that has failed is its failure.
    """

    facts: tuple[SagaFact, ...]
    input_size: int
    result_size: int | None
    input: Any = None
    result: Any = None


class Facts:
    """The facts of one saga. ``holders``: who has each resource, in words; empty for this saga, absent for nobody."""

    def __init__(self, saga: Saga, holders: Mapping[str, str], show: bool) -> None:
        self._saga = saga
        self._holders = holders
        self._show = show
        self._signals = {each.name: each for each in saga.entries if _kind(each) == "signal"}

    def all(self) -> tuple[SagaFact, ...]:
        """Return the facts in the order in which they began."""
        # The clocks of the stores count milliseconds: of two in one, the first is what has ended first.
        entries = sorted(self._saga.entries, key=lambda entry: (-entry.began, entry.order or sys.maxsize))
        return (*map(self._fact, entries), *self._undos_to_come())

    def _fact(self, entry: Entry) -> SagaFact:
        kind, head, tail = _kind(entry), head_of(entry), tail_of(entry)
        error = error_in(tail) if entry.progress is Progress.FAILED else ""
        value = plain(tail) if kind in ("step", "undo") else head.get("value")
        return SagaFact(
            kind=kind,
            name=_name(entry),
            state=self._state(entry),
            attempts=entry.attempt,
            began=entry.began,
            changed=entry.changed,
            note=", ".join(self._notes(entry)),
            error=error or head.get("error", ""),
            size=len(tail) if tail and kind == "step" else None,
            value=value if self._show else None,
        )

    def _state(self, entry: Entry) -> FactState:
        match _kind(entry), entry.progress:
            case "wait", _:
                signal = self._signals.get(signal_of(_name(entry), head_of(entry)["about"]))
                return "waiting" if signal is None else self._state(signal)
            case "hold", _:
                holder = self._holders.get(_name(entry))
                if holder is None:
                    return "failed" if entry.progress is Progress.FAILED else "done"
                return "busy" if holder else "held"
            case "signal", Progress.SKIPPED:
                return "timed-out"
            case "patch", Progress.SKIPPED:
                return "old"
            case "undo", Progress.SKIPPED:
                return "skipped"
            case "sleep", Progress.BEGUN:
                return "waiting"
            case _, Progress.FAILED:
                return "unknown" if is_unknown(entry) else "failed"
            case _, Progress.BEGUN:
                return self._state_of_begun(entry)
        return "done"

    def _state_of_begun(self, entry: Entry) -> FactState:
        if head_of(entry).get("error"):
            return "failing"
        if is_run(self._saga.row):
            return "running"
        return "waiting" if "child" in head_of(entry) else "unknown"

    def _notes(self, entry: Entry) -> Iterator[str]:
        head = head_of(entry)
        if head.get("kind"):
            yield head["kind"]
        if head.get("undo"):
            yield f"undo {head['undo']}"
        if "child" in head:
            yield f"saga {'/'.join(head['child'])}"
        if "seconds" in head:
            yield f"{max(0.0, head['seconds'] - entry.began):.0f} s remaining"
        if _kind(entry) == "hold" and self._holders.get(_name(entry)):
            yield f"held by {self._holders[_name(entry)]}"
        if head.get("by"):
            yield f"by {head['by']}"
        if "resolved" in head:
            yield f"resolved by {head['resolved'] or 'an operator'}"

    def _undos_to_come(self) -> Iterator[SagaFact]:
        if self._saga.row.phase is not Phase.UNDOING:
            return
        begun = {_name(entry) for entry in self._saga.entries if _kind(entry) == "undo"}
        for step in to_undo(self._saga.entries):
            if _name(step) not in begun:
                yield SagaFact(kind="undo", name=_name(step), state="waiting", attempts=0, began=0.0, changed=0.0)


def _kind(entry: Entry) -> Any:
    return entry.name.partition(":")[0]


def _name(entry: Entry) -> str:
    return entry.name.partition(":")[2].partition(ABOUT)[0]
