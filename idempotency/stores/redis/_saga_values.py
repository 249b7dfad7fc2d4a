"""How the values of a saga are written into a command of :mod:`._sagas`, and read from its reply."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from idempotency._durations import milliseconds
from idempotency._sagas.journal import Entry, Phase, Progress, Row, Saga
from idempotency.errors import UnreadableError
from idempotency.stores._saga_sealing import newer

FLAG = (b"0", b"1")
_UNREADABLE, _WHOLE = -1, 2
"""What a reply begins with where a saga cannot be read, and where it has the entries too. Else it is 0 (no) or 1."""

_FIELDS = tuple(b"vnkptofiacwrzdlb"[at : at + 1] for at in range(16))
"""The fields of a row, in the order in which saga_fields.lua has them."""

_IS_DAMAGED = "the saga is damaged"
_NONSENSE = (KeyError, ValueError)


def text(value: str) -> bytes:
    """Write a name or a key."""
    return value.encode("utf-8", "surrogatepass")


def duration(seconds: float) -> bytes:
    """Write a duration, in milliseconds."""
    return b"%d" % milliseconds(seconds)


def changes(phase: Phase | None, result: bytes | None, given: Sequence[Entry]) -> tuple[bytes, ...]:
    """Write phase, result and entries as ``change`` of saga.lua reads them."""
    return b"" if phase is None else b"%d" % phase, FLAG[result is not None], result or b"", *entries(given)


def entries(given: Sequence[Entry]) -> Iterator[bytes]:
    """Write entries as ``record`` of saga.lua reads them."""
    yield b"%d" % len(given)
    for each in given:
        yield text(each.name)
        yield b"%d %d %d" % (each.progress, each.order, each.attempt)
        yield each.body


def check(reply: Any) -> None:
    """Raise UnreadableError for the reply to a command for a saga that cannot be read."""
    if reply[0] == _UNREADABLE:
        raise newer(reply[1]) if reply[1] else UnreadableError(_IS_DAMAGED)


def saga(record: bytes, reply: Any) -> Saga:
    """Read a saga of this id; its entries where the reply has them."""
    _, now, found = reply
    with _damaged():
        fields = dict(zip(found[::2], found[1::2], strict=True)) if reply[0] == _WHOLE else _by_field(found)
        heads = {field[1:]: head for field, head in fields.items() if field.startswith(b"e")}
        read = (_entry(now, name.decode("utf-8", "surrogatepass"), heads[name], fields[b"x" + name]) for name in heads)
        return Saga(_row(record, now, fields), tuple(read))


def entry(name: str, reply: Any) -> Entry:
    """Read the entry of this name from the reply to saga_put.lua."""
    _, now, head, body = reply
    with _damaged():
        return _entry(now, name, head, body)


def rows(ids: Sequence[bytes], now: int, found: Sequence[Sequence[bytes | None] | None]) -> Iterator[Row]:
    """Read rows from the reply to saga_rows.lua: those that make sense."""
    for record, values in zip(ids, found, strict=True):
        if values:
            try:
                row = _row(record, now, _by_field(values))
            except _NONSENSE:
                continue
            yield row


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    """Raise UnreadableError where what is read makes no sense."""
    try:
        yield
    except _NONSENSE as error:
        raise UnreadableError(_IS_DAMAGED) from error


def _by_field(values: Sequence[bytes | None]) -> dict[bytes, bytes]:
    return {field: value for field, value in zip(_FIELDS, values, strict=True) if value is not None}


def _row(record: bytes, now: int, fields: dict[bytes, bytes]) -> Row:
    return Row(
        id=record,
        name=fields[b"n"].decode("utf-8", "surrogatepass"),
        key=fields[b"k"].decode("utf-8", "surrogatepass"),
        phase=Phase(int(fields[b"p"])),
        token=fields[b"t"].decode() if fields[b"o"] == b"1" else "",
        fingerprint=fields[b"f"],
        input=fields[b"i"],
        attempt=int(fields[b"a"]),
        crashes=int(fields[b"c"]),
        wakes=int(fields[b"w"]),
        reason=fields[b"r"],
        result=fields.get(b"z"),
        due_in=(int(fields[b"d"]) - now) / 1000 if b"d" in fields else None,
        deadline_in=(int(fields[b"l"]) - now) / 1000 if b"l" in fields else None,
        age=(now - int(fields[b"b"])) / 1000,
        version=int(fields[b"v"]),
    )


def _entry(now: int, name: str, head: bytes, body: bytes | None) -> Entry:
    if body is None:
        raise ValueError(name)
    progress, order, attempt, began, changed = map(int, head.split())
    return Entry(
        name=name,
        progress=Progress(progress),
        order=order,
        attempt=attempt,
        body=body,
        began=(now - began) / 1000,
        changed=(now - changed) / 1000,
    )
