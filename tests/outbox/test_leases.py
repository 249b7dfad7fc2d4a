"""Who owns which bucket: a fair share, by the database's clock, and never two owners."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import update

from idempotency.outbox import Outbox
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._leases import Buckets, Lease, Leases, share_out
from tests.kit.ledger import Ledger

KINDS = ("sqlite", "postgres", "mariadb")
ALL = frozenset(range(64))


def rows(*members: str, **owners: range) -> list[Lease]:
    buckets = {number: owner for owner, numbers in owners.items() for number in numbers}
    named = [Lease(f"bucket-{number:02d}", buckets.get(number, ""), number in buckets) for number in range(64)]
    return [*named, *(Lease(f"relay-{member}", member, True) for member in members)]


def test_a_share_is_rounded_up() -> None:
    surplus, wanted = share_out(rows("a", "b", "c", a=range(30), b=range(30, 60)), "a", range(30))
    assert (surplus, wanted) == ([22, 23, 24, 25, 26, 27, 28, 29], [])
    surplus, wanted = share_out(rows("a", "b", "c", a=range(30), b=range(30, 60)), "c", ())
    assert (surplus, set(wanted)) == ([], {60, 61, 62, 63})
    assert len(share_out(rows("a"), "a", ())[1]) == 64
    assert len(share_out(rows("a", "b", "c"), "a", ())[1]) == 22


def test_a_relay_that_has_ended_counts_no_more() -> None:
    ended = [Lease("relay-b", "b", False), *(row._replace(live=False) for row in rows(b=range(64)))]
    assert len(share_out([*ended, Lease("relay-a", "a", True)], "a", ())[1]) == 64


def test_a_bucket_that_was_taken_without_an_answer_is_taken_again() -> None:
    assert share_out(rows("a", "b", a=range(32), b=range(32, 64)), "a", range(30)) == ([], [30, 31])


@pytest.fixture
async def database(ledger: Ledger, outbox: Outbox) -> AsyncIterator[RelayDatabase]:
    opened = RelayDatabase(ledger.engine, outbox.tables, 5.0)
    yield opened
    await opened.aclose()


async def end(database: RelayDatabase, owner: str) -> None:
    """Let the leases of an owner be over, as after its time."""
    table = database.tables.lease
    await database.run(lambda connection: connection.execute(ending(table, owner)))


def ending(table: Any, owner: str) -> Any:
    return update(table).where(table.c.owner == owner).values(until_ms=1)


@pytest.mark.stores(*KINDS)
async def test_relays_share_the_buckets_and_take_over_those_of_a_dead_one(database: RelayDatabase) -> None:
    first, second = Buckets(database, 60.0), Buckets(database, 60.0)
    await first.join()
    assert await first.rebalance() == (ALL, frozenset())
    await second.join()
    assert await second.rebalance() == (frozenset(), frozenset())
    await first.rebalance()
    taken, lapsed = await second.rebalance()
    assert (len(taken), lapsed, first.held & taken, first.held | taken) == (32, frozenset(), frozenset(), ALL)
    await end(database, first.leases.owner)
    assert await second.rebalance() == (first.held, first.held)
    assert second.held == ALL
    # The first one was only paused. It finds that it has lost everything, and begins anew with its share.
    assert not await first.leases.renew()
    assert (first.held, first.leases.valid) == (frozenset(), False)
    await first.join()
    await second.rebalance()
    await first.rebalance()
    assert len(first.held) == len(second.held) == 32
    await second.leave()
    taken, lapsed = await first.rebalance()
    assert (first.held, lapsed) == (ALL, frozenset())


@pytest.mark.stores(*KINDS)
async def test_a_lease_has_one_owner(database: RelayDatabase) -> None:
    first, second = Leases(database, 60.0), Leases(database, 60.0)
    await first.create(["slot-orders"])
    await second.create(["slot-orders", "slot-other"])
    assert not first.valid
    assert await first.take(["slot-orders"]) == {"slot-orders"}
    assert await second.take(["slot-orders", "slot-other"]) == {"slot-other"}
    assert first.valid
    assert 50 < first.remaining < 60
    assert await first.renew()
    await second.release(["slot-orders"])
    assert await second.take(["slot-orders"]) == set()
    await first.release(["slot-orders"])
    assert await second.take(["slot-orders"]) == {"slot-orders"}
    await second.release(second.held)


@pytest.mark.stores("sqlite")
async def test_what_is_held_is_not_used_in_the_last_tenth_of_its_lease(
    database: RelayDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("idempotency.outbox._leases.monotonic", lambda: now)
    leases = Leases(database, 60.0)
    await leases.create(["slot-orders"])
    await leases.take(["slot-orders"])
    now += 53.9
    assert leases.valid
    now += 0.2
    assert not leases.valid
    assert leases.remaining == 0
