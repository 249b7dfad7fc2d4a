"""Append events and read them, on one connection: what the two kinds of sessions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from idempotency._sql.engines import level_of
from idempotency._sql.failures import (
    MadeBy,
    conflicts,
    describe_failure,
    error_code,
    lacks_table,
    read_only,
    waited_for_lock,
)
from idempotency._sql.send import Compiled
from idempotency._sql.sessions import is_autocommit
from idempotency._sql.tables import MYSQL
from idempotency.errors import StoreError, TransactionError
from idempotency.streams._position import Appended, ConflictError, Position
from idempotency.streams._statements import PLACES_AT_ONCE, Statements
from idempotency.streams._table import Tables

Row = Mapping[str, Any]
"""One event as it is written: ``id``, ``type``, ``type_version``, ``data`` and ``headers``."""

MOST_TRIES = 100
"""How often an append that expects no version is tried, while other transactions append to the same stream."""

_MOST_ROWS = 100
_LAST = 2**63 - 1
_NOT_UNIQUE = frozenset({"23505", 1062, 1555, 2067})
_CHECKED = "idempotency.streams"
_NO_START = "{} has no row: run `idempotency schema create --streams TABLE`, or insert it as streams_sql() does"
_OTHERS = "an earlier run of this operation has appended other events than these to {}: roll the transaction back"

STREAMS = MadeBy(
    "idempotency schema create --streams TABLE",
    "Streams.create_schema() or create_schema_sync()",
    "idempotency.streams.streams_table",
)


class Reached:
    """The streams of one set of tables, reached by connections of any database."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._known: dict[object, Statements] = {}

    def statements(self, connection: Connection) -> Statements:
        """Return the statements for a connection, made once for each driver and schema."""
        dialect = connection.dialect
        wanted = dialect.name, dialect.driver, dialect.paramstyle, connection.schema_for_object(self.tables.events)
        found = self._known.get(wanted)
        if found is None:
            found = self._known[wanted] = Statements(connection, self.tables)
        return found

    def append(self, connection: Connection, stream: str, rows: Sequence[Row], expected: int | None) -> Appended:
        """Append rows to a stream, or return the append of an earlier run that had the same ids.

        Raises :class:`ConflictError`.
        """
        if is_autocommit(connection):
            raise TransactionError("the connection is in AUTOCOMMIT: begin a transaction, with which events commit")
        self._check_places(connection)
        after = expected or 0
        for tried in range(1 if expected is not None else MOST_TRIES):
            if expected is None:
                after = self.version(connection, stream, tried > 0)
            if self._can_follow(connection, stream, expected) and self._append(connection, stream, rows, after):
                return Appended(stream, after + len(rows))
            earlier = self._own(connection, stream, rows)
            if earlier is not None:
                return earlier
        conflict = ConflictError(f"{stream} is not at version {after}: load it again, and decide again")
        conflict.expected = after
        raise conflict

    def _can_follow(self, connection: Connection, stream: str, expected: int | None) -> bool:
        """MariaDB: return whether the version that is expected is there. The other databases look when they append."""
        if not expected or connection.dialect.name not in MYSQL:
            return True
        has = self.statements(connection).has
        return bool(self._rows(connection, has, {"stream": stream, "expected": expected}))

    def _append(self, connection: Connection, stream: str, rows: Sequence[Row], after: int) -> bool:
        statements = self.statements(connection)
        for start in range(0, len(rows), _MOST_ROWS):
            part = rows[start : start + _MOST_ROWS]
            values: dict[str, Any] = {"stream": stream, "expected": after + start}
            for number, row in enumerate(part, 1):
                values[f"version{number}"] = after + start + number
                values.update((f"{name}{number}", value) for name, value in row.items())
            if self._insert(connection, stream, statements.append(len(part)), values) == len(part):
                continue
            if start == 0:
                return False
            # The next versions belong to this transaction by now, so that it is an event that was there already.
            raise ConflictError(_OTHERS.format(stream))
        return True

    def _insert(self, connection: Connection, stream: str, append: Compiled, values: Row) -> int:
        """Insert rows, and return how many; 0 where one of them is there."""
        try:
            result = connection.exec_driver_sql(append.sql, append.parameters(values))
        except DBAPIError as error:
            self.explain(connection, error)
            if error_code(error) not in _NOT_UNIQUE:
                raise
            if connection.dialect.name == "postgresql":
                raise ConflictError(_OTHERS.format(stream)) from error
            return 0
        count: int = result.scalar_one() if connection.dialect.name == "postgresql" else result.rowcount
        return count

    def _own(self, connection: Connection, stream: str, rows: Sequence[Row]) -> Appended | None:
        """Return the append of an earlier run with these ids; None if there is none."""
        own = self.statements(connection).own(len(rows))
        values = {f"id{number}": row["id"] for number, row in enumerate(rows, 1)}
        found = connection.exec_driver_sql(own.sql, own.parameters(values)).all()
        if not found:
            return None
        if len(found) != len(rows) or any(row[0] != stream for row in found):
            raise ConflictError(_OTHERS.format(stream))
        return Appended(stream, found[-1][1], new=False)

    def version(self, connection: Connection, stream: str, again: bool = False) -> int:
        """Return the version of a stream; 0 if it has no event. ``again``: after an append that met another one."""
        statements, values = self.statements(connection), {"stream": stream}
        found = None if again and statements.name in MYSQL else self._scalar(connection, statements.version, values)
        if statements.name in MYSQL and (found or again):
            # Not in an empty stream: there it would lock those beside it too.
            self._rows(connection, statements.lock_first, values)
            found = self._scalar(connection, statements.newest_version, values)
        return found or 0

    def read(self, connection: Connection, stream: str, after: int, until: int | None, most: int) -> Sequence[Any]:
        """Read events of one stream."""
        values = {"stream": stream, "after": after, "until": _LAST if until is None else until, "most": most}
        return self._rows(connection, self.statements(connection).read, values)

    def read_all(self, connection: Connection, after: Position, most: int) -> Sequence[Any]:
        """Read events of all streams after a position."""
        self._check_places(connection)
        self.give_places(connection)
        values = {"place": after.place, "seq": after.seq, "most": most}
        return self._rows(connection, self.statements(connection).read_all, values)

    def position(self, connection: Connection, stream: str, version: int) -> Position | None:
        """Return the position of an event; None if it has none yet."""
        self.give_places(connection)
        values = {"stream": stream, "version": version}
        rows = self._rows(connection, self.statements(connection).position, values)
        return Position(*rows[0]) if rows and rows[0][0] is not None else None

    def give_places(self, connection: Connection) -> None:
        """MariaDB: give places to the events that are committed, in a transaction of its own."""
        if connection.dialect.name not in MYSQL:
            return
        if level_of(connection.dialect, connection.get_execution_options()) == "READ UNCOMMITTED":
            raise TransactionError(
                "under READ UNCOMMITTED, events are read whose places may change: take another level"
            )
        statements = self.statements(connection)
        try:
            # On a connection of its own: the caller's snapshot is to begin afterwards.
            with connection.engine.connect() as own:
                waiting = self._rows(own, statements.without_place, {})
                own.rollback()
                while waiting and self._give_places(own, statements) == PLACES_AT_ONCE:
                    pass
        except PoolTimeoutError as error:
            raise StoreError(
                "events are given their places by a second connection, which the engine's pool did not give: enlarge"
                " pool_size or max_overflow"
            ) from error
        except DBAPIError as error:
            if not (read_only(error) or waited_for_lock(error)):
                raise
            # A replica, whose primary gives places; or an open transaction has locked an event that has none, as the
            # first one of a stream to which it appends. What has no place is read later.

    def _give_places(self, own: Connection, statements: Statements) -> int:
        if is_autocommit(own):
            own.exec_driver_sql("START TRANSACTION")
        last = self._scalar(own, statements.last_place, {})
        if last is None:
            raise StoreError(_NO_START.format(self.tables.place.fullname))
        # Not a locking read: events of open transactions are not seen, nor waited for.
        numbers = [row[0] for row in self._rows(own, statements.without_place, {})]
        if numbers:
            own.exec_driver_sql(statements.give_places(last, numbers))
            own.exec_driver_sql(statements.raise_last_place(len(numbers)))
        own.commit()
        return len(numbers)

    def _check_places(self, connection: Connection) -> None:
        """PostgreSQL: refuse tables whose events have the numbers of another server; once for each connection."""
        statements = self.statements(connection)
        if statements.name != "postgresql":
            return
        checked = connection.info.setdefault(_CHECKED, set())
        if statements.behind.sql in checked:
            return
        if self._scalar(connection, statements.subscribed, {}):
            raise StoreError(
                f"{self.tables.events.fullname} is filled by a logical subscription, which commits in another order:"
                " use its publisher, or drop the subscription first"
            )
        if self._behind(connection) > 0:
            raise StoreError(
                f"{self.tables.events.fullname} was restored from another server, whose transactions have higher"
                " numbers: call Streams.rebase() once, before events are appended or read"
            )
        checked.add(statements.behind.sql)

    def snapshot(self, connection: Connection, stream: str, kind: str, until: int | None) -> Any:
        """Return version, type version and data of a snapshot, and whether the stream has that version; or None."""
        values = {"stream": stream, "type": kind, "until": _LAST if until is None else until}
        rows = self._rows(connection, self.statements(connection).snapshot, values)
        return rows[0] if rows else None

    def write_snapshot(self, connection: Connection, values: Row) -> None:
        """Write a snapshot."""
        statement = self.statements(connection).write_snapshot
        try:
            connection.exec_driver_sql(statement.sql, statement.parameters(values))
        except DBAPIError as error:
            self.explain(connection, error)
            raise

    def rebase(self, connection: Connection) -> int:
        """PostgreSQL: let new places come after those that are there; return by how much they were behind."""
        statements = self.statements(connection)
        if statements.name != "postgresql":
            return 0
        # An open transaction that appends has read the table of places already: its events are to come before.
        connection.exec_driver_sql(statements.lock_events)
        more = max(0, self._behind(connection))
        if more:
            connection.exec_driver_sql(statements.rebase.sql, statements.rebase.parameters({"more": more}))
        return more

    def _behind(self, connection: Connection) -> int:
        behind: int | None = self._scalar(connection, self.statements(connection).behind, {})
        if behind is None:
            raise StoreError(_NO_START.format(self.tables.place.fullname))
        return behind

    def explain(self, connection: Connection, error: DBAPIError) -> None:
        """Raise what says better than ``error`` what has failed, if there is such."""
        error.hide_parameters = True  # an error is logged, and an event must not be
        if conflicts(error):
            raise ConflictError("another transaction writes to the same stream: begin yours again") from error
        if lacks_table(error):
            raise describe_failure(error, connection.engine.url, self.tables.events.fullname, STREAMS) from error

    def _rows(self, connection: Connection, statement: Any, values: Row) -> Sequence[Any]:
        try:
            return connection.exec_driver_sql(statement.sql, statement.parameters(values) or None).all()
        except DBAPIError as error:
            self.explain(connection, error)
            raise

    def _scalar(self, connection: Connection, statement: Any, values: Row) -> Any:
        rows = self._rows(connection, statement, values)
        return rows[0][0] if rows else None
