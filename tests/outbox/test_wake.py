"""A relay is woken by a commit: in its process, in another thread, and in other processes by NOTIFY."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from idempotency._outbox import after_commit
from idempotency._outbox.notify import NOTIFIER, Notifier, pause_after
from idempotency.outbox import Outbox
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._wake import Wake
from tests.kit.ledger import Ledger
from tests.kit.relays import emit

ORDER: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": 7, "type": "Placed", "payload": {}}


@asynccontextmanager
async def waiting(ledger: Ledger, outbox: Outbox, notify: bool = False) -> AsyncIterator[Wake]:
    """Open what a relay waits for."""
    database = RelayDatabase(ledger.engine, outbox.tables, 5.0)
    wake = Wake(database)
    async with wake.listening(notify):
        yield wake
    await database.aclose()


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_commit_wakes_a_relay_of_its_process(ledger: Ledger, outbox: Outbox) -> None:
    async with waiting(ledger, outbox) as wake, ledger.sessions() as session:
        await outbox.emit(session, **ORDER)
        assert not await wake.wait(0)
        async with session.begin_nested():
            await outbox.emit(session, **ORDER)
        assert not await wake.wait(0)
        await session.commit()
        assert await wake.wait(5)
        await outbox.emit(session, **ORDER)
        await session.rollback()
        await session.execute(text("SELECT 1"))
        await session.commit()
        assert not await wake.wait(0)


@pytest.mark.stores("sqlite", "postgres")
async def test_a_commit_of_a_connection_wakes_a_relay(ledger: Ledger, outbox: Outbox) -> None:
    async with waiting(ledger, outbox) as wake:
        await emit(ledger.engine, outbox, (1, "a"), (1, "b"))
        assert await wake.wait(5)


@pytest.mark.stores("sqlite")
async def test_a_connection_wakes_the_relays_of_what_its_transaction_has_emitted(
    ledger: Ledger, outbox: Outbox
) -> None:
    other = Outbox(f"{outbox.tables.messages.name}2")
    await other.create_schema(ledger.engine)  # type: ignore[arg-type]
    woken: list[str] = []

    def close() -> None:
        raise RuntimeError("Event loop is closed")

    first, second = outbox.tables.messages.fullname, other.tables.messages.fullname
    with (
        after_commit.woken(first, close),
        after_commit.woken(first, lambda: woken.append("first")),
        after_commit.woken(second, lambda: woken.append("second")),
    ):
        async with ledger.engine.connect() as connection:  # type: ignore[union-attr]
            for emitting in ([outbox, other], [], [other]):
                async with connection.begin():
                    for each in emitting:
                        await each.emit(connection, **ORDER)
                woken.append("-")
    assert sorted(woken[:2]) == ["first", "second"]
    assert woken[2:] == ["-", "-", "second", "-"]


@pytest.mark.stores("sqlite", "postgres")
def test_a_commit_in_a_thread_wakes_a_relay(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    listening, woken = threading.Event(), threading.Event()

    async def relay() -> None:
        async with waiting(sync_ledger, sync_outbox) as wake:
            listening.set()
            if await wake.wait(10):
                woken.set()

    thread = threading.Thread(target=asyncio.run, args=[relay()])
    thread.start()
    assert listening.wait(10)
    with sync_ledger.sessions.begin() as session:
        sync_outbox.emit_sync(session, **ORDER)
    thread.join(10)
    assert woken.is_set()


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_commit_notifies_other_processes_outside_of_its_transaction(ledger: Ledger, outbox: Outbox) -> None:
    statements: list[str] = []
    event.listen(ledger.sync_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    # One connection only, which the session uses: the notification needs another one.
    narrow = create_async_engine(ledger.engine.url, pool_size=1, max_overflow=0)  # type: ignore[union-attr]
    heard = asyncio.Event()
    listener = asyncio.create_task(hear(ledger, outbox, heard))
    async with AsyncSession(narrow) as session:
        while not heard.is_set():
            await outbox.emit(session, **ORDER)
            await session.commit()
            await session.execute(text("SELECT 1"))
            await asyncio.wait({listener}, timeout=0.1)
    await narrow.dispose()
    assert not any("NOTIFY" in statement for statement in statements)


async def hear(ledger: Ledger, outbox: Outbox, heard: asyncio.Event) -> None:
    """Wait as a relay of another process: what wakes it in this one is removed."""
    async with waiting(ledger, outbox, notify=True) as wake:
        after_commit._wakers.pop(outbox.tables.messages.fullname, None)
        await wake.wait(10)  # for the beginning of the notifications
        if await wake.wait(10):
            heard.set()
        after_commit._wakers[outbox.tables.messages.fullname] = set()


@pytest.mark.stores("postgres")
async def test_notifications_can_be_switched_off(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("idempotency._outbox.after_commit.NOTIFIER.notify", lambda *place: asked.append(place))
    silent = Outbox(outbox.tables.messages.name, notify=False)
    await emit(ledger.engine, silent, (1, "a"))
    assert asked == []
    await emit(ledger.engine, outbox, (1, "a"))
    assert len(asked) == 1


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_the_connections_that_notify_are_few_and_end(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idempotency._outbox.notify._IDLE", 0.2)
    opened: list[Any] = []
    for _ in range(6):
        engine = create_async_engine(ledger.engine.url)  # type: ignore[union-attr]

        @event.listens_for(engine.sync_engine, "connect")
        def begin(connection: Any, _: Any) -> None:
            # With some drivers this begins a transaction, and leaves it open.
            connection.cursor().execute("SET search_path TO public")
            opened.append(connection)

        await engine.dispose()
        before = len(opened)
        NOTIFIER.notify(engine.sync_engine, outbox.tables.messages.name)
        await until(lambda before=before: len(opened) > before)
    drivers = [connection.driver_connection for connection in opened]
    await until(lambda: sum(not is_closed(driver) for driver in drivers) <= 4)
    await until(lambda: all(map(is_closed, drivers)))
    assert len(drivers) == 6


async def test_while_many_commits_come_it_is_notified_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []

    async def send(*_: object) -> bool:
        sent.append(monotonic())
        return True

    monkeypatch.setattr("idempotency._outbox.notify._Connections.send", send)
    engine, notifier = create_engine("postgresql+psycopg://"), Notifier()
    while len(sent) < 5:
        notifier.notify(engine, "orders")
        await asyncio.sleep(0)
    # After pauses of 10, 20, 40 and 80 ms.
    assert sent[-1] - sent[0] >= 0.15


@pytest.mark.parametrize(
    ("pause", "commits", "following"),
    [(0.01, 1, 0.01), (0.01, 4, 0.02), (0.08, 25, 0.1), (0.1, 31, 0.1), (0.1, 9, 0.01)],
)
def test_few_commits_are_notified_soon(pause: float, commits: int, following: float) -> None:
    assert pause_after(pause, commits) == following


def is_closed(driver: Any) -> bool:
    return bool(driver.closed if hasattr(driver, "closed") else driver.is_closed())


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
