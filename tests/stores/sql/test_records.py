"""The rows of the records: their clock, damage, and what purges them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Record, Unreadable, judge
from idempotency.errors import UnreadableError
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import DRIVERS, POSTGRES, SHORT, Verbs_of, new_claim, scalar


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_the_applications_clock_does_not_matter(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the application's clock a day ahead, leases and expiries are what the database's clock says."""
    mine = new_claim()
    await store.claim(mine)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86400)

    record = await store.claim(new_claim())
    entry = await store.inspect(mine.id)

    assert 25 < record.lease_left <= 30
    assert entry is not None
    assert entry.expires_in is not None
    assert 85 < entry.expires_in <= 90


@pytest.mark.parametrize("driver", ["mariadb"])
async def test_the_sessions_time_zone_does_not_matter(store: SQLStore, engine: AsyncEngine) -> None:
    """A session in another time zone sees the same time left."""
    await store.claim(new_claim())

    @event.listens_for(engine.sync_engine, "checkout")
    def move(connection: Any, *_: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SET time_zone = '+11:00'")
        cursor.close()

    record = await store.claim(new_claim())
    event.remove(engine.sync_engine, "checkout", move)

    assert 25 < record.lease_left <= 30


@pytest.mark.parametrize("driver", ["sqlite", "postgres", "mariadb"])
@pytest.mark.parametrize("damage", ["state = 9", "state = 0", "version = 0", "attempt = 0"])
async def test_damaged_rows_are_unreadable(store: SQLStore, engine: AsyncEngine, table: str, damage: str) -> None:
    """A row that makes no sense is reported as such and neither run again nor changed, its lease over or not."""
    await store.claim(new_claim(lease=SHORT))
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table} SET {damage}, lease_until_ms = 1"))
    whole = f"SELECT concat(version, ' ', state, ' ', attempt, ' ', token) FROM {table}"
    whole = (
        whole.replace("concat(", "(").replace(", ' ', ", " || ' ' || ") if engine.dialect.name == "sqlite" else whole
    )
    before = await scalar(engine, whole)

    record = await store.claim(mine := new_claim())

    assert isinstance(judge(mine, record), Unreadable)
    assert await scalar(engine, whole) == before


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_sqlite_values_of_a_wrong_type_are_unreadable(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """SQLite keeps text where a number belongs: such a record is unreadable, and an operator is told."""
    claim = new_claim()
    await store.claim(claim)
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table} SET state = 'done', attempt = 'x'"))

    record = await store.claim(new_claim())

    assert record == Record.unreadable()
    with pytest.raises(UnreadableError):
        await store.inspect(claim.id)


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_purge_takes_batches(store: SQLStore) -> None:
    """Each purge deletes at most a batch of what expired, and never what did not."""
    for number in range(7):
        await store.claim(new_claim(f"expired-{number}", lease=SHORT, ttl=SHORT))
    await store.claim(kept := new_claim("kept"))
    await store.claim(held := new_claim("held", lease=SHORT, ttl=SHORT, hold=True))
    await asyncio.sleep(0.15)

    counts = [await store.purge(0), *[await store.purge(3) for _ in range(4)]]

    assert counts == [0, 3, 3, 1, 0]
    assert await store.inspect(kept.id) is not None
    assert await store.inspect(held.id) is not None


@pytest.mark.parametrize("driver", POSTGRES)
async def test_purge_passes_by_what_is_locked(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """An expired row that a transaction holds is left for a later purge, and not waited for."""
    for number in range(3):
        await store.claim(new_claim(f"key-{number}", lease=SHORT, ttl=SHORT))
    await asyncio.sleep(0.15)
    async with engine.connect() as connection:
        await connection.execute(text(f"SELECT 1 FROM {table} LIMIT 1 FOR UPDATE"))

        purged = await store.purge()

    assert purged == 2


# What an application may have in place of the table.
TABLES = {
    "partitions": """
        CREATE TABLE {t}_new (LIKE {t}, PRIMARY KEY (id)) PARTITION BY HASH (id);
        CREATE TABLE {t}_0 PARTITION OF {t}_new FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE {t}_1 PARTITION OF {t}_new FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        DROP TABLE {t};
        ALTER TABLE {t}_new RENAME TO {t}
    """,
    "a table that inherits": "CREATE TABLE {t}_1 (PRIMARY KEY (id)) INHERITS ({t}); INSERT INTO {t}_1 SELECT {row}",
    "a view": "ALTER TABLE {t} RENAME TO {t}_all; CREATE VIEW {t} AS SELECT * FROM {t}_all",
}
LIVE = "'\\x00'::bytea, 's', 'k', 1, 1, 't', 'f'::bytea, 1, FALSE, FALSE, 0, 0, NULL, NULL"


@pytest.mark.parametrize("kind", list(TABLES))
async def test_purge_deletes_nothing_else_from_other_kinds_of_tables(
    store: SQLStore, engine: AsyncEngine, table: str, kind: str
) -> None:
    """Rows of two partitions may be at the same place, and a view has no places."""
    statements = TABLES[kind].replace("{t}", table).replace("{row}", LIVE)
    async with engine.begin() as connection:
        for statement in statements.split(";"):
            await connection.execute(text(statement))
    live = [new_claim(f"live-{number}") for number in range(10)]
    try:
        for number in range(10):
            await store.claim(new_claim(f"expired-{number}", lease=0.0, ttl=0.001))
            await store.claim(live[number])
        before = await scalar(engine, f"SELECT count(*) FROM {table}")
        await asyncio.sleep(0.01)

        assert [await store.purge(6), await store.purge(6)] == [6, 4]
        assert await scalar(engine, f"SELECT count(*) FROM {table}") == before - 10
        assert None not in [await store.inspect(claim.id) for claim in live]
    finally:
        async with engine.begin() as connection:
            what = f"TABLE {table}_all" if kind == "a view" else f"TABLE {table}"
            await connection.execute(text(f"DROP {what} CASCADE"))


async def expire(store: SQLStore, engine: AsyncEngine, table: str, times: Iterable[int]) -> None:
    """Claim a key for each of these times, at which its record expires."""
    for time_ms in times:
        await store.claim(claim := new_claim(f"expired-{time_ms}"))
        async with engine.begin() as connection:
            await connection.execute(
                text(f"UPDATE {table} SET expires_ms = :time WHERE id = :id"), {"time": time_ms, "id": claim.id}
            )


@pytest.mark.parametrize("driver", POSTGRES)
async def test_purge_goes_back_to_what_expired_before(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """A batch is only short when nothing is expired, also not before those that are purged already."""
    await expire(store, engine, table, [100, 101, 102, 103, 104])

    counts = [await store.purge(2), await store.purge(2)]
    await expire(store, engine, table, [1, 2])
    counts += [await store.purge(2) for _ in range(3)]

    assert counts == [2, 2, 2, 1, 0]


async def test_an_open_transaction_does_not_make_each_batch_longer(
    store: SQLStore, engine: AsyncEngine, table: str, url: str
) -> None:
    """What a transaction may still see stays in the index, and only the first and the last batch read it."""
    await expire(store, engine, table, range(1, 31))
    reads = f"SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = '{table}_expires'"
    # As in a large table.
    by_index = {"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_sort": "off"}
    purging = create_async_engine(url, connect_args={"server_settings": by_index})
    async with engine.execution_options(isolation_level="REPEATABLE READ").connect() as older:
        await older.execute(text(f"SELECT 1 FROM {table}"))

        purging_store = SQLStore(purging, table=table)
        counts = [await purging_store.purge(10) for _ in range(4)]
        await purging_store.aclose()
        # A connection reports what it has read when it is closed.
        await purging.dispose()

    assert counts == [10, 10, 10, 0]
    async with asyncio.timeout(10):
        # 10 + 11 + 11 + 1, and once more all 30.
        while (read := await scalar(engine, reads)) < 60:
            await asyncio.sleep(0.01)
    assert read <= 63


@pytest.mark.parametrize("driver", ["postgres", "mariadb"])
async def test_purge_uses_the_index(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The statement that purges finds its rows by the index of expiries."""
    async with engine.connect() as connection:
        purge = str(Verbs_of(store, connection.sync_connection)._sql.purge)  # type: ignore[arg-type]
        purge = purge.replace(":limit", "10").replace(":after", "1")
        purge = re.sub(r"^SET STATEMENT .* FOR (?=DELETE)", "", purge)
        if engine.dialect.name == "postgresql":
            await connection.execute(text("SET enable_seqscan = off"))
        plan = " ".join(str(row) for row in await connection.execute(text(f"EXPLAIN {purge}")))

    assert f"{table}_expires" in plan
    assert "Filter" not in plan
