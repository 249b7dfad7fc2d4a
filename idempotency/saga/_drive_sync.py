"""Drive the programs of a saga in a thread."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

from idempotency._engine.scheduler import Scheduler
from idempotency._signature import close_unused
from idempotency.errors import ConfigurationError, StoreError, UnreadableError
from idempotency.operation import Operation
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Ask, Call, Effect, Join, Pause, Play, Program
from idempotency.saga._run import Run, within

T = TypeVar("T")

HEARTBEATS = Scheduler()
"""Renews the leases of the runs of this process."""


def drive_sync(definition: Definition, program: Program[T]) -> T:
    """Do what a program asks for, and return its value."""
    send: Callable[[Any], Effect] = program.send
    value: Any = None
    while True:
        try:
            effect = send(value)
        except StopIteration as returned:
            found: T = returned.value
            return found
        try:
            value, send = _perform(definition, effect), program.send
        except BaseException as error:
            value, send = error, program.throw


def _perform(definition: Definition, effect: Effect) -> Any:
    match effect:
        case Ask(request):
            return definition.store.journal_sync(request)  # sync only: see the other half
        case Call():
            return call_step_sync(effect.function, effect.operation)  # sync only: it has no time limit
        case Join():
            # It needs SQLAlchemy.
            from idempotency.saga._join import join_sync

            return join_sync(definition, effect, call_step_sync)
        case Play(run, arguments):
            return call_saga_sync(run, arguments)
        case Pause(seconds):
            time.sleep(seconds)  # sync only: a thread waits


def call_step_sync(function: Callable[[], Any], operation: Operation) -> Any:
    """Call the function of a step."""
    # The function of a step is not a part of the saga: it has no steps of its own.
    with within(None, operation):
        value = function()
        if inspect.isawaitable(value):
            close_unused(value)
            raise ConfigurationError("a function of a step is awaited, and the saga is not: make the saga async")
        return value


class _Renewal:
    """The job that renews the lease of one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.ended = False

    def __call__(self) -> float | None:
        """Renew, and return when to do it again."""
        lease, sent = self._run.definition.lease, monotonic()
        if sent >= self._run.until:
            self._run.lose()
            return None
        try:
            owned = self._run.definition.store.journal_sync(self._run.write_of(()))
        except (StoreError, UnreadableError):
            return monotonic() + min(lease / 10, 1.0)
        if owned is None:
            self._run.lose()
            return None
        self._run.called = owned
        self._run.note_renewed(sent)
        return sent + lease / 3


@contextmanager
def renewed_sync(run: Run) -> Iterator[None]:
    """Renew the lease of a run in this block."""
    renewal = _Renewal(run)
    HEARTBEATS.run_at(monotonic() + run.definition.lease / 3, renewal)
    try:
        yield
    finally:
        renewal.ended = True
        HEARTBEATS.note_ended()


def call_saga_sync(run: Run, arguments: dict[str, Any]) -> tuple[Any, BaseException | None]:
    """Call the function of the saga; return its value and its error, once no step of it is under way."""
    value, error = None, None
    try:
        # The keys that are derived in the function are the same in each run.
        with within(run, run.operation("", run.attempt)):
            value = run.definition.function(**arguments)
    except BaseException as raised:
        error = raised
    run.ended = True
    at_rest_sync(run)
    return value, error


def at_rest_sync(run: Run) -> None:
    """Wait until no call of the saga's function is under way."""
    while run.active:
        idle = threading.Event()
        run.when_idle(idle.set)
        idle.wait()
