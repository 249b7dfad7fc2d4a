"""One run of a saga: what is recorded of it, and what this process knows while it owns it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any

from idempotency._results.by_annotation import dump
from idempotency._rules import Claim
from idempotency._sagas.journal import MOST_CHARACTERS, Entry, Phase, Progress, Saga, Write
from idempotency.errors import ConfigurationError
from idempotency.operation import Lost, Operation
from idempotency.saga._effects import Ask, Program
from idempotency.saga.errors import CancelledByOperatorError, DeadlineError, SagaLostError

if TYPE_CHECKING:
    from idempotency.saga._definition import Definition

CANCEL = "cancel"
"""The entry by which an operator cancels a saga."""

_OUTSIDE = (
    "There is no running saga here: call this in a function that @saga decorates, and not in the function of a step"
)
RUNNING: ContextVar[Run | None] = ContextVar("idempotency_saga", default=None)


def running() -> Run:
    """Return the run of the saga that calls this; ConfigurationError outside of one."""
    run = RUNNING.get()
    if run is None:
        raise ConfigurationError(_OUTSIDE)
    return run


class Suspended(BaseException):
    """The saga has to wait. It ends this run, and no handler of errors in the saga may stop it.

    ``due``: seconds until somebody looks again; None: only once something comes from outside. ``reason`` is data.
    """

    def __init__(self, due: float | None, reason: dict[str, Any]) -> None:
        super().__init__(due, reason)
        self.due = due
        self.reason = reason


class Run:
    """A saga that this process owns."""

    def __init__(self, definition: Definition, saga: Saga, token: str, asked: float) -> None:
        row = saga.row
        self.definition = definition
        self.id = row.id
        self.key = row.key
        self.token = token
        self.phase = row.phase
        self.attempt = row.attempt
        self.wakes = row.wakes
        # What the store said last: where it is not ``wakes``, something came from outside.
        self.called = row.wakes
        self.input = row.input
        self.result = row.result
        self.lost = Lost()
        self.entries = {entry.name: entry for entry in saga.entries}
        self.ended = False
        self.active = 0
        self.on_idle: Callable[[], None] | None = None
        self.unvisited = {name for name in self.entries if name.startswith("step:")}
        self._opened = asked
        self._deadline = None if row.deadline_in is None else asked + row.deadline_in
        self._order = max((entry.order for entry in saga.entries), default=0)
        self._counts: Counter[str] = Counter()

    @property
    def pivoted(self) -> bool:
        """Return whether the pivot is done: nothing is undone any more."""
        return any(
            entry.progress is Progress.DONE and head_of(entry).get("kind") == "pivot" for entry in self.entries.values()
        )

    def next_name(self, kind: str, name: object) -> str:
        """Return the name of the next entry of a kind: the second of one name is ``name#2``.

        Raises :class:`~idempotency.errors.ConfigurationError` for a name that cannot be stored.
        """
        if not isinstance(name, str) or not name or "#" in name or "\0" in name or len(name) > MOST_CHARACTERS - 40:
            raise ConfigurationError(
                f"a name in a saga is text of 1 to {MOST_CHARACTERS - 40} characters without # and NUL, not {name!r}"
            )
        found = f"{kind}:{name}"
        self._counts[found] += 1
        return found if self._counts[found] == 1 else f"{found}#{self._counts[found]}"

    def next_order(self) -> int:
        """Return the next number of what has ended."""
        self._order += 1
        return self._order

    def since(self, entry: Entry) -> float:
        """Return the seconds since the first write of an entry."""
        return entry.began + monotonic() - self._opened

    @property
    def remaining(self) -> float | None:
        """Return the seconds until the deadline; None where there is none, or it does not matter any more."""
        return None if self._deadline is None or self.pivoted else self._deadline - monotonic()

    def check(self) -> None:
        """Raise what ends the saga instead of its next step."""
        if self.lost:
            raise self.lost_error()
        if self.ended:
            raise ConfigurationError("the saga has ended: await each of its steps in the function")
        if not self.pivoted:
            if CANCEL in self.entries:
                raise CancelledByOperatorError("An operator has cancelled the saga.")
            remaining = self.remaining
            if remaining is not None and remaining <= 0:
                raise DeadlineError("The deadline of the saga is over.")

    def lost_error(self) -> SagaLostError:
        """Return the error of an owner that is not it any more."""
        self.lost.set()
        error = SagaLostError(f"Another process has taken over the saga {self.definition.name}.")
        error.name, error.key = self.definition.name, self.key
        return error

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Count a step that is under way: only when there is none, the saga ends or is undone."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            if not self.active and self.on_idle is not None:
                self.on_idle()

    def operation(self, name: str, attempt: int, transaction: Any = None) -> Operation:
        """Return the operation of an entry: keys that are derived from it are the same at each attempt."""
        found = Operation(self.claim(name), attempt, transaction, f"{self.definition.name} {name}")
        found.lost = self.lost
        return found

    def claim(self, name: str) -> Claim:
        """Return the claim whose id names an entry everywhere."""
        lease = self.definition.lease
        return Claim(
            scope=f"saga:1:{self.definition.name}\0{name}", key=self.key, fingerprint=b"", lease=lease, ttl=lease
        )

    def write_of(
        self,
        entries: Sequence[Entry],
        *,
        progress: bool = False,
        phase: Phase | None = None,
        result: bytes | None = None,
    ) -> Write:
        """Return the request that writes entries."""
        lease = self.definition.lease
        return Write(
            id=self.id,
            token=self.token,
            lease=lease,
            entries=entries,
            progress=progress,
            phase=phase,
            result=result,
        )

    def write(
        self,
        *entries: Entry,
        progress: bool = False,
        phase: Phase | None = None,
        result: bytes | None = None,
    ) -> Program[int]:
        """Write entries, and note them; SagaLostError where another process owns the saga."""
        request = self.write_of(entries, progress=progress, phase=phase, result=result)
        wakes = yield Ask(request)
        if wakes is None:
            raise self.lost_error()
        self.called = int(wakes)
        self.note(*entries)
        return self.called

    def note(self, *entries: Entry) -> None:
        """Note what was written."""
        for entry in entries:
            self.entries[entry.name] = entry


def body(head: dict[str, Any], tail: bytes = b"") -> bytes:
    """Return the body of an entry: a line of JSON, and bytes."""
    return dump(head) + b"\n" + tail


def head_of(entry: Entry) -> dict[str, Any]:
    """Return the line of JSON of an entry's body."""
    found: dict[str, Any] = json.loads(entry.body.partition(b"\n")[0] or b"{}")
    return found


def tail_of(entry: Entry) -> bytes:
    """Return the bytes of an entry's body."""
    return entry.body.partition(b"\n")[2]
