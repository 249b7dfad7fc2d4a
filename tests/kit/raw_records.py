"""What a store has stored, past the store: read and written as an administrator of its server could."""

from __future__ import annotations

from typing import Any

from sqlalchemy import create_engine, text

from tests.kit.targets import Target, redis_client

_FIELDS = {"scope": "c", "key": "k", "result": "r"}


async def raw(target: Target, record: bytes, field: str) -> Any:
    """Return the stored scope, key or result of a record."""
    if target.kind == "memory":
        stored = target.open()._records[record]
        return stored.result if field == "result" else stored.names[field == "key"]
    if target.is_redis:
        async with redis_client(target) as client:
            return await client.hget(f"{target.name}:1:{record.hex()}", _FIELDS[field])
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        table = connection.dialect.identifier_preparer.quote("key") if field == "key" else field
        [[value]] = connection.execute(text(f"SELECT {table} FROM {target.name} WHERE id = :id"), {"id": record})
    engine.dispose()
    return value


async def write_result(target: Target, record: bytes, result: bytes) -> None:
    """Replace the stored result of a record."""
    if target.kind == "memory":
        target.open()._records[record].result = result
    else:
        await write(target, record, "result", result)


async def write(target: Target, record: bytes, field: str, value: Any) -> None:
    """Replace the stored scope, key or result of a record on a server."""
    if target.is_redis:
        async with redis_client(target) as client:
            assert await client.hset(f"{target.name}:1:{record.hex()}", _FIELDS[field], value) == 0
        return
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        column = connection.dialect.identifier_preparer.quote("key") if field == "key" else field
        statement = text(f"UPDATE {target.name} SET {column} = :value WHERE id = :id")
        assert connection.execute(statement, {"id": record, "value": value}).rowcount == 1
    engine.dispose()
