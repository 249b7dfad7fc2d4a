"""Drive the programs of a saga in an event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, TypeVar

from idempotency._sagas.journal import Request
from idempotency.errors import StoreError, UnreadableError
from idempotency.operation import Operation
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Ask, Call, Effect, Join, Pause, Play, Program
from idempotency.saga._run import Run, within

T = TypeVar("T")

_TURNS = 10


async def drive(definition: Definition, program: Program[T]) -> T:
    """Do what a program asks for, and return its value."""
    send: Callable[[Any], Effect] = program.send
    value: Any = None
    cancelled: asyncio.CancelledError | None = None  # async only: see _ask
    while True:
        try:
            effect = send(value)
        except StopIteration as returned:
            if cancelled is not None:  # async only: see _ask
                raise cancelled from None
            found: T = returned.value
            return found
        except BaseException as error:  # async only: see _ask
            if cancelled is not None:
                raise cancelled from error
            raise
        if cancelled is not None:  # async only: see _ask
            value, send, cancelled = cancelled, program.throw, None
            continue
        try:
            value, send = await _perform(definition, effect), program.send
        except _AnsweredError as interrupted:  # async only: see _ask
            value, send, cancelled = interrupted.answer, program.send, interrupted.error
        except BaseException as error:
            value, send = error, program.throw


async def _perform(definition: Definition, effect: Effect) -> Any:
    match effect:
        case Ask(request):
            return await _ask(definition, request)  # async only: a caller may be cancelled meanwhile
        case Call():
            # async only: a thread cannot be stopped.
            return await call_step(effect.function, effect.operation, effect.timeout)
        case Join():
            # It needs SQLAlchemy.
            from idempotency.saga._join import join

            return await join(definition, effect, call_step)
        case Play(run, arguments):
            return await call_saga(run, arguments)
        case Pause(seconds):
            await asyncio.sleep(seconds)  # async only: a task waits


class _AnsweredError(Exception):
    """The caller was cancelled by ``error``, while a request was under way whose ``answer`` came then."""

    def __init__(self, error: asyncio.CancelledError, answer: Any) -> None:
        super().__init__()
        self.error = error
        self.answer = answer


# async only: a thread is not cancelled.
async def _ask(definition: Definition, request: Request[Any]) -> Any:
    """Send a request. A caller who is cancelled waits for the answer: what was written has to be known."""
    sent = asyncio.ensure_future(definition.store.journal(request))
    try:
        return await asyncio.shield(sent)
    except asyncio.CancelledError as error:
        if sent.cancelled():
            raise
        try:
            await asyncio.wait({sent})
        except asyncio.CancelledError:
            sent.cancel()
            raise
        if sent.cancelled() or sent.exception() is not None:
            raise
        raise _AnsweredError(error, sent.result()) from error


async def call_step(function: Callable[[], Any], operation: Operation, timeout: float | None) -> Any:
    """Call the function of a step."""
    # The function of a step is not a part of the saga: it has no steps of its own.
    with within(None, operation):
        async with asyncio.timeout(timeout):
            value = function()
            return await value if inspect.isawaitable(value) else value


@asynccontextmanager
async def renewed(run: Run) -> AsyncIterator[None]:
    """Renew the lease of a run in this block."""
    sending = asyncio.Lock()
    task = asyncio.get_running_loop().create_task(_renew(run, sending))
    try:
        yield
    except GeneratorExit:
        task.cancel()
        raise
    except BaseException:
        await _stop(task, sending)
        raise
    await _stop(task, sending)


async def _stop(task: asyncio.Task[None], sending: asyncio.Lock) -> None:
    try:
        # A request that was sent is answered first: to cut it off would cost its connection.
        async with sending:
            pass
    finally:
        task.cancel()


async def _renew(run: Run, sending: asyncio.Lock) -> None:
    lease = run.definition.lease
    pause = lease / 3
    while True:
        await asyncio.sleep(min(pause, max(0.0, run.until - monotonic())))
        sent = monotonic()
        if sent >= run.until:
            run.lose()
            return
        try:
            async with sending, asyncio.timeout(run.until - sent):
                owned = await run.definition.store.journal(run.write_of(()))
        except (StoreError, UnreadableError, TimeoutError):
            pause = min(lease / 10, 1.0)
            continue
        if owned is None:
            run.lose()
            return
        run.called = owned
        run.note_renewed(sent)
        pause = lease / 3


async def call_saga(run: Run, arguments: dict[str, Any]) -> tuple[Any, BaseException | None]:
    """Call the function of the saga; return its value and its error, once no step of it is under way."""
    value, error = None, None
    try:
        # The keys that are derived in the function are the same in each run.
        with within(run, run.operation("", run.attempt)):
            value = await run.definition.function(**arguments)
    except GeneratorExit:  # async only: the coroutine is closed, and cannot wait
        raise
    except BaseException as raised:
        error = raised
    run.ended = True
    await at_rest(run)
    return value, error


async def others_at_rest(run: Run) -> None:
    """Wait until no other call of the saga's function is under way, and none begins."""
    quiet = 0
    # async only: a task that goes on when a step has ended may need a few turns of the loop until it begins the next.
    while quiet < _TURNS and not run.ended:
        quiet = 0 if run.active else quiet + 1
        await at_rest(run)
        await asyncio.sleep(0)


async def at_rest(run: Run) -> None:
    """Wait until no call of the saga's function is under way."""
    while run.active:
        idle = asyncio.Event()
        run.when_idle(idle.set)
        await idle.wait()
