"""What the journal of sagas sends to Redis and how the replies are read: written once, for every client.

A saga is one hash, ``{prefix}:1:{saga:TAG}:ID``: 16 hex digits for its name (:func:`name_id`) and 64 of its id. The
braces put the sagas of a name, and their indexes, in one slot of a cluster: the sagas of one name are on one server.

The fields of its row: ``v`` format, ``n`` name, ``k`` key, ``p`` phase, ``t`` token, ``o`` whether the run of that
token goes on, ``f`` fingerprint, ``i`` input, ``a`` attempt, ``c`` crashes, ``w`` wakes, ``r`` reason, ``z`` result,
``d`` when it is due, ``l`` deadline, ``b`` time of the first record. Each entry has two: ``e`` and its name for its
progress, order, attempt, first and last write; ``x`` and its name for its body. Times are milliseconds by the clock of
the Redis server.

Five sorted sets of ids are the indexes of a name: ``due``; ``open``, what has not ended, and ``stuck``, by their first
record; ``ended``, by the same, and ``expiries``, what has ended, by when it expires. Every name has its digits in the
set ``{prefix}:1:{saga:}:names``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from idempotency._sagas.journal import (
    FORMAT,
    Amend,
    Browse,
    Due,
    Entry,
    Leave,
    Look,
    Open,
    Purge,
    Put,
    Request,
    Row,
    Saga,
    Wake,
    Write,
    name_id,
)
from idempotency.errors import StoreError
from idempotency.stores._saga_sealing import opened_entry, opened_saga, readable, sealed, shown
from idempotency.stores._sealing import Sealing
from idempotency.stores.redis import _saga_values as values
from idempotency.stores.redis._wire import Command, Script

R = TypeVar("R")

_OPEN, _WRITE, _LEAVE, _PUT, _WAKE, _AMEND, _LOOK = (
    Script("saga_fields", "saga", f"saga_{verb}") for verb in ("open", "write", "leave", "put", "wake", "amend", "look")
)
_ROWS, _PAGE, _NAMES = Script("saga_fields", "saga_rows"), Script("saga_page"), Script("saga_names")

_INDEXES = (b"due", b"open", b"stuck", b"ended", b"expiries")
_FORMAT = b"%d" % FORMAT

_NOTED = 60.0
"""Seconds for which a name that was noted is not noted again. It is noted again because a server can lose it."""

_MOST_ROWS = 1000
"""Rows that are read by one command."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command of a request. ``durable``: what it writes must be on as many copies as the store's durability says."""

    command: Command
    durable: bool = False

    @property
    def largest(self) -> int:
        """Return how many bytes the largest value has."""
        return max(map(len, self.command[1]))


Answer = tuple[Any, StoreError | None]
"""The reply to a step; and the error that there are too few copies of what it has written, if it has."""

Steps = Generator[Step, Answer, R]


class _Read(NamedTuple):
    """A row, and the time of the server's clock, in seconds, when it was read."""

    now: float
    row: Row


class Sagas:
    """The journal of one store, without its connections: each request is a sequence of steps."""

    def __init__(self, prefix: bytes, sealing: Sealing | None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._prefix = prefix
        self._sealing = sealing
        self._monotonic = monotonic
        self._noted: dict[bytes, float] = {}

    def steps(self, request: Request[R]) -> Steps[R]:
        """Yield the commands of a request, be sent their replies, and return the answer."""
        return cast(Steps[R], self._steps(sealed(self._sealing, request)))

    def _steps(self, request: Request[Any]) -> Steps[Any]:
        match request:
            case Open():
                return self._open(request)
            case Write():
                return self._write(request)
            case Leave():
                return self._leave(request)
            case Put():
                return self._put(request)
            case Wake():
                return self._yes_or_no(Step(self._command(_WAKE, request.id), durable=True))
            case Amend():
                return self._yes_or_no(Step(self._amend(request), durable=True))
            case Look():
                return self._look(request)
            case Due():
                return self._due(request)
            case Browse():
                return self._browse(request)
            case Purge():
                return _nothing()
            case _:
                raise AssertionError(request)

    # One saga.

    def _open(self, request: Open) -> Steps[Saga | None]:
        if request.input is not None:
            yield from self._note(request.id[-8:])
        command = self._command(
            _OPEN,
            request.id,
            request.token.encode(),
            values.duration(request.lease),
            request.fingerprint,
            values.FLAG[request.input is not None],
            request.input or b"",
            values.text(request.name),
            values.text(request.key),
            b"" if request.deadline is None else values.duration(request.deadline),
        )
        reply, missing = yield Step(command, durable=True)
        values.check(reply)
        saga = self._opened(request.id, reply) if reply[0] else None
        if missing is None or saga is None:
            return saga
        if saga.row.token == request.token:
            yield from self._give_up(saga.row)
            raise missing
        if not request.lease:
            raise missing
        return saga

    def _give_up(self, row: Row) -> Steps[None]:
        """Make a saga free for a retry that was owned on too few copies."""
        request = Leave(id=row.id, token=row.token, phase=row.phase, due=0.0, wakes=row.wakes, reason=row.reason)
        with contextlib.suppress(StoreError):
            yield Step(self._leaving(cast(Leave, sealed(self._sealing, request))))

    def _write(self, request: Write) -> Steps[int | None]:
        renews_only = not request.entries and request.phase is None and request.result is None
        command = self._command(
            _WRITE,
            request.id,
            request.token.encode(),
            values.duration(request.lease),
            values.FLAG[request.progress],
            *values.changes(request.phase, request.result, request.entries),
        )
        reply = yield from _written(Step(command, durable=not renews_only))
        return int(reply[1]) if reply[0] else None

    def _leave(self, request: Leave) -> Steps[bool]:
        return self._yes_or_no(Step(self._leaving(request), durable=True))

    def _leaving(self, request: Leave) -> Command:
        return self._command(
            _LEAVE,
            request.id,
            request.token.encode(),
            b"" if request.due is None else values.duration(request.due),
            b"%d" % request.wakes,
            request.reason,
            values.duration(request.ttl),
            *values.changes(request.phase, request.result, request.entries),
        )

    def _amend(self, request: Amend) -> Command:
        changes = values.changes(request.phase, request.result, request.entries)
        names = (b"%d" % len(request.without), *map(values.text, request.without))
        seen = b"" if request.attempt is None else b"%d" % request.attempt
        return self._command(_AMEND, request.id, *changes, *names, seen, request.token.encode())

    def _put(self, request: Put) -> Steps[Entry | None]:
        step = Step(self._command(_PUT, request.id, *values.entries([request.entry])), durable=True)
        reply = yield from _written(step)
        if not reply[0]:
            return None
        return opened_entry(self._sealing, request.id, values.entry(request.entry.name, reply))

    def _look(self, request: Look) -> Steps[Saga | None]:
        reply = yield from _written(Step(self._command(_LOOK, request.id)))
        return self._opened(request.id, reply) if reply[0] else None

    def _yes_or_no(self, step: Step) -> Steps[bool]:
        reply = yield from _written(step)
        return bool(reply[0])

    def _opened(self, record: bytes, reply: Any) -> Saga:
        return opened_saga(self._sealing, values.saga(record, reply))

    def _command(self, script: Script, record: bytes, *arguments: bytes) -> Command:
        space = self._space(record[-8:])
        keys = (space + record.hex().encode(), *(space + index for index in _INDEXES))
        return script, (b"%d" % len(keys), *keys, _FORMAT, record, *arguments)

    def _space(self, name: bytes) -> bytes:
        return b"%b{saga:%b}:" % (self._prefix, name.hex().encode())

    # Many sagas.

    def _due(self, request: Due) -> Steps[list[Row]]:
        def read(rows: Iterable[Row]) -> Iterator[Row]:
            due = (row for row in rows if row.due_in is not None and row.due_in <= 0)
            return readable(self._sealing, (row for row in due if not request.names or row.name in request.names))

        found: list[_Read] = []
        for name in (yield from self._names(request.names)):
            found += yield from self._rows(name, b"due", read, request.limit)
        found.sort(key=lambda each: each.now + (each.row.due_in or 0.0))
        return [each.row for each in found[: request.limit]]

    def _browse(self, request: Browse) -> Steps[list[Row]]:
        def read(rows: Iterable[Row]) -> Iterator[Row]:
            named = (row for row in rows if request.name is None or row.name == request.name)
            return (shown(self._sealing, row) for row in named)

        indexes = [b"stuck"] if request.stuck else [b"open", b"ended"] if request.ended else [b"open"]
        found: list[_Read] = []
        for name in (yield from self._names(() if request.name is None else (request.name,))):
            for index in indexes:
                found += yield from self._rows(name, index, read, request.limit)
        found.sort(key=lambda each: each.now - each.row.age)
        return [each.row for each in found[: request.limit]]

    def _rows(
        self, name: bytes, index: bytes, read: Callable[[Iterable[Row]], Iterator[Row]], limit: int
    ) -> Steps[list[_Read]]:
        """Return the first rows of an index that ``read`` yields. Others do not hide them, however many they are."""
        space = self._space(name)
        found: dict[bytes, _Read] = {}
        start = 0
        while len(found) < limit:
            count = min(limit - len(found), _MOST_ROWS)
            page = (values.FLAG[index == b"due"], b"%d" % start, b"%d" % count)
            ids, _ = yield Step((_PAGE, (b"1", space + index, *page)))
            if not ids:
                break
            keys = [space + each.hex().encode() for each in ids]
            (now, *rows), _ = yield Step((_ROWS, (b"%d" % (len(keys) + 1), *keys, space + index, *ids)))
            found |= {row.id: _Read(now / 1000, row) for row in read(values.rows(ids, now, rows))}
            start += sum(row is not None for row in rows)
            if len(ids) < count:
                break
        return list(found.values())

    def _names(self, names: Sequence[str]) -> Steps[list[bytes]]:
        if names:
            return list({name_id(name) for name in names})
        found, _ = yield Step((_NAMES, (b"1", self._space(b"") + b"names")))
        return [bytes.fromhex(each.decode()) for each in found]

    def _note(self, name: bytes) -> Steps[None]:
        """Add a name to the set of all names, before its first saga is recorded."""
        now = self._monotonic()
        if now - self._noted.get(name, -_NOTED) >= _NOTED:
            yield Step((_NAMES, (b"1", self._space(b"") + b"names", name.hex().encode())))
            self._noted[name] = now


def _nothing() -> Steps[int]:
    """Delete nothing: the server itself expires sagas."""
    yield from ()
    return 0


def _written(step: Step) -> Steps[Any]:
    reply, missing = yield step
    values.check(reply)
    if missing is not None and reply[0]:
        raise missing
    return reply
