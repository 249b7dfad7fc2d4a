"""How messages get into their table: by which sessions, in how many statements, and what a refusal says."""

from __future__ import annotations

import asyncio
import enum
import traceback
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from idempotency.errors import ConfigurationError, EmitRefusedError
from idempotency.outbox import Limits, Outbox
from tests.kit.ledger import SYNC_JOINED_KINDS, Ledger
from tests.kit.relays import count

ORDER: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": 7, "type": "Placed"}


class Kind(str, enum.Enum):  # noqa: UP042
    """As older code writes it; format() gives ``Kind.ORDER``."""

    ORDER = "order"


def rows(outbox: Outbox, number: int, payload: bytes) -> list[Any]:
    return [outbox.row("order", 7, "Placed", payload, None, None) for _ in range(number)]


def test_an_enumeration_is_the_same_key_as_its_text() -> None:
    row = Outbox().row(Kind.ORDER, 7, "Placed", None, None, None)
    assert (row["bucket"], row["aggregatetype"], type(row["aggregatetype"])) == (53, "order", str)


@pytest.mark.stores("sqlite")
async def test_a_scoped_session_is_as_good_as_its_own(ledger: Ledger, outbox: Outbox) -> None:
    sessions = async_scoped_session(ledger.sessions, asyncio.current_task)
    await outbox.emit(sessions, **ORDER, payload={})
    await sessions.commit()
    await sessions.remove()
    assert await count(ledger.engine, outbox.tables.messages) == 1  # type: ignore[arg-type]


@pytest.mark.stores("sqlite")
def test_a_scoped_session_of_a_thread_is_as_good_as_its_own(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    sessions = scoped_session(sync_ledger.sessions)
    sync_outbox.emit_sync(sessions, **ORDER, payload={})
    sessions.commit()
    assert sessions.execute(text(f"SELECT count(*) FROM {sync_outbox.tables.messages.name}")).scalar_one() == 1
    sessions.remove()


async def test_the_wrong_kind_of_session_is_named() -> None:
    wrong: Any
    async with AsyncSession() as wrong:
        with pytest.raises(ConfigurationError, match="not AsyncSession: is it await emit"):
            Outbox().emit_sync(wrong, **ORDER, payload={})
    with Session() as wrong:
        with pytest.raises(ConfigurationError, match="not Session: is it emit_sync"):
            await Outbox().emit(wrong, **ORDER, payload={})
        with pytest.raises(ConfigurationError, match="has no engine"):
            Outbox().emit_sync(wrong, **ORDER, payload={})


@pytest.mark.stores(*(kind for kind in SYNC_JOINED_KINDS if "mariadb" in kind))
def test_several_messages_are_one_statement_of_the_server(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    inserts = text("SHOW SESSION STATUS LIKE 'Com_insert'")
    with sync_ledger.engine.begin() as connection:
        before = int(connection.execute(inserts).one()[1])
        sync_outbox.write(connection, rows(sync_outbox, 5, b"\xff"))
        assert int(connection.execute(inserts).one()[1]) == before + 1


@pytest.mark.stores("mariadb")
def test_what_no_packet_takes_is_refused_although_the_limits_allow_it(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    wide = Outbox(sync_outbox.tables.messages.name, limits=Limits(most_bytes=10**9))
    with sync_ledger.engine.begin() as connection:
        most = connection.execute(text("SELECT @@max_allowed_packet")).scalar_one()
        with pytest.raises(EmitRefusedError, match="max_allowed_packet allows"):
            wide.emit_sync(connection, **ORDER, payload=bytes(most * 3 // 4))
        wide.emit_sync(connection, **ORDER, payload=bytes(2_000_000))


@pytest.mark.stores("postgres_psycopg2")
def test_a_statement_has_a_limited_size(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    statements: list[str] = []
    event.listen(sync_ledger.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    with sync_ledger.engine.begin() as connection:
        sync_outbox.write(connection, rows(sync_outbox, 101, b"x"))
        assert len(statements) == 2
        sync_outbox.write(connection, rows(sync_outbox, 3, b"x" * 400_000))
        assert len(statements) == 4
        found = connection.execute(text(f"SELECT count(*) FROM {sync_outbox.tables.messages.name}")).scalar_one()
        assert found == 104


@pytest.mark.stores("postgres", "mariadb")
async def test_what_the_database_refuses_is_named_without_its_payload(ledger: Ledger, outbox: Outbox) -> None:
    table, secret = outbox.tables.messages.name, "".join(("4111", "1111"))
    async with ledger.engine.begin() as connection:  # type: ignore[union-attr]
        await connection.execute(text(f"ALTER TABLE {table} ADD CONSTRAINT {table}_odd CHECK (type <> 'Odd')"))
    async with ledger.sessions() as session:
        with pytest.raises(EmitRefusedError, match="the database refuses the message") as refused:
            await outbox.emit(session, **{**ORDER, "type": "Odd"}, payload=b"\xff", headers={"card": secret})
        await session.rollback()
        await session.execute(text(f"ALTER TABLE {table} RENAME COLUMN headers TO headings"))
        await session.commit()
        with pytest.raises(DBAPIError) as failed:
            await outbox.emit(session, **ORDER, payload=secret, headers={"card": secret})
    own = refused.value.__cause__
    assert isinstance(own, DBAPIError)
    assert own.hide_parameters
    assert secret not in "".join(traceback.format_exception(failed.value))
