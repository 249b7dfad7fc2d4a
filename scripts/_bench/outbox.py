"""The outbox: what relays publish a second, how long a commit waits for its publish, and what emitting costs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter, perf_counter_ns

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from idempotency.outbox import LogRelay, Message, Outbox, Outcome, PollingRelay, Publisher, Sent
from idempotency.outbox.publishers import open_publisher

KEYS = 1000
WRITERS = 16
BATCH = 500
BROKERS = ("amqp://guest:guest@127.0.0.1:5672/", "nats://127.0.0.1:4222", "redis://127.0.0.1:6379/0")


@dataclass(frozen=True)
class Relayed:
    """How many messages a second one relay has published."""

    name: str
    per_second: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds from commit to publish."""

    name: str
    median: float
    p99: float


@dataclass(frozen=True)
class Emitting:
    """Commits a second of 16 writers, each an effect and a message."""

    ours: float
    by_hand: float


class AtOnce:
    """A publisher that confirms at once, and notes when it was given each message."""

    delivery_timeout = 5.0

    def __init__(self) -> None:
        self.published: dict[str, int] = {}

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """Confirm the batch."""
        now = perf_counter_ns()
        for message in batch:
            self.published[message.id] = now
        return [Sent()] * len(batch)

    async def aclose(self) -> None:
        """Close nothing."""


@asynccontextmanager
async def opened(url: str, place: str) -> AsyncIterator[tuple[AsyncEngine, Outbox]]:
    """Open an engine, and an outbox in tables of its own."""
    engine = create_async_engine(url, pool_size=WRITERS + 4)
    outbox = Outbox(place)
    await outbox.create_schema(engine)
    try:
        yield engine, outbox
    finally:
        async with engine.begin() as connection:
            for table in outbox.tables.all:
                await connection.execute(text(f"DROP TABLE {table.name}"))
        await engine.dispose()


async def fill(engine: AsyncEngine, outbox: Outbox, messages: int) -> None:
    """Emit many messages by one statement, as that many transactions would have."""
    rows = [outbox.row("order", number % KEYS, "OrderPlaced", {"order": number}, None, None) for number in range(KEYS)]
    columns = "id, aggregatetype, aggregateid, type, payload, headers, bucket, attempts, available_ms"
    async with engine.begin() as connection:
        await connection.run_sync(outbox.write, rows)
        for _ in range(messages // KEYS - 1):
            await connection.execute(
                text(
                    f"INSERT INTO {outbox.tables.messages.name} (created_ms, {columns})"
                    f" SELECT created_ms, {columns.replace('id,', 'gen_random_uuid(),', 1)}"
                    f" FROM {outbox.tables.messages.name} ORDER BY seq LIMIT {KEYS}"
                )
            )
        await connection.commit()
    async with engine.connect() as connection:
        options = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await options.execute(text(f"VACUUM ANALYZE {outbox.tables.messages.name}"))


async def relayed(name: str, publisher: Publisher, engine: AsyncEngine, outbox: Outbox, messages: int) -> Relayed:
    """Measure the polling relay over a table that is full."""
    await fill(engine, outbox, messages)
    relay = PollingRelay(engine, publisher, outbox=outbox, batch=BATCH)
    began = perf_counter()
    done = await relay.drain()
    took = perf_counter() - began
    if done != messages:
        raise RuntimeError(f"{done} of {messages} messages were published")
    return Relayed(name, messages / took)


async def relayed_by_log(publisher: Publisher, engine: AsyncEngine, outbox: Outbox, messages: int) -> Relayed:
    """Measure the relay that reads the log, from a slot that is older than the messages."""
    slot = f"{outbox.tables.messages.name}_slot"
    relay = LogRelay(engine, publisher, outbox=outbox, slot=slot, allow_unlimited_wal=True)
    await relay.drain()
    try:
        await fill(engine, outbox, messages)
        began = perf_counter()
        done = await relay.drain()
        took = perf_counter() - began
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT pg_drop_replication_slot(:slot)"), {"slot": slot})
    if done != messages:
        raise RuntimeError(f"{done} of {messages} messages were published from the log")
    return Relayed("log, confirms at once", messages / took)


async def to_broker(url: str, engine: AsyncEngine, outbox: Outbox, messages: int) -> Relayed:
    """Measure the polling relay with a local broker."""
    target = await prepared(url, outbox.tables.messages.name)
    publisher = open_publisher(target)
    try:
        return await relayed(url.partition(":")[0], publisher, engine, outbox, messages)
    finally:
        await publisher.aclose()
        await removed(url, outbox.tables.messages.name)


async def prepared(url: str, name: str) -> str:
    """Declare where the messages go, and return the publisher's URL."""
    if url.startswith("amqp"):
        import aio_pika

        async with await aio_pika.connect(url) as connection:
            channel = await connection.channel()
            await channel.declare_queue(name, durable=True)
        return f"{url}?topic={name}"
    if url.startswith("nats"):
        import nats

        client = await nats.connect(url)
        await client.jetstream().add_stream(name=name, subjects=[name])
        await client.close()
        return f"{url}?topic={name}"
    return f"{url}?topic={name}"


async def removed(url: str, name: str) -> None:
    """Remove what :func:`prepared` declared."""
    if url.startswith("amqp"):
        import aio_pika

        async with await aio_pika.connect(url) as connection:
            await (await connection.channel()).queue_delete(name)
    elif url.startswith("nats"):
        import nats

        client = await nats.connect(url)
        await client.jetstream().delete_stream(name)
        await client.close()
    else:
        import redis.asyncio

        client = redis.asyncio.from_url(url)
        await client.delete(name)
        await client.aclose()


async def latency_in_process(engine: AsyncEngine, outbox: Outbox, rate: float, messages: int) -> list[float]:
    """Measure a relay in the process that emits."""
    publisher = AtOnce()
    relay = PollingRelay(engine, publisher, outbox=outbox)
    running = asyncio.create_task(relay.run())
    try:
        committed = await emit_at(engine, outbox, rate, messages)
        async with asyncio.timeout(30):
            while len(publisher.published) < len(committed):
                await asyncio.sleep(0.05)
    finally:
        await relay.stop()
        await running
    return between(committed, publisher.published)


async def latency_across(url: str, engine: AsyncEngine, outbox: Outbox, rate: float, messages: int) -> list[float]:
    """Measure a relay in a process of its own; the clock is one for both."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("outbox_child.py")),
        url,
        outbox.tables.messages.name,
        str(messages),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    assert child.stdout is not None
    await child.stdout.readline()  # it owns its buckets
    committed = await emit_at(engine, outbox, rate, messages)
    published = json.loads(await child.stdout.read())
    await child.wait()
    return between(committed, published)


async def emit_at(engine: AsyncEngine, outbox: Outbox, rate: float, messages: int) -> dict[str, int]:
    """Emit so many messages a second, each in a transaction of its own; return when each was committed."""
    sessions = async_sessionmaker(engine)
    committed: dict[str, int] = {}

    async def one(number: int) -> None:
        async with sessions() as session:
            told = await outbox.emit(
                session, aggregate_type="order", aggregate_id=number % KEYS, type="OrderPlaced", payload=number
            )
            await session.commit()
            committed[told] = perf_counter_ns()

    began = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(messages):
            delay = began + number / rate - perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.create_task(one(number))
    return committed


def between(committed: dict[str, int], published: dict[str, int]) -> list[float]:
    """Return the milliseconds from commit to publish; a publish may begin before the commit has returned here."""
    return [max(0, published[each] - at) / 1e6 for each, at in committed.items()]


def latency(name: str, took: Sequence[float]) -> Latency:
    """Return the median and the 99th percentile."""
    cuts = quantiles(took, n=100)
    return Latency(name, cuts[49], cuts[98])


async def emitting(engine: AsyncEngine, outbox: Outbox, seconds: float, rounds: int) -> Emitting:
    """Measure 16 writers that emit beside ones that send the same INSERT, in turn."""
    sessions = async_sessionmaker(engine)
    table = outbox.tables.messages.name
    by_hand_sql = text(
        f"INSERT INTO {table} (created_ms, id, aggregatetype, aggregateid, type, payload, bucket, attempts) VALUES"
        " (CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint), gen_random_uuid(), 'order', :key,"
        " 'OrderPlaced', :payload, 7, 0)"
    )

    async def ours() -> None:
        async with sessions() as session:
            await outbox.emit(session, aggregate_type="order", aggregate_id="7", type="OrderPlaced", payload={"a": 1})
            await session.commit()

    async def by_hand() -> None:
        async with sessions() as session:
            await session.execute(by_hand_sql, {"key": "7", "payload": b'{"a":1}'})
            await session.commit()

    counts = {ours: 0, by_hand: 0}
    for _ in range(rounds):
        for way in counts:
            counts[way] += await commits(way, seconds)
    return Emitting(counts[ours] / rounds / seconds, counts[by_hand] / rounds / seconds)


async def commits(write: Callable[[], Awaitable[None]], seconds: float) -> int:
    """Count the commits of 16 writers."""
    until, count = perf_counter() + seconds, 0

    async def writer() -> None:
        nonlocal count
        while perf_counter() < until:
            await write()
            count += 1

    await asyncio.gather(*(writer() for _ in range(WRITERS)))
    return count


async def claim_times(url: str, engine: AsyncEngine, outbox: Outbox, seconds: float) -> tuple[float, float]:
    """Measure the median time of a poll in the first and in the last tenth of a report that holds its snapshot.

    Meanwhile 500 messages a second are emitted and published.
    """
    report = await asyncpg.connect(url.replace("+asyncpg", ""))
    publisher = AtOnce()
    relay = PollingRelay(engine, publisher, outbox=outbox)
    async with report.transaction(isolation="repeatable_read"):
        await report.fetchval("SELECT count(*) FROM pg_class")
        running = asyncio.create_task(relay.run())
        committed = await emit_at(engine, outbox, 500, round(seconds * 500))
        while len(publisher.published) < len(committed):
            await asyncio.sleep(0.05)
        await relay.stop()
        await running
    await report.close()
    took = between(committed, publisher.published)
    tenth = len(took) // 10
    return latency("", took[:tenth]).median, latency("", took[-tenth:]).median
