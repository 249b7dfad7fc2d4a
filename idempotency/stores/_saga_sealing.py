"""Seal what a saga holds of its users: its key, input, reason and result, and the bodies of its entries.

A request is sealed before a store writes it, and what the store reads is opened. The key is in the envelope of the
input: who can read the one needs the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from idempotency._sagas.journal import FORMAT, Amend, Entry, Leave, Open, Put, Request, Row, Saga, Write
from idempotency.errors import ConfigurationError, UnreadableError
from idempotency.stores._sealing import Sealing, opened_field, sealed_field
from idempotency.stores.encryption import MAGIC

R = TypeVar("R")

_INPUT, _REASON, _RESULT = "saga", "saga reason", "saga result"


def sealed(sealing: Sealing | None, request: Request[R]) -> Request[R]:
    """Return a request as a store with this sealing writes it.

    Raises :class:`~idempotency.errors.ConfigurationError` for an :class:`Open` where names are digested.
    """
    if sealing is None:
        return request
    if isinstance(request, Open) and sealing.digest_names:
        raise ConfigurationError(
            "a saga needs its key to go on, and this store has digest_names=True, which stores digests only: give the"
            " sagas a store without digest_names, with encryption= if keys must not be stored in plain text"
        )
    return cast(Request[R], request if sealing.writer is None else _encrypted(sealing, request))


def _encrypted(sealing: Sealing, request: Request[Any]) -> Request[Any]:
    match request:
        case Open(input=bytes(given)):
            key = request.key.encode("utf-8", "surrogatepass")
            whole = sealed_field(sealing, request.id, _INPUT, b"%d:%b%b" % (len(key), key, given))
            return replace(request, key="", input=whole)
        case Write() | Amend():
            return replace(
                request,
                entries=_entries(sealing, request.id, request.entries),
                result=_result(sealing, request.id, request.result),
            )
        case Leave():
            return replace(
                request,
                entries=_entries(sealing, request.id, request.entries),
                result=_result(sealing, request.id, request.result),
                reason=sealed_field(sealing, request.id, _REASON, request.reason),
            )
        case Put():
            return replace(request, entry=_entries(sealing, request.id, [request.entry])[0])
        case _:
            return request


def _result(sealing: Sealing, record: bytes, result: bytes | None) -> bytes | None:
    return None if result is None else sealed_field(sealing, record, _RESULT, result)


def _entries(sealing: Sealing, record: bytes, entries: Sequence[Entry]) -> list[Entry]:
    return [replace(each, body=sealed_field(sealing, record, _field_of(each), each.body)) for each in entries]


def _field_of(entry: Entry) -> str:
    return f"entry {entry.name}"


def opened_saga(sealing: Sealing | None, saga: Saga) -> Saga:
    """Return a saga as it was before :func:`sealed`.

    Raises :class:`~idempotency.errors.UnreadableError` for one that cannot be decrypted, or is of a newer format.
    """
    row = opened_row(sealing, saga.row)
    return Saga(row, tuple(opened_entry(sealing, row.id, entry) for entry in saga.entries))


def opened_row(sealing: Sealing | None, row: Row) -> Row:
    """Return a row as it was before :func:`sealed`; it raises as :func:`opened_saga` does."""
    if row.version > FORMAT:
        raise newer(row.version)
    key, given = row.key, opened_field(sealing, row.id, _INPUT, row.input)
    if row.input.startswith(MAGIC):
        length, _, rest = given.partition(b":")
        key, given = rest[: int(length)].decode("utf-8", "surrogatepass"), rest[int(length) :]
    result = None if row.result is None else opened_field(sealing, row.id, _RESULT, row.result)
    return replace(row, key=key, input=given, reason=opened_field(sealing, row.id, _REASON, row.reason), result=result)


def opened_entry(sealing: Sealing | None, record: bytes, entry: Entry) -> Entry:
    """Return an entry of the saga of this id as it was before :func:`sealed`; it raises as :func:`opened_saga` does."""
    return replace(entry, body=opened_field(sealing, record, _field_of(entry), entry.body))


def newer(version: int) -> UnreadableError:
    """Return the error for a saga of a newer format."""
    return UnreadableError(f"the saga is of format {version}, and this release reads {FORMAT}: update the library")


def readable(sealing: Sealing | None, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows that can be read, as they were before :func:`sealed`."""
    for row in rows:
        try:
            opened = opened_row(sealing, row)
        except UnreadableError:
            continue
        yield opened


def shown(sealing: Sealing | None, row: Row) -> Row:
    """Return a row as an operator sees it: as it was before :func:`sealed`, or what can be read of it."""
    try:
        return opened_row(sealing, row)
    except UnreadableError as error:
        return replace(row, key=row.key or f"(encrypted: {error})", input=b"", reason=b"", result=None)
