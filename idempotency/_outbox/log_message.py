"""Messages that are written into the log of PostgreSQL and into no table, in the form that Debezium reads too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Connection, Text, bindparam, text

from idempotency._outbox.message import Message, time_ordered_id
from idempotency._outbox.payload import headers_from_text, name_of
from idempotency._outbox.table import MOST_CHARACTERS
from idempotency.errors import ConfigurationError, EmitRefusedError

_FIELDS = ("id", "aggregatetype", "aggregateid", "type")

# Without a slot, nobody would ever read the message. A slot that is being created has no confirmed place yet: it would
# not have this transaction.
_EMIT = text(
    "SELECT count(pg_logical_emit_message(true, :prefix, content)) FROM unnest(:contents) AS content"
    " WHERE EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'logical' AND database = current_database()"
    " AND confirmed_flush_lsn IS NOT NULL AND coalesce(wal_status, '') <> 'lost')"
).bindparams(bindparam("contents", type_=ARRAY(Text)))


def write_messages(connection: Connection, prefix: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as messages of the transaction: one statement."""
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(f"mode='message' needs PostgreSQL, and has no place on {connection.dialect.name}")
    contents = [encode_row(row) for row in rows]
    if connection.execute(_EMIT, {"prefix": prefix, "contents": contents}).scalar_one() != len(rows):
        raise EmitRefusedError(
            "no replication slot of this database would deliver the message: run the LogRelay once, which creates it"
        )


def encode_row(row: Mapping[str, Any]) -> str:
    """Return a message's row as JSON: text only, and without what is None.

    Raises :class:`~idempotency.errors.EmitRefusedError` for a payload of other bytes than text in UTF-8.
    """
    content = {name: row[name] for name in _FIELDS}
    payload: bytes | None = row["payload"]
    if payload is not None:
        try:
            content["payload"] = payload.decode()
        except UnicodeDecodeError:
            raise EmitRefusedError(
                "mode='message' carries text only: the payload is not text in UTF-8; use mode='table', or base64"
            ) from None
    if row["headers"] is not None:
        content["headers"] = row["headers"]
    # ASCII only, so that the encoding of the database does not matter.
    return json.dumps(content, separators=(",", ":"))


def decode_message(content: bytes, created: float, position: tuple[int, int]) -> Message:
    """Return the message of what :func:`encode_row` wrote. ``created``: its commit, in seconds since the epoch.

    Raises an error of Python, or :class:`~idempotency.errors.EmitRefusedError`, for anything else: a message that could
    not be a row of the table either.
    """
    fields = json.loads(content)
    payload = fields.get("payload")
    return Message(
        id=str(UUID(fields["id"])),
        aggregate_type=name_of("aggregate_type", fields["aggregatetype"], MOST_CHARACTERS),
        aggregate_id=name_of("aggregate_id", fields["aggregateid"], MOST_CHARACTERS),
        type=name_of("type", fields["type"], MOST_CHARACTERS),
        payload=None if payload is None else payload.encode(),
        headers=headers_from_text(fields.get("headers")),
        created=created,
        position=position,
    )


def unreadable_message(content: bytes, created: float) -> Message:
    """Return a message that holds what :func:`decode_message` cannot read, for the table of dead messages."""
    return Message(
        id=time_ordered_id(), aggregate_type="?", aggregate_id="?", type="?", payload=content, created=created
    )
