"""A step of a saga written in the transaction of its effect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from idempotency._sagas.journal import Look
from idempotency.errors import ConfigurationError, TransactionError
from idempotency.stores.sql import SQLStore
from tests.kit.saga_requests import ID, entry, looked_at, opening, owned, write
from tests.kit.sql_store import DRIVERS, POSTGRES, scalar
from tests.kit.targets import SYNC_DRIVERS, Target

ON_EACH = pytest.mark.parametrize("driver", list(DRIVERS))


@pytest.fixture
async def effects(engine: AsyncEngine, table: str) -> AsyncIterator[str]:
    name = f"{table}_effects"
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE TABLE {name} (what VARCHAR(50))"))
    yield name
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {name}"))


@ON_EACH
async def test_a_step_commits_or_vanishes_with_its_effect(
    saga_store: SQLStore, engine: AsyncEngine, effects: str
) -> None:
    """Of a transaction that is rolled back neither the effect nor the entry remains; of the next one, both."""
    await owned(saga_store, owner := opening())
    step = write(owner, entry("step", b"done"), progress=True)
    found = []
    for commits in (False, True):
        async with AsyncSession(engine) as session:
            await session.execute(text(f"INSERT INTO {effects} VALUES ('effect')"))
            assert await saga_store.journal_in(session, step) == 0
            await (session.commit() if commits else session.rollback())
        count = await scalar(engine, f"SELECT count(*) FROM {effects}")
        found.append((count, [each.body for each in (await looked_at(saga_store)).entries]))

    assert found == [(0, []), (1, [b"done"])]


@ON_EACH
async def test_an_owner_that_was_replaced_writes_nothing(
    saga_store: SQLStore, engine: AsyncEngine, effects: str
) -> None:
    """The answer is None, by which the caller knows that it must roll back."""
    await owned(saga_store, opening())
    async with AsyncSession(engine) as session:
        await session.execute(text(f"INSERT INTO {effects} VALUES ('effect')"))
        assert await saga_store.journal_in(session, write(opening(), entry("step"))) is None
        await session.commit()

    assert (await looked_at(saga_store)).entries == ()


@pytest.mark.parametrize("driver", POSTGRES)
async def test_the_lock_timeout_of_the_transaction_is_restored(saga_store: SQLStore, engine: AsyncEngine) -> None:
    """What is written limits its own wait only, also where nothing is changed."""
    await owned(saga_store, owner := opening())
    lost, recorded = opening(), opening(key="other", lease=0)
    async with AsyncSession(engine) as session:
        await session.execute(text("SET LOCAL lock_timeout = '123ms'"))
        for request in (write(owner, entry("step")), write(lost, entry("step")), recorded, recorded):
            await saga_store.journal_in(session, request)
            assert await session.scalar(text("SHOW lock_timeout")) == "123ms"


@ON_EACH
async def test_without_a_transaction_it_is_refused(saga_store: SQLStore, engine: AsyncEngine) -> None:
    """In AUTOCOMMIT the entry would be committed before the effect."""
    await owned(saga_store, owner := opening())
    by_itself: Any = engine.execution_options(isolation_level="AUTOCOMMIT")
    async with AsyncSession(by_itself) as session:
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            await saga_store.journal_in(session, write(owner, entry("step")))

    assert (await looked_at(saga_store)).entries == ()


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_session_of_another_schema_is_refused(saga_store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The entry would be in a table of another tenant."""
    moved: Any = engine.execution_options(schema_translate_map={None: "elsewhere"})
    async with AsyncSession(moved) as session:
        with pytest.raises(ConfigurationError, match=rf"elsewhere\.{table}"):
            await saga_store.journal_in(session, write(opening(), entry("step")))


@pytest.fixture
def sync_engine(target: Target) -> Iterator[Engine]:
    engine = sqlalchemy.create_engine(target.sync_url)
    yield engine
    engine.dispose()


@pytest.mark.stores("sqlite", "postgres", "mariadb", *SYNC_DRIVERS)
def test_the_same_for_threads(sync_engine: Engine, target: Target) -> None:
    """A step commits or vanishes with its effect, by each driver that blocks."""
    store = SQLStore(sync_engine, table=target.name)
    store.create_saga_schema_sync()
    store.journal_sync(owner := opening())
    found = []
    for commits in (False, True):
        with Session(sync_engine) as session:
            assert store.journal_in_sync(session, write(owner, entry("step", b"done"))) == 0
            (session.commit if commits else session.rollback)()
        saga = store.journal_sync(Look(id=ID))
        assert saga is not None
        found.append([each.body for each in saga.entries])

    assert found == [[], [b"done"]]


@pytest.mark.parametrize("driver", ["mariadb"])
async def test_requests_are_transactions_on_an_engine_in_autocommit(saga_store: SQLStore, url: str, table: str) -> None:
    """A request that fails in its second statement has changed nothing."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    store = SQLStore(engine, table=table)
    await owned(store, owner := opening())

    with pytest.raises(Exception, match="refused"):
        await store.journal(write(owner, entry("n" * 2000), lease=3000.0))

    due_in = (await looked_at(store)).row.due_in
    assert await store.journal(write(owner, entry("step"))) == 0
    await store.aclose()
    await engine.dispose()
    assert due_in is not None
    assert due_in <= 30
    assert [each.name for each in (await looked_at(saga_store)).entries] == ["step"]
