"""The columns of the name of an operation: written where they are there, and added to a table that is in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from idempotency._rules import Execute, Replay, judge
from idempotency.errors import ConfigurationError
from idempotency.stores.sql import SQLStore, _joined, _verbs, audit_table, records_table, upgrade_sql
from tests.kit.sql_store import DRIVERS, SHORT, new_claim
from tests.stores.sql.test_statements import counted

ON_EACH = pytest.mark.parametrize("driver", list(DRIVERS))
IN_FLIGHTS = pytest.mark.parametrize("driver", ["sqlite", "postgres", "psycopg"])


@pytest.fixture
async def naming(store: SQLStore, engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    """A store that writes names, on the table of ``store``."""
    naming = SQLStore(engine, table=table, write_version=2)
    yield naming
    await naming.aclose()


@pytest.fixture
async def before(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """Make the table what an earlier release created."""
    await drop_columns(engine, table)


async def drop_columns(engine: AsyncEngine, table: str) -> None:
    """Remove the columns of the name."""
    async with engine.begin() as connection:
        for column in ("operation_name", "named_fingerprint"):
            await connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))


async def upgrade(engine: AsyncEngine, table: str) -> None:
    """Execute the statements that are printed for this table."""
    dialect = "mariadb" if engine.dialect.name == "mysql" else engine.dialect.name
    async with engine.begin() as connection:
        for statement in upgrade_sql(dialect, table).split(";\n"):
            if statement:
                await connection.execute(text(statement))


async def name_of(store: SQLStore, record: bytes) -> str:
    """Return the name that a record shows."""
    entry = await store.inspect(record)
    assert entry is not None
    return entry.name


@ON_EACH
@pytest.mark.usefixtures("before")
async def test_a_table_without_the_columns_serves(naming: SQLStore, store: SQLStore, engine: AsyncEngine) -> None:
    """Claim, replay, completion and release are one statement each, as before, and no name is shown."""
    mine, other = new_claim(name="charge"), new_claim("other", name="charge")
    await naming.claim(new_claim("first"))
    with counted(engine.sync_engine) as sent:
        await naming.claim(mine)
        await naming.complete(mine, b"done")
        replayed = judge(again := new_claim(name="charge"), await naming.claim(again))
        await naming.claim(other)
        released = await naming.release(other)

    assert replayed == Replay(b"done")
    assert released
    assert len(sent) == (7 if engine.dialect.name == "sqlite" else 5)  # on SQLite a claim that is won reads first
    assert (await name_of(naming, mine.id), await name_of(store, mine.id)) == ("", "")
    assert await naming.list_records(name="charge") == []
    assert mine.id in {each.id for each in await naming.list_records("done")}


@ON_EACH
@pytest.mark.parametrize("missing", ["operation_name", "named_fingerprint"])
async def test_a_table_with_one_of_the_columns_serves(
    naming: SQLStore, store: SQLStore, engine: AsyncEngine, table: str, missing: str
) -> None:
    """A migration may add one after the other: until both are there, no name is written, and doctor notes it."""
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {missing}"))
    await naming.claim(mine := new_claim(name="charge"))
    async with AsyncSession(engine) as session:
        await naming.claim_in(session, new_claim("joined", name="charge"), wait=1.0)
        await session.commit()

    assert await naming.complete(mine, b"done")
    assert await name_of(store, mine.id) == ""
    assert [each.level for each in await store.examine() if "names" in each.what] == ["note"]


@ON_EACH
@pytest.mark.usefixtures("before")
async def test_connections_in_use_survive_the_upgrade(naming: SQLStore, engine: AsyncEngine, table: str) -> None:
    """Statements that drivers have prepared for the table of before go on: alone, together, and in transactions."""

    async def work(round: str) -> None:
        for number in range(8):  # psycopg prepares a statement at its sixth execution
            claims = [new_claim(f"{round} {number} {one}", name="charge") for one in range(4)]
            records = await asyncio.gather(*map(naming.claim, claims))
            ended = await asyncio.gather(*(naming.complete(each, b"done") for each in claims))
            assert [judge(*each) for each in zip(claims, records, strict=True)] == [Execute()] * 4
            assert all(ended)
            again = new_claim(claims[0].key)
            assert judge(again, await naming.claim(again)) == Replay(b"done")
            async with AsyncSession(engine) as session:
                await naming.claim_in(session, joined := new_claim(f"{round} {number}", name="charge"), wait=1.0)
                assert await naming.complete_in(session, joined, b"done")
                await session.commit()

    await work("before")
    await upgrade(engine, table)
    await work("afterwards")


@ON_EACH
@pytest.mark.usefixtures("before")
async def test_the_columns_are_added_to_a_table_that_is_in_use(
    naming: SQLStore, store: SQLStore, engine: AsyncEngine, table: str
) -> None:
    """The stores that are open go on; one that is opened afterwards writes names, and each shows them."""
    mine, late = new_claim(name="charge"), new_claim("late", name="charge")
    for each in (naming, store):
        await each.claim(new_claim(f"open {id(each)}"))
    await naming.claim(mine)
    await upgrade(engine, table)
    opened = SQLStore(engine, table=table, write_version=2)

    completed = await store.complete(mine, b"done")
    await opened.claim(late)
    replayed = judge(again := new_claim("late", name="x"), await naming.claim(replace(again, fingerprint=b"f" * 32)))

    assert completed
    assert replayed != Execute()
    assert await name_of(opened, late.id) == "charge"
    assert [each.id for each in await store.list_records(name="charge")] == [late.id]
    await opened.aclose()


@ON_EACH
async def test_names_take_no_further_statement(naming: SQLStore, engine: AsyncEngine, monkeypatch: Any) -> None:
    """Whether the columns are there is asked once; each verb is then one statement."""
    asked: list[Connection] = []
    ask = _verbs.has_names
    monkeypatch.setattr(_verbs, "has_names", lambda *given: (asked.append(given[0]), ask(*given))[1])
    mine = new_claim(name="charge")
    with counted(engine.sync_engine) as sent:
        await naming.claim(mine)
        await naming.complete(mine, b"done")
        await naming.claim(new_claim(name="charge"))

    of_records = [each for each in sent if not each.lstrip().startswith("CREATE")]
    assert len(of_records) == (4 if engine.dialect.name == "sqlite" else 3)
    assert len(asked) == 1
    assert await name_of(naming, mine.id) == "charge"


@ON_EACH
async def test_a_name_does_not_outlive_its_operation(naming: SQLStore, store: SQLStore) -> None:
    """A store that writes no names takes an expired row for another operation: its name is not known then."""
    gone, lapsed = new_claim(name="charge", lease=SHORT, ttl=SHORT), new_claim("lapsed", name="charge", lease=SHORT)
    await naming.claim(gone)
    await naming.claim(lapsed)
    await asyncio.sleep(2 * SHORT + 0.05)  # by the server's clock

    other = new_claim(name="refund", fingerprint=b"o" * 32)
    taken = new_claim("lapsed", name="charge")

    assert judge(other, await store.claim(other)) == Execute(1)
    assert judge(taken, await store.claim(taken)) == Execute(2)
    assert await name_of(naming, other.id) == ""
    assert await name_of(naming, taken.id) == "charge"


@ON_EACH
async def test_a_damaged_row_does_not_end_the_list(naming: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The others are listed."""
    sound, damaged = new_claim(name="charge"), new_claim("damaged", name="charge")
    for claim in (sound, damaged):
        await naming.claim(claim)
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table} SET state = 9 WHERE token = :token"), {"token": damaged.token})

    assert [each.id for each in await naming.list_records(name="charge")] == [sound.id]


@pytest.mark.parametrize("driver", ["postgres"])
async def test_a_user_with_rights_by_column_goes_on(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """Without rights on the added columns it claims, completes and inspects, without a name."""
    columns = ", ".join(each.name for each in records_table(MetaData(), table).c if "named" not in each.name)
    granted = columns.replace(", operation_name", "")
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {table}_by_column LOGIN"))
        rights = f"SELECT ({granted}), INSERT ({granted}), UPDATE ({granted})"
        await connection.execute(text(f"GRANT {rights} ON {table} TO {table}_by_column"))
        await connection.execute(text(f"GRANT DELETE ON {table} TO {table}_by_column"))
    limited = SQLStore.from_url(engine.url.set(username=f"{table}_by_column"), table=table, write_version=2)
    try:
        await limited.claim(mine := new_claim(name="charge"))
        assert await limited.complete(mine, b"done")
        assert await name_of(limited, mine.id) == ""
    finally:
        await limited.aclose()
        async with engine.begin() as connection:
            await connection.execute(text(f"DROP OWNED BY {table}_by_column"))
            await connection.execute(text(f"DROP ROLE {table}_by_column"))


@IN_FLIGHTS
async def test_claims_that_are_sent_together_write_names(naming: SQLStore) -> None:
    """Each of them its own."""
    await naming.claim(new_claim("first"))
    claims = [new_claim(f"key {number}", name=f"name {number}" if number % 3 else "") for number in range(40)]

    records = await asyncio.gather(*map(naming.claim, claims))

    assert [judge(*each) for each in zip(claims, records, strict=True)] == [Execute()] * 40
    assert [await name_of(naming, claim.id) for claim in claims] == [claim.name for claim in claims]


@ON_EACH
@pytest.mark.parametrize("columns", ["with the columns", "without"])
async def test_a_joined_claim_writes_the_name(
    naming: SQLStore, engine: AsyncEngine, table: str, columns: str, monkeypatch: Any
) -> None:
    """In the caller's transaction too, which asks once whether the columns are there."""
    if columns == "without":
        await drop_columns(engine, table)
    asked: list[Connection] = []
    ask = _joined.has_names
    monkeypatch.setattr(_joined, "has_names", lambda *given: (asked.append(given[0]), ask(*given))[1])
    claims = [new_claim(key, name=f"name of {key}") for key in "ab"]
    for claim in claims:
        async with AsyncSession(engine) as session:
            record = await naming.claim_in(session, claim, wait=1.0)
            assert record is not None
            assert judge(claim, record) == Execute()
            assert await naming.complete_in(session, claim, b"done")
            await session.commit()

    assert len(asked) == 1
    names = [await name_of(naming, claim.id) for claim in claims]
    assert names == (["name of a", "name of b"] if columns == "with the columns" else ["", ""])


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_the_first_joined_claim_on_sqlite_creates_the_columns(engine: AsyncEngine, table: str) -> None:
    """The table that it creates has them, and it writes the name."""
    naming = SQLStore(engine, table=table, write_version=2)
    async with AsyncSession(engine) as session:
        await naming.claim_in(session, claim := new_claim(name="charge"), wait=1.0)
        await session.commit()

    assert await name_of(naming, claim.id) == "charge"
    await naming.aclose()


@pytest.mark.parametrize("driver", ["postgres", "mariadb"])
async def test_the_printed_upgrade_may_run_twice(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """It adds nothing to a table that has the columns."""
    await upgrade(engine, table)

    await store.check()


def test_the_printed_upgrade_waits_for_a_lock_only_briefly() -> None:
    """It asks for a short time-out, and that no row is written anew."""
    added = "operation_name TEXT, ADD COLUMN{} named_fingerprint {}"

    assert upgrade_sql("postgresql", "shop.records") == (
        "SET lock_timeout = '2s';\nALTER TABLE shop.records ADD COLUMN IF NOT EXISTS "
        + added.format(" IF NOT EXISTS", "BYTEA")
        + ";\n"
    )
    assert upgrade_sql("mysql") == (
        "SET lock_wait_timeout = 2;\nALTER TABLE idempotency_record ADD COLUMN "
        + added.format("", "VARBINARY(64)")
        + ", ALGORITHM=INSTANT;\n"
    )


@pytest.mark.parametrize("driver", ["sqlite", "postgres", "mariadb"])
@pytest.mark.usefixtures("before")
async def test_alembic_finds_the_columns(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """Given the table in its metadata, an autogenerated migration adds the columns, and nothing else of the table."""
    metadata = MetaData()
    records_table(metadata, table)
    audit_table(metadata, table)

    def compared(connection: Connection) -> list[Any]:
        only = {"include_name": lambda name, kind, _: kind != "table" or name in metadata.tables}
        return compare_metadata(MigrationContext.configure(connection, opts=only), metadata)

    async with engine.connect() as connection:
        found = await connection.run_sync(compared)

    assert [(change[0], change[2], change[3].name) for change in found] == [
        ("add_column", table, "operation_name"),
        ("add_column", table, "named_fingerprint"),
    ]


@pytest.mark.parametrize("driver", ["sqlite", "postgres"])
async def test_doctor_notes_that_the_columns_are_missing(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """It is no fault: the store serves."""
    whole = await store.examine()
    await drop_columns(engine, table)
    lacking = await store.examine()

    note = f"{table} has no columns for the names of operations: schema upgrade"
    assert [each.what for each in whole if "names" in each.what] == []
    assert [(each.level, each.what) for each in lacking if "names" in each.what] == [("note", note)]


@pytest.mark.parametrize("version", [0, 3, True, "2", None])
def test_a_version_that_cannot_be_written_is_refused(version: Any) -> None:
    """The error says which can be."""
    with pytest.raises(ConfigurationError, match="write_version must be 1 or 2"):
        SQLStore.from_url("sqlite+aiosqlite:///x", write_version=version)
