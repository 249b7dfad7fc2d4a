"""Streams of events: what happened, in order, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from idempotency._outbox.after_commit import emitted
from idempotency._outbox.emit import Outbox
from idempotency._outbox.message_ids import ids_taken
from idempotency._results.versioned import Versioned
from idempotency._sql.names import stored_name
from idempotency._sql.sessions import as_async, as_sync, connection_of
from idempotency.errors import ConfigurationError
from idempotency.operation import current
from idempotency.streams._delay import Delay, find_delay
from idempotency.streams._fold import Fold, Until
from idempotency.streams._position import Appended, Position, RecordedEvent
from idempotency.streams._reached import MOST_VERSION, Reached, Row
from idempotency.streams._statements import Statements
from idempotency.streams._table import DEFAULT_TABLE, tables_named
from idempotency.streams._types import EventTypes, id_names

S = TypeVar("S")
A = TypeVar("A")
AnyAsync = AsyncSession | AsyncConnection
AnySync = Session | Connection
Events = Sequence[object]
Headers = Mapping[str, str] | None
Apply = Callable[[Any, Any], S]
Read = Callable[[AnySync, A], tuple[Sequence[Any], A | None]]
"""Read the next rows after a place; return the place after which the others are, too, None where there are none."""

START = Position()

_PAGE = 4000
_NO_TRANSACTION = "There is no transaction to append in: begin one, or give the middleware or decorator session=."


class LoadOptions(TypedDict, Generic[S], total=False):
    """The options of a load; :meth:`Streams.load` says what they mean."""

    initial: Any
    snapshot_every: int | None
    snapshot: Versioned[S] | None
    until: Until


class Streams:
    """A table of events, in streams: all that happened to one thing, such as ``account-7``.

    ``event_types``: the types of events, each a dataclass, a pydantic model, or a :class:`Versioned` that gives it a
    name, a version, and what makes older versions readable. ``table`` names the table, default ``stream_event``.
    ``outbox``: each event is emitted as a message too, with the stream as its key; ``aggregate_type`` is then the type
    of the key, default ``"stream"``.
    """

    def __init__(
        self,
        event_types: Sequence[type | Versioned[Any]],
        table: str = DEFAULT_TABLE,
        *,
        outbox: Outbox | None = None,
        aggregate_type: str = "stream",
    ) -> None:
        self._types = EventTypes(event_types)
        self._tables = tables_named(table)
        self._statements: dict[object, Statements] = {}
        self._outbox = outbox
        self._aggregate_type = aggregate_type

    def __repr__(self) -> str:
        return f"<Streams {self._tables.events.fullname}>"

    @property
    def event_types(self) -> list[Versioned[Any]]:
        """Return the types of its events."""
        return self._types.all

    async def append(
        self, session: AnyAsync, stream: str, events: Events, *, expected: int | None = None, headers: Headers = None
    ) -> Appended:
        """Append events to a stream, in the transaction of ``session``, and return the last version of it.

        ``expected``: the version that the stream must have, 0 for none; None: whatever it has. Inside of an operation
        the ids are derived from it: a command that is repeated meets its own events, and appends nothing.
        Raises :class:`ConflictError` where the stream has another version, and then roll the transaction back;
        :class:`~idempotency.errors.TransactionError` where there is no transaction; and
        :class:`~idempotency.errors.ConfigurationError` for what cannot be appended.
        """
        return await as_async(session, "append").run_sync(self._append, stream, events, expected, headers)

    def append_sync(
        self, session: AnySync, stream: str, events: Events, *, expected: int | None = None, headers: Headers = None
    ) -> Appended:
        """See :meth:`append`."""
        return self._append(as_sync(session, "append"), stream, events, expected, headers)

    async def load(self, session: AnyAsync, stream: str, apply: Apply[S], **options: Unpack[LoadOptions[S]]) -> S:
        """Return what ``apply`` makes of the events of a stream, one after the other.

        ``apply(state, event)`` returns the next state. ``initial``: the state before the first event, default None.
        ``snapshot_every``: after so many events the state is stored, in this transaction, and the next load begins
        there; ``snapshot`` describes its type, default what ``apply`` is annotated to return. ``until``: a version, or
        a time with its zone: the state as it was then.
        """
        return (await self.load_versioned(session, stream, apply, **options))[0]

    def load_sync(self, session: AnySync, stream: str, apply: Apply[S], **options: Unpack[LoadOptions[S]]) -> S:
        """See :meth:`load`."""
        return self.load_versioned_sync(session, stream, apply, **options)[0]

    async def load_versioned(
        self, session: AnyAsync, stream: str, apply: Apply[S], **options: Unpack[LoadOptions[S]]
    ) -> tuple[S, int]:
        """Return the state as :meth:`load` does, and the version it has, which the next append expects."""
        return await as_async(session, "load").run_sync(self._load, stream, Fold(apply, **options))

    def load_versioned_sync(
        self, session: AnySync, stream: str, apply: Apply[S], **options: Unpack[LoadOptions[S]]
    ) -> tuple[S, int]:
        """See :meth:`load_versioned`."""
        return self._load(as_sync(session, "load"), stream, Fold(apply, **options))

    def read(self, session: AnyAsync, stream: str, *, after: int = 0) -> AsyncIterator[RecordedEvent]:
        """Read the events of a stream after a version, in order."""
        return self._each(as_async(session, "read"), self._reading(stream), after)

    def read_sync(self, session: AnySync, stream: str, *, after: int = 0) -> Iterator[RecordedEvent]:
        """See :meth:`read`."""
        return self._each_sync(as_sync(session, "read"), self._reading(stream), after)

    def read_all(self, session: AnyAsync, *, after: Position = START) -> AsyncIterator[RecordedEvent]:
        """Read the events of all streams after a position, in the order in which they were committed, without a gap.

        It ends where an open transaction may still append. What that one appends comes after the position of every
        event that was read. Read in a transaction that is not REPEATABLE READ, or in a new one each time.
        """
        return self._each(as_async(session, "read_all"), self._read_all, after)

    def read_all_sync(self, session: AnySync, *, after: Position = START) -> Iterator[RecordedEvent]:
        """See :meth:`read_all`."""
        return self._each_sync(as_sync(session, "read_all"), self._read_all, after)

    async def position(self, session: AnyAsync, appended: Appended) -> Position | None:
        """Return the position of an event; None while its database has not given it one, as MariaDB before a commit."""
        return await as_async(session, "position").run_sync(self._position, appended)

    def position_sync(self, session: AnySync, appended: Appended) -> Position | None:
        """See :meth:`position`."""
        return self._position(as_sync(session, "position"), appended)

    async def create_schema(self, engine: AsyncEngine) -> None:
        """Create the tables where they are missing; safe in any number of processes at once."""
        async with engine.begin() as connection:
            await connection.run_sync(self._tables.create)

    def create_schema_sync(self, engine: Engine) -> None:
        """See :meth:`create_schema`."""
        with engine.begin() as connection:
            self._tables.create(connection)

    async def delayed_by(self, session: AnyAsync) -> Delay | None:
        """Return the oldest open transaction that :meth:`read_all` waits for; None if there is none.

        Only PostgreSQL has such. There it is any transaction that has written, in any database of the server.
        """
        return await as_async(session, "delayed_by").run_sync(_delay)

    def delayed_by_sync(self, session: AnySync) -> Delay | None:
        """See :meth:`delayed_by`."""
        return _delay(as_sync(session, "delayed_by"))

    async def rebase(self, session: AnyAsync) -> int:
        """Let new events come after the old ones, once a dump was restored in another server of PostgreSQL.

        The numbers of transactions are lower there, and until it was called nothing can be appended or read. It returns
        by how much they were lower, 0 where nothing was to be done.
        """
        return await as_async(session, "rebase").run_sync(lambda own: self._reached(own).rebase())

    def rebase_sync(self, session: AnySync) -> int:
        """See :meth:`rebase`."""
        return self._reached(as_sync(session, "rebase")).rebase()

    def page_of_all(self, session: AnySync, after: Position, most: int) -> Sequence[RecordedEvent]:
        """Read at most so many events of all streams after a position; each becomes an object when it is taken."""
        return _Page(self._rows_of_all(session, after, most), self._types)

    @property
    def table(self) -> str:
        """Return the name of the table of events."""
        return self._tables.events.fullname

    def peek(self, session: AnySync, after: Position) -> tuple[Position, float] | None:
        """Return where the next event is, and its time in seconds since the epoch, without reading what it holds."""
        rows = self._rows_of_all(session, after, 1)
        return (Position(rows[0][0], rows[0][1]), rows[0][9] / 1000) if rows else None

    def _reached(self, session: AnySync) -> Reached:
        connection = _connection(session)
        dialect, schema = connection.dialect, connection.schema_for_object(self._tables.events)
        # Made once for each driver and schema.
        wanted = dialect.name, dialect.driver, dialect.paramstyle, schema
        if wanted not in self._statements:
            self._statements[wanted] = Statements(connection, self._tables)
        return Reached(connection, self._statements[wanted])

    async def _each(self, session: AnyAsync, read: Read[A], after: A) -> AsyncIterator[RecordedEvent]:
        at: A | None = after
        while at is not None:
            rows, at = await session.run_sync(read, at)
            # One at a time: a page of events would not fit into the cache of a processor, and takes twice as long.
            for event in self._types.recorded(rows):
                yield event

    def _each_sync(self, session: AnySync, read: Read[A], after: A) -> Iterator[RecordedEvent]:
        at: A | None = after
        while at is not None:
            rows, at = read(session, at)
            yield from self._types.recorded(rows)

    def _reading(self, stream: str, until: int = MOST_VERSION) -> Read[int]:
        stream = _name(stream)

        def read(session: AnySync, after: int) -> tuple[Sequence[Any], int | None]:
            rows = self._reached(session).read(stream, after, until, _PAGE)
            return rows, rows[-1][3] if len(rows) == _PAGE else None

        return read

    def _read_all(self, session: AnySync, after: Position) -> tuple[Sequence[Any], Position | None]:
        rows = self._rows_of_all(session, after, _PAGE)
        return rows, Position(*rows[-1][:2]) if len(rows) == _PAGE else None

    def _rows_of_all(self, session: AnySync, after: Position, most: int) -> Sequence[Any]:
        return self._reached(session).read_all(after, most)

    def _append(
        self, session: AnySync, stream: str, events: Events, expected: int | None, headers: Headers
    ) -> Appended:
        stream, operation = _name(stream), current()
        if expected is not None and (type(expected) is not int or not 0 <= expected <= MOST_VERSION):
            raise ConfigurationError(f"expected must be a version of the stream, 0 for none, or None, not {expected!r}")
        connection = _connection(session)
        reached = self._reached(connection)
        # Only with a connection: an operation counts its ids, and an append that is tried again must get the same.
        rows = self._types.rows(stream, events, headers, operation)
        names = [] if operation is None else [(row["id"], id_names(stream, row["type"])) for row in rows]
        with ids_taken(connection, operation, names):
            # Before an event is written: a message may be refused.
            messages = [] if self._outbox is None else [self._message(stream, row, self._outbox) for row in rows]
            appended = reached.append(stream, rows, expected, repeatable=operation is not None)
        emitted(session, connection, self.table, notify=False)
        if self._outbox is not None and appended.new:
            self._outbox.write(session, messages)
        return appended

    def _load(self, session: AnySync, stream: str, fold: Fold[S]) -> tuple[S, int]:
        def events(after: int, until: int) -> Iterator[RecordedEvent]:
            return self._each_sync(session, self._reading(stream, until), after)

        return fold.load(self._reached(session), _name(stream), events)

    def _position(self, session: AnySync, appended: Appended) -> Position | None:
        return self._reached(session).position(appended.stream, appended.version)

    def _message(self, stream: str, row: Row, outbox: Outbox) -> dict[str, Any]:
        headers = json.loads(row["headers"]) if row["headers"] else None
        message = outbox.row(self._aggregate_type, stream, row["type"], row["data"].encode(), headers, None)
        return {**message, "id": row["id"]}


class _Page(Sequence[RecordedEvent]):
    """Events that were read, and become objects one at a time."""

    def __init__(self, rows: Sequence[Any], types: EventTypes) -> None:
        self._rows, self._types = rows, types

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[RecordedEvent]:
        return self._types.recorded(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        return _Page(rows, self._types) if isinstance(index, slice) else next(self._types.recorded([rows]))


def _connection(session: AnySync) -> Connection:
    return connection_of(session, _NO_TRANSACTION)


def _delay(session: AnySync) -> Delay | None:
    return find_delay(_connection(session))


def _name(stream: str) -> str:
    return stored_name("stream", stream)
