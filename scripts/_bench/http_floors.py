"""The floors: the fewest round trips to a store that an idempotent request needs, and nothing else.

There is no fingerprint, no policy, no lease and no event, and the answer is not recorded from what the application
sends: each request pays for its claim and its completion, sent by the plain client one at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import asyncpg
import redis.asyncio as aioredis
from exchange import ANSWER, HEADERS, App, shop
from redis.exceptions import RedisError
from redis_subject import unlink_all
from sqlalchemy import make_url

FLOOR_ERRORS = (RedisError, asyncpg.PostgresError, OSError)
"""What a floor raises whose server cannot be used."""

_TOKEN = "5a" * 16
_TTL = 86_400_000
_CONNECTIONS = 1024
_POOL = 16
_REPLAYED = [*HEADERS, (b"idempotent-replayed", b"true")]

_CLAIM = """
local result = redis.call('HGET', KEYS[1], 'r')
if result then return result end
redis.call('HSET', KEYS[1], 't', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return nil"""
_COMPLETE = """
if redis.call('HGET', KEYS[1], 't') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'r', ARGV[3])
return redis.call('PEXPIRE', KEYS[1], ARGV[2])"""

_CREATE = "CREATE TABLE {} (id text PRIMARY KEY, token text NOT NULL, expires_ms bigint NOT NULL, result bytea)"
_INSERT = """
WITH claimed AS (
  INSERT INTO {0} (id, token, expires_ms) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING RETURNING NULL::bytea)
SELECT * FROM claimed UNION ALL SELECT result FROM {0} WHERE id = $1"""
_UPDATE = "UPDATE {} SET result = $3, expires_ms = $4 WHERE id = $1 AND token = $2"


class _Verbs(Protocol):
    async def claim(self, key: str) -> bytes | None: ...

    async def complete(self, key: str) -> None: ...


def has_floor(url: str) -> bool:
    """Return whether there is a floor for the store of a URL."""
    return url.startswith(("redis:", "postgresql"))


@asynccontextmanager
async def floor_of(url: str, place: str) -> AsyncIterator[App]:
    """Open the floor of a store, whose records are at ``place`` and are removed at the end."""
    opened = _redis(url, place) if url.startswith("redis:") else _postgresql(url, place)
    async with opened as verbs:
        yield _app(verbs)


def _app(verbs: _Verbs) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        key = next((value for name, value in scope["headers"] if name == b"idempotency-key"), None)
        if key is None:
            await shop(scope, receive, send)
            return
        result = await verbs.claim(key.decode())
        if result is not None:
            await send({"type": "http.response.start", "status": 201, "headers": _REPLAYED})
            await send({"type": "http.response.body", "body": result})
            return

        async def send_recorded(message: Any) -> None:
            if message["type"] == "http.response.start":
                await verbs.complete(key.decode())
            await send(message)

        await shop(scope, receive, send_recorded)

    return app


class _Redis:
    def __init__(self, client: Any, place: str) -> None:
        self._place = place
        self._claim = client.register_script(_CLAIM)
        self._complete = client.register_script(_COMPLETE)

    async def claim(self, key: str) -> bytes | None:
        result: bytes | None = await self._claim(keys=(f"{self._place}:{key}",), args=(_TOKEN, _TTL))
        return result

    async def complete(self, key: str) -> None:
        await self._complete(keys=(f"{self._place}:{key}",), args=(_TOKEN, _TTL, ANSWER))


@asynccontextmanager
async def _redis(url: str, place: str) -> AsyncIterator[_Verbs]:
    # By default redis-py raises an error where more than 100 commands run at a time.
    client: Any = aioredis.Redis.from_url(url, max_connections=_CONNECTIONS)
    await client.ping()
    try:
        yield _Redis(client, place)
    finally:
        await unlink_all(client, place)
        await client.aclose()


class _PostgreSQL:
    def __init__(self, pool: Any, table: str) -> None:
        self._pool = pool
        self._insert = _INSERT.format(table)
        self._update = _UPDATE.format(table)

    async def claim(self, key: str) -> bytes | None:
        result: bytes | None = await self._pool.fetchval(self._insert, key, _TOKEN, _TTL)
        return result

    async def complete(self, key: str) -> None:
        await self._pool.execute(self._update, key, _TOKEN, ANSWER, _TTL)


async def _no_reset(_: object) -> None:
    """Send nothing when a connection returns to its pool: single statements leave no state in a session."""


@asynccontextmanager
async def _postgresql(url: str, place: str) -> AsyncIterator[_Verbs]:
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    pool: Any = await asyncpg.create_pool(address, min_size=_POOL, max_size=_POOL, reset=_no_reset)
    try:
        await pool.execute(_CREATE.format(place))
        yield _PostgreSQL(pool, place)
    finally:
        await pool.execute(f"DROP TABLE IF EXISTS {place}")
        await pool.close()
