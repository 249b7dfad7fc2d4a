"""Load: snapshots, time travel, and types that have changed, on each database."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from idempotency import idempotent
from idempotency.errors import ConfigurationError, UnreadableError
from idempotency.stores.memory import MemoryStore
from idempotency.streams import Streams, Versioned
from tests.kit.ledger import Ledger
from tests.streams.kit import KINDS, NEW, Account, Deposited, Withdrawn, append, apply

stores = pytest.mark.stores(*KINDS)
sqlite = pytest.mark.stores("sqlite")


async def load(ledger: Ledger, streams: Streams, stream: str = "a", **options: Any) -> Any:
    async with ledger.sessions.begin() as session:
        return await streams.load(session, stream, options.pop("apply", apply), initial=NEW, **options)


async def snapshots(ledger: Ledger) -> list[Any]:
    async with ledger.engine.connect() as connection:
        query = text(f"SELECT stream, type, type_version, version, data FROM {ledger.name}_ev_snapshot")
        return [tuple(row) for row in await connection.execute(query)]


@stores
async def test_a_snapshot_is_written_after_so_many_events_and_read_then(ledger: Ledger, streams: Streams) -> None:
    applied: list[Any] = []

    def counted(account: Account, event: Any) -> Account:
        applied.append(event)
        return apply(account, event)

    options = {"apply": counted, "snapshot_every": 3}
    assert await load(ledger, streams, **options) == NEW
    await append(ledger, streams, "a", 1, 2)
    assert await load(ledger, streams, **options) == Account(3, 2)
    assert await snapshots(ledger) == []
    await append(ledger, streams, "a", 3)
    assert await load(ledger, streams, **options) == Account(6, 3)
    assert await snapshots(ledger) == [("a", "Account", 1, 3, '{"balance":6,"events":3}')]
    await append(ledger, streams, "a", 4)
    applied.clear()
    assert await load(ledger, streams, **options) == Account(10, 4)
    assert applied == [Deposited(4)]
    assert [row[3] for row in await snapshots(ledger)] == [3]


@stores
async def test_a_state_is_loaded_as_it_was_at_a_version(ledger: Ledger, streams: Streams) -> None:
    await append(ledger, streams, "a", 1, 2, 3, 4)
    await load(ledger, streams, snapshot_every=2)

    states = [await load(ledger, streams, until=until, snapshot_every=2) for until in (0, 1, 3, 4, 99)]
    assert states == [NEW, Account(1, 1), Account(6, 3), Account(10, 4), Account(10, 4)]
    assert [row[3] for row in await snapshots(ledger)] == [4]


@stores
async def test_a_stream_of_several_pages(ledger: Ledger, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idempotency.streams._streams._PAGE", 3)
    await append(ledger, streams, "a", *range(1, 10))
    await append(ledger, streams, "b", 1)

    async with ledger.sessions() as session:
        assert [event.version async for event in streams.read(session, "a", after=2)] == [3, 4, 5, 6, 7, 8, 9]
    assert await load(ledger, streams) == Account(45, 9)
    assert await load(ledger, streams, until=7) == Account(28, 7)


@stores
async def test_a_version_that_no_stream_can_have_is_after_every_event(ledger: Ledger, streams: Streams) -> None:
    await append(ledger, streams, "a", 1)

    async with ledger.sessions() as session:
        assert [event async for event in streams.read(session, "a", after=2**63)] == []
    assert await load(ledger, streams, until=2**63) == Account(1, 1)


@stores
async def test_a_state_is_loaded_as_it_was_at_a_time(ledger: Ledger, streams: Streams) -> None:
    """The clock of the database was set back before the third event: nothing after the second is read."""
    await append(ledger, streams, "a", 1, 2, 3)
    base = datetime(2026, 1, 1, tzinfo=UTC)
    async with ledger.sessions.begin() as session:
        for version, seconds in ((1, 10), (2, 30), (3, 20)):
            moved = int((base.timestamp() + seconds) * 1000)
            query = f"UPDATE {ledger.name}_ev SET created_ms = :at WHERE version = :version"
            await session.execute(text(query).bindparams(at=moved, version=version))
    async with ledger.sessions() as session:
        [first, *_] = [event async for event in streams.read(session, "a")]

    times = [base + timedelta(seconds=seconds) for seconds in (9.999, 25, 30)]
    states = [await load(ledger, streams, until=until, snapshot_every=1) for until in times]
    assert states == [NEW, Account(1, 1), Account(6, 3)]
    assert await load(ledger, streams, until=datetime.fromtimestamp(first.at, UTC)) == Account(1, 1)


@sqlite
async def test_options_that_cannot_work_are_refused(ledger: Ledger, streams: Streams) -> None:
    def untyped(account, event):  # type: ignore[no-untyped-def]
        return account

    refused: list[tuple[dict[str, Any], str]] = [
        ({"snapshot_every": 0}, "snapshot_every must be a number of events"),
        ({"snapshot_every": True}, "snapshot_every must be a number of events"),
        ({"snapshot": Versioned(Account)}, "snapshot_every= says when"),
        ({"snapshot_every": 2, "apply": untyped}, "annotate what apply returns"),
        ({"until": -1}, "until must be a version"),
        ({"until": datetime(2026, 1, 1)}, "its time zone"),
    ]
    for options, reason in refused:
        with pytest.raises(ConfigurationError, match=reason):
            await load(ledger, streams, **options)


@stores
async def test_an_event_type_that_is_not_known_is_named(ledger: Ledger, streams: Streams) -> None:
    async with ledger.sessions.begin() as session:
        await streams.append(session, "a", [Deposited(1), Withdrawn(1)])
    older = Streams([Deposited], f"{ledger.name}_ev")
    with pytest.raises(UnreadableError, match=r"a has an event of type Withdrawn.*deploy the code that knows it, or"):
        await load(ledger, older)


class Paid(BaseModel):
    """The newest of three versions."""

    amount: int
    currency: str
    note: str


PAID = Versioned(
    Paid,
    version=3,
    upcast={
        1: lambda old: {**old, "currency": "EUR"},
        2: lambda old: {**old, "note": "", "amount": old["amount"] * 100},
    },
)


@stores
async def test_old_versions_of_events_and_snapshots_are_read(ledger: Ledger, streams: Streams) -> None:
    @dataclass
    class Old:
        amount: int

    table = f"{ledger.name}_ev"
    old, new = Streams([Versioned(Old, name="Paid")], table), Streams([PAID], table)
    last_paid = {"apply": lambda _, paid: paid, "snapshot_every": 1}
    async with ledger.sessions.begin() as session:
        await old.append(session, "a", [Old(7)])
    await load(ledger, old, **last_paid, snapshot=Versioned(Old, name="Paid"))
    stored = await snapshots(ledger)

    assert stored == [("a", "Paid", 1, 1, '{"amount":7}')]
    assert await load(ledger, new, **last_paid, snapshot=PAID) == Paid(amount=700, currency="EUR", note="")
    async with ledger.sessions() as session:
        [event] = [event async for event in new.read(session, "a")]
    assert event.data == Paid(amount=700, currency="EUR", note="")
    assert await snapshots(ledger) == stored


@stores
async def test_newer_versions_are_not_read(ledger: Ledger, streams: Streams) -> None:
    table = f"{ledger.name}_ev"
    new = Versioned(Account, version=2, upcast={1: lambda old: old})
    await append(ledger, streams, "a", 1)
    await load(ledger, streams, snapshot_every=1, snapshot=new)
    with pytest.raises(UnreadableError, match=r"Account is stored in version 2, and this code reads 1 to 1: deploy"):
        await load(ledger, streams, snapshot_every=1)
    newer = Streams([Versioned(Deposited, version=2, upcast={1: lambda old: old})], table)
    await append(ledger, newer, "b", 1)
    with pytest.raises(UnreadableError, match="Deposited is stored in version 2"):
        await load(ledger, streams, "b")


@stores
async def test_a_snapshot_of_another_name_begins_anew(ledger: Ledger, streams: Streams) -> None:
    """An apply that counts in another way does not go on from what the older one has made."""

    def with_fee(account: Account, event: Any) -> Account:
        return Account(apply(account, event).balance - 1, account.events + 1)

    await append(ledger, streams, "a", 10, 20)
    assert await load(ledger, streams, snapshot_every=1) == Account(30, 2)
    assert await load(ledger, streams, apply=with_fee, snapshot_every=1) == Account(30, 2)

    newer = Versioned(Account, name="Account-2")
    assert await load(ledger, streams, apply=with_fee, snapshot_every=1, snapshot=newer) == Account(28, 2)
    assert sorted(row[1] for row in await snapshots(ledger)) == ["Account", "Account-2"]


@stores
async def test_a_snapshot_of_more_events_than_there_are_is_refused(ledger: Ledger, streams: Streams) -> None:
    await append(ledger, streams, "a", 1, 2)
    await load(ledger, streams, snapshot_every=1)
    async with ledger.sessions.begin() as session:
        await session.execute(text(f"DELETE FROM {ledger.name}_ev WHERE version = 2"))
    with pytest.raises(UnreadableError, match=r"the snapshot Account of a is of version 2.*delete its row in .*snap"):
        await load(ledger, streams, snapshot_every=1)
    assert await load(ledger, streams) == Account(1, 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": 3, "upcast": {2: dict}}, "no upcast from version 1 to 2"),
        ({"version": 3, "upcast": {1: dict}}, "no upcast from version 2 to 3"),
        ({"version": 1, "upcast": {1: dict}}, "cannot have an upcast from 1"),
        ({"version": 0}, "an integer from 1 on"),
        ({"version": True}, "an integer from 1 on"),
        ({"name": ""}, "1 to 255 characters"),
        ({"name": "a" * 256}, "1 to 255 characters"),
    ],
)
def test_chains_with_gaps_and_bad_names_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Versioned(Deposited, **options)


def test_an_upcast_that_fails_says_what_was_read() -> None:
    broken = Versioned(Deposited, version=2, upcast={1: lambda old: old["missing"]})
    with pytest.raises(
        UnreadableError,
        match="is no Deposited of version 1: a type that has changed needs a new version, with an upcast",
    ):
        broken.load(1, b'{"amount":1}')


def test_json_is_read_whatever_wrote_it() -> None:
    """Spaces, bytes, and fields of later code do not matter; another type does, and so does what is not JSON."""
    withdrawn = Versioned(Withdrawn)

    assert withdrawn.load(1, '{"amount":1}') == Withdrawn(1)
    assert withdrawn.load(1, ' {"amount": 1, "why": "rent"}\n') == Withdrawn(1, "rent")
    assert withdrawn.load(1, b'{"amount":1,"since_later_code":[]}') == Withdrawn(1)
    for broken in ('{"amount":true}', '{"amount":"1"}', '{"amount":1}{"amount":2}', '{"amount":1', "", "[]", "{}"):
        with pytest.raises(UnreadableError, match="what is stored is no Withdrawn of version 1"):
            withdrawn.load(1, broken)


def test_the_bytes_of_released_versions_stay() -> None:
    """They are stored: a later version of this library reads them."""
    paid = Paid(amount=1, currency="EUR", note="")
    assert PAID.encode(paid) == b'3:{"amount":1,"currency":"EUR","note":""}'
    assert PAID.decode(b'1:{"amount":1}') == Paid(amount=100, currency="EUR", note="")
    for wrong in (b"", b"{}", b"x:{}", b"4:{}", b"0:{}", b"1:{"):
        with pytest.raises(UnreadableError):
            PAID.decode(wrong)


async def test_recorded_results_have_versions_too() -> None:
    """A result that the old code has recorded is replayed by the new one."""
    store = MemoryStore()

    @dataclass
    class Receipt:
        cents: int

    @dataclass
    class OldReceipt:
        euros: int

    renamed = Versioned(Receipt, version=2, upcast={1: lambda old: {"cents": old["euros"] * 100}})

    @idempotent(store, key=lambda: "one", name="charge", codec=Versioned(OldReceipt))
    async def charge_of_old_code() -> OldReceipt:
        return OldReceipt(3)

    @idempotent(store, key=lambda: "one", name="charge", codec=renamed)
    async def charge() -> Receipt:
        raise AssertionError

    await charge_of_old_code()
    assert await charge() == Receipt(300)
