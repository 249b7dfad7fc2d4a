"""Joined functions that write into a ledger, and what a server says of their locks."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import text

from idempotency import idempotent
from tests.kit.ledger import Ledger

# How many statements on a table wait for a lock.
WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :table",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    " AND trx_query LIKE :table",
}


async def until_one_waits(ledger: Ledger) -> None:
    """Wait until a statement on the records of this ledger waits for a lock."""
    look = text(WAITING[ledger.sync_engine.dialect.name]).bindparams(table=f"%{ledger.name.removesuffix('_effects')}%")
    async with asyncio.timeout(20), ledger.sessions() as watcher:
        while not (await watcher.execute(look)).scalar_one():
            await watcher.rollback()
            # InnoDB shows what it saw last to who asks again within 0.1 s.
            await asyncio.sleep(0.15)


def order_of(ledger: Ledger, **options: Any) -> Any:
    """Make a joined function that has one effect."""

    @idempotent(ledger.store, key=lambda what: f"order:{what}", session=ledger.sessions, **options)
    async def order(what: str, *, session: Any) -> dict[str, str]:
        await session.execute(ledger.insert(what))
        return {"ordered": what}

    return order


def commit_past_the_savepoint(session: Any) -> None:
    session.begin_nested()
    session.get_transaction().commit()
