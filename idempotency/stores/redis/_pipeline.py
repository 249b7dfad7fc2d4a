"""One connection over which commands follow each other without waiting; replies come in the order of the commands."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

import hiredis
import redis
from redis.asyncio.connection import DefaultParser
from redis.exceptions import InvalidResponse

from idempotency.stores.redis._wire import Command, pack

_IN_FLIGHT = 1024
"""Commands that wait for replies on one connection. More wait here, in order."""

_ONE_WRITE = 1024**2
"""Bytes in one write, which takes no further command once it has that many. While the transport asks to pause, nothing
is written. So the transport has no more unsent bytes than one write and its own limit."""

_NOTHING = object()
"""What hiredis returns where no complete reply has arrived."""


class Call:
    """A command on its way, from its start until its reply or its failure.

    ``deadline``: by the event loop's clock. ``pipeline``: where it was written and its reply is missing, else None.
    ``again``: it was sent once more. ``by_text``: with the text of its script, for a server that did not have it.
    """

    __slots__ = ("again", "by_text", "command", "deadline", "future", "packed", "pipeline")

    def __init__(self, command: Command, packed: bytes, deadline: float, future: asyncio.Future[Any]) -> None:
        self.command = command
        self.packed = packed
        self.deadline = deadline
        self.future = future
        self.pipeline: Pipeline | None = None
        self.again = False
        self.by_text = False

    def send_by_text(self) -> None:
        """Put the text of the script into the command, in place of its digest."""
        script, rest = self.command
        self.by_text = True
        self.packed = pack(script.by_text, rest)

    @property
    def over(self) -> bool:
        """Whether nothing of this call is expected any more: no caller waits, and no reply is missing."""
        return self.pipeline is None and self.future.done()


class Owner(Protocol):
    """What a pipeline reports to."""

    def refused(self, pipeline: Pipeline, call: Call, error: Exception) -> None:
        """Handle a reply that is an error."""
        ...

    def lost(self, pipeline: Pipeline, error: redis.ConnectionError, sent: list[Call], unsent: list[Call]) -> None:
        """Handle the end of the connection, which happens once."""
        ...

    def answered(self, pipeline: Pipeline) -> None:
        """Handle that replies have arrived."""
        ...


class Pipeline(asyncio.Protocol):
    """A connection of redis-py whose transport we read and write ourselves.

    redis-py has connected it, and goes on to own it: it closes it, and waits until it is closed.
    """

    def __init__(self, loop: AbstractEventLoop, connection: Any, owner: Owner) -> None:
        self.connection = connection
        self.is_lost = False
        self._loop = loop
        self._owner = owner
        self._sent: deque[Call] = deque()
        self._unsent: deque[Call] = deque()
        self._flush_is_due = False
        self._is_paused = False
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=DefaultParser.parse_error, notEnoughData=_NOTHING
        )
        self._transport: Any = connection._writer.transport
        self._stream: asyncio.BaseProtocol = self._transport.get_protocol()

    async def take_over(self) -> None:
        """Receive what arrives on the connection from now on; raise redis.ConnectionError where it cannot be used."""
        stream = self.connection._reader
        self._transport.set_protocol(self)
        if stream.at_eof() or self._transport.is_closing():
            self.is_lost = True
            raise redis.ConnectionError("the connection was lost (closed by the server)")
        stream.feed_eof()  # so that it gives what it has, and does not wait for more
        self._reader.feed(await stream.read())
        while type(self._reader.gets()) is hiredis.PushNotification:
            pass
        # What is there is no reply to us. A part of a message in redis-py's reader would begin the reply to our first.
        if self._reader.has_data() or self.connection._parser._reader.has_data():
            self.is_lost = True
            raise redis.ConnectionError("a message arrived that nothing asked for")

    @property
    def is_idle(self) -> bool:
        """Whether no caller waits for a reply."""
        return all(call.future.done() for call in self._sent)

    # Commands.

    def add(self, call: Call) -> None:
        """Send a command: at once where none is in flight, else with all others of this iteration of the event loop."""
        if self._flush_is_due:
            self._unsent.append(call)
        elif self._sent:
            self._unsent.append(call)
            self._plan_flush()
        else:
            call.pipeline = self
            self._sent.append(call)
            self._transport.write(call.packed)

    def extend(self, calls: Iterable[Call]) -> None:
        """Send commands in one write."""
        self._unsent.extend(calls)
        self._flush()

    def _plan_flush(self) -> None:
        self._flush_is_due = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        unsent, sent = self._unsent, self._sent
        while unsent and len(sent) < _IN_FLIGHT and not self._is_paused and not self.is_lost:
            commands: list[bytes] = []
            size = 0
            while unsent and size < _ONE_WRITE and len(sent) < _IN_FLIGHT:
                call = unsent.popleft()
                if not call.future.done():  # else it was cancelled, or its time is over
                    call.pipeline = self
                    sent.append(call)
                    commands.append(call.packed)
                    size += len(call.packed)
            self._transport.write(b"".join(commands))

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        self._is_paused = False
        self._flush()

    # Replies.

    def data_received(self, data: bytes) -> None:
        """Give each reply to the oldest command without one."""
        gets, sent = self._reader.gets, self._sent
        callers = 0
        try:
            self._reader.feed(data)
            while not self.is_lost and (reply := gets()) is not _NOTHING:
                if type(reply) is hiredis.PushNotification:
                    continue
                call = sent.popleft()
                call.pipeline = None
                if call.future.done():
                    continue
                callers += 1
                if isinstance(reply, Exception):
                    self._owner.refused(self, call, reply)
                else:
                    call.future.set_result(reply)
        except (InvalidResponse, IndexError) as error:
            self.drop(redis.ConnectionError(f"a reply that nothing asked for: {error}"))
        # The callers that now have their replies run before this flush, and some of them send their next commands.
        if (callers > 1 or self._unsent) and not self._flush_is_due:
            self._plan_flush()
        self._owner.answered(self)

    # The end.

    def take_unsent(self) -> list[Call]:
        """Return the commands that were not written, which are not written here any more."""
        unsent = [call for call in self._unsent if not call.future.done()]
        self._unsent.clear()
        return unsent

    def drop(self, error: redis.ConnectionError) -> None:
        """Cut the connection off; ``error`` is what its commands fail with."""
        self._transport.abort()
        self._lose(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._stream.connection_lost(exc)  # redis-py may be waiting for it
        self._lose(redis.ConnectionError(f"the connection was lost ({exc or 'closed by the server'})"))

    def _lose(self, error: redis.ConnectionError) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        for call in self._sent:
            call.pipeline = None
        sent = [call for call in self._sent if not call.future.done()]
        self._sent.clear()
        self._owner.lost(self, error, sent, self.take_unsent())
