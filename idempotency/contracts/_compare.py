"""Compare the answer of new code with that of the code in use, after GitHub's scientist."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, NoReturn, TypeVar

from idempotency._hooks import check_callable
from idempotency.contracts.events import Comparison, ComparisonHook, deliver, log_comparison
from idempotency.errors import ConfigurationError, EmitRefusedError
from idempotency.operation import RUNNING, Operation

T = TypeVar("T")
Ignore = Callable[[Any, Any], bool]


async def compare(
    name: str,
    control: Callable[[], Awaitable[T]],
    candidate: Callable[[], Awaitable[T]],
    *,
    ignore: Ignore | None = None,
    sample: float = 1.0,
    on_event: ComparisonHook = log_comparison,
) -> T:
    """Return what ``control`` returns, or raise what it raises; compare that with what ``candidate`` does.

    Both are called without arguments, one after the other: the call takes as long as both. The error of the candidate
    never reaches the caller, and its answer is compared by ``==``, an error by its class.
    ``ignore``: called with both answers where they differ; True means that this difference is expected.
    ``sample``: which part of the calls is compared, from 0 to 1, the default: all.
    The candidate must only read, and not change an object that the control has returned. Give it a session of its own:
    a statement that fails would fail the transaction of the control too. Inside of an operation the candidate cannot
    emit a message, or append an event: this raises :class:`~idempotency.errors.EmitRefusedError` in it, and the event
    is ``"refused"``. It has no time-out: give it one, such as ``lambda: asyncio.wait_for(candidate(), 1)``.
    """
    comparing = _Comparing(name, ignore, sample, on_event)
    try:
        with comparing.control:
            comparing.control.value = value = await control()
    finally:
        if comparing.due:
            with comparing.reading():
                comparing.candidate.value = await candidate()
            comparing.report()
    return value


def compare_sync(
    name: str,
    control: Callable[[], T],
    candidate: Callable[[], T],
    *,
    ignore: Ignore | None = None,
    sample: float = 1.0,
    on_event: ComparisonHook = log_comparison,
) -> T:
    """See :func:`compare`."""
    comparing = _Comparing(name, ignore, sample, on_event)
    try:
        with comparing.control:
            comparing.control.value = value = control()
    finally:
        if comparing.due:
            with comparing.reading():
                comparing.candidate.value = _not_awaitable(candidate())
            comparing.report()
    return value


class _Run:
    """One of the two calls: what it returned or raised, and how long it took."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.seconds = perf_counter() - self._begun
        self.error = error


class _Comparing:
    """The two calls of one comparison, and its event."""

    def __init__(self, name: str, ignore: Ignore | None, sample: float, on_event: ComparisonHook) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"name must be text, not {name!r}")
        if isinstance(sample, bool) or not isinstance(sample, int | float) or not 0 <= sample <= 1:
            raise ConfigurationError(f"sample is the part of the calls that is compared, from 0 to 1, not {sample!r}")
        if ignore is not None:
            check_callable("ignore=", ignore)
        check_callable("on_event", on_event)
        self.control, self.candidate = _Run(), _Run()
        self._name, self._ignore, self._on_event = name, ignore, on_event
        self._sampled = random.random() < sample  # noqa: S311 - no secret

    @property
    def due(self) -> bool:
        """Return whether the candidate is called: not where the control was cancelled."""
        return self._sampled and (self.control.error is None or isinstance(self.control.error, Exception))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Run the candidate: it cannot emit, and its error is noted only."""
        operation = RUNNING.get()
        token = RUNNING.set(None if operation is None else _Reading(operation))
        try:
            with self.candidate:
                yield
        except BaseException as error:
            if not _is_of_candidate(error):
                raise
        finally:
            RUNNING.reset(token)

    def report(self) -> None:
        """Deliver the event."""
        kind, error = self._judged()
        event = Comparison(
            kind=kind,
            name=self._name,
            control_s=self.control.seconds,
            candidate_s=self.candidate.seconds,
            control_error=type(self.control.error).__name__ if self.control.error is not None else "",
            error=type(error).__name__ if error is not None else "",
        )
        deliver(self._on_event, event)

    def _judged(self) -> tuple[Literal["same", "mismatch", "ignored", "failed", "refused"], BaseException | None]:
        expected, found = self.control.error, self.candidate.error
        if isinstance(found, EmitRefusedError):
            return "refused", found
        if found is not None:
            return ("same" if type(found) is type(expected) else "failed"), found
        if expected is not None:
            return "mismatch", None
        try:
            if self.control.value == self.candidate.value:
                return "same", None
            ignored = self._ignore is not None and self._ignore(self.control.value, self.candidate.value)
        except Exception as error:
            return "failed", error
        return ("ignored" if ignored else "mismatch"), None


def _is_of_candidate(error: BaseException) -> bool:
    """Return whether the candidate has raised it, and not the process or the task that is to end."""
    if isinstance(error, asyncio.CancelledError):
        try:
            task = asyncio.current_task()
        except RuntimeError:  # a thread without an event loop
            task = None
        return task is None or not task.cancelling()
    return isinstance(error, Exception | SystemExit)


def _not_awaitable(value: T) -> T:
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("the candidate of compare_sync is not awaited")
    return value


class _Reading(Operation):
    """The running operation, as a candidate sees it: it emits nothing."""

    __slots__ = ()

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation._claim, operation.attempt, operation._transaction, operation.name)
        self.lost = operation.lost

    def emit(self, **message: Any) -> NoReturn:
        """Refuse: the candidate of a comparison only reads."""
        raise EmitRefusedError("the candidate of a comparison must only read: it cannot emit a message")

    def next_message_id(self, *names: str) -> NoReturn:
        """Refuse, since only what is emitted has an id."""
        self.emit()

    def hold(self) -> NoReturn:
        """Refuse: the effect is that of the control."""
        self.emit()

    def release(self) -> NoReturn:
        """Refuse: the effect is that of the control."""
        self.emit()
