"""The rows of checkpoints on one connection: what the two kinds of sessions, and the commands, share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, case, delete, func, literal_column, or_, select, tuple_, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from idempotency._outbox.after_commit import emitted
from idempotency._sql.clock import NOW_MS
from idempotency._sql.failures import MadeBy, conflicts, describe_failure, error_code, lacks_table, waited_for_lock
from idempotency._sql.sessions import connection_of, is_autocommit
from idempotency._sql.tables import MYSQL
from idempotency.errors import ConfigurationError, StoreError, TransactionError
from idempotency.projections._table import Tables
from idempotency.projections.errors import ProjectionBehindError
from idempotency.streams._position import Position

AnySync = Session | Connection

RUNNING, STOPPED, DROPPED = "running", "stopped", "dropped"

PROJECTIONS = MadeBy(
    "idempotency projection schema create",
    "create_projections_schema() or create_projections_schema_sync()",
    "idempotency.projections.projections_table",
)
_NO_TRANSACTION = "There is no transaction to move a checkpoint in: begin one."
_NOWAIT_OF_MYSQL = 3572


class Name(NamedTuple):
    """Whose checkpoint it is. ``version`` is that of a projection, else 0; ``stream`` "" is all of a source."""

    consumer: str
    version: int = 0
    stream: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """One row of the table. ``failed``: the position of an event that has failed alone. ``now_ms``: the clock."""

    name: Name
    position: Position
    state: str
    attempts: int
    error: str
    failed: str | None
    moved_ms: int
    now_ms: int


class BusyError(Exception):
    """Another worker has the lock."""


class Rows:
    """The rows of one set of tables, reached by connections of any database."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.woken_by = tables.checkpoints.fullname

    def add(self, session: AnySync, name: Name) -> None:
        """Add the row of a projection that has begun with nothing; the first version of a projection is live."""
        with self._connection(session) as connection:
            _check_name(connection, name)
            rows = [
                (self.tables.checkpoints, {**name._asdict(), **_begun(connection, Position())}),
                (self.tables.live, {"name": name.consumer, "version": name.version}),
            ]
            for table, values in rows:
                known = select(table).where(*(table.c[key.name] == values[key.name] for key in table.primary_key))
                # To look first is no lock; the worker of this row has one.
                if connection.execute(known).first() is None:
                    if connection.dialect.name in MYSQL:
                        connection.execute(mysql.insert(table).values(values).prefix_with("IGNORE"))
                    else:
                        insert: Any = _insert(connection, table).values(values)
                        connection.execute(insert.on_conflict_do_nothing())

    def lock(self, session: AnySync, name: Name, *, wait: bool = False) -> Mark | None:
        """Lock a row until the transaction ends, and return it; None if there is none.

        Raises :class:`BusyError` where another transaction has the lock, unless ``wait``.
        """
        with self._connection(session) as connection:
            try:
                if connection.dialect.name == "sqlite":
                    row = self.tables.checkpoints
                    connection.execute(update(row).where(self._is(name)).values(state=row.c.state))
                elif connection.dialect.name == "postgresql" and not wait:
                    # SKIP LOCKED, since NOWAIT would fail the transaction, and be a line in the server's log each time.
                    locked = self._first(connection, name, skip_locked=True)
                    if locked is None and self.find(session, name) is not None:
                        raise BusyError
                    return locked
                return self._first(connection, name, nowait=connection.dialect.name in MYSQL and not wait)
            except DBAPIError as error:
                if wait or not (waited_for_lock(error) or error_code(error) == _NOWAIT_OF_MYSQL):
                    raise
                raise BusyError from error

    def find(self, session: AnySync, name: Name) -> Mark | None:
        """Return a row as it is committed; None if there is none."""
        return next(iter(self.list(session, self._is(name))), None)

    def list(self, session: AnySync, where: Any = None) -> Sequence[Mark]:
        """Return the rows for which ``where`` is true, or all."""
        with self._connection(session) as connection:
            query = self._query(connection).order_by(*self.tables.checkpoints.primary_key)
            return [_mark(row) for row in connection.execute(query if where is None else query.where(where))]

    def of_consumer(self, session: AnySync, consumer: str, version: int) -> Sequence[Mark]:
        """Return the rows of a consumer, one for each stream."""
        row = self.tables.checkpoints.c
        return self.list(session, and_(row.consumer == consumer, row.version == version))

    def move(self, session: AnySync, name: Name, position: Position) -> bool:
        """Move a checkpoint to a position after it, in one statement; False if it is there or further already.

        False too for a version that is dropped.
        """
        with self._connection(session) as connection:
            if is_autocommit(connection):
                raise TransactionError("the connection is in AUTOCOMMIT: begin a transaction, which has the effect too")
            _check_name(connection, name)
            emitted(session, connection, self.woken_by, notify=False)
            row = self.tables.checkpoints
            values = _begun(connection, position)
            if connection.dialect.name in MYSQL:
                return self._move_on_mysql(connection, name, values)
            insert: Any = _insert(connection, row).values({**name._asdict(), **values})
            newer = tuple_(row.c.place, row.c.seq) < tuple_(insert.excluded.place, insert.excluded.seq)
            changes = {column: insert.excluded[column] for column in values}
            move = insert.on_conflict_do_update(
                index_elements=list(row.primary_key), set_=changes, where=and_(newer, row.c.state != DROPPED)
            )
            return bool(connection.execute(move.execution_options(preserve_rowcount=True)).rowcount)

    def _move_on_mysql(self, connection: Connection, name: Name, values: dict[str, Any]) -> bool:
        row = self.tables.checkpoints.c
        insert = mysql.insert(self.tables.checkpoints).values({**name._asdict(), **values})
        new = insert.inserted
        later = or_(new.place > row.place, and_(new.place == row.place, new.seq > row.seq))
        newer = and_(later, row.state != DROPPED)
        # Each value is computed after those before it have changed: what newer is about comes last.
        last = "state", "seq", "place"
        columns = [*(column for column in values if column not in last), *last]
        changes = {column: case((newer, new[column]), else_=row[column]) for column in columns}
        # The number of rows is the same for a row that is new and for one that does not change. So a row that does not
        # change sets the id of the statement.
        changes["moved_ms"] = case((newer, new.moved_ms), else_=row.moved_ms + 0 * func.last_insert_id(1))
        return not connection.execute(insert.on_duplicate_key_update(list(changes.items()))).lastrowid

    def fail(self, session: AnySync, mark: Mark, failed: str, error: str, most: int) -> int:
        """Note that the event after a checkpoint has failed alone, and stop the projection after ``most`` failures.

        It returns the number of failures; 0 where the checkpoint has moved meanwhile.
        """
        with self._connection(session) as connection:
            row = self.tables.checkpoints.c
            there = self._is(mark.name), row.place == mark.position.place, row.seq == mark.position.seq
            noted = {
                # In this order: on MariaDB each value is computed after those before it have changed.
                "state": case((row.attempts + 1 >= most, STOPPED), else_=RUNNING),
                "attempts": row.attempts + 1,
                "error": error[:255],
                "failed": failed,
            }
            changes = [(row[name], value) for name, value in noted.items()]
            statement = update(self.tables.checkpoints).where(*there, row.state == RUNNING).ordered_values(*changes)
            if not connection.execute(statement).rowcount:
                return 0
            return int(connection.execute(select(row.attempts).where(self._is(mark.name))).scalar_one())

    def resume(self, session: AnySync, name: Name) -> None:
        """Let a projection that has stopped try its event again."""
        self._stopped(session, name)
        with self._connection(session) as connection:
            again = {"state": RUNNING, "attempts": 0}
            connection.execute(update(self.tables.checkpoints).where(self._is(name)).values(again))

    def skip(self, session: AnySync, name: Name, position: Position, reason: str) -> None:
        """Go on after the event at which a projection has stopped, and write down why."""
        if not reason.strip():
            raise ConfigurationError("give a reason: it is written down with the event that is skipped")
        mark = self._stopped(session, name)
        if mark.failed != str(position):
            raise ConfigurationError(f"{_shown(name)} has stopped at {mark.failed}, not at {position}: nothing changed")
        with self._connection(session) as connection:
            note = {"consumer": name.consumer, "version": name.version, "position": str(position)}
            values = {**note, "error": mark.error, "reason": reason, "at_ms": mark.now_ms}
            connection.execute(self.tables.skipped.insert().values(values))
            self.move(session, name, position)

    def live(self, session: AnySync, consumer: str, *, lock: bool = False) -> int | None:
        """Return the version of a projection that is read; None if there is none yet."""
        with self._connection(session) as connection:
            row = self.tables.live
            query = select(row.c.version).where(row.c.name == consumer)
            if lock and connection.dialect.name == "sqlite":
                connection.execute(update(row).where(row.c.name == consumer).values(version=row.c.version))
            found: int | None = connection.execute(query.with_for_update() if lock else query).scalar()
            return found

    def lock_both(self, session: AnySync, name: Name) -> tuple[Mark, Mark]:
        """Lock which version is live, and the checkpoints of that one and of ``name``; return these two."""
        live = self.live(session, name.consumer, lock=True)
        wanted = [name, name._replace(version=name.version if live is None else live)]
        # In one order, whatever the versions are: of two who switch, none waits for the other one.
        marks = {each: self.lock(session, each, wait=True) for each in sorted(set(wanted))}
        mine, other = (marks[each] for each in wanted)
        if mine is None or other is None:
            raise ConfigurationError(f"{_shown(name)} has no checkpoint: run it first")
        if mine.state != RUNNING:
            raise ConfigurationError(f"{_shown(name)} is {mine.state}: nothing was switched")
        return mine, other

    def switch(self, session: AnySync, name: Name) -> None:
        """Make a version the live one. Raises ProjectionBehindError where it is behind the one that is."""
        mine, other = self.lock_both(session, name)
        self.make_live(session, name, mine.position, other.position)

    def make_live(self, session: AnySync, name: Name, at: Position, other: Position) -> None:
        """Make a version the live one, under both locks: it is ``at`` a position, and the live one at the ``other``."""
        if at < other:
            raise ProjectionBehindError(f"{_shown(name)} is at {at}, before the live one: let it catch up")
        with self._connection(session) as connection:
            row = self.tables.live
            connection.execute(update(row).where(row.c.name == name.consumer).values(version=name.version))

    def drop(self, session: AnySync, name: Name) -> None:
        """End a version that is not live, for ever: its workers stop, so that its tables can be dropped."""
        if self.live(session, name.consumer, lock=True) == name.version:
            raise ConfigurationError(f"{_shown(name)} is the live version: switch to another one first")
        mark = self.lock(session, name, wait=True)
        if mark is None:
            raise ConfigurationError(f"there is no {_shown(name)}")
        with self._connection(session) as connection:
            # The row remains: without it, a worker of that version would begin anew, in tables that are full.
            connection.execute(update(self.tables.checkpoints).where(self._is(name)).values(state=DROPPED))
            row = self.tables.skipped.c
            mine = and_(row.consumer == name.consumer, row.version == name.version)
            connection.execute(delete(self.tables.skipped).where(mine))

    def reached(self, session: AnySync, name: Name) -> Position | None:
        """Return the checkpoint of the version that is live, or of this one where none is; None if there is none."""
        live = self.live(session, name.consumer)
        mark = self.find(session, name if live is None else name._replace(version=live))
        return None if mark is None else mark.position

    def now(self, connection: Connection) -> float:
        """Return the time of the database in seconds since the epoch."""
        return float(connection.execute(select(_now(connection))).scalar_one()) / 1000

    def _stopped(self, session: AnySync, name: Name) -> Mark:
        mark = self.lock(session, name, wait=True)
        if mark is None or mark.state != STOPPED:
            raise ConfigurationError(f"{_shown(name)} {'is ' + mark.state if mark else 'is not there'}: nothing to do")
        return mark

    def _first(self, connection: Connection, name: Name, **options: bool) -> Mark | None:
        found = connection.execute(self._query(connection).where(self._is(name)).with_for_update(**options)).first()
        return None if found is None else _mark(found)

    def _query(self, connection: Connection) -> Any:
        row = self.tables.checkpoints.c
        columns = row.consumer, row.version, row.stream, row.place, row.seq, row.state, row.attempts, row.error
        return select(*columns, row.failed, row.moved_ms, _now(connection))

    def _is(self, name: Name) -> Any:
        row = self.tables.checkpoints.c
        return and_(row.consumer == name.consumer, row.version == name.version, row.stream == name.stream)

    @contextmanager
    def _connection(self, session: AnySync) -> Iterator[Connection]:
        connection = connection_of(session, _NO_TRANSACTION)
        try:
            yield connection
        except DBAPIError as error:
            table = self.tables.checkpoints.fullname
            if lacks_table(error):
                raise describe_failure(error, connection.engine.url, table, PROJECTIONS) from error
            if conflicts(error):
                raise StoreError("the transaction conflicts with another one: begin it again") from error
            raise


def _begun(connection: Connection, position: Position) -> dict[str, Any]:
    """Return the columns of a checkpoint that has just moved to a position."""
    place = {"place": position.place, "seq": position.seq}
    return {"state": RUNNING, "attempts": 0, "error": "", "failed": None, "moved_ms": _now(connection), **place}


def _check_name(connection: Connection, name: Name) -> None:
    """MariaDB: refuse a name that it takes for another one."""
    for each in (name.consumer, name.stream):
        if connection.dialect.name in MYSQL and each.endswith(" "):
            raise ConfigurationError(f"a name must not end with a space on MariaDB, which ignores it: {each!r}")


def _now(connection: Connection) -> Any:
    return literal_column(NOW_MS[connection.dialect.name])


def _insert(connection: Connection, table: Any) -> Any:
    make: Any = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return partial(make, table)()


def _mark(row: Any) -> Mark:
    return Mark(Name(row[0], row[1], row[2]), Position(row[3], row[4]), *row[5:])


def _shown(name: Name) -> str:
    return f"version {name.version} of the projection {name.consumer!r}"
