"""Send calls of one kind together, in flights: while two are under way, the calls that arrive wait for the next one.

A flight takes the calls that arrive in the same few iterations of the event loop: no timer delays it. It either
answers a call or gives it back, and what is given back is sent alone. So whatever fails, fails as it does alone.
"""

from __future__ import annotations

import asyncio
from asyncio import Future, Task, TimerHandle
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from itertools import chain, islice
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from idempotency._sql.bounded import Abandoned, InFlight

Call = TypeVar("Call")
Answer = TypeVar("Answer")

MOST_CALLS = 128
"""Calls in one flight."""

AT_ONCE = 2
"""Flights of one kind that are under way, at most: while the server writes one to disk, another is made or read."""

MOST_ITERATIONS = 4
"""Iterations of the event loop for which a flight waits, at most, while each brings a call. A lone call waits for one.

A flight costs as much as several calls, and requests arrive one by one, each read in an iteration of its own."""

MOST_BYTES = 256 * 1024
"""Bytes in one flight. It takes no further call once it has that many."""


class Limits(NamedTuple):
    """What limits flights.

    ``slots``: a flight takes one. ``timeout``: seconds for a call, and seconds for a flight, each from its own start. A
    flight that takes longer is cut off, and ends among the ``abandoned``.
    """

    slots: asyncio.Semaphore
    timeout: float
    abandoned: Abandoned


class _Ticket(Generic[Call, Answer]):
    """A call that waits for its answer until its deadline. An exception is an answer too.

    ``flight``: the one that it is in; None while it is not sent. ``others``: the calls about the same record that
    waited too when it was sent.
    """

    __slots__ = ("answer", "call", "deadline", "flight", "others", "record", "size")

    def __init__(
        self, record: bytes, call: Call, size: int, deadline: float, answer: Future[Answer | Exception | None]
    ) -> None:
        self.record = record
        self.call = call
        self.size = size
        self.deadline = deadline
        self.answer = answer
        self.flight: Task[None] | None = None
        self.others: Sequence[_Ticket[Call, Answer]] = ()

    def settle(self, answer: Answer | Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class Flights(Generic[Call, Answer]):
    """The flights of one kind of call, in one event loop.

    ``fly`` sends calls, in the order of their records' ids, and returns an answer for each; None gives a call back, and
    an exception fails it. If it raises, it gives all of them back. Two calls about one record never fly together. But
    an answer also answers another call about the record that waited when the flight began, where ``answers_too`` says
    so.
    """

    def __init__(
        self,
        fly: Callable[[Sequence[Call], InFlight], Awaitable[Sequence[Answer | Exception | None]]],
        answers_too: Callable[[Answer, Call], bool],
        limits: Limits,
    ) -> None:
        self._send_together = fly
        self._answers_too = answers_too
        # Not asked for at each call: before Python 3.12, that is a system call.
        self._loop = asyncio.get_running_loop()
        self._slots, self._timeout, self._abandoned = limits
        # The calls that wait, by their record: those that can fly, and those behind a call that is flying.
        self._waiting: dict[bytes, deque[_Ticket[Call, Answer]]] = {}
        self._behind: dict[bytes, deque[_Ticket[Call, Answer]]] = {}
        # None of a flight that has not boarded.
        self._under_way: dict[Task[None], Sequence[_Ticket[Call, Answer]] | None] = {}
        self._boarding = False
        # In the order of their deadlines, with one timer for all.
        self._timed: deque[_Ticket[Call, Answer]] = deque()
        self._timer: TimerHandle | None = None

    @property
    def is_awaited(self) -> bool:
        """Return whether a call waits for the next flight."""
        return bool(self._waiting)

    async def send(self, record: bytes, call: Call, size: int) -> Answer | None:
        """Return the answer to a call that is about ``record`` and has ``size`` bytes; None where it is given back.

        Raises TimeoutError when its time is over, and the exception that the flight answers it with. A call that is
        cancelled is withdrawn if it is not sent yet. Else its flight is waited for, so that a release which follows
        cannot overtake the call.
        """
        loop = self._loop
        ticket: _Ticket[Call, Answer] = _Ticket(record, call, size, loop.time() + self._timeout, loop.create_future())
        self._timed.append(ticket)
        if self._timer is None:
            self._arm()
        behind = self._behind.get(record)
        if behind is not None:
            behind.append(ticket)
        else:
            self._waiting.setdefault(record, deque()).append(ticket)
            self._depart()
        try:
            answer = await ticket.answer
        except asyncio.CancelledError:
            if ticket.flight is not None:
                await asyncio.wait({ticket.flight}, timeout=self._timeout)
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _arm(self) -> None:
        # In an empty context, as a flight is.
        self._timer = self._loop.call_at(self._timed[0].deadline, self._expire, context=Context())

    def _expire(self) -> None:
        self._timer, now = None, self._loop.time()
        while self._timed and (self._timed[0].deadline <= now or self._timed[0].answer.done()):
            self._timed.popleft().settle(TimeoutError())
        if self._timed:
            self._arm()

    def _depart(self) -> None:
        if self._waiting and not self._boarding and len(self._under_way) < AT_ONCE:
            # The task begins after the calls of this iteration of the event loop have arrived, and takes them all. Its
            # context is empty: that of one caller would pass from each flight to the next, with all that hangs on it.
            # A task factory of the application may not know create_task's own ``context``.
            self._boarding = True
            flight = Context().run(self._loop.create_task, self._fly())
            self._under_way[flight] = None
            flight.add_done_callback(self._end)

    async def _fly(self) -> None:
        flight: Any = asyncio.current_task()
        async with self._slots:
            await self._gather()
            tickets = self._board(flight)
            if tickets:
                await self._answer(flight, tickets)
        self._end(flight)

    async def _gather(self) -> None:
        """Wait until an iteration of the event loop brings no further call, or for a few iterations."""
        for _ in range(MOST_ITERATIONS):
            before = len(self._waiting)
            await asyncio.sleep(0)
            if not before < len(self._waiting) < MOST_CALLS:
                return

    def _end(self, flight: Task[None]) -> None:
        """Give back what has no answer; the task itself may have been cancelled before its first step."""
        if flight not in self._under_way:
            return  # it has ended, or was abandoned
        tickets = self._under_way[flight] or ()
        if self._under_way[flight] is None:
            self._boarding = False
        if flight.done():
            # Something cancels all tasks, as the end of an event loop does. Nothing may be begun then.
            queues = *self._waiting.values(), *self._behind.values()
            tickets = [*tickets, *chain.from_iterable(queues)]
            for queue in queues:
                queue.clear()
            self._waiting.clear()
        # The others too: if their row is locked, each would delay the next flight.
        for ticket in chain(tickets, *(ticket.others for ticket in tickets)):
            ticket.settle(None)
        self._land(flight)

    async def _answer(self, flight: Task[None], tickets: Sequence[_Ticket[Call, Answer]]) -> None:
        statement = InFlight()
        # Each call began before its flight, so the time of each call is over by then.
        limit = self._loop.call_later(self._timeout, self._abandon, flight, statement)
        try:
            answers = await self._send_together([ticket.call for ticket in tickets], statement)
        except Exception:  # a driver may raise anything
            return
        finally:
            limit.cancel()
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.settle(answer)
            if answer is None or isinstance(answer, Exception):
                continue
            for other in ticket.others:
                if self._answers_too(answer, other.call):
                    other.settle(answer)

    def _board(self, flight: Task[None]) -> list[_Ticket[Call, Answer]]:
        """Take calls that wait: of each record the first one, which is the only one that may be under way."""
        self._boarding = False
        boarded: list[_Ticket[Call, Answer]] = []
        size = 0
        for record, tickets in list(islice(self._waiting.items(), MOST_CALLS)):
            if size >= MOST_BYTES:
                break
            del self._waiting[record]
            while tickets:
                ticket = tickets.popleft()
                if not ticket.answer.done():  # else it is withdrawn
                    ticket.flight, ticket.others = flight, [*tickets]
                    self._behind[record] = tickets
                    boarded.append(ticket)
                    size += ticket.size
                    break
        # In one order, so that the flights of several processes cannot wait for one another in a circle.
        boarded.sort(key=attrgetter("record"))
        self._under_way[flight] = boarded
        self._depart()
        return boarded

    def _abandon(self, flight: Task[None], statement: InFlight) -> None:
        self._abandoned.add(flight, statement.cut_off)
        self._land(flight)

    def _land(self, flight: Task[None]) -> None:
        if flight not in self._under_way:
            return  # it was abandoned
        for ticket in self._under_way.pop(flight) or ():
            behind = self._behind.pop(ticket.record)
            if behind:
                self._waiting[ticket.record] = behind
        while self._timed and self._timed[0].answer.done():
            self._timed.popleft()
        self._depart()
