"""The audit, on every store."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from idempotency.errors import StoreError
from idempotency.stores import _audit_memory
from idempotency.stores.base import Action, Auditing, supports
from idempotency.stores.redis import _audit as redis_audit
from idempotency.stores.sql import SQLStore, audit_table, schema_sql
from idempotency.stores.sql import _audit as sql_audit
from tests.kit.targets import Target


def action(number: int, **fields: Any) -> Action:
    """Return an action of an operator."""
    fields = {"operator": "ada", "name": "forget", "thing": f"record {number}", "reason": "it is done", **fields}
    return Action(id=f"{number:032x}", **fields)


async def test_an_action_is_written_down_and_its_outcome_after_it(store: Any) -> None:
    """The newest comes first; one that has not ended has no outcome."""
    assert supports(store, Auditing)
    assert await store.actions() == []

    for number in (1, 2):
        await store.write_down(action(number))
    await store.write_outcome(action(1).id, "done")

    last, first = await store.actions()
    assert (last.id, last.thing, last.outcome) == (action(2).id, "record 2", None)
    assert (first.operator, first.name, first.thing) == ("ada", "forget", "record 1")
    assert (first.reason, first.outcome) == ("it is done", "done")
    assert 0 <= last.age <= first.age < 60
    assert [found.id for found in await store.actions(1)] == [last.id]


async def test_what_an_operator_writes_is_read_as_it_was(store: Any) -> None:
    """Any text, also such as a column of text cannot hold."""
    odd = "NUL \0, a backslash \\0, ☃ and a lone \ud800"
    await store.write_down(action(1, operator=odd, reason=odd, thing=odd))
    await store.write_outcome(action(1).id, odd)

    [found] = await store.actions()

    assert (found.operator, found.reason, found.thing, found.outcome) == (odd, odd, odd, odd)


async def test_an_action_that_is_sent_again_is_one_action(store: Any, target: Target) -> None:
    """As a client does whose answer was lost. On SQL the transaction of a lost answer is written, or is not."""
    if not target.is_redis:
        pytest.skip("only a command to Redis is sent again")
    for _ in range(2):
        await store.write_down(action(1))

    assert [found.id for found in await store.actions()] == [action(1).id]


async def test_the_oldest_action_gives_way(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit has a bounded length."""
    monkeypatch.setattr(sql_audit, "AUDITED", 3)
    monkeypatch.setattr(redis_audit, "_MOST", b"6")
    monkeypatch.setattr(_audit_memory, "AUDITED", 3)
    if hasattr(store, "_actions"):
        _audit_memory.AuditInMemory.__init__(store, store._clock)

    for number in range(5):
        await store.write_down(action(number))
        await store.write_outcome(action(number).id, "done")

    assert [found.thing for found in await store.actions()] == ["record 4", "record 3", "record 2"]


async def test_the_pages_of_the_audit_are_read_until_there_are_enough(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Redis an action is two entries, which two pages may share."""
    monkeypatch.setattr(redis_audit, "_PAGE", 3)
    for number in range(5):
        await store.write_down(action(number))
        await store.write_outcome(action(number).id, f"outcome {number}")

    found = await store.actions(4)

    assert [(each.thing, each.outcome) for each in found] == [
        (f"record {number}", f"outcome {number}") for number in (4, 3, 2, 1)
    ]


@pytest.mark.stores("postgres", "mariadb")
async def test_without_its_table_nothing_is_written_and_the_error_names_the_remedy(store_target: Target) -> None:
    """A database whose schema is of an older release has the records only."""
    import sqlalchemy
    from sqlalchemy.ext.asyncio import create_async_engine

    from idempotency.stores.sql import records_table

    engine = create_async_engine(store_target.url)
    async with engine.begin() as connection:
        await connection.run_sync(records_table(sqlalchemy.MetaData(), store_target.name).create)
    async with contextlib.aclosing(SQLStore(engine, table=store_target.name)) as store:
        with pytest.raises(StoreError, match=rf"no table {store_target.name}_audit: run `idempotency schema create`"):
            await store.write_down(action(1))
        with pytest.raises(StoreError, match=rf"no table {store_target.name}_audit"):
            await store.actions()
        await store.create_schema()
        await store.write_down(action(1))
        assert len(await store.actions()) == 1
    await engine.dispose()


def test_the_schema_includes_the_audit() -> None:
    """In the statements, and as a table for migrations."""
    import sqlalchemy

    assert "CREATE TABLE idempotency_record_audit" in schema_sql("postgresql")
    assert audit_table(sqlalchemy.MetaData(), "shop.keys").fullname == "shop.keys_audit"
