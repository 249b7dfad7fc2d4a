"""Emit a message: one row, in the transaction of the caller, which commits or vanishes with it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from idempotency._outbox.after_commit import emitted
from idempotency._outbox.insert import Inserts, Row
from idempotency._outbox.limits import Limits, refusal_of
from idempotency._outbox.log_message import write_messages
from idempotency._outbox.message import time_ordered_id, wire_headers
from idempotency._outbox.message_ids import ids_taken
from idempotency._outbox.payload import encode_headers, encode_payload, headers_as_text, name_of
from idempotency._outbox.table import BUCKETS, DEFAULT_TABLE, MOST_CHARACTERS, tables_named
from idempotency._sql.failures import MadeBy, describe_failure, lacks_table, refuses_data
from idempotency._sql.sessions import as_async, as_sync, connection_of, is_autocommit
from idempotency.errors import ConfigurationError, EmitRefusedError, TransactionError
from idempotency.operation import NewMessage, Operation, current

NO_TRANSACTION = (
    "There is no transaction to emit in: begin one, or give the middleware or decorator session=. A message commits or"
    " vanishes with what is written beside it."
)
_ANY_ID = 36 * "0"
"""As long as every id."""

_AUTOCOMMIT = "the connection is in AUTOCOMMIT: a message has no transaction there with which it commits or vanishes"


OUTBOX = MadeBy(
    "idempotency outbox schema create",
    "Outbox.create_schema() or create_schema_sync()",
    "idempotency.outbox.outbox_table",
)


class Outbox:
    """A table of messages. What is emitted commits with the transaction, and a relay publishes it afterwards.

    ``table`` names it, default ``outbox``; its schema may be named too, ``"schema.table"``, and SQLAlchemy's option
    ``schema_translate_map`` applies. ``limits``: what the broker carries, see :class:`Limits`; a message that it cannot
    carry is refused here, with :class:`~idempotency.errors.EmitRefusedError`.

    ``mode``: ``"message"`` writes no rows, but messages in the log of PostgreSQL from 14, which :class:`LogRelay` and
    Debezium read. It is the fastest, carries text only, and loses what was not read yet if the server removes the log.
    A message with ``available_at`` is a row of the table there too.
    """

    def __init__(
        self,
        table: str = DEFAULT_TABLE,
        *,
        mode: Literal["table", "message"] = "table",
        limits: Limits | None = None,
        notify: bool = True,
    ) -> None:
        if mode not in ("table", "message"):
            raise ConfigurationError(f"mode must be 'table' or 'message', not {mode!r}")
        self.tables = tables_named(table)
        self.mode = mode
        self.notify = notify
        self.limits = limits or Limits()
        self._inserts = Inserts(self.tables)

    @property
    def prefix(self) -> str:
        """Return the prefix of messages in the log."""
        return self.tables.messages.fullname

    def __repr__(self) -> str:
        return f"<Outbox {self.tables.messages.fullname}>"

    async def emit(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        *,
        aggregate_type: str,
        aggregate_id: object,
        type: str,
        payload: object,
        headers: Mapping[str, str] | None = None,
        available_at: datetime | float | None = None,
    ) -> str:
        """Write a message in the transaction of ``session``, and return its id. It is published after the commit.

        Messages of one ``aggregate_type`` and ``aggregate_id`` are published in order. ``payload``: bytes go to the
        broker as they are; anything else as JSON; None is a tombstone. ``available_at``: when to publish it, a time
        with its zone or seconds since the epoch, default at once; a message that is not due delays no other one.
        Inside of an operation the id is derived from the operation, the key and ``type`` of the message and its number
        among those of the same, so that a run that is repeated emits the same ids.
        Raises :class:`~idempotency.errors.EmitRefusedError` for a message that cannot be written or carried, and
        :class:`~idempotency.errors.TransactionError` where there is no transaction.
        """
        session = as_async(session, "emit")
        message = NewMessage(aggregate_type, aggregate_id, type, payload, headers, available_at)
        return await session.run_sync(self._write_one, message, current())

    def emit_sync(
        self,
        session: Session | scoped_session[Any] | Connection,
        *,
        aggregate_type: str,
        aggregate_id: object,
        type: str,
        payload: object,
        headers: Mapping[str, str] | None = None,
        available_at: datetime | float | None = None,
    ) -> str:
        """See :meth:`emit`."""
        session = as_sync(session, "emit")
        message = NewMessage(aggregate_type, aggregate_id, type, payload, headers, available_at)
        return self._write_one(session, message, current())

    def row(
        self,
        aggregate_type: str,
        aggregate_id: object,
        type: str,
        payload: object,
        headers: Mapping[str, str] | None,
        available_at: datetime | float | None,
        operation: Operation | None = None,
    ) -> Row:
        """Return the row of a message; see :meth:`emit`. ``operation``: the one that emits it."""
        key_type = name_of("aggregate_type", aggregate_type, MOST_CHARACTERS)
        key_id = name_of("aggregate_id", aggregate_id, MOST_CHARACTERS)
        type = name_of("type", type, MOST_CHARACTERS)
        body, own = encode_payload(payload), encode_headers(headers)
        available = _milliseconds(available_at)
        refusal = refusal_of(self.limits, key_id, body, wire_headers(_ANY_ID, type, own))
        if refusal is not None:
            raise EmitRefusedError(f"the message cannot be carried by its route: {refusal}")
        return {
            # An operation counts its ids: what is refused gets none.
            "id": time_ordered_id() if operation is None else operation.next_message_id(key_type, key_id, type),
            "aggregatetype": key_type,
            "aggregateid": key_id,
            "type": type,
            "payload": body,
            "headers": headers_as_text(own),
            "bucket": bucket_of(key_type, key_id),
            "attempts": 0,
            "available_ms": available,
        }

    def _write_one(self, session: Session | Connection, message: NewMessage, operation: Operation | None) -> str:
        connection = connection_of(session, NO_TRANSACTION)
        # Only with a connection: an operation counts its ids, and an emit that is tried again must get the same.
        row = self.row(*message, operation)
        names = row["aggregatetype"], row["aggregateid"], row["type"]
        with ids_taken(connection, operation, [(row["id"], names)]):
            self.write(session, [row])
        return str(row["id"])

    def write(self, session: Session | Connection, rows: Sequence[Row]) -> None:
        """Write rows in the transaction of ``session``: one statement for up to 100 of them, or a megabyte."""
        connection = connection_of(session, NO_TRANSACTION)
        if is_autocommit(connection):
            raise TransactionError(_AUTOCOMMIT)
        table = self.tables.messages.fullname
        try:
            if self.mode == "message":
                now = [row for row in rows if row["available_ms"] is None]
                if now:
                    write_messages(connection, self.prefix, now)
                rows = [row for row in rows if row["available_ms"] is not None]
            if rows:
                self._inserts.write(connection, rows)
        except (DBAPIError, UnicodeError) as error:
            _explain(error, connection, table)
            raise
        emitted(session, connection, table, self.notify)

    async def create_schema(self, engine: AsyncEngine) -> None:
        """Create the tables where they are missing; safe in any number of processes at once."""
        async with engine.begin() as connection:
            await connection.run_sync(self.tables.create)

    def create_schema_sync(self, engine: Engine) -> None:
        """See :meth:`create_schema`."""
        with engine.begin() as connection:
            self.tables.create(connection)


def bucket_of(aggregate_type: str, aggregate_id: str) -> int:
    """Return the bucket of a key. It is stored: another rule would let two relays have one key."""
    return zlib.crc32(f"{aggregate_type}\0{aggregate_id}".encode()) % BUCKETS


def _explain(error: DBAPIError | UnicodeError, connection: Connection, table: str) -> None:
    """Raise what says better than ``error`` what has failed, if there is such."""
    if isinstance(error, DBAPIError):
        error.hide_parameters = True  # an error is logged, and a payload must not be
    if lacks_table(error):
        raise describe_failure(error, connection.engine.url, table, OUTBOX) from error
    if refuses_data(error):
        kind = type(error.orig if isinstance(error, DBAPIError) else error).__name__
        raise EmitRefusedError(
            f"the database refuses the message ({kind}), as it does where it is too large, or where its key or type"
            " has characters that the database or the connection cannot encode"
        ) from error


def _milliseconds(at: datetime | float | None) -> int | None:
    if isinstance(at, datetime):
        if at.tzinfo is None:
            raise EmitRefusedError("available_at must have its time zone, as in datetime.now(UTC)")
        at = at.timestamp()
    if at is None:
        return None
    if type(at) not in (int, float) or not 0 <= at < 2**40:
        raise EmitRefusedError(f"available_at must be a time with its zone or seconds since the epoch, not {at!r}")
    return round(at * 1000)
