"""From changes of the log to messages: which are ours, and at which position each of them is."""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

from idempotency._outbox.log_message import decode_message, unreadable_message
from idempotency._outbox.message import Message
from idempotency._outbox.payload import readable_headers
from idempotency.errors import ConfigurationError, EmitRefusedError
from idempotency.outbox._ledger import Position
from idempotency.outbox._pgoutput import Begin, Commit, Emitted, Insert, Relation, decode

_COLUMNS = ("seq", "id", "aggregatetype", "aggregateid", "type", "payload", "headers", "created_ms", "available_ms")


class Logged(NamedTuple):
    """A message that was read from the log.

    ``seq`` is that of its row; None in message mode, where it has none. ``refused``: why it cannot be published.
    """

    position: Position
    seq: int | None
    message: Message
    refused: str | None = None


class LogReader:
    """Read messages after a position, in the order of commits.

    ``schema`` and ``table`` name the table whose rows are messages. With ``messages``, rows are not read, but messages
    in the log with ``prefix``. Messages are counted within their transaction: that is their position.
    """

    def __init__(self, schema: str, table: str, prefix: str, messages: bool, after: Position) -> None:
        self._name = (schema, table)
        self._prefix = prefix
        self._messages = messages
        self._after = after
        self._oid: int | None = None
        self._places: Callable[[list[bytes | None]], tuple[Any, ...]] = tuple
        self._lsn, self._committed, self._count = 0, 0.0, 0
        self.end = 0
        """Where the log goes on after the last transaction that was read to its end."""

    def read(self, messages: Iterable[bytes]) -> list[Logged]:
        """Return the messages that are new. Rows that wait for their time are none of these.

        Raises :class:`~idempotency.errors.ConfigurationError` for a message in the log where rows are read.
        """
        found: list[Logged] = []
        for data in messages:
            match decode(data):
                case Insert(oid, values) if oid == self._oid:
                    position = self._next()
                    if position > self._after:
                        found += self._row(position, values)
                case Begin(lsn, committed):
                    self._lsn, self._committed, self._count = lsn, committed, 0
                case Commit(_, end):
                    self.end = end
                case Emitted(True, prefix, content) if prefix == self._prefix:
                    position = self._next()
                    if position > self._after:
                        found.append(self._emitted(position, content))
                case Relation(oid, schema, name, columns) if (schema, name) == self._name and not self._messages:
                    self._oid, self._places = oid, itemgetter(*map(columns.index, _COLUMNS))
                case _:
                    pass
        return found

    def _next(self) -> Position:
        self._count += 1
        return Position(self._lsn, self._count)

    def _emitted(self, position: Position, content: bytes) -> Logged:
        if not self._messages:
            raise ConfigurationError(
                f"the log has messages of an Outbox(mode='message') named {self._prefix}, and this relay reads rows:"
                " run it with mode='message', on the command line --mode message, which publishes both; or give one of"
                " two outboxes another table"
            )
        try:
            return Logged(position, None, decode_message(content, self._committed, position))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, EmitRefusedError):
            message = unreadable_message(content, self._committed)
            return Logged(position, None, message, "it was not written by an outbox: emit() writes these messages")

    def _row(self, position: Position, values: list[bytes | None]) -> list[Logged]:
        seq, identity, aggregate_type, aggregate_id, kind, payload, headers, created, available = self._places(values)
        if available is not None:
            return []
        own, refused = readable_headers(None if headers is None else headers.decode())
        message = Message(
            id=identity.decode(),
            aggregate_type=aggregate_type.decode(),
            aggregate_id=aggregate_id.decode(),
            type=kind.decode(),
            payload=None if payload is None else unhexlify(payload[2:]),
            headers=own,
            created=int(created) / 1000,
            position=position,
        )
        return [Logged(position, int(seq), message, refused)]
