"""What each store can do, as a type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import assert_type

from idempotency._sagas.journal import JoinedJournaling, Journaling, Look, Saga, SyncJournaling, Write
from idempotency.stores import AnyStore, open_store
from idempotency.stores.base import (
    Counting,
    CreatingSagaSchema,
    Entry,
    Examining,
    Finding,
    Forkable,
    Joining,
    NamingSchema,
    OneSided,
    Searching,
    SyncCounting,
    require,
    supports,
)
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore

memory, redis = MemoryStore(), RedisStore.from_url("redis://localhost")
sql = SQLStore.from_url("postgresql+asyncpg://localhost/shop")

all_of_it: list[AnyStore] = [memory, redis, sql]
searched: list[Searching] = [memory, redis, sql]
examined: list[Examining] = [memory, redis, sql]
named: list[NamingSchema] = [memory, redis, sql]
counted: list[Counting] = [memory, redis, sql]
counted_sync: list[SyncCounting] = [memory, redis, sql]
one_sided: list[OneSided] = [redis, sql]
forkable: Forkable = sql
joining: Joining = sql
creating: CreatingSagaSchema = sql
journals: list[Journaling] = [memory, redis, sql]
journals_sync: list[SyncJournaling] = [memory, redis, sql]
joined_journal: JoinedJournaling = sql


async def look_around(store: object) -> None:
    assert_type(await require(open_store("memory://"), Searching, "a page").find(key="order-7"), list[Entry])
    if supports(store, Examining):
        assert_type(await store.examine(), list[Finding])
    assert_type(await sql.journal(Look(id=b"")), Saga | None)
    assert_type(sql.journal_sync(Write(id=b"", token="", lease=1.0)), int | None)
