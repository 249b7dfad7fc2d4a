"""Drive the programs of a saga in an event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, TypeVar

from idempotency.errors import StoreError
from idempotency.operation import RUNNING as OPERATION
from idempotency.operation import Operation
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Ask, Call, Effect, Join, Pause, Program
from idempotency.saga._run import RUNNING, Run

T = TypeVar("T")


async def drive(definition: Definition, program: Program[T]) -> T:
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
            value, send = await _perform(definition, effect), program.send
        except BaseException as error:
            value, send = error, program.throw


async def _perform(definition: Definition, effect: Effect) -> Any:
    match effect:
        case Ask(request):
            return await definition.store.journal(request)
        case Call():
            return await _call(effect)
        case Join():
            # It needs SQLAlchemy.
            from idempotency.saga._join import join

            return await join(definition, effect, call_step)
        case Pause(seconds):
            await asyncio.sleep(seconds)


async def _call(call: Call) -> Any:
    return await call_step(call.function, call.operation, call.timeout)


async def call_step(function: Callable[[], Any], operation: Operation, timeout: float | None) -> Any:
    """Call the function of a step."""
    # The function of a step is not a part of the saga: it has no steps of its own.
    outside, token = RUNNING.set(None), OPERATION.set(operation)
    try:
        async with asyncio.timeout(timeout):
            value = function()
            return await value if inspect.isawaitable(value) else value
    finally:
        OPERATION.reset(token)
        RUNNING.reset(outside)


@asynccontextmanager
async def renewed(run: Run) -> AsyncIterator[None]:
    """Renew the lease of a run in this block."""
    task = asyncio.get_running_loop().create_task(_renew(run))
    try:
        yield
    finally:
        task.cancel()


async def _renew(run: Run) -> None:
    lease = run.definition.lease
    until, pause = monotonic() + lease, lease / 3
    while True:
        await asyncio.sleep(min(pause, max(0.0, until - monotonic())))
        sent = monotonic()
        if sent >= until:
            run.lost.set()
            return
        try:
            async with asyncio.timeout(until - sent):
                owned = await run.definition.store.journal(run.write_of(()))
        except (StoreError, TimeoutError):
            pause = min(lease / 10, 1.0)
            continue
        if owned is None:
            run.lost.set()
            return
        run.called = owned
        until, pause = sent + lease, lease / 3


async def call_saga(run: Run, arguments: dict[str, Any]) -> Any:
    """Call the function of the saga, and wait for steps that it has left under way."""
    token = RUNNING.set(run)
    try:
        return await run.definition.function(**arguments)
    finally:
        RUNNING.reset(token)
        run.ended = True
        if run.active:
            idle = asyncio.Event()
            run.on_idle = idle.set
            await idle.wait()
