"""What doctor says of an outbox: of its tables, its relays, and what keeps the database from cleaning it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import insert, text, update

from idempotency.outbox import Outbox, _cleaning, _examine
from idempotency.outbox._operate import OutboxOperations
from tests.kit.ledger import Ledger
from tests.kit.targets import unique_name

DAYS = 1_000_000_000


async def said(ledger: Ledger, outbox: Outbox, **options: Any) -> list[str]:
    """Return the findings as doctor prints them."""
    engine: Any = ledger.engine
    findings = await OutboxOperations(engine, outbox).examine(**options)
    name = outbox.tables.messages.name
    return [f"{finding.level} {finding.what}".replace(name, "T") for finding in findings]


async def execute(ledger: Ledger, *statements: Any) -> None:
    async with ledger.engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement) if isinstance(statement, str) else statement)


async def emit(ledger: Ledger, outbox: Outbox) -> None:
    async with ledger.engine.begin() as connection:
        await Outbox(outbox.tables.messages.name, notify=False).emit(
            connection, aggregate_type="order", aggregate_id=7, type="Placed", payload={}
        )


@pytest.mark.stores("postgres")
async def test_an_outbox_that_is_as_it_was_created_has_nothing_to_fix(ledger: Ledger, outbox: Outbox) -> None:
    assert await said(ledger, outbox, lease=30, delivery_timeout=20) == [
        "ok T: index on available_ms",
        "ok T: autovacuum by the number of its deleted rows",
        "note no relay runs: start idempotency relay",
    ]


@pytest.mark.stores("sqlite", "mariadb")
async def test_an_outbox_elsewhere_has_nothing_to_fix(ledger: Ledger, outbox: Outbox) -> None:
    assert await said(ledger, outbox) == [
        "ok T: index on available_ms",
        "note no relay runs: start idempotency relay",
    ]


@pytest.mark.stores("postgres")
@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("DROP TABLE {0}_lease", "fix there is no table T_lease: idempotency outbox schema create"),
        ("ALTER TABLE {0} DROP COLUMN headers, DROP COLUMN bucket", "fix T lacks headers, bucket: add it by a"),
        ("DROP INDEX {0}_available", "fix T has no index on available_ms"),
        (
            "DROP INDEX {0}_available; CREATE INDEX {0}_available ON {0} (available_ms)",
            "fix the index on available_ms of T is not partial",
        ),
        (
            "ALTER TABLE {0} RESET (autovacuum_vacuum_scale_factor)",
            "fix T is cleaned too seldom, it lacks autovacuum_vacuum_scale_factor: ALTER TABLE T SET (",
        ),
        ("ALTER TABLE {0} SET (autovacuum_enabled = off)", "fix T has autovacuum_enabled off"),
    ],
)
async def test_what_a_migration_has_left_out_is_to_be_fixed(
    change: str, finding: str, ledger: Ledger, outbox: Outbox
) -> None:
    await execute(ledger, *change.format(outbox.tables.messages.name).split("; "))

    assert [line for line in await said(ledger, outbox) if line.startswith(finding)] != []


@pytest.mark.stores("sqlite", "mariadb")
async def test_an_index_that_is_missing_is_to_be_fixed_elsewhere(ledger: Ledger, outbox: Outbox) -> None:
    name = outbox.tables.messages.name
    of_table = f" ON {name}" if ledger.engine.dialect.name == "mysql" else ""
    await execute(ledger, f"DROP INDEX {name}_available{of_table}")

    assert "fix T has no index on available_ms" in "\n".join(await said(ledger, outbox))


@pytest.mark.stores("mariadb")
async def test_a_table_without_transactions_is_to_be_fixed(ledger: Ledger, outbox: Outbox) -> None:
    await execute(ledger, f"ALTER TABLE {outbox.tables.messages.name} ENGINE=MyISAM")

    assert "fix T is not InnoDB: it has no transactions" in await said(ledger, outbox)


@pytest.mark.stores("sqlite")
async def test_messages_that_wait_for_a_relay_are_to_be_fixed(ledger: Ledger, outbox: Outbox) -> None:
    """Where a relay runs, an old one is a note; and so is a dead one."""
    await emit(ledger, outbox)
    assert "fix no relay runs; messages that wait: 1, the oldest for 0 s: start idempotency relay" in await said(
        ledger, outbox
    )

    tables = outbox.tables
    dead = [column.name for column in tables.messages.c]
    old = {"created_ms": DAYS * 1000, "payload": b"secret"}
    lease = {"name": "bucket-01", "owner": "a", "until_ms": 4 * DAYS * 1000}
    await execute(
        ledger,
        update(tables.messages).values(old),
        insert(tables.lease).values(lease),
        f"INSERT INTO {tables.dead.name} ({', '.join(dead)}, reason, died_ms)"
        f" SELECT {', '.join(dead)}, 'refused', 0 FROM {tables.messages.name}",
    )

    lines = await said(ledger, outbox)

    assert lines[1] == "ok relays that run: 1"
    assert lines[2].startswith("note messages that wait: 1, the oldest for ")
    assert lines[3] == "note messages that are dead: 1: idempotency outbox list --dead"


@pytest.mark.stores("sqlite")
async def test_a_lease_must_be_longer_than_the_delivery_timeout(ledger: Ledger, outbox: Outbox) -> None:
    lines = await said(ledger, outbox, lease=30, delivery_timeout=30)

    assert lines[0].startswith("fix the lease of 30 s is not longer than the delivery time-out of 30 s")


@pytest.mark.stores("postgres", "mariadb")
async def test_who_keeps_the_database_from_cleaning_is_named_with_the_statement(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that holds a snapshot, without the values in its query; before that, nobody is named."""
    monkeypatch.setattr(_cleaning, "LONG", 0.0)
    await emit(ledger, outbox)
    report = f"SELECT 'secret', 7 FROM {outbox.tables.messages.name}"
    mysql = ledger.engine.dialect.name == "mysql"

    async with ledger.engine.connect() as connection:
        if not mysql:
            await connection.execution_options(isolation_level="REPEATABLE READ")
        await connection.execute(text(report))
        [line] = [line for line in await said(ledger, outbox) if "cannot be cleaned away" in line]

    assert line.startswith("note ")
    assert re.search(r"has been open for \d s", line)
    assert line.endswith("; idle" if mysql else "; idle in transaction: SELECT ?, ? FROM T")
    monkeypatch.setattr(_cleaning, "LONG", 3600.0)
    assert not [line for line in await said(ledger, outbox) if "cannot be cleaned away" in line]


@pytest.mark.stores("postgres")
async def test_a_session_that_holds_up_cleaning_of_many_rows_is_to_be_fixed(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cleaning, "LONG", 0.0)
    monkeypatch.setattr(_examine, "MANY_DELETED", 2)
    async with ledger.engine.connect() as report:
        await report.execution_options(isolation_level="REPEATABLE READ")
        await report.execute(text("SELECT 1"))
        for _ in range(3):
            await emit(ledger, outbox)
        await execute(
            ledger, f"DELETE FROM {outbox.tables.messages.name}", "SELECT pg_stat_force_next_flush()", "SELECT 1"
        )

        lines = await said(ledger, outbox)

    assert "note T has 3 deleted rows beside 0: relays read slowly until they are cleaned away" in lines
    assert [line for line in lines if line.startswith("fix session ")] != []


@pytest.mark.stores("mariadb")
async def test_a_user_who_may_not_see_transactions_is_told_so(ledger: Ledger, outbox: Outbox) -> None:
    user, database = unique_name("ops")[:32], ledger.engine.url.database
    await execute(ledger, f"CREATE USER '{user}'@'%'", f"GRANT ALL ON {database}.* TO '{user}'@'%'")
    url = ledger.engine.url.set(username=user)
    operations = OutboxOperations(url, outbox)
    try:
        findings = [finding.what for finding in await operations.examine()]
    finally:
        await operations.aclose()
        await execute(ledger, f"DROP USER '{user}'@'%'")

    assert "open transactions cannot be seen: grant PROCESS to the user of doctor" in findings
