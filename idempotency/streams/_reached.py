"""Append events and read them, on one connection: what the two kinds of sessions share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from idempotency._sql.engines import level_of
from idempotency._sql.failures import MadeBy, conflicts, error_code, raise_described, read_only, waited_for_lock
from idempotency._sql.send import Compiled, setting
from idempotency._sql.sessions import is_autocommit
from idempotency._sql.tables import MYSQL, check_last_character
from idempotency.errors import StoreError, TransactionError, UnreadableError
from idempotency.streams._position import Appended, ConflictError, Position
from idempotency.streams._statements import PLACES_AT_ONCE, Statements

Row = Mapping[str, Any]
"""One event as it is written: ``id``, ``type``, ``type_version``, ``data`` and ``headers``."""

MOST_TRIES = 100
"""How often an append that expects no version is tried, while other transactions append to the same stream."""

_MOST_ROWS = 100
MOST_VERSION = 2**53
"""More events than a stream can ever have; a database has numbers for as many again."""

_LOCK_WAIT = "innodb_lock_wait_timeout"
_NOT_UNIQUE = frozenset({"23505", 1062, 1555, 2067})
_CHECKED = "idempotency.streams"
_OTHERS = "an earlier run of this operation has appended other events than these to {}: roll the transaction back"

STREAMS = MadeBy(
    "idempotency schema create --streams TABLE",
    "Streams.create_schema() or create_schema_sync()",
    "idempotency.streams.streams_table",
)


class Reached:
    """The streams of one set of tables, reached by one connection."""

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements
        self._dialect = connection.dialect.name

    def append(self, stream: str, rows: Sequence[Row], expected: int | None, *, repeatable: bool) -> Appended:
        """Append rows to a stream, or return the append of an earlier run that had the same ids.

        ``repeatable``: there may have been such a run. Raises :class:`ConflictError`.
        """
        if is_autocommit(self._connection):
            raise TransactionError("the connection is in AUTOCOMMIT: begin a transaction, with which events commit")
        self._check_name(stream)
        self._check_places()
        # Before the first of several parts is inserted: it would stay where a later one meets an event that is there.
        if repeatable and len(rows) > _MOST_ROWS and (earlier := self._own(stream, rows)) is not None:
            return earlier
        after = expected or 0
        for tried in range(1 if expected is not None else MOST_TRIES):
            if expected is None:
                after = self._version(stream, tried > 0)
            if self._can_follow(stream, expected) and self._append(stream, rows, after):
                return Appended(stream, after + len(rows))
            if repeatable and (earlier := self._own(stream, rows, newest=True)) is not None:
                return earlier
        conflict = ConflictError(f"{stream} is not at version {after}: load it again, and decide again")
        conflict.expected = after
        raise conflict

    def _check_name(self, stream: str) -> None:
        check_last_character(self._connection, "stream", stream)

    def _can_follow(self, stream: str, expected: int | None) -> bool:
        """MariaDB: return whether the version that is expected is there. The other databases look when they append."""
        if not expected or self._dialect not in MYSQL:
            return True
        return bool(self._rows(self._statements.has, stream=stream, expected=expected))

    def _append(self, stream: str, rows: Sequence[Row], after: int) -> bool:
        version = after
        for part in _parts(rows):
            values = {**_parameters(part), "stream": stream, "expected": version}
            if self._insert(stream, values, len(part)) == len(part):
                version += len(part)
                continue
            if version == after:
                return False
            # The next versions belong to this transaction by now, so that it is an event that was there already.
            raise ConflictError(_OTHERS.format(stream))
        return True

    def _insert(self, stream: str, values: Row, count: int) -> int:
        """Insert ``count`` rows, and return how many were inserted; 0 where one of them is there."""
        try:
            result = self._execute(self._statements.append(count), values)
        except DBAPIError as error:
            if error_code(error) not in _NOT_UNIQUE:
                raise
            if self._dialect == "postgresql":
                raise ConflictError(_OTHERS.format(stream)) from error
            return 0
        inserted: int = result.scalar_one() if result.returns_rows else result.rowcount
        return inserted

    def _own(self, stream: str, rows: Sequence[Row], *, newest: bool = False) -> Appended | None:
        """Return the append of an earlier run with these ids; None if there is none.

        ``newest``: also if it is committed since the snapshot of this transaction began.
        """
        found: list[Any] = []
        for part in _parts(rows):
            ids = {f"id{number}": row["id"] for number, row in enumerate(part, 1)}
            found += self._rows(self._statements.own(len(part), newest), **ids)
        if not found:
            return None
        if len(found) != len(rows) or any(row[0] != stream for row in found):
            raise ConflictError(_OTHERS.format(stream))
        return Appended(stream, max(row[1] for row in found), new=False)

    def _version(self, stream: str, again: bool) -> int:
        """Return the version of a stream; 0 if it has no event. ``again``: after an append that met another one."""
        locks, statements = self._dialect in MYSQL, self._statements
        found = None if again and locks else self._scalar(statements.version, stream=stream)
        if locks and (found or again):
            # Not in an empty stream: there it would lock those beside it too.
            self._rows(statements.lock_first, stream=stream)
            found = self._scalar(statements.newest_version, stream=stream)
        return found or 0

    def read(self, stream: str, after: int, until: int, most: int) -> Sequence[Any]:
        """Read events of one stream."""
        self._check_name(stream)
        after, until = min(after, MOST_VERSION), min(until, MOST_VERSION)
        return self._rows(self._statements.read, stream=stream, after=after, until=until, most=most)

    def read_all(self, after: Position, most: int) -> Sequence[Any]:
        """Read events of all streams after a position."""
        self._check_places()
        self._give_places()
        return self._rows(self._statements.read_all, place=after.place, seq=after.seq, most=most)

    def position(self, stream: str, version: int) -> Position | None:
        """Return the position of an event; None if it has none yet."""
        self._give_places()
        rows = self._rows(self._statements.position, stream=stream, version=version)
        return Position(*rows[0]) if rows and rows[0][0] is not None else None

    def _give_places(self) -> None:
        """MariaDB: give places to the events that are committed, in a transaction of its own."""
        if self._dialect not in MYSQL:
            return
        if level_of(self._connection.dialect, self._connection.get_execution_options()) == "READ UNCOMMITTED":
            raise TransactionError(
                "under READ UNCOMMITTED, events are read whose places may change: take another level"
            )
        try:
            # On a connection of its own: the caller's snapshot is to begin afterwards.
            with self._connection.engine.connect() as connection:
                Reached(connection, self._statements)._give_all_places()
        except PoolTimeoutError as error:
            raise StoreError(
                "events are given their places by a second connection, which the engine's pool did not give: enlarge"
                " pool_size or max_overflow"
            ) from error
        except (ConflictError, DBAPIError) as error:
            if not _are_given_later(error):
                raise

    def _give_all_places(self) -> None:
        waiting = self._rows(self._statements.without_place)
        self._connection.rollback()
        if not waiting:
            return
        before = self._connection.exec_driver_sql(f"SELECT @@{_LOCK_WAIT}").scalar_one()
        # An event may be locked for long, also by the transaction of the caller.
        with setting(self._connection, f"SET {_LOCK_WAIT}", 1, before):
            while self._give_places_once() == PLACES_AT_ONCE:
                pass

    def _give_places_once(self) -> int:
        if is_autocommit(self._connection):
            self._connection.exec_driver_sql("START TRANSACTION")
        last = self._scalar(self._statements.last_place)
        if last is None:
            raise self._no_start()
        # Not a locking read: events of open transactions are not seen, nor waited for.
        numbers = [row[0] for row in self._rows(self._statements.without_place)]
        if numbers:
            self._connection.exec_driver_sql(self._statements.give_places(last, numbers))
            self._connection.exec_driver_sql(self._statements.raise_last_place(len(numbers)))
        self._connection.commit()
        return len(numbers)

    def _check_places(self) -> None:
        """PostgreSQL: refuse tables whose events have the numbers of another server; once for each connection."""
        if self._dialect != "postgresql":
            return
        checked = self._connection.info.setdefault(_CHECKED, set())
        if self._statements.behind.sql in checked:
            return
        if self._scalar(self._statements.subscribed):
            raise StoreError(
                f"{self._statements.table} is filled by a logical subscription, which commits in another order:"
                " use its publisher, or drop the subscription first"
            )
        if self._behind() > 0:
            raise StoreError(
                f"{self._statements.table} was restored from another server, whose transactions have higher"
                " numbers: call Streams.rebase() once, before events are appended or read"
            )
        checked.add(self._statements.behind.sql)

    def snapshot(self, stream: str, kind: str, until: int) -> tuple[int, int, str] | None:
        """Return version, type version and data of a snapshot; None if there is none.

        Raises UnreadableError for a version that the stream does not have.
        """
        rows = self._rows(self._statements.snapshot, stream=stream, type=kind, until=min(until, MOST_VERSION))
        if not rows:
            return None
        version, type_version, data, whole = rows[0]
        if not whole:
            raise UnreadableError(
                f"the snapshot {kind} of {stream} is of version {version}, which the stream does not have: delete its"
                f" row in {self._statements.snapshots}"
            )
        return version, type_version, data

    def write_snapshot(self, values: Row) -> None:
        """Write a snapshot."""
        self._execute(self._statements.write_snapshot, values)

    def rebase(self) -> int:
        """PostgreSQL: let new places come after those that are there; return by how much they were behind."""
        if self._dialect != "postgresql":
            return 0
        # An open transaction that appends has read the table of places already: its events are to come before.
        self._connection.exec_driver_sql(self._statements.lock_events)
        more = max(0, self._behind())
        if more:
            self._execute(self._statements.rebase, {"more": more})
        return more

    def _behind(self) -> int:
        behind: int | None = self._scalar(self._statements.behind)
        if behind is None:
            raise self._no_start()
        return behind

    def _no_start(self) -> StoreError:
        command = "run `idempotency schema create --streams TABLE`, or insert it as streams_sql() does"
        return StoreError(f"{self._statements.place} has no row: {command}")

    def _execute(self, statement: Compiled, values: Row) -> CursorResult[Any]:
        try:
            return self._connection.exec_driver_sql(statement.sql, statement.parameters(values) or None)
        except DBAPIError as error:
            error.hide_parameters = True  # an error is logged, and an event must not be
            conflict = ConflictError("another transaction writes to the same stream: begin yours again")
            raise_described(error, self._connection, self._statements.table, STREAMS, conflict)

    def _rows(self, statement: Compiled, **values: Any) -> Sequence[Any]:
        result = self._execute(statement, values)
        # As the driver gives them: to make a Row of each takes as long as to read it.
        cursor: Any = result.cursor
        rows: Sequence[Any] = cursor.fetchall()
        result.close()
        return rows

    def _scalar(self, statement: Compiled, **values: Any) -> Any:
        rows = self._rows(statement, **values)
        return rows[0][0] if rows else None


def _are_given_later(error: Exception) -> bool:
    """Return whether the places that could not be given are given later, and until then read_all() leaves events out.

    It is a replica, whose primary gives places; or an open transaction has locked an event that has none, as the first
    one of a stream to which it appends, and may wait itself for another one that is given its place.
    """
    return isinstance(error, ConflictError) or read_only(error) or waited_for_lock(error) or conflicts(error)


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Return the rows of one statement after the other: a database allows so many parameters, and no more."""
    return (rows[start : start + _MOST_ROWS] for start in range(0, len(rows), _MOST_ROWS))


def _parameters(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the parameters of rows, with the number of the row at the end of each name where there are several."""
    if len(rows) == 1:
        return dict(rows[0])
    return {f"{name}{number}": value for number, row in enumerate(rows, 1) for name, value in row.items()}
