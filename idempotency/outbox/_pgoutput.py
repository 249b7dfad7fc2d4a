"""Decode what the plug-in pgoutput of PostgreSQL writes of committed transactions, in version 1 of its protocol.

There is no I/O. See "Logical Replication Message Formats" in the manual of PostgreSQL. A transaction is Begin, then its
changes, then Commit; transactions come in the order of their commits. Values are text, as without the option
``binary``.
"""

from __future__ import annotations

from struct import Struct, error
from typing import NamedTuple

_BEGIN = Struct("!QqI")
_COMMIT = Struct("!xQQq")
_EMITTED = Struct("!BQ")
_INSERT = Struct("!Icxx")
_OID = Struct("!I")
_COUNT = Struct("!H")
_SIZE = Struct("!i")
_COLUMN_TAIL = 8
"""Bytes of the type and the type's modifier, after the name of a column."""

_TO_UNIX = 946_684_800
"""Seconds from the epoch of Unix to that of PostgreSQL, 1 January 2000."""


class MalformedError(ValueError):
    """These bytes are not a message of pgoutput."""


class Begin(NamedTuple):
    """A transaction begins. ``lsn`` is where its commit is in the log, ``committed`` when, in seconds since 1970."""

    lsn: int
    committed: float


class Commit(NamedTuple):
    """A transaction ends. ``end`` is where the log goes on after its commit."""

    lsn: int
    end: int


class Relation(NamedTuple):
    """A table, before its first change."""

    oid: int
    schema: str
    name: str
    columns: tuple[str, ...]


class Insert(NamedTuple):
    """A row of the table ``oid``: the text of each column, None for NULL."""

    oid: int
    values: list[bytes | None]


class Emitted(NamedTuple):
    """What ``pg_logical_emit_message`` wrote."""

    transactional: bool
    prefix: str
    content: bytes


Change = Begin | Commit | Relation | Insert | Emitted


def decode(data: bytes) -> Change | None:
    """Return the change in one message of pgoutput; None for those that are not of use here, such as an update.

    Raises :class:`MalformedError`, and nothing else, for bytes that cannot be read.
    """
    try:
        match data[:1]:
            case b"I":
                return _insert(data)
            case b"B":
                lsn, microseconds, _ = _BEGIN.unpack_from(data, 1)
                return Begin(lsn, _TO_UNIX + microseconds / 1e6)
            case b"C":
                return Commit(*_COMMIT.unpack_from(data, 1)[:2])
            case b"M":
                return _emitted(data)
            case b"R":
                return _relation(data)
            case b"":
                raise MalformedError("an empty message")
    except (error, ValueError) as unreadable:
        raise MalformedError(f"a message of the kind {data[:1]!r} cannot be read") from unreadable
    return None


def _insert(data: bytes) -> Insert:
    oid, kind = _INSERT.unpack_from(data, 1)
    if kind != b"N":
        raise MalformedError(f"an insert has a tuple of the kind {kind!r}")
    (count,) = _COUNT.unpack_from(data, 6)
    at, values = 8, list[bytes | None]()
    size_at = _SIZE.unpack_from
    for _ in range(count):
        kind = data[at : at + 1]
        if kind == b"t":
            (size,) = size_at(data, at + 1)
            at += 5 + size
            if size < 0 or at > len(data):
                raise MalformedError("a value is longer than its message")
            values.append(data[at - size : at])
        elif kind == b"n":
            at += 1
            values.append(None)
        else:
            raise MalformedError(f"a value of the kind {kind!r}")
    return Insert(oid, values)


def _emitted(data: bytes) -> Emitted:
    flags, _ = _EMITTED.unpack_from(data, 1)
    prefix, at = _text(data, 10)
    (size,) = _SIZE.unpack_from(data, at)
    content = data[at + 4 : at + 4 + size]
    if size < 0 or len(content) != size:
        raise MalformedError("the content is longer than its message")
    return Emitted(bool(flags & 1), prefix, content)


def _relation(data: bytes) -> Relation:
    (oid,) = _OID.unpack_from(data, 1)
    schema, at = _text(data, 5)
    name, at = _text(data, at)
    (count,) = _COUNT.unpack_from(data, at + 1)
    at, columns = at + 3, list[str]()
    for _ in range(count):
        column, at = _text(data, at + 1)
        columns.append(column)
        at += _COLUMN_TAIL
    if at > len(data):
        raise MalformedError("a table has more columns than its message")
    return Relation(oid, schema, name, tuple(columns))


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(0, at)
    return data[at:end].decode(), end + 1
