"""With encryption, or digests, no plain text is in what a store's server has: in its files, and in its memory.

Each test first finds the texts without these options, so that it would find them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy

from idempotency import IdempotencyMiddleware, open_store
from idempotency.stores.encryption import Encryption
from idempotency.stores.memory import MemoryStore
from tests.kit.asgi_calls import call
from tests.kit.servers import PostgresServer, RedisServer

SCOPE, KEY, HEADER, BODY = "plaintext-scope", "plaintext-key", "plaintext-header", "plaintext-body"
TEXTS = [text.encode() for text in (SCOPE, KEY, HEADER, BODY)]
FUNCTION_TEXTS = [b"plaintext-name", b"plaintext-argument", b"plaintext-result"]


async def handler(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"x-private", HEADER.encode())]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": BODY.encode()})


async def use(store: Any) -> None:
    """Run an operation, replay it, and hold and resolve another, with texts that are nowhere else."""
    from idempotency import idempotent
    from idempotency._rules import Claim, State

    app = IdempotencyMiddleware(handler, store=store)
    for _ in range(2):
        assert (await call(app, key=KEY)).body == BODY.encode()

    @idempotent(store, key=lambda argument: f"plaintext-argument {argument}", name="plaintext-name")
    async def function(argument: str) -> str:
        return "plaintext-result"

    for _ in range(2):
        assert await function("1") == "plaintext-result"
    held = Claim(scope=SCOPE, key="held", fingerprint=b"f" * 32, lease=30.0, ttl=60.0)
    await store.claim(held)
    await store.complete(held, None, State.UNKNOWN)
    assert await store.resolve(held.id, "done", BODY.encode())
    await store.aclose()


def found_in(*contents: bytes) -> set[bytes]:
    """Return which of the texts are there."""
    return {text for text in [*TEXTS, *FUNCTION_TEXTS] if any(text in content for content in contents)}


def files_of(directory: Path) -> Iterator[bytes]:
    """Yield the content of every file below a directory."""
    return (path.read_bytes() for path in directory.rglob("*") if path.is_file())


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield the memory of a process that can be written, part by part."""
    parts = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for part in parts:
            if part[1].startswith("rw") and part[-1] not in ("[vvar]", "[vsyscall]"):
                start, end = (int(each, 16) for each in part[0].split("-"))
                memory.seek(start)
                yield memory.read(end - start)


def encrypted() -> dict[str, Any]:
    return {"encryption": Encryption(Encryption.new_key())}


async def test_the_files_of_sqlite(tmp_path: Path):
    """The database and its write-ahead log, which is not yet copied into it."""
    for name, options, expected in (("plain", {}, {*TEXTS, *FUNCTION_TEXTS}), ("encrypted", encrypted(), set())):
        place = tmp_path / name
        place.mkdir()
        url = f"sqlite+aiosqlite:///{place}/records.db"
        # A reader that stays prevents the last connection from copying the log and deleting it.
        engine = sqlalchemy.create_engine(url.replace("+aiosqlite", ""))
        store = open_store(url, **options)
        await store.create_schema()
        with engine.connect() as reader:
            reader.exec_driver_sql("SELECT 1 FROM idempotency_record").all()
            await use(store)
            assert (place / "records.db-wal").stat().st_size > 0
            assert found_in(*files_of(place)) == expected
        engine.dispose()


async def test_the_files_and_the_memory_of_redis():
    """The snapshot, the append-only file, and the server's process: it has never seen the texts."""
    for options, expected in (({}, {*TEXTS, *FUNCTION_TEXTS}), (encrypted(), set())):
        with RedisServer("--appendonly", "yes", "--rdbcompression", "no") as server:
            await use(open_store(server.url, **options))
            with redis.Redis.from_url(server.url) as client:
                client.save()
            written = list(files_of(server.directory))
            assert any(content.startswith(b"REDIS") for content in written)
            assert any(b"\r\nEVAL" in content or b"HSET" in content or b"HMSET" in content for content in written)
            assert found_in(*written) == expected
            assert found_in(*memory_of(server.pid)) == expected


async def test_the_files_of_postgresql():
    """Every file of the data directory: tables, write-ahead log, and the log of the server."""
    with PostgresServer() as server:
        for options, expected in ((encrypted(), set()), ({}, {*TEXTS, *FUNCTION_TEXTS})):
            store = open_store(server.url, **options)
            await store.create_schema()
            await use(store)
            engine = sqlalchemy.create_engine(server.url.replace("asyncpg", "psycopg"), isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.exec_driver_sql("CHECKPOINT")
                assert (
                    found_in(*files_of(server.directory / "data"), (server.directory / "log").read_bytes()) == expected
                )
                connection.exec_driver_sql("TRUNCATE idempotency_record")
            engine.dispose()


async def test_the_memory_of_the_store_in_memory():
    """What hangs on the store itself; the application has the plain texts, of course."""
    for options, expected in (({}, {*TEXTS, *FUNCTION_TEXTS}), (encrypted(), set())):
        store = MemoryStore(**options)
        await use(store)

        seen: dict[int, bytes] = {}
        for record in store._records.values():
            pending: list[Any] = [record]
            while pending:
                each = pending.pop()
                if id(each) not in seen and not isinstance(each, type):
                    seen[id(each)] = (
                        each if isinstance(each, bytes) else each.encode() if isinstance(each, str) else b""
                    )
                    pending += gc.get_referents(each)
        assert found_in(*seen.values()) == expected


@pytest.mark.parametrize("make", [lambda: {}, encrypted])
async def test_digests_instead_of_scopes_and_keys(tmp_path: Path, make: Callable[[], dict[str, Any]]):
    """Also where nothing is encrypted: then the results are in plain text, and nothing else."""
    options = make()
    store = open_store(f"sqlite+aiosqlite:///{tmp_path}/records.db", digest_names=True, **options)
    await store.create_schema()
    await use(store)

    results = set() if options else {HEADER.encode(), BODY.encode(), b"plaintext-result"}
    assert found_in(*files_of(tmp_path)) == results
