"""The outbox on PostgreSQL: what relays publish a second, of a table that is full."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns, process_time

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency.outbox import LogRelay, Message, Outbox, Outcome, PollingRelay, Publisher, Sent
from idempotency.outbox.publishers import open_publisher
from tests.kit import servers

KEYS = 1000
SAMPLE = "sample"
"""The type of aggregate of messages whose latency is measured."""

WRITERS = 16
BATCH = 500
BROKERS = ("amqp://guest:guest@127.0.0.1:5672/", "nats://127.0.0.1:4222", "redis://127.0.0.1:6379/0")


@dataclass(frozen=True)
class Relayed:
    """How many messages a second one relay has published, and microseconds of its processor for each."""

    name: str
    per_second: float
    processor: float


class AtOnce:
    """A publisher that confirms at once, and notes when it was given each sample."""

    delivery_timeout = 5.0

    def __init__(self) -> None:
        self.published: dict[str, int] = {}

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """Confirm the batch."""
        now = perf_counter_ns()
        self.published.update((message.id, now) for message in batch if message.aggregate_type == SAMPLE)
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
    """Emit many messages by few transactions."""
    rows = [outbox.row("order", number % KEYS, "OrderPlaced", {"order": number}, None, None) for number in range(KEYS)]
    columns = "id, aggregatetype, aggregateid, type, payload, headers, bucket, attempts, available_ms"
    name = outbox.tables.messages.name
    again = text(
        f"INSERT INTO {name} (created_ms, {columns})"
        f" SELECT created_ms, {columns.replace('id,', 'gen_random_uuid(),', 1)} FROM {name} ORDER BY seq LIMIT {KEYS}"
    )
    async with engine.begin() as connection:
        await connection.run_sync(outbox.write, rows)
    for _ in range(messages // KEYS - 1):
        async with engine.begin() as connection:
            await connection.execute(again)
    async with engine.connect() as connection:
        options = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await options.execute(text(f"VACUUM ANALYZE {name}"))


async def relayed(name: str, publisher: Publisher, engine: AsyncEngine, outbox: Outbox, messages: int) -> Relayed:
    """Measure the polling relay over a table that is full."""
    await fill(engine, outbox, messages)
    return await timed(name, PollingRelay(engine, publisher, outbox=outbox, batch=BATCH), messages)


async def timed(name: str, relay: PollingRelay | LogRelay, messages: int) -> Relayed:
    """Measure a relay that has so many messages to publish."""
    began, processor = perf_counter(), process_time()
    done = await relay.drain()
    took, processor = perf_counter() - began, process_time() - processor
    if done != messages:
        raise RuntimeError(f"{done} of {messages} messages were published")
    return Relayed(name, messages / took, processor / messages * 1e6)


async def relayed_by_log(name: str, engine: AsyncEngine, outbox: Outbox, messages: int) -> Relayed:
    """Measure the relay that reads the log, from a slot that is older than the messages."""
    slot = f"{outbox.tables.messages.name}_slot"
    relay = LogRelay(engine, AtOnce(), outbox=outbox, slot=slot, batch=BATCH, allow_unlimited_wal=True)
    await relay.drain()
    try:
        await fill(engine, outbox, messages)
        return await timed(name, relay, messages)
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT pg_drop_replication_slot(:slot)"), {"slot": slot})


@contextmanager
def with_log(url: str, is_logical: bool) -> Iterator[str]:
    """Yield a server whose log can be read: the given one, else a private one of the same programs."""
    if is_logical:
        yield url
        return
    settings = {"wal_level": "logical", "fsync": "on", "shared_buffers": "128MB"}
    with servers.PostgresServer(servers.system_postgres_binaries(), **settings) as server:
        yield server.url


async def to_broker(url: str, engine: AsyncEngine, outbox: Outbox, messages: int) -> Relayed:
    """Measure the polling relay with a local broker."""
    target = await prepared(url, outbox.tables.messages.name)
    publisher = open_publisher(target)
    try:
        return await relayed(f"poll, to {url.partition(':')[0]}", publisher, engine, outbox, messages)
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
