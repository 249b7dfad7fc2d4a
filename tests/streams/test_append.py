"""Append: the expected version, repeated commands, and what cannot be appended, on each database."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from sqlalchemy import text

from idempotency import idempotent
from idempotency.errors import ConfigurationError, StoreError, TransactionError
from idempotency.outbox import Outbox
from idempotency.stores.memory import MemoryStore
from idempotency.streams import Appended, ConflictError, Streams
from tests.kit.ledger import Ledger
from tests.streams.kit import KINDS, NEW, TYPES, Account, Deposited, Withdrawn, all_of, append, apply, shown

stores = pytest.mark.stores(*KINDS)


@stores
async def test_the_expected_version_is_that_of_the_stream(ledger: Ledger, streams: Streams) -> None:
    assert await append(ledger, streams, "a", 1, 2, expected=0) == Appended("a", 2)
    assert await append(ledger, streams, "a", 3, expected=2) == Appended("a", 3)
    assert await append(ledger, streams, "a", 4) == Appended("a", 4)
    for expected in (0, 3, 5, 10**12):
        with pytest.raises(ConflictError) as conflict:
            await append(ledger, streams, "a", 9, expected=expected)
        assert conflict.value.expected == expected
    with pytest.raises(ConflictError):
        await append(ledger, streams, "new", 9, expected=1)

    assert shown(await all_of(ledger, streams)) == [("a", 1), ("a", 2), ("a", 3), ("a", 4)]


@pytest.mark.stores("postgres18", "sqlite")
async def test_after_a_conflict_the_transaction_can_be_used(ledger: Ledger, streams: Streams) -> None:
    await append(ledger, streams, "a", 1)
    async with ledger.sessions.begin() as session:
        with pytest.raises(ConflictError):
            await streams.append(session, "a", [Deposited(1)] * 3, expected=0)
        await session.execute(ledger.insert("kept"))

    assert await ledger.effects() == ["kept"]
    assert shown(await all_of(ledger, streams)) == [("a", 1)]


@stores
async def test_what_is_rolled_back_was_never_appended(ledger: Ledger, streams: Streams) -> None:
    async with ledger.sessions() as session:
        await streams.append(session, "a", [Deposited(1)])
        await session.rollback()
    async with ledger.sessions.begin() as session:
        await streams.append(session, "a", [Deposited(2)], expected=0)
        nested = await session.begin_nested()
        await streams.append(session, "a", [Deposited(3)], expected=1)
        await nested.rollback()
        await streams.append(session, "a", [Deposited(4)], expected=1)

    assert [event.data for event in await all_of(ledger, streams)] == [Deposited(2), Deposited(4)]


@stores
async def test_many_and_large_events(ledger: Ledger, streams: Streams) -> None:
    await append(ledger, streams, "many", *range(1000), expected=0)
    large = Withdrawn(1, "ü\0%s:x'" * 700_000)
    async with ledger.sessions.begin() as session:
        await streams.append(session, "large", [large], headers={"trace": "1"})

    *many, last = await all_of(ledger, streams)
    assert [event.data.amount for event in many] == list(range(1000))
    assert [event.version for event in many] == list(range(1, 1001))
    assert (last.data, last.headers) == (large, {"trace": "1"})


@stores
async def test_names_of_streams_are_any_text(ledger: Ledger, streams: Streams) -> None:
    names = ["50%:s %(x)s", "ü" * 255, "\N{GRINNING FACE}" * 255, "'; --", "A", "a", " a", "a\t", "\xe1", "a\u0301"]
    for name in names:
        await append(ledger, streams, name, 1, expected=0)

    assert [event.stream for event in await all_of(ledger, streams)] == names


@stores
async def test_a_name_with_a_space_at_its_end_is_another_one_or_refused(ledger: Ledger, streams: Streams) -> None:
    """MariaDB compares names without such spaces: two accounts would be one."""
    await append(ledger, streams, "account", 1)
    if ledger.engine.dialect.name != "mysql":
        await append(ledger, streams, "account ", 2, expected=0)
        assert shown(await all_of(ledger, streams)) == [("account", 1), ("account ", 1)]
        return
    with pytest.raises(ConfigurationError, match="must not end with a space"):
        await append(ledger, streams, "account ", 2)
    async with ledger.sessions() as session:
        with pytest.raises(ConfigurationError, match="must not end with a space"):
            await streams.load(session, "account ", apply, initial=NEW)
    assert shown(await all_of(ledger, streams)) == [("account", 1)]


@stores
async def test_a_number_as_the_name_of_a_stream_is_text(ledger: Ledger, streams: Streams) -> None:
    name: Any = 7
    assert await append(ledger, streams, name, 1) == Appended("7", 1)


@pytest.mark.stores("sqlite")
async def test_what_cannot_be_appended_is_refused(ledger: Ledger, streams: Streams) -> None:
    refused: list[tuple[str, Any, dict[str, Any], str]] = [
        ("a" * 256, [Deposited(1)], {}, "stream must be text of 1 to 255 characters"),
        ("a\0", [Deposited(1)], {}, "without NUL"),
        ("", [Deposited(1)], {}, "1 to 255"),
        ("a", [], {}, "no events"),
        ("a", [Account()], {}, "Account is not in event_types, which has Deposited, Withdrawn"),
        ("a", [Deposited(1)], {"expected": -1}, "expected must be a version"),
        ("a", [Deposited(1)], {"expected": True}, "expected must be a version"),
        ("a", [Deposited(1)], {"expected": 2**63}, "expected must be a version"),
        ("a", [Deposited(10**5000)], {}, "Deposited cannot be written"),
        ("a", [Deposited(float("nan"))], {}, "Deposited cannot be written"),  # type: ignore[arg-type]
    ]
    for stream, events, options, reason in refused:
        async with ledger.sessions() as session:
            with pytest.raises(ConfigurationError, match=reason):
                await streams.append(session, stream, events, **options)

    assert await all_of(ledger, streams) == []


@pytest.mark.stores("sqlite")
async def test_two_types_of_one_name_are_refused(ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="two event types are named Deposited"):
        Streams([Deposited, Deposited])


@stores
async def test_autocommit_is_refused(ledger: Ledger, streams: Streams) -> None:
    async with ledger.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            await streams.append(connection, "a", [Deposited(1)])


@stores
async def test_a_missing_table_is_named_with_the_command(ledger: Ledger) -> None:
    missing = Streams(TYPES, "stream_that_is_missing")
    async with ledger.sessions() as session:
        with pytest.raises(StoreError, match=r"no table stream_that_is_missing.*schema create --streams TABLE"):
            await missing.append(session, "a", [Deposited(1)])


@stores
async def test_writers_of_one_stream_without_an_expected_version_all_append(ledger: Ledger, streams: Streams) -> None:
    await append(ledger, streams, "a", 0)
    await asyncio.gather(*(append(ledger, streams, "a", number) for number in range(1, 6)))

    events = await all_of(ledger, streams)
    assert [event.version for event in events] == [1, 2, 3, 4, 5, 6]
    assert {event.data.amount for event in events} == set(range(6))


@stores
async def test_of_writers_that_expect_the_same_version_one_appends(ledger: Ledger, streams: Streams) -> None:
    async def try_one(number: int) -> bool:
        try:
            await append(ledger, streams, "a", number, expected=0)
        except ConflictError:
            return False
        return True

    assert sum(await asyncio.gather(*map(try_one, range(5)))) == 1
    assert len(await all_of(ledger, streams)) == 1


@stores
async def test_a_repeated_command_meets_its_own_events(ledger: Ledger, streams: Streams) -> None:
    """A leased operation whose process dies after its commit: the next run appends nothing."""
    store, runs = MemoryStore(), []

    @idempotent(store, key=lambda expected: f"deposit-{expected}")
    async def deposit(expected: int | None) -> None:
        runs.append(await append(ledger, streams, "a", 1, 2, expected=expected))
        if len(runs) % 2:
            raise ConnectionError("before the record is written")

    for expected in (0, None):
        with pytest.raises(ConnectionError):
            await deposit(expected)
        await append(ledger, streams, "a", 9)
        await deposit(expected)

    assert runs == [Appended("a", 2), Appended("a", 2, new=False), Appended("a", 5), Appended("a", 5, new=False)]
    assert len(await all_of(ledger, streams)) == 6


@stores
@pytest.mark.parametrize("undone", ["conflict", "rollback"])
async def test_a_command_that_tried_again_is_repeated_with_the_same_ids(
    undone: str, ledger: Ledger, streams: Streams
) -> None:
    """Its first try is not appended, its second one is, and then the process dies before the record is written."""
    runs: list[Appended] = []

    @idempotent(MemoryStore(), key=lambda: "deposit")
    async def deposit() -> None:
        if not runs and undone == "conflict":
            with pytest.raises(ConflictError):
                await append(ledger, streams, "a", 1, 2, expected=7)
        if not runs and undone == "rollback":
            async with ledger.sessions() as session:
                await streams.append(session, "a", [Deposited(1), Deposited(2)])
                await session.rollback()
        runs.append(await append(ledger, streams, "a", 1, 2))
        if len(runs) == 1:
            raise ConnectionError("before the record is written")

    with pytest.raises(ConnectionError):
        await deposit()
    await deposit()

    assert runs == [Appended("a", 2), Appended("a", 2, new=False)]
    assert [event.data for event in await all_of(ledger, streams)] == [Deposited(1), Deposited(2)]


@stores
async def test_what_an_operation_has_committed_keeps_its_ids(ledger: Ledger, streams: Streams) -> None:
    """A rollback afterwards, also on the same connection, returns no id of what is committed."""

    @idempotent(MemoryStore(), key=lambda: "deposit")
    async def deposit() -> None:
        async with ledger.engine.connect() as connection:
            for amount in (1, 2):
                await streams.append(connection, "a", [Deposited(amount)])
                await connection.commit()
                await streams.append(connection, "a", [Deposited(9)])
                await connection.rollback()

    await deposit()
    assert [event.data for event in await all_of(ledger, streams)] == [Deposited(1), Deposited(2)]


@stores
@pytest.mark.parametrize("first", [1, 101], ids=["short", "in parts"])
async def test_a_repeated_command_with_other_events_is_a_conflict(ledger: Ledger, streams: Streams, first: int) -> None:
    """It had appended a withdrawal, and now deposits too, before or after it: nothing more is appended."""
    store = MemoryStore()
    runs = [[Withdrawn(1)], [*[Deposited(1)] * first, Withdrawn(1)], [Withdrawn(1), *[Deposited(1)] * first]]
    tried: list[int] = []

    @idempotent(store, key=lambda: "order")
    async def order() -> None:
        tried.append(len(tried))
        async with ledger.sessions.begin() as session:
            await streams.append(session, "a", runs[tried[-1]])
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await order()
    for _ in range(2):
        with pytest.raises(ConflictError, match="earlier run of this operation has appended other events"):
            await order()
    assert [event.data for event in await all_of(ledger, streams)] == [Withdrawn(1)]


@stores
async def test_a_joined_operation_commits_its_events_with_its_record(ledger: Ledger, streams: Streams) -> None:
    @idempotent(ledger.store, key=lambda fails: "one", session=ledger.sessions)
    async def deposit(fails: bool, session: Any) -> int:
        appended = await streams.append(session, "a", [Deposited(1)], expected=0)
        if fails:
            raise ValueError("on purpose")
        return appended.version

    with pytest.raises(ValueError, match="on purpose"):
        await deposit(True)
    assert [await deposit(False) for _ in range(2)] == [1, 1]
    assert shown(await all_of(ledger, streams)) == [("a", 1)]


@stores
async def test_events_are_emitted_as_messages_too(ledger: Ledger, streams: Streams) -> None:
    outbox = Outbox(f"{ledger.name}_o"[:50])
    await outbox.create_schema(ledger.engine)
    emitting = Streams(TYPES, f"{ledger.name}_ev"[:50], outbox=outbox, aggregate_type="account")
    await append(ledger, emitting, "a", 1, 2)

    async with ledger.engine.connect() as connection:
        query = text(f"SELECT aggregatetype, aggregateid, type, id FROM {outbox.tables.messages.name} ORDER BY seq")
        rows = (await connection.execute(query)).all()
    ids = [event.id for event in await all_of(ledger, streams)]
    assert [(*row[:3], str(row[3])) for row in rows] == [("account", "a", "Deposited", each) for each in ids]


@pytest.mark.stores(*KINDS)
def test_threads(sync_ledger: Ledger, sync_streams: Streams) -> None:
    """The verbs for threads do the same, in several threads at once."""
    streams, failed = sync_streams, list[BaseException]()

    def work(name: str) -> None:
        try:
            for expected in range(3):
                with sync_ledger.sessions.begin() as session:
                    streams.append_sync(session, name, [Deposited(1)], expected=expected)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []
    with sync_ledger.sessions.begin() as session:
        events = list(streams.read_all_sync(session))
        assert sorted(shown(events)) == [(name, version) for name in "abc" for version in (1, 2, 3)]
        assert [event.version for event in streams.read_sync(session, "b", after=1)] == [2, 3]
        assert streams.load_sync(session, "a", apply, initial=NEW, snapshot_every=2) == Account(3, 3)
        assert streams.load_versioned_sync(session, "a", apply, initial=NEW) == (Account(3, 3), 3)
        assert streams.position_sync(session, Appended("a", 3)) in [event.position for event in events]
        assert streams.delayed_by_sync(session) is None
        assert streams.rebase_sync(session) == 0
