"""One run of a saga: what is recorded of it, and what this process knows while it owns it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from idempotency._results.by_annotation import dump
from idempotency._rules import Claim
from idempotency._sagas.journal import MOST_CHARACTERS, Entry, Phase, Progress, Saga, Write
from idempotency.errors import ConfigurationError, StoreError, UnreadableError
from idempotency.operation import RUNNING as OPERATION
from idempotency.operation import Lost, Operation
from idempotency.saga._effects import Ask, Program
from idempotency.saga.errors import CancelledByOperatorError, DeadlineError, SagaLostError, StepFailedError
from idempotency.saga.events import SagaEvent, SagaEventKind

if TYPE_CHECKING:
    from idempotency.saga._definition import Definition

CANCEL = "cancel"
"""The entry by which an operator, or the saga whose step it is, cancels a saga."""

PLACES = ("step", "sleep", "wait", "hold", "patch")
"""The kinds of entries that the saga's function comes to, one after the other."""

LONGEST_NAME = MOST_CHARACTERS - 40
"""Characters that a name may have, so that its kind and its number are stored too."""

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


@contextmanager
def within(run: Run | None, operation: Operation) -> Iterator[None]:
    """Let a saga, and an operation, be the running ones; None: no saga, as in the function of a step."""
    tokens = OPERATION.set(operation), RUNNING.set(run)
    try:
        yield
    finally:
        # A coroutine that is closed ends in another context.
        with suppress(ValueError):
            OPERATION.reset(tokens[0])
            RUNNING.reset(tokens[1])


class Suspended(BaseException):
    """The saga has to wait. It ends this run, and no handler of errors in the saga may stop it.

    ``due``: seconds until somebody looks again; None: only once an operator acts. ``reason`` is data. ``timed``: it may
    be over by then, and not only by what comes from outside.
    """

    def __init__(self, due: float | None, reason: dict[str, Any], *, timed: bool = True) -> None:
        super().__init__(due, reason)
        self.due = due
        self.reason = reason
        self.timed = timed


FAULTS = (
    SagaLostError,
    StoreError,
    ConfigurationError,
    UnreadableError,
    DeadlineError,
    CancelledByOperatorError,
)
"""What ends a run when a call of the saga's function raises it, also if the function goes on."""


class Run:
    """A saga that this process owns.

    ``ended``: its function has returned, or raised. ``owned``: until the saga ends, waits, or is lost.
    ``until``: when the lease is over, if it is not renewed. ``stopped``: what ended the run in the middle of its
    function: the function cannot stop it. ``waits``: what the saga waits for. ``failures``: those of steps that its
    function was given. ``unsure``: a call was cancelled, and what it was about to write may be in the store.
    """

    def __init__(self, definition: Definition, saga: Saga, token: str, asked: float) -> None:
        row = saga.row
        self.definition = definition
        self.id = row.id
        self.key = row.key
        self.token = token
        self.phase = row.phase
        self.attempt = row.attempt
        self.crashes = row.crashes
        self.wakes = row.wakes
        # What the store said last: where it is not ``wakes``, something came from outside.
        self.called = row.wakes
        self.input = row.input
        self.result = row.result
        self.asked = asked
        self.until = asked + definition.lease
        self.lost = Lost()
        self.lost.check_by(self.check_lease)
        self.ended = False
        self.owned = True
        self.unsure = False
        self.active = 0
        self.stopped: BaseException | None = None
        self.waits: list[Suspended] = []
        self.failures: list[StepFailedError] = []
        self.cause: BaseException | None = None
        self.entries: dict[str, Entry] = {}
        self._pivots: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._idle: list[Callable[[], object]] = []
        self._deadline = None if row.deadline_in is None else asked + row.deadline_in
        self._order = 0
        self._counts: Counter[str] = Counter()
        self.read(saga.entries, asked)
        self.unvisited = {name for name in self.entries if name.partition(":")[0] in PLACES}

    @property
    def pivoted(self) -> bool:
        """Return whether the pivot is done: nothing is undone any more."""
        return any(entry.progress is Progress.DONE for entry in list(self._pivots.values()))

    @property
    def forward_only(self) -> bool:
        """Return whether the pivot is done, or may be done: until its outcome is known, nothing may be undone."""
        return any(entry.progress is Progress.DONE or is_unknown(entry) for entry in list(self._pivots.values()))

    def is_final(self, failed: Entry) -> bool:
        """Return whether a failed step is not done again: only one that failed after the pivot is."""
        orders = [entry.order for entry in list(self._pivots.values()) if entry.progress is Progress.DONE]
        return not orders or failed.order < min(orders)

    def next_name(self, kind: str, name: object) -> str:
        """Return the name of the next entry of a kind: the second of one name is ``name#2``.

        Raises :class:`~idempotency.errors.ConfigurationError` for a name that cannot be stored.
        """
        found = f"{kind}:{checked_name(name)}"
        with self._lock:
            self._counts[found] += 1
            count = self._counts[found]
            found = found if count == 1 else f"{found}#{count}"
            self.unvisited.discard(found)
            return found

    def next_order(self) -> int:
        """Return the next number of what has ended."""
        with self._lock:
            self._order += 1
            return self._order

    def since(self, entry: Entry) -> float:
        """Return the seconds since the first write of an entry of this run."""
        return entry.began + monotonic() - self.asked

    @property
    def remaining(self) -> float | None:
        """Return the seconds until the deadline; None where there is none, or it does not matter any more."""
        return None if self._deadline is None or self.forward_only else self._deadline - monotonic()

    def check(self) -> None:
        """Raise what ends the saga instead of its next step."""
        self.check_owned()
        if self.ended:
            raise ConfigurationError("the saga has ended: await each of its steps in the function")
        if not self.forward_only:
            if CANCEL in self.entries:
                raise CancelledByOperatorError("An operator has cancelled the saga.")
            remaining = self.remaining
            if remaining is not None and remaining <= 0:
                raise DeadlineError("The deadline of the saga is over.")

    def emit(
        self, kind: SagaEventKind, *, step: str = "", attempt: int = 0, error: object = None, reason: str = ""
    ) -> None:
        """Deliver an event. ``attempt``: that of the step, default the run's. ``error``: an exception, or its name."""
        event = SagaEvent(
            kind=kind,
            saga=self.definition.name,
            record=self.id.hex()[:12],
            attempt=attempt or self.attempt,
            step=step,
            error=error if isinstance(error, str) else "" if error is None else type(error).__name__,
            reason=reason,
            seconds=monotonic() - self.asked,
        )
        self.definition.hooks.deliver(event)

    def check_lease(self) -> None:
        """Lose a lease that is over by now."""
        if monotonic() >= self.until:
            self.lose()

    def check_owned(self) -> None:
        """Raise SagaLostError where the lease is lost."""
        if self.lost:
            raise self.lost_error()

    def lose(self) -> None:
        """Note that the lease is lost. A thread that goes on after its step sees it also after the end of the saga."""
        if self.lost.set() and self.owned:
            self.emit("lease-lost")

    def lost_error(self) -> SagaLostError:
        """Return the error of an owner that is not it any more."""
        self.lose()
        self.owned = False
        error = SagaLostError(
            f"The lease of the saga {self.definition.name} is over, and another process may have taken it over."
        )
        error.name, error.key = self.definition.name, self.key
        return error

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Count a call of the saga's function that is under way, and note what ends the run."""
        if self.stopped is not None:
            raise self.stopped
        with self._lock:
            self.active += 1
        try:
            yield
        except FAULTS as error:
            if not self.ended:
                self.stopped = self.stopped or error
            raise
        except StepFailedError as error:
            self.failures.append(error)
            raise
        except Suspended as wait:
            self.waits.append(wait)
            raise
        except Exception:
            raise
        except BaseException:
            self.unsure = True
            raise
        finally:
            with self._lock:
                self.active -= 1
                idle, self._idle = ([], self._idle) if self.active else (self._idle, [])
            for each in idle:
                each()

    def when_idle(self, call: Callable[[], object]) -> None:
        """Call once no call of the saga's function is under way."""
        with self._lock:
            if self.active:
                self._idle.append(call)
                return
        call()

    def operation(self, name: str, attempt: int, transaction: Any = None) -> Operation:
        """Return the operation of an entry: keys that are derived from it are the same at each attempt."""
        found = Operation(self.claim(name), attempt, transaction, f"{self.definition.name} {name}".rstrip())
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
        sent = monotonic()
        wakes = yield Ask(request)
        if wakes is None:
            raise self.lost_error()
        self.note_renewed(sent)
        self.note_called(wakes)
        self.note(*entries)
        return self.called

    def note_renewed(self, sent: float) -> None:
        """Note that the lease began anew with a request that was sent at ``sent``."""
        self.until = max(self.until, sent + self.definition.lease)

    def note_called(self, wakes: int) -> None:
        """Note ``Row.wakes`` as the store has answered it."""
        self.called = int(wakes)

    def note(self, *entries: Entry) -> None:
        """Note what was written just now."""
        for entry in entries:
            with self._lock:
                known = self.entries.get(entry.name)
                began = self.asked - monotonic() if known is None else known.began
                self._set(replace(entry, began=began))

    def read(self, entries: Iterable[Entry], asked: float) -> None:
        """Note what was read in answer to a request that was sent at ``asked``."""
        with self._lock:
            for entry in entries:
                self._set(replace(entry, began=entry.began + self.asked - asked))
                self._order = max(self._order, entry.order)

    def _set(self, entry: Entry) -> None:
        self.entries[entry.name] = entry
        if entry.name.startswith("step:") and head_of(entry).get("kind") == "pivot":
            self._pivots[entry.name] = entry


def cancelled_by(by: str) -> Entry:
    """Return the entry that cancels a saga."""
    return Entry(name=CANCEL, progress=Progress.DONE, body=body({"by": by}))


def checked_name(name: object) -> str:
    """Return a name; :class:`~idempotency.errors.ConfigurationError` for one that cannot be stored."""
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= LONGEST_NAME
        or {"#", "\0"} & set(name)
        or not is_unicode(name)
    ):
        raise ConfigurationError(
            f"a name in a saga is text of 1 to {LONGEST_NAME} characters without # and NUL, not {name!r}"
        )
    return name


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which SQL databases do not store."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_unknown(step: Entry) -> bool:
    """Return whether the effect of a step may have happened, and may not have."""
    begun = step.progress is Progress.BEGUN
    return begun or (step.progress is Progress.FAILED and bool(head_of(step).get("unknown")))


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
