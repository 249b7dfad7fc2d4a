"""What only SQLite needs: pragmas, one lock, files and no memory."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Execute, judge
from idempotency._sql.engines import _write_ahead
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import new_claim, scalar


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_a_users_sqlite_engine_keeps_its_pragmas(store: SQLStore, engine: AsyncEngine) -> None:
    """An engine passed in is not switched to another journal mode."""
    await store.claim(new_claim())

    assert await scalar(engine, "PRAGMA journal_mode") == "delete"


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_locked_sqlite_is_a_store_error(url: str, table: str) -> None:
    """A database that another connection keeps locked is named after the time-out, and usable afterwards."""
    before = SQLStore.from_url(url, table=table)
    await before.claim(new_claim("before"))
    await before.aclose()
    store = SQLStore.from_url(url, table=table, timeout=1)
    with sqlite3.connect(make_url(url).database or "", isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            await store.claim(new_claim())
        took = time.monotonic() - begun
        writer.execute("ROLLBACK")
    writer.close()

    record = await store.claim(mine := new_claim())
    await store.aclose()

    # The driver's own time-out is 5 seconds.
    assert took < 4.9
    assert judge(mine, record) == Execute()


@pytest.mark.parametrize(
    "url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"]
)
def test_sqlite_in_memory_is_refused(url: str) -> None:
    """A database in memory is refused, from a URL and as an engine, with what to use instead."""
    with pytest.raises(ConfigurationError, match="name a file, or use memory://"):
        SQLStore.from_url(url)
    if "aiosqlite" in url:
        with pytest.raises(ConfigurationError, match="name a file, or use memory://"):
            SQLStore(create_async_engine(url))


def test_a_file_whose_mode_is_being_changed_can_be_opened(tmp_path: Path) -> None:
    """Several processes open a new file at once: the one that may not switch it to WAL leaves that to the other."""
    path = tmp_path / "records.db"
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as other,
        closing(sqlite3.connect(path, timeout=0)) as late,
    ):
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            late.execute("PRAGMA journal_mode=WAL")

        _write_ahead(late, None)

        other.execute("COMMIT")
        assert late.execute("SELECT count(*) FROM t").fetchone() == (0,)
