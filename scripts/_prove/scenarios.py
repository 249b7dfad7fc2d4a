"""The scenarios of scripts/prove: one for each way to hold a record and an effect together."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import redis
from redis import asyncio as aioredis
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idempotency import IdempotencyMiddleware, Policy
from idempotency.consumer import Done, Replayed, idempotent_consumer
from idempotency.errors import OutcomeUnknownError
from idempotency.function import idempotent
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_point

# Imported here once, so that not each process that delivers does it.
for _driver in ("asyncpg", "psycopg", "aiomysql", "pymysql", "aiosqlite", "sqlalchemy.dialects.postgresql.asyncpg"):
    with suppress(ImportError):
        importlib.import_module(_driver)

# What is proved here is counted, not read in a log.
logging.getLogger("idempotency").setLevel(logging.ERROR)

LEASE = 1.0
TTL = 600.0
RECORDS = "prove_record"
EFFECTS = Table("prove_effect", MetaData(), Column("id", Integer, primary_key=True), Column("reference", String(64)))


class UnsettledError(Exception):
    """The client did not get the response that it needs, and will send its request again."""


async def post(app: Any, key: str) -> bytes:
    """Send one request to ``app`` and return the body of the answer; raise if the client must send it again."""
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/orders",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"idempotency-key", key.encode()), (b"content-type", b"application/json")],
        "state": {},
    }
    await app(scope, receive, send)
    status = messages[0]["status"]
    if status != 201:
        code = json.loads(messages[1]["body"])["code"]
        if code == "outcome-unknown":
            raise OutcomeUnknownError
        if code != "completed-not-replayable":
            raise UnsettledError(f"{status} {code}")
    return bytes(messages[1]["body"])


async def respond(send: Any) -> None:
    """Answer 201."""
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


class OnSQL:
    """The business table and the records, in one database."""

    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url)
        self.sessions = async_sessionmaker(self.engine)
        self.store = SQLStore(self.engine, table=RECORDS)

    async def prepare(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(EFFECTS.metadata.create_all)
        await self.store.create_schema()

    async def add(self, session: AsyncSession, key: str) -> None:
        await session.execute(EFFECTS.insert().values(reference=key))

    async def count(self, key: str) -> int:
        async with self.engine.connect() as connection:
            query = select(func.count()).select_from(EFFECTS).where(EFFECTS.c.reference == key)
            return int(await connection.scalar(query) or 0)


class TransactionalHTTP(OnSQL):
    """Effect, response and record commit together."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.app = IdempotencyMiddleware(
            self.handle, store=self.store, session=self.sessions, policy=Policy(lease=LEASE, ttl=TTL)
        )

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        operation = scope["state"]["idempotency"]
        await self.add(operation.session, operation.key)
        crash_point("effect")
        await respond(send)

    async def deliver(self, key: str) -> None:
        await post(self.app, key)


class JoinedConsumer(OnSQL):
    """A message's record, effect and result are one transaction."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent_consumer(self.store, consumer="prove", key=str, session=self.sessions, policy=Policy(ttl=TTL))
        async def handle(message: str, session: AsyncSession) -> str:
            await self.add(session, message)
            crash_point("effect")
            return message

        self.handle = handle

    async def deliver(self, key: str) -> None:
        outcome = await self.handle.deliver(key)
        if outcome not in (Done(key), Replayed(key)):
            raise UnsettledError(repr(outcome))


class JoinedFunction(OnSQL):
    """A call's record, effect and result are one transaction."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent(self.store, key=str, session=self.sessions, policy=Policy(ttl=TTL))
        async def order(reference: str, session: AsyncSession) -> str:
            await self.add(session, reference)
            crash_point("effect")
            return reference

        self.order: Any = order

    async def deliver(self, key: str) -> None:
        if await self.order(key) != key:
            raise UnsettledError("another result")


class OnSQLSync:
    """The business table and the records, in one database, without an event loop."""

    DRIVERS = MappingProxyType({"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite"})

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.engine = create_engine(parsed.set(drivername=self.DRIVERS[parsed.get_backend_name()]))
        self.sessions = sessionmaker(self.engine)
        self.store = SQLStore(self.engine, table=RECORDS)

    def prepare(self) -> None:
        EFFECTS.metadata.create_all(self.engine)
        self.store.create_schema_sync()

    def add(self, session: Session, key: str) -> None:
        session.execute(EFFECTS.insert().values(reference=key))

    def count(self, key: str) -> int:
        with self.engine.connect() as connection:
            query = select(func.count()).select_from(EFFECTS).where(EFFECTS.c.reference == key)
            return int(connection.scalar(query) or 0)


class TransactionalHTTPSync(OnSQLSync):
    """As :class:`TransactionalHTTP`, with a synchronous session."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.app = IdempotencyMiddleware(
            self.handle, store=self.store, session=self.sessions, policy=Policy(lease=LEASE, ttl=TTL)
        )

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        operation = scope["state"]["idempotency"]
        await asyncio.to_thread(self.add, operation.session, operation.key)
        crash_point("effect")
        await respond(send)

    async def deliver(self, key: str) -> None:
        await post(self.app, key)


class JoinedConsumerSync(OnSQLSync):
    """As :class:`JoinedConsumer`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent_consumer(self.store, consumer="prove", key=str, session=self.sessions, policy=Policy(ttl=TTL))
        def handle(message: str, session: Session) -> str:
            self.add(session, message)
            crash_point("effect")
            return message

        self.handle = handle

    def deliver(self, key: str) -> None:
        outcome = self.handle.deliver(key)
        if outcome not in (Done(key), Replayed(key)):
            raise UnsettledError(repr(outcome))


class JoinedFunctionSync(OnSQLSync):
    """As :class:`JoinedFunction`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent(self.store, key=str, session=self.sessions, policy=Policy(ttl=TTL))
        def order(reference: str, session: Session) -> str:
            self.add(session, reference)
            crash_point("effect")
            return reference

        self.order: Any = order

    def deliver(self, key: str) -> None:
        if self.order(key) != key:
            raise UnsettledError("another result")


class LeasedFunctionSync(OnSQLSync):
    """A call's effect is committed first, and its result is recorded after it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        @idempotent(self.store, key=str, policy=Policy(lease=LEASE, ttl=TTL))
        def order(reference: str) -> str:
            with self.sessions.begin() as session:
                self.add(session, reference)
            crash_point("effect")
            return reference

        self.order = order

    def deliver(self, key: str) -> None:
        self.order(key)


class LeasedFunctionRedisSync:
    """As :class:`LeasedFunctionSync`, by two commands."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)

        @idempotent(
            RedisStore(redis.Redis.from_url(url), prefix="prove"),
            key=str,
            policy=Policy(lease=LEASE, ttl=TTL),
        )
        def order(reference: str) -> str:
            self.client.rpush(f"prove-effects:{reference}", "1")
            self.client.expire(f"prove-effects:{reference}", int(TTL))
            crash_point("effect")
            return reference

        self.order = order

    def deliver(self, key: str) -> None:
        self.order(key)

    def count(self, key: str) -> int:
        return int(self.client.llen(f"prove-effects:{key}"))


class Leased:
    """The effect is committed first, and the record is written after it."""

    ON_CRASH: Any = "rerun"
    store: Any
    effect: Any
    count: Any

    def protect(self) -> None:
        policy = Policy(lease=LEASE, ttl=TTL, on_crash=self.ON_CRASH)
        self.app = IdempotencyMiddleware(self.handle, store=self.store, policy=policy)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await self.effect(scope["state"]["idempotency"].key)
        crash_point("effect")
        await respond(send)

    async def deliver(self, key: str) -> None:
        await post(self.app, key)

    async def resolve(self, key: str) -> None:
        """Find out what happened, and resolve the key with that."""
        [record] = [entry for entry in await self.store.unresolved(10_000) if entry.key == key]
        happened = await self.count(key)
        if not await self.store.resolve(record.id, "done" if happened else "release", None, ttl=TTL):
            raise UnsettledError("the record was not unresolved")


class LeasedSQL(OnSQL, Leased):
    """On a SQL database, in two transactions."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.protect()

    async def effect(self, key: str) -> None:
        async with self.sessions.begin() as session:
            await self.add(session, key)


class LeasedRedis(Leased):
    """On Redis, by two commands."""

    def __init__(self, url: str) -> None:
        self.client = aioredis.Redis.from_url(url)
        self.store = RedisStore(aioredis.Redis.from_url(url), prefix="prove")
        self.protect()

    async def effect(self, key: str) -> None:
        await self.client.rpush(f"prove-effects:{key}", "1")
        await self.client.expire(f"prove-effects:{key}", int(TTL))

    async def count(self, key: str) -> int:
        return int(await self.client.llen(f"prove-effects:{key}"))


class HeldSQL(LeasedSQL):
    """After a crash of the owner the outcome of the key is unknown."""

    ON_CRASH = "hold"


class HeldRedis(LeasedRedis):
    """After a crash of the owner the outcome of the key is unknown."""

    ON_CRASH = "hold"
