"""Overwrite the format version of a stored record, as a newer release of the library would have written it."""

from __future__ import annotations

from sqlalchemy import create_engine, text

from tests.kit.targets import Target, redis_client


async def make_newer(target: Target, record: bytes) -> None:
    """Set the version of ``record`` to 2."""
    if target.kind == "memory":
        target.open()._records[record].version = 2
    elif target.is_redis:
        key = f"{target.name}:1:{record.hex()}"
        async with redis_client(target) as client:
            assert await client.hset(key, "v", "2") == 0
    else:
        engine = create_engine(target.sync_url)
        with engine.begin() as connection:
            statement = text(f"UPDATE {target.name} SET version = 2 WHERE id = :id")
            assert connection.execute(statement, {"id": record}).rowcount == 1
        engine.dispose()


async def make_newer_saga(target: Target, record: bytes) -> None:
    """Set the version of the saga ``record`` to 2."""
    assert target.is_redis
    async with redis_client(target) as client:
        assert await client.hset(f"{target.name}:1:{{saga:{record[-8:].hex()}}}:{record.hex()}", "v", "2") == 0
