"""Records that were damaged in the store."""

from __future__ import annotations

import psycopg
import pytest
import redis
from psycopg import sql

from tests.kit.asgi_servers import Bench, Live, new_key, over, post, problem, record_of

REDIS_DAMAGE = {
    "no-fields": lambda client, name: client.hdel(name, "v", "s", "t"),
    "state": lambda client, name: client.hset(name, "s", "nine"),
    "no-fingerprint": lambda client, name: client.hdel(name, "f"),
    "version": lambda client, name: client.hset(name, "v", "2"),
    "cut-result": lambda client, name: client.hset(name, "r", client.hget(name, "r")[:-1]),
    "empty-result": lambda client, name: client.hset(name, "r", b""),
    "text-result": lambda client, name: client.hset(name, "r", b"{}"),
    "other-type": lambda client, name: (client.delete(name), client.rpush(name, "x")),
    "text": lambda client, name: (client.delete(name), client.set(name, "x")),
}
POSTGRES_DAMAGE = {
    "state": "state = 9",
    "version": "version = 2",
    "attempt": "attempt = 0",
    "cut-result": "result = substring(result from 1 for 20)",
    "empty-result": "result = ''",
    "text-result": "result = 'text'",
}


def damage_redis(bench: Bench, key: str, kind: str) -> None:
    """Damage the record of ``key``."""
    name = f"{bench.target.name}:1:{record_of(key).hex()}"
    with redis.Redis.from_url(bench.target.url) as client:
        assert client.exists(name) == 1
        REDIS_DAMAGE[kind](client, name)


def damage_postgres(bench: Bench, key: str, kind: str) -> None:
    """Damage the record of ``key``."""
    statement = f"UPDATE {{}} SET {POSTGRES_DAMAGE[kind]} WHERE id = %s"
    with psycopg.connect(bench.target.url.replace("+asyncpg", "")) as connection:
        query = sql.SQL(statement).format(sql.Identifier(bench.target.name))
        assert connection.execute(query, [record_of(key)]).rowcount == 1


async def check(live: Live, kind: str) -> None:
    """Run a request, damage its record, and assert what its retries are told."""
    key = new_key()
    damage = damage_redis if live.bench.target.is_redis else damage_postgres

    async with live.client() as client:
        await post(client, "/order", key)
        damage(live.bench, key, kind)
        for _ in range(2):
            problem(await post(client, "/order", key), 500, "record-unreadable")

    assert len(live.bench.lines(effect=key)) == 1
    assert len(live.bench.lines(event="unreadable", record=record_of(key).hex()[:12])) == 2


@over([("uvicorn-httptools", 1, "redis"), ("granian", 2, "redis")])
@pytest.mark.parametrize("kind", REDIS_DAMAGE)
async def test_a_damaged_record_in_redis(live: Live, kind: str) -> None:
    """A record that cannot be read is a problem of its own, and nothing runs again."""
    await check(live, kind)


@over([("uvicorn-httptools", 1, "postgres"), ("granian", 2, "postgres")])
@pytest.mark.parametrize("kind", POSTGRES_DAMAGE)
async def test_a_damaged_record_in_postgres(live: Live, kind: str) -> None:
    """A record that cannot be read is a problem of its own, and nothing runs again."""
    await check(live, kind)
