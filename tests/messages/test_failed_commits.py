"""Deliveries whose transaction fails or is lost, whatever their handler caught of it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Column, MetaData, String, Table, make_url, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import registry

from idempotency import Policy, idempotent_consumer
from idempotency.consumer import DeadLetter, Done, Failed, Replayed, Retry
from idempotency.errors import (
    StoreError,
)
from tests.kit import servers
from tests.kit.handlers import POISON, billing, id_of, is_refused, redeliver, redeliver_sync
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_ledger
from tests.kit.targets import Target
from tests.kit.tcp_proxy import Proxy

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)


@pytest.mark.stores("postgres", "mariadb")
async def test_a_lost_acknowledgement_of_the_commit(target: Target) -> None:
    """The database is cut off while it commits: the delivery is retried or done, and a redelivery has no effect."""
    from sqlalchemy import event

    with Proxy(make_url(target.url).port or 0) as proxy:
        async with open_ledger(target, servers.with_port(target.url, proxy.port)) as ledger:
            on_order = billing(ledger)
            lose = [2]

            @event.listens_for(ledger.sync_engine, "commit")
            def cut(_: Any) -> None:
                if lose:
                    proxy.lose_replies(lose.pop())

            first = await on_order.deliver({"id": "1"})
            second = await on_order.deliver({"id": "1"})

            assert first in (Retry(1.0, "unavailable"), Done({"billed": "1"}))
            assert second == Replayed({"billed": "1"})
            assert await ledger.effects() == ["billing 1"]


def mapped(ledger: Ledger) -> type[Any]:
    """Map a class to the ledger's table."""

    class Effect:
        def __init__(self, what: str) -> None:
            self.what = what

    registry().map_imperatively(Effect, Table(ledger.name, MetaData(), Column("what", String(100), primary_key=True)))
    return Effect


def unique(ledger: Ledger) -> tuple[Any, Any]:
    """Make the statements after which an effect cannot happen once more."""
    return text(f"CREATE UNIQUE INDEX {ledger.name}_once ON {ledger.name} (what)"), ledger.insert("tea")


@asynchronous
async def test_a_failure_that_the_handler_swallowed_counts(ledger: Ledger) -> None:
    """A session that a failed flush has left unusable is the handler's own failure, up to max_attempts."""
    effect, runs = mapped(ledger), list[int]()
    async with ledger.engine.begin() as connection:  # type: ignore[union-attr]
        for statement in unique(ledger):
            await connection.execute(statement)

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, max_attempts=2)
    async def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.add(effect("tea"))
        with pytest.raises(IntegrityError):
            await session.flush()

    first, second = await redeliver(handle, 1), await redeliver(handle, 2)

    assert isinstance(first, Failed)
    assert isinstance(first.error, PendingRollbackError)
    assert isinstance(second, DeadLetter)
    assert second.reason == "exhausted"
    assert is_refused(await redeliver(handle, 3))
    assert len(runs) == 2


@synchronous
def test_a_failure_that_the_handler_swallowed_counts_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""
    effect, runs = mapped(sync_ledger), list[int]()
    with sync_ledger.sync_engine.begin() as connection:
        for statement in unique(sync_ledger):
            connection.execute(statement)

    @idempotent_consumer(sync_ledger.store, consumer="c", key=id_of, session=sync_ledger.sessions, max_attempts=2)
    def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.add(effect("tea"))
        with pytest.raises(IntegrityError):
            session.flush()

    first, second = redeliver_sync(handle, 1), redeliver_sync(handle, 2)

    assert isinstance(first, Failed)
    assert isinstance(first.error, PendingRollbackError)
    assert isinstance(second, DeadLetter)
    assert is_refused(redeliver_sync(handle, 3))
    assert len(runs) == 2


@asynchronous
async def test_a_store_that_fails_after_the_handler_counts(ledger: Ledger) -> None:
    """The message is delivered again, and not for ever: its handler ran each time."""
    runs: list[int] = []

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, max_attempts=2)
    async def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        await session.execute(ledger.insert("tea"))
        raise StoreError("away")

    for attempt in (1, 2):
        assert await redeliver(handle, attempt) == Retry(1.0, "unavailable")
    assert is_refused(await redeliver(handle, 3))
    assert len(runs) == 2
    assert await ledger.effects() == []


@synchronous
def test_a_store_that_fails_after_the_handler_counts_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""
    runs: list[int] = []

    @idempotent_consumer(sync_ledger.store, consumer="c", key=id_of, session=sync_ledger.sessions, max_attempts=2)
    def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.execute(sync_ledger.insert("tea"))
        raise StoreError("away")

    for attempt in (1, 2):
        assert redeliver_sync(handle, attempt) == Retry(1.0, "unavailable")
    assert is_refused(redeliver_sync(handle, 3))
    assert len(runs) == 2


@asynchronous
async def test_a_message_whose_savepoint_is_gone_is_settled(ledger: Ledger) -> None:
    """A failure that is stored is a dead letter also where the server has rolled everything back before."""

    @idempotent_consumer(
        ledger.store, consumer="c", key=id_of, session=ledger.sessions, policy=Policy(outcomes={ValueError: "store"})
    )
    async def handle(message: dict[str, Any], session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        await session.execute(text("ROLLBACK"))
        raise POISON

    assert await handle.deliver({"id": "1"}) == DeadLetter("recorded-failure", POISON)
    assert await ledger.effects() == []
