"""One connection for all commands of an event loop, and what happens when it fails.

A call has until its own deadline. When it fails, times out or is cancelled, no other call does. A connection on which a
call timed out takes no new calls, as its server may be gone: another is made, and the old one is closed once each of
its calls has its reply or its own time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Awaitable
from contextvars import Context
from typing import Any

import redis
from redis.exceptions import NoScriptError, ResponseError

from idempotency._synchronization import Deadline
from idempotency.stores.redis._failures import CLIENT_ERRORS, unwrapped
from idempotency.stores.redis._open import cut_off
from idempotency.stores.redis._pipeline import Call, Pipeline
from idempotency.stores.redis._send import COMMAND_NAME, REPEATED, Send
from idempotency.stores.redis._wire import Command, pack

_LARGE = 64 * 1024
"""Bytes of a command that is sent over a connection of its own. It delays no other command, and fails alone when the
server closes the connection because of its size."""

_CLOSED = "the store was closed"


class Multiplexed:
    """The commands of one event loop over one connection of a client's pool.

    ``timeout``: seconds from the start of a call, within which it ends. ``own``: nothing else uses the pool.
    ``send_alone``: how a large command is sent.
    """

    def __init__(self, loop: AbstractEventLoop, pool: Any, timeout: float, own: bool, send_alone: Send) -> None:
        self._loop = loop
        self._pool = pool
        self._timeout = timeout
        self._own = own
        self._send_alone = send_alone
        self._is_closed = False
        self._calls: deque[Call] = deque()  # in the order of their deadlines
        self._waiting: list[Call] = []  # for a connection
        self._pipeline: Pipeline | None = None
        self._retired: set[Pipeline] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()

    # Calls.

    def send(self, command: Command) -> Awaitable[Any]:
        """Start a command, and return what its reply is awaited by."""
        script, rest = command
        packed = pack(script.by_digest, rest)
        if len(packed) > _LARGE:
            return self._send_alone(command)
        loop = self._loop
        call = Call(command, packed, loop.time() + self._timeout, loop.create_future())
        self._calls.append(call)
        if self._timer is None:
            # In an empty context, which the next timers take over.
            self._timer = loop.call_at(call.deadline, self._expire, context=Context())
        self._add(call)
        return call.future

    def _add(self, call: Call) -> None:
        if self._pipeline is not None:
            self._pipeline.add(call)
        else:
            self._wait(call)

    def _wait(self, call: Call) -> None:
        if self._is_closed:
            call.future.set_exception(redis.ConnectionError(_CLOSED))
            return
        self._waiting.append(call)
        if self._connecting is None or self._connecting.done():
            # In an empty context: the connection would hold that of this caller, with all that hangs on it, until it is
            # closed. A task factory of the application may not know create_task's own ``context``.
            self._connecting = Context().run(self._loop.create_task, self._connect())

    def _expire(self) -> None:
        now, calls = self._loop.time(), self._calls
        while calls and (calls[0].deadline <= now or calls[0].over):
            call = calls.popleft()
            pipeline = call.pipeline
            if not call.future.done():
                call.future.set_exception(TimeoutError())
            if pipeline is not None:
                # Also where the caller was cancelled: the missing reply means that the server may be gone.
                self._retire(pipeline)
        self._timer = self._loop.call_at(calls[0].deadline, self._expire) if calls else None
        for pipeline in list(self._retired):
            self._close_if_idle(pipeline)

    # What a pipeline reports: see Owner.

    def answered(self, pipeline: Pipeline) -> None:
        """Forget the calls that are over."""
        calls = self._calls
        while calls and calls[0].over:
            calls.popleft()
        if pipeline is not self._pipeline:
            self._close_if_idle(pipeline)

    def refused(self, pipeline: Pipeline, call: Call, error: Exception) -> None:
        """Send a call again where that can help, or fail it."""
        cause = unwrapped(error)
        if isinstance(cause, REPEATED):
            self._retire(pipeline)
        if isinstance(cause, NoScriptError) and not call.by_text:
            call.send_by_text()
            self._add(call)
        elif isinstance(cause, REPEATED) and not call.again:
            call.again = True
            self._add(call)
        else:
            call.future.set_exception(cause)

    def lost(self, pipeline: Pipeline, error: redis.ConnectionError, sent: list[Call], unsent: list[Call]) -> None:
        """Send each call once more over another connection."""
        if self._pipeline is pipeline:
            self._pipeline = None
        self._retired.discard(pipeline)
        task = self._loop.create_task(self._give_back(pipeline.connection))
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
        for call in sent:
            if call.again:
                call.future.set_exception(error)
            else:
                call.again = True
                self._add(call)
        for call in unsent:
            self._add(call)

    def _retire(self, pipeline: Pipeline) -> None:
        if pipeline is self._pipeline:
            self._pipeline = None
            self._retired.add(pipeline)
            for call in pipeline.take_unsent():
                self._add(call)

    def _close_if_idle(self, pipeline: Pipeline) -> None:
        if pipeline in self._retired and pipeline.is_idle:
            pipeline.drop(redis.ConnectionError("replaced"))

    # Connections.

    async def _connect(self) -> None:
        """Make a connection for all that wait; where that fails, all of them fail."""
        try:
            while self._pipeline is None and (waiting := [call for call in self._waiting if not call.future.done()]):
                self._waiting = waiting  # while the server does not answer, those that are over would add up
                # Past this time-out, each call that waits still has its own deadline.
                with contextlib.suppress(TimeoutError), Deadline(self._loop, self._timeout):
                    self._pipeline = await self._open()
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            self._fail_waiting(redis.ConnectionError("connecting was interrupted") if cancelled else error)
            if not isinstance(error, Exception):
                raise
        waiting, self._waiting = self._waiting, []
        if self._pipeline is not None:
            self._pipeline.extend(waiting)
            if self._is_closed:  # asyncio.wait_for of Python 3.11, in redis-py, can swallow the cancellation
                self._pipeline.drop(redis.ConnectionError(_CLOSED))

    def _fail_waiting(self, error: BaseException) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if not call.future.done():
                call.future.set_exception(error)

    async def _open(self) -> Pipeline:
        try:
            return await self._open_once()
        except REPEATED:
            # The pool gave a connection that its server had closed.
            return await self._open_once()

    async def _open_once(self) -> Pipeline:
        connection = await self._pool.get_connection(*COMMAND_NAME)
        try:
            if not self._own:
                await _check(connection)
            pipeline = Pipeline(self._loop, connection, self)
            await pipeline.take_over()
        except BaseException:
            await self._give_back(connection)
            raise
        return pipeline

    async def _give_back(self, connection: Any) -> None:
        # A KeyError: somebody has reset the pool.
        with contextlib.suppress(*CLIENT_ERRORS, KeyError):
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)

    # The end.

    def close(self) -> None:
        """Give the connection back to its pool; calls in flight fail."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        closed = redis.ConnectionError(_CLOSED)
        self._fail_waiting(closed)
        for pipeline in self._pipelines():
            pipeline.drop(closed)
        if self._timer is not None:
            self._timer.cancel()

    async def aclose(self) -> None:
        """Give the connection back to its pool, and wait until that is done; calls in flight fail."""
        self.close()
        ending = [*self._returning, *([self._connecting] if self._connecting is not None else ())]
        if ending:
            await asyncio.wait(ending)

    def abandon(self) -> None:
        """Cut the connection off, after its event loop was closed."""
        for pipeline in self._pipelines():
            self._pool._in_use_connections.discard(pipeline.connection)
            cut_off(pipeline.connection)

    def _pipelines(self) -> list[Pipeline]:
        return [*self._retired, *([self._pipeline] if self._pipeline is not None else ())]


async def _check(connection: Any) -> None:
    """Raise what redis-py raises for a connection that does not work, or not in the running event loop."""
    await connection.send_command("PING")
    with contextlib.suppress(ResponseError):  # the user may not be allowed to ask
        if await connection.read_response() not in (b"PONG", "PONG"):
            raise redis.ConnectionError("the connection has a reply to another command")
