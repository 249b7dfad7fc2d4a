"""One aio-pika consumer of RabbitMQ: its handler bare, under ``idempotent_consumer``, and with statements by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from statistics import median
from time import process_time_ns
from typing import Any

from aio_pika import Message, connect_robust
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue
from by_hand import ByHand
from measure import Case, medians
from sql_subject import SQL
from sqlalchemy import Column, Integer, MetaData, String, Table, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from subjects import Subject

from idempotency import idempotent_consumer
from idempotency.adapters.aio_pika import consume

PREFETCH = 100
BARE, ONE, THREE = "bare", "by hand, one", "by hand, three"

_CONNECTIONS = 16
_LIMIT = 120.0
"""Seconds in which a queue must be consumed: a handler that fails would be waited for without end."""

_numbers = count()


@dataclass(frozen=True)
class Rate:
    """Messages per second, and microseconds of this process's processor time per message."""

    per_second: float
    processor: float


@dataclass(frozen=True)
class Rates:
    """The rates of one way, at the first and at the second delivery; a bare handler has no second."""

    name: str
    first: Rate
    replay: Rate | None


class Countdown:
    """An event that is set after so many messages."""

    def begin(self, messages: int) -> None:
        """Wait for ``messages`` from now on."""
        self._remaining = messages
        self.ended = asyncio.Event()

    def note(self, _: object = None) -> None:
        """Count one message."""
        self._remaining -= 1
        if not self._remaining:
            self.ended.set()


@dataclass(frozen=True)
class Way:
    """One way to handle messages. ``consume`` handles those of a queue until the countdown ends."""

    name: str
    consume: Callable[[AbstractQueue, Countdown], Awaitable[None]]
    handled: Countdown
    replays: bool = True


class Effects:
    """The effect of every way: one row per message."""

    def __init__(self, place: str) -> None:
        self.metadata = MetaData()
        columns = Column("id", Integer, primary_key=True), Column("message", String(64))
        self._table = Table(f"{place}_effect", self.metadata, *columns)

    async def insert(self, message: AbstractIncomingMessage, session: AsyncSession) -> dict[str, Any]:
        """Handle a message: insert its row, and return a result."""
        await session.execute(self._table.insert(), {"message": message.message_id})
        return {"order": json.loads(message.body)["order"]}

    async def expect(self, session: AsyncSession, way: str, messages: int) -> None:
        """Raise an error unless so many messages of a way took effect, each once."""
        mine = self._table.c.message.startswith(f"{way}-")
        effects = func.count(), func.count(self._table.c.message.distinct())
        found = (await session.execute(select(*effects).where(mine))).one()
        if tuple(found) != (messages, messages):
            raise RuntimeError(f"{messages} messages were handled {way}: {found[0]} effects, of {found[1]} messages")


async def measure(broker: str, database: SQL, leased: Sequence[Subject], *, messages: int, rounds: int) -> list[Rates]:
    """Consume so many messages in every way, round by round.

    ``database`` is a PostgreSQL; effects and records by hand are there, and the joined records. ``leased``: the stores
    of the leased records.
    """
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await connect_robust(broker))
        engine = create_async_engine(database.url, pool_size=_CONNECTIONS, max_overflow=0)
        stack.push_async_callback(engine.dispose)
        sessions = async_sessionmaker(engine)
        effects, by_hand = Effects(database.place), ByHand(database.place)
        await stack.enter_async_context(_tables(engine, effects.metadata, by_hand.metadata))
        ways = [*_ways_by_hand(sessions, effects, by_hand), _joined(database, sessions, effects)]
        ways += [_leased(subject, sessions, effects) for subject in leased]
        all_measured = [Measured(way, database.place, await connection.channel(), messages) for way in ways]
        for each in all_measured:
            await each.open()
        cases = [case for each in all_measured for case in each.cases()]
        took = await medians(cases, rounds, warm_up=1)
        for each in all_measured:
            async with sessions() as session:
                await effects.expect(session, each.way.name, each.published)
    rates = {}
    for each in all_measured:
        for name, processor in each.processor.items():
            rates[name] = Rate(messages * 1e6 / took[name], median(processor) / messages / 1000)
    return [Rates(way.name, rates[way.name], rates.get(_again(way))) for way in ways]


@asynccontextmanager
async def _tables(engine: AsyncEngine, *all_metadata: MetaData) -> AsyncIterator[None]:
    try:
        async with engine.begin() as connection:
            for metadata in all_metadata:
                await connection.run_sync(metadata.create_all)
        yield
    finally:
        async with engine.begin() as connection:
            for metadata in all_metadata:
                await connection.run_sync(metadata.drop_all)


def _again(way: Way) -> str:
    return f"{way.name} again"


class Measured:
    """A way with a queue of its own, which ends with the connection."""

    def __init__(self, way: Way, place: str, channel: Any, messages: int) -> None:
        self.way = way
        self.published = 0
        self.processor: dict[str, list[int]] = {}
        self._channel = channel
        self._place = f"{place}_{way.name}"
        self._done = self._new_ids(messages)
        self._messages = messages

    async def open(self) -> None:
        """Declare the queue, and handle for the first time the messages that are delivered again later."""
        self._queue: AbstractQueue = await self._channel.declare_queue(self._place, exclusive=True)
        await self._consume([], await self._publish(self._done))

    def cases(self) -> list[Case]:
        """Return the cases of first and of second deliveries."""
        cases = [self._case(self.way.name, lambda: self._publish(self._new_ids(self._messages)))]
        if self.way.replays:
            cases.append(self._case(_again(self.way), lambda: self._publish(self._done)))
        return cases

    def _case(self, name: str, publish: Callable[[], Awaitable[int]]) -> Case:
        return Case(name, publish, partial(self._consume, self.processor.setdefault(name, [])))

    def _new_ids(self, messages: int) -> list[str]:
        self.published += messages
        return [f"{self.way.name}-{next(_numbers)}" for _ in range(messages)]

    async def _publish(self, ids: Sequence[str]) -> int:
        for each in ids:
            body = json.dumps({"order": each, "item": "cup", "amount": 2}).encode()
            await self._channel.default_exchange.publish(Message(body, message_id=each), self._place)
        return len(ids)

    async def _consume(self, processor: list[int], messages: int) -> None:
        self.way.handled.begin(messages)
        began = process_time_ns()
        async with asyncio.timeout(_LIMIT):
            await self.way.consume(self._queue, self.way.handled)
        processor.append(process_time_ns() - began)


def _ways_by_hand(
    sessions: async_sessionmaker[AsyncSession], effects: Effects, by_hand: ByHand
) -> tuple[Way, Way, Way]:
    async def bare(message: AbstractIncomingMessage) -> None:
        async with sessions.begin() as session:
            await effects.insert(message, session)

    async def one(message: AbstractIncomingMessage) -> None:
        async with sessions.begin() as session:
            token = await by_hand.claim(session, message.message_id)
            if token is not None:
                result = await effects.insert(message, session)
                await by_hand.complete(session, message.message_id, token, result)

    async def three(message: AbstractIncomingMessage) -> None:
        async with sessions.begin() as session:
            token = await by_hand.claim(session, message.message_id)
        if token is not None:
            async with sessions.begin() as session:
                result = await effects.insert(message, session)
            async with sessions.begin() as session:
                await by_hand.complete(session, message.message_id, token, result)

    return (
        Way(BARE, partial(_consume_by_hand, bare), Countdown(), replays=False),
        Way(ONE, partial(_consume_by_hand, one), Countdown()),
        Way(THREE, partial(_consume_by_hand, three), Countdown()),
    )


async def _consume_by_hand(
    handle: Callable[[AbstractIncomingMessage], Awaitable[None]], queue: AbstractQueue, handled: Countdown
) -> None:
    async def on_message(message: AbstractIncomingMessage) -> None:
        await handle(message)
        await message.ack()
        handled.note()

    await queue.channel.set_qos(prefetch_count=PREFETCH)
    tag = await queue.consume(on_message)
    await handled.ended.wait()
    await queue.cancel(tag)


def _joined(database: SQL, sessions: async_sessionmaker[AsyncSession], effects: Effects) -> Way:
    handled = Countdown()

    @idempotent_consumer(database.store, consumer="joined", session=sessions, on_event=handled.note)
    async def handle(message: AbstractIncomingMessage, session: AsyncSession) -> dict[str, Any]:
        return await effects.insert(message, session)

    return Way("joined", partial(_consume_ours, handle), handled)


def _leased(subject: Subject, sessions: async_sessionmaker[AsyncSession], effects: Effects) -> Way:
    handled = Countdown()

    @idempotent_consumer(subject.store, consumer="leased", on_event=handled.note)
    async def handle(message: AbstractIncomingMessage) -> dict[str, Any]:
        async with sessions.begin() as session:
            return await effects.insert(message, session)

    return Way(f"leased {subject.name}", partial(_consume_ours, handle), handled)


async def _consume_ours(handler: Any, queue: AbstractQueue, handled: Countdown) -> None:
    # Each message has one event, after its commit. Those in hand are acknowledged before this returns.
    await consume(queue, handler, concurrency=PREFETCH, stop=handled.ended)
