"""Read rows of the tables of sagas. SQLite stores anything in any column, and a row may have been written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from idempotency._sagas.journal import FORMAT, Entry, Phase, Progress, Row, Saga
from idempotency.errors import UnreadableError
from idempotency.stores._saga_sealing import newer, opened_entry, opened_saga
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._values import as_bytes, as_text, stored


def read_saga(found: Sequence[Any], sealing: Sealing | None) -> Saga | None:
    """Read the row of a saga and its entries, which are in columns of the same types; None where there is no row.

    Raises :class:`~idempotency.errors.UnreadableError` for a saga that is damaged, newer or cannot be decrypted.
    """
    rows = [_row(each) for each in found if each.kind == "saga"]
    if not rows:
        return None
    record = rows[0].id
    entries = [
        _entry(record, each.name, each.phase, each.crashes, each.attempt, each.input, each.age, each.due)
        for each in found
        if each.kind == "entry"
    ]
    return opened_saga(sealing, Saga(rows[0], tuple(entries)))


def read_put(found: Any, record: bytes, sealing: Sealing | None) -> Entry | None:
    """Read the entry that is there after it was put; None without a saga that goes on. See :func:`read_saga`."""
    if found is None or found.expired:
        return None
    if found.version > FORMAT:
        raise newer(int(found.version))
    if not found.goes_on:
        return None
    entry = _entry(record, found.name, found.progress, found.ord, found.attempt, found.body, found.began, found.changed)
    return opened_entry(sealing, record, entry)


def read_rows(found: Iterable[Any]) -> Iterator[Row]:
    """Read rows of sagas, sealed as they are, but those that are damaged."""
    for each in found:
        with suppress(UnreadableError):
            yield _row(each)


def _row(found: Any) -> Row:
    try:
        return Row(
            id=as_bytes(found.id),
            name=_name(found.name),
            key=stored(found.key),
            phase=Phase(found.phase),
            token=as_text(found.token),
            fingerprint=as_bytes(found.fingerprint),
            input=as_bytes(found.input),
            attempt=int(found.attempt),
            crashes=int(found.crashes),
            wakes=int(found.wakes),
            reason=b"" if found.reason is None else as_bytes(found.reason),
            result=None if found.result is None else as_bytes(found.result),
            due_in=_seconds(found.due),
            deadline_in=_seconds(found.deadline),
            age=max(0.0, float(found.age)) / 1000,
            version=int(found.version),
        )
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(found.version, int) and found.version > FORMAT:
            raise newer(found.version) from error
        raise UnreadableError(f"the saga {_shown(found.id)} is damaged") from error


def _entry(
    record: bytes, name: Any, progress: Any, order: Any, attempt: Any, body: Any, began: Any, changed: Any
) -> Entry:
    try:
        return Entry(
            name=_name(name),
            progress=Progress(progress),
            order=int(order),
            attempt=int(attempt),
            body=as_bytes(body),
            began=max(0.0, float(began)) / 1000,
            changed=max(0.0, float(changed)) / 1000,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UnreadableError(f"an entry of the saga {_shown(record)} is damaged") from error


def _name(value: Any) -> str:
    return value if isinstance(value, str) else as_bytes(value).decode("utf-8", "surrogatepass")


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value) / 1000


def _shown(record: Any) -> str:
    return record.hex()[:12] if isinstance(record, bytes) else repr(record)
