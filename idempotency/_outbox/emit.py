"""Emit a message: one row, in the transaction of the caller, which commits or vanishes with it."""

from __future__ import annotations

import zlib
from binascii import b2a_base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Engine, TextClause, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from idempotency._outbox.after_commit import emitted
from idempotency._outbox.limits import Limits
from idempotency._outbox.log_message import write_messages
from idempotency._outbox.message import Message, time_ordered_id
from idempotency._outbox.payload import encode_headers, encode_payload, headers_as_text, name_of
from idempotency._outbox.table import BUCKETS, DEFAULT_TABLE, MOST_CHARACTERS, emitted_at, tables_named
from idempotency._sql.engines import level_of
from idempotency._sql.failures import MadeBy, describe_failure, lacks_table
from idempotency._sql.guarded_connection import commits_by_itself
from idempotency._sql.tables import full_name
from idempotency.errors import ConfigurationError, EmitRefusedError, TransactionError
from idempotency.operation import Operation, current

Row = dict[str, Any]
"""The values of a row's columns, but those that the database sets."""

NO_TRANSACTION = (
    "There is no transaction to emit in: begin one, or give the middleware or decorator session=. A message commits or"
    " vanishes with what is written beside it."
)
_COLUMNS = "id", "aggregatetype", "aggregateid", "type", "payload", "headers", "bucket", "attempts", "available_ms"
_MYSQL = ("mysql", "mariadb")
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
        self._insert: dict[tuple[str, str | None], TextClause] = {}

    @property
    def prefix(self) -> str:
        """Return the prefix of messages in the log."""
        return self.tables.messages.fullname

    def __repr__(self) -> str:
        return f"<Outbox {self.tables.messages.fullname}>"

    async def emit(
        self,
        session: AsyncSession | AsyncConnection,
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
        row = self.row(aggregate_type, aggregate_id, type, payload, headers, available_at, current())
        await session.run_sync(self.write, [row])
        return str(row["id"])

    def emit_sync(
        self,
        session: Session | Connection,
        *,
        aggregate_type: str,
        aggregate_id: object,
        type: str,
        payload: object,
        headers: Mapping[str, str] | None = None,
        available_at: datetime | float | None = None,
    ) -> str:
        """See :meth:`emit`."""
        row = self.row(aggregate_type, aggregate_id, type, payload, headers, available_at, current())
        self.write(session, [row])
        return str(row["id"])

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
        message = Message(
            id=time_ordered_id(),
            aggregate_type=name_of("aggregate_type", aggregate_type, MOST_CHARACTERS),
            aggregate_id=name_of("aggregate_id", aggregate_id, MOST_CHARACTERS),
            type=name_of("type", type, MOST_CHARACTERS),
            payload=encode_payload(payload),
            headers=encode_headers(headers),
        )
        refusal = self.limits.refusal(message)
        if refusal is not None:
            raise EmitRefusedError(f"the message cannot be carried by its route: {refusal}")
        names = message.aggregate_type, message.aggregate_id, message.type
        return {
            "id": message.id if operation is None else operation.next_message_id(*names),
            "aggregatetype": message.aggregate_type,
            "aggregateid": message.aggregate_id,
            "type": message.type,
            "payload": message.payload,
            "headers": headers_as_text(message.headers),
            "bucket": bucket_of(message.aggregate_type, message.aggregate_id),
            "attempts": 0,
            "available_ms": _milliseconds(available_at),
        }

    def write(self, session: Session | Connection, rows: Sequence[Row]) -> None:
        """Write rows in the transaction of ``session``: one statement."""
        connection = _connection_of(session)
        if level_of(connection.dialect, connection.get_execution_options()) == "AUTOCOMMIT" or commits_by_itself(
            connection
        ):
            raise TransactionError(_AUTOCOMMIT)
        if self.mode == "message":
            now = [row for row in rows if row["available_ms"] is None]
            if now:
                write_messages(connection, self.prefix, now)
            rows = [row for row in rows if row["available_ms"] is not None]
        if rows:
            self._insert_rows(connection, rows)
        emitted(session, connection, self.tables.messages.fullname, self.notify)

    def _insert_rows(self, connection: Connection, rows: Sequence[Row]) -> None:
        name, schema = connection.dialect.name, connection.schema_for_object(self.tables.messages)
        statement = self._insert.get((name, schema))
        if statement is None:
            statement = self._insert[name, schema] = self._insert_by(connection)
        if name in _MYSQL:
            rows = [{**row, "payload": _as_base64(row["payload"])} for row in rows]
        parameters: Any = rows if len(rows) > 1 else rows[0]
        try:
            connection.execute(statement, parameters)
        except DBAPIError as error:
            if not lacks_table(error):
                raise
            if name != "sqlite":
                raise describe_failure(error, connection.engine.url, self.tables.messages.fullname, OUTBOX) from error
            self.tables.create(connection)
            connection.execute(statement, parameters)

    def _insert_by(self, connection: Connection) -> TextClause:
        # As text, because SQLAlchemy takes longer to find an insert() in its cache than to send it.
        name = connection.dialect.name
        values = [f":{column}" for column in _COLUMNS]
        if name in _MYSQL:
            # Its drivers escape bytes in different ways, and some send two digits for each byte.
            values[_COLUMNS.index("payload")] = "FROM_BASE64(:payload)"
        return text(
            f"INSERT INTO {full_name(connection, self.tables.messages)} (created_ms, {', '.join(_COLUMNS)})"  # noqa: S608
            f" VALUES ({emitted_at(name)}, {', '.join(values)})"
        )

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


def _as_base64(payload: bytes | None) -> str | None:
    return None if payload is None else b2a_base64(payload, newline=False).decode()


def _connection_of(session: Session | Connection) -> Connection:
    if isinstance(session, Connection):
        return session
    try:
        return session.connection()
    except InvalidRequestError as error:
        if session.in_transaction():
            raise
        raise TransactionError(NO_TRANSACTION) from error


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
