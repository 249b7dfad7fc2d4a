"""The golden files: what each version of every stored format looks like in a store, read by every later version.

``python -m tests.contracts.golden_files REDIS_URL`` writes those that are missing. A file that exists is never written
again: a new version of a format gets a new file, beside those of all versions before it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.outbox import Outbox, outbox_table
from idempotency.stores import open_store
from idempotency.stores.encryption import Encryption
from idempotency.stores.sql._saga_table import saga_tables
from idempotency.stores.sql._table import records_table
from idempotency.streams import Streams, Versioned, streams_table
from tests.kit.paths import ROOT

FOLDER = Path(__file__).parent / "golden"
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
NUMBERS = range(3)
WRITTEN: dict[str, dict[str, Any]] = {
    "records-1.json": {},
    "sealed-1.json": {"encryption": Encryption(KEY)},
    "records-2.json": {"write_version": 2},
    "tools-1.json": {},
}
"""The files of records, and the options of the store that has written each."""
_NEVER_MS = 4102444800000


@dataclass(frozen=True)
class Paid:
    """An event of which the golden file has an older version."""

    cents: int
    currency: str = "EUR"


def streams(table: str = "golden_event") -> Streams:
    """Return the streams of the golden events; ``Paid`` was in whole euros in version 1."""
    upcast = {1: lambda found: {"cents": found["euros"] * 100}}
    return Streams([Versioned(Paid, name="Paid", version=2, upcast=upcast)], table)


def tables(name: str) -> list[sqlalchemy.Table]:
    """Return the tables of records, sagas, messages and events, whose names begin with ``name``."""
    metadata = sqlalchemy.MetaData()
    records_table(metadata, name)
    saga_tables(metadata, name)
    outbox_table(metadata, f"{name}_outbox")
    streams_table(metadata, f"{name}_event")
    return list(metadata.sorted_tables)


def read(file: str) -> Any:
    """Return the content of a golden file."""
    return json.loads((FOLDER / file).read_text(), object_hook=_as_bytes)


def _as_bytes(found: dict[str, Any]) -> Any:
    return bytes.fromhex(found["hex"]) if found.keys() == {"hex"} else found


def load_sql(connection: sqlalchemy.Connection, golden: Any, name: str) -> None:
    """Insert the rows of a golden file into tables whose names begin with ``name``, which exist."""
    for table in tables(name):
        # MariaDB has names as bytes, to tell letters apart.
        kinds = {each.name: each.type.dialect_impl(connection.dialect).python_type for each in table.columns}
        for row in golden.get(table.name.replace(name, "golden", 1), ()):
            values = {
                column: value.encode() if kinds[column] is bytes and isinstance(value, str) else value
                for column, value in row.items()
            }
            connection.execute(table.insert(), values)


def load_redis(client: redis.Redis, golden: Any, prefix: str) -> None:
    """Write the keys of a golden file under a prefix."""
    for key, value in golden.items():
        place = key.replace("golden", prefix, 1)
        if isinstance(value, dict):
            client.hset(place, mapping=value)
        else:
            client.zadd(place, dict(value))


def _dump_sql(connection: sqlalchemy.Connection) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for table in tables("golden"):
        if sqlalchemy.inspect(connection).has_table(table.name):
            rows = [dict(row._mapping) for row in connection.execute(table.select())]
            for row in rows:
                if row.get("expires_ms") is not None:
                    row["expires_ms"] = _NEVER_MS
            # The table of places is made with its row.
            if rows and not table.name.endswith("_place"):
                yield table.name, rows


def _dump_redis(client: redis.Redis) -> Iterator[tuple[str, Any]]:
    for key in sorted(client.scan_iter("golden*")):
        if client.type(key) == b"hash":
            yield key.decode(), {name.decode(): value for name, value in client.hgetall(key).items()}
        elif client.type(key) == b"zset":
            yield key.decode(), client.zrange(key, 0, -1, withscores=True)


async def do_all(store: Any, ledger: Path, file: str) -> dict[str, Any]:
    """Do the work of a file on a store, and return the answers by kind and number; effects are in the ledger."""
    sys.path.insert(0, str(ROOT / "scripts" / "_prove"))
    try:
        import contracts_child
    finally:
        sys.path.pop(0)
    work = contracts_child.Work(store, str(ledger))
    tools = file.startswith("tools")
    kinds = contracts_child.with_tools(work) if tools else work.kinds() | contracts_child.with_sagas(work)
    return {f"{kind} {number}": await answer(number) for kind, answer in kinds.items() for number in NUMBERS}


async def _write(redis_url: str, directory: Path) -> None:
    for file, options in WRITTEN.items():
        if not (FOLDER / file).exists():
            url = f"sqlite+aiosqlite:///{directory}/{file}"
            found = {"sql": await _written_on_sql(url, options, directory / f"{file}.sql", file)}
            store = open_store(redis_url, prefix="golden", **options)
            await do_all(store, directory / f"{file}.redis", file)
            await store.aclose()
            with redis.Redis.from_url(redis_url) as client:
                found["redis"] = dict(_dump_redis(client))
                for key in client.scan_iter("golden*"):
                    client.delete(key)
            _write_file(file, found)
    if not (FOLDER / "messages-1.json").exists():
        _write_file("messages-1.json", {"sql": await _messages(f"sqlite+aiosqlite:///{directory}/messages")})


async def _written_on_sql(url: str, options: dict[str, Any], ledger: Path, file: str) -> Any:
    store: Any = open_store(url, table="golden", **options)
    await store.create_schema()
    await store.create_saga_schema()
    await do_all(store, ledger, file)
    await store.aclose()
    return await _dumped(url)


async def _messages(url: str) -> Any:
    @dataclass(frozen=True)
    class Euros:
        euros: int

    engine, outbox = create_async_engine(url), Outbox("golden_outbox")
    first, second = Streams([Versioned(Euros, name="Paid")], "golden_event"), streams()
    await outbox.create_schema(engine)
    await first.create_schema(engine)
    async with engine.begin() as connection:
        message: Any = {"aggregate_type": "order", "aggregate_id": 7, "type": "Placed", "headers": {"trace": "ä"}}
        for payload in ({"id": 7}, b"\0\xff", None):
            await outbox.emit(connection, payload=payload, **message)
        await first.append(connection, "account-7", [Euros(5)], expected=0, headers={"by": "a"})
        await second.append(connection, "account-7", [Paid(250)], expected=1)
    await engine.dispose()
    return await _dumped(url)


async def _dumped(url: str) -> Any:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = await connection.run_sync(lambda each: dict(_dump_sql(each)))
    await engine.dispose()
    return found


def _write_file(file: str, found: Any) -> None:
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False, default=lambda value: {"hex": value.hex()})
    (FOLDER / file).write_text(text + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_write(sys.argv[1], Path(name)))
