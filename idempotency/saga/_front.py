"""What the function of a saga calls: steps, and what it waits for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar, overload

from idempotency.errors import ConfigurationError
from idempotency.saga._drive import drive, others_at_rest
from idempotency.saga._drive_sync import at_rest_sync, drive_sync
from idempotency.saga._effects import Program
from idempotency.saga._run import Run, Suspended
from idempotency.saga._run import running as _running
from idempotency.saga._step import Options, perform
from idempotency.saga._wait import await_signal, hold_resource, is_patched, sleep_until
from idempotency.saga.options import UNKNOWN, Kind, OnCrash, Retry

R = TypeVar("R")
T = TypeVar("T")


@overload
async def step(
    name: str,
    function: Callable[..., Awaitable[R]],
    /,
    *args: Any,
    undo: Callable[..., Any] | None = None,
    retry: Retry | int | None = None,
    timeout: float | timedelta | None = None,
    on_crash: OnCrash = "rerun",
    verify: Callable[..., Any] | None = None,
    kind: Kind | None = None,
    unknown: tuple[type[BaseException], ...] = UNKNOWN,
    **kwargs: Any,
) -> R: ...
@overload
async def step(
    name: str,
    function: Callable[..., R],
    /,
    *args: Any,
    undo: Callable[..., Any] | None = None,
    retry: Retry | int | None = None,
    timeout: float | timedelta | None = None,
    on_crash: OnCrash = "rerun",
    verify: Callable[..., Any] | None = None,
    kind: Kind | None = None,
    unknown: tuple[type[BaseException], ...] = UNKNOWN,
    **kwargs: Any,
) -> R: ...
async def step(
    name: str,
    function: Callable[..., Any],
    /,
    *args: Any,
    undo: Callable[..., Any] | None = None,
    retry: Retry | int | None = None,
    timeout: float | timedelta | None = None,
    on_crash: OnCrash = "rerun",
    verify: Callable[..., Any] | None = None,
    kind: Kind | None = None,
    unknown: tuple[type[BaseException], ...] = UNKNOWN,
    **kwargs: Any,
) -> Any:
    """Do a step of a saga once: a later run is given its recorded result, or the recorded failure.

    ``name`` names the step; the second one of a name is another step. ``function`` is called with the arguments that
    follow; with the keyword ``session`` too, if it takes it and the saga has ``session=``. It may be another saga,
    which is then run under a key of its own, and cancelled if this one is undone first. Arguments named as an option
    here are given by ``functools.partial``.
    ``undo``: a function of the saga's module, which undoes the step if the saga fails, also if its outcome is unknown.
    It is called with the arguments of the step, and with the keywords ``result`` (None if unknown), ``failure`` and
    ``session`` if it takes them, until it succeeds.
    ``retry``: how often a step that fails is repeated, default once in all. ``timeout``: seconds for each attempt.
    ``on_crash``: whether a step whose outcome is unknown after a crash is run again (``"rerun"``), or the saga is stuck
    until an operator resolves it (``"hold"``). ``verify``: a function of the same arguments, which is asked before a
    step whose outcome is unknown is run again, and returns the result of the step, or :data:`NOT_DONE`.
    ``kind``: ``"pivot"`` for the step after which nothing is undone, and the saga only goes forward. By default a step
    with ``undo`` is ``"compensatable"``, and one without is ``"retriable"``.
    ``unknown``: the exceptions after which the effect may have happened, default TimeoutError and ConnectionError. A
    pivot that ends so is tried again later, until it is known whether it is done.

    Steps may run side by side, in ``asyncio.gather`` or a ``TaskGroup``. A step that a TaskGroup cancels is unknown.

    Raises :class:`~idempotency.saga.StepFailedError` where the function failed, and
    :class:`~idempotency.errors.ConfigurationError` for what cannot work, such as other arguments than in the first run.
    """
    options = Options(
        undo=undo,
        retry=retry,
        timeout=timeout,
        on_crash=on_crash,
        verify=verify,
        kind=kind,
        unknown=unknown,
    )
    return await _do(lambda run: perform(run, options.step(run, name, function, args, kwargs)))


def step_sync(
    name: str,
    function: Callable[..., R],
    /,
    *args: Any,
    undo: Callable[..., Any] | None = None,
    retry: Retry | int | None = None,
    on_crash: OnCrash = "rerun",
    verify: Callable[..., Any] | None = None,
    kind: Kind | None = None,
    unknown: tuple[type[BaseException], ...] = UNKNOWN,
    **kwargs: Any,
) -> R:
    """See :func:`step`; of a saga that is not awaited. It has no ``timeout``: a thread cannot be stopped."""
    options = Options(
        undo=undo,
        retry=retry,
        timeout=None,
        on_crash=on_crash,
        verify=verify,
        kind=kind,
        unknown=unknown,
    )
    found: R = _do_sync(lambda run: perform(run, options.step(run, name, function, args, kwargs)))
    return found


async def sleep(name: str, seconds: float | timedelta) -> None:
    """Wait until ``seconds`` after the saga came here first. Above a second, this run ends, and a later one goes on."""
    await _do(lambda run: sleep_until(run, name, seconds))


def sleep_sync(name: str, seconds: float | timedelta) -> None:
    """See :func:`sleep`."""
    _do_sync(lambda run: sleep_until(run, name, seconds))


async def wait_for(name: str, timeout: float | timedelta | None = None, *, about: object = None) -> Any:
    """Wait for a signal, and return its value: JSON. The first one of a name counts, also if it came before.

    ``timeout``: seconds from when the saga came here first; then :class:`~idempotency.saga.SignalTimeoutError` is
    raised. ``about``: what is asked, such as the order to approve: a signal must be about the same.
    """
    return await _do(lambda run: await_signal(run, name, timeout, about))


def wait_for_sync(name: str, timeout: float | timedelta | None = None, *, about: object = None) -> Any:
    """See :func:`wait_for`."""
    return _do_sync(lambda run: await_signal(run, name, timeout, about))


async def hold(resource: str) -> None:
    """Hold a resource, which is text, until the saga ends (a semantic lock).

    Raises :class:`~idempotency.saga.HeldError`, in every run, where another saga held it when this one came here first.
    To call it once more is another try. Take several in a sorted order.
    """
    await _do(lambda run: hold_resource(run, resource))


def hold_sync(resource: str) -> None:
    """See :func:`hold`."""
    _do_sync(lambda run: hold_resource(run, resource))


async def patched(name: str) -> bool:
    """Return whether this saga came here with the changed code first; False for one that went past before.

    ``name`` names the change. It is False too while other steps that are recorded run side by side with this call.
    """
    return await _do(lambda run: is_patched(run, name))


def patched_sync(name: str) -> bool:
    """See :func:`patched`."""
    return _do_sync(lambda run: is_patched(run, name))


async def _do(program: Callable[[Run], Program[T]]) -> T:
    run = _running()
    try:
        with run.calling():
            _check_side(run, asynchronous=True)
            return await drive(run.definition, program(run))
    except Suspended as wait:
        await others_at_rest(run)
        run.stopped = run.stopped or wait
        raise


def _do_sync(program: Callable[[Run], Program[T]]) -> T:
    run = _running()
    try:
        with run.calling():
            _check_side(run, asynchronous=False)
            return drive_sync(run.definition, program(run))
    except Suspended as wait:
        at_rest_sync(run)
        run.stopped = run.stopped or wait
        raise


def _check_side(run: Run, asynchronous: bool) -> None:
    if run.definition.asynchronous is not asynchronous:
        how = "await step(...), sleep(...)" if run.definition.asynchronous else "step_sync(...), sleep_sync(...)"
        raise ConfigurationError(f"the saga {run.definition.name} needs {how}")
