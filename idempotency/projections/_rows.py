"""The rows of checkpoints on one connection: what the two kinds of sessions, and the commands, share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, CursorResult, Executable, MetaData, delete, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from idempotency._outbox.after_commit import emitted
from idempotency._sql.commit_guard import SESSION_ENDED
from idempotency._sql.failures import MadeBy, error_code, raise_described, waited_for_lock
from idempotency._sql.names import stored_name
from idempotency._sql.sessions import connection_of, is_autocommit
from idempotency._sql.tables import MYSQL, check_last_character
from idempotency.errors import ConfigurationError, StoreError, TransactionError
from idempotency.projections._statements import Statements
from idempotency.projections._table import DROPPED, RUNNING, STOPPED, Tables
from idempotency.projections.errors import ProjectionBehindError
from idempotency.streams._position import Position

AnySync = Session | Connection
Values = Mapping[str, Any]
AnyPosition = int | tuple[int, int]
"""An offset of Kafka, a :class:`~idempotency.streams.Position`, or two numbers such as commit LSN and index."""

_LARGEST = 2**63 - 1

PROJECTIONS = MadeBy(
    "idempotency projection schema create",
    "create_projections_schema() or create_projections_schema_sync()",
    "idempotency.projections.projections_table",
)
_BEFORE_ALL = Position(-1, -1)
_NOWAIT_OF_MYSQL = 3572


class Name(NamedTuple):
    """Whose checkpoint it is. ``version`` is that of a projection, else 0; ``stream`` "" is all of a source."""

    consumer: str
    version: int = 0
    stream: str = ""

    def __str__(self) -> str:
        return f"{self.consumer} version {self.version}"


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
        self._statements = cache(partial(Statements, tables))

    def add(self, session: AnySync, name: Name) -> None:
        """Add the row of a projection that has begun with nothing; the first version of a projection is live."""
        check_last_character(_connection(session), "the name of a projection", name.consumer)
        # To look first is no lock; the worker of this row has one.
        if self.find(session, name) is None:
            self._add(session, name, Position())
        if self.live(session, name.consumer) is None:
            self._execute(session, self._on(session).add_live, {"name": name.consumer, "version": name.version})

    def lock(self, session: AnySync, name: Name, *, wait: bool = False) -> Mark | None:
        """Lock a row until the transaction ends, and return it; None if there is none.

        Raises :class:`BusyError` where another transaction has the lock, unless ``wait``.
        """
        connection = _connection(session)
        statements = self._on(connection)
        try:
            self._lock_all(connection)
            found = self._first(connection, statements.lock if wait else statements.lock_now, name)
        except DBAPIError as error:
            if wait or not (waited_for_lock(error) or error_code(error) == _NOWAIT_OF_MYSQL):
                raise
            raise BusyError from error
        if found is None and self.find(connection, name) is not None:
            raise BusyError
        return found

    def find(self, session: AnySync, name: Name) -> Mark | None:
        """Return a row as it is committed; None if there is none."""
        return self._first(session, self._on(session).find, name)

    def list(self, session: AnySync, *where: Any) -> Sequence[Mark]:
        """Return the rows for which ``where`` is true, or all."""
        return [_mark(row) for row in self._execute(session, self._on(session).all.where(*where))]

    def of_consumer(self, session: AnySync, consumer: str, version: int) -> Mapping[str, Position]:
        """Return the positions of a consumer, by stream."""
        row = self.tables.checkpoints.c
        marks = self.list(session, row.consumer == consumer, row.version == version)
        return {mark.name.stream: mark.position for mark in marks}

    def move(self, session: AnySync, name: Name, to: AnyPosition) -> bool:
        """Move a checkpoint to a position after it, and add it where it is missing; False if it is there already."""
        connection, position = _connection(session), position_of(to)
        for what, each in (("consumer", name.consumer), ("stream", name.stream)):
            check_last_character(connection, what, stored_name(what, each))
        if is_autocommit(connection):
            raise TransactionError("the connection is in AUTOCOMMIT: begin a transaction, which has the effect too")
        # MariaDB: of a row that is missing, an UPDATE would lock what is beside it, and of two one would fail.
        if connection.dialect.name not in MYSQL and self.advance(session, name, position):
            return True
        self._add(connection, name, _BEFORE_ALL)
        return self.advance(session, name, position)

    def advance(self, session: AnySync, name: Name, position: Position) -> bool:
        """Move a checkpoint that is there, in one statement; False if it is there or further already."""
        connection = _connection(session)
        emitted(session, connection, self.woken_by, notify=False)
        to = {**_own(name), "to_place": position.place, "to_seq": position.seq}
        return bool(self._execute(connection, self._on(connection).advance, to).rowcount)

    def fail(self, session: AnySync, mark: Mark, failed: str, error: str, most: int) -> Mark:
        """Note that the event after a checkpoint has failed alone, and stop the projection after ``most`` failures.

        It returns the row as it is then. Where another worker has moved or stopped it meanwhile, nothing is noted.
        """
        now = self.lock(session, mark.name, wait=True) or mark
        if (now.position, now.state) != (mark.position, RUNNING):
            return now
        state = RUNNING if now.attempts + 1 < most else STOPPED
        noted: dict[str, Any] = {"state": state, "attempts": now.attempts + 1, "error": error[:255], "failed": failed}
        self._change(session, mark.name, **noted)
        return replace(now, **noted)

    def resume(self, session: AnySync, name: Name) -> None:
        """Let a projection that has stopped try its event again."""
        self._stopped(session, name)
        self._change(session, name, state=RUNNING, attempts=0)

    def skip(self, session: AnySync, name: Name, position: Position, reason: str) -> None:
        """Go on after the event at which a projection has stopped, and write down why."""
        if not reason.strip():
            raise ConfigurationError("give a reason: it is written down with the event that is skipped")
        mark = self._stopped(session, name)
        if mark.failed != str(position):
            raise ConfigurationError(f"{name} has stopped at {mark.failed}, not at {position}: nothing changed")
        note = {"consumer": name.consumer, "version": name.version, "position": str(position)}
        values = {**note, "error": mark.error, "reason": reason, "at_ms": mark.now_ms}
        self._execute(session, self.tables.skipped.insert().values(values))
        self.advance(session, name, position)

    def live(self, session: AnySync, consumer: str, *, lock: bool = False) -> int | None:
        """Return the version of a projection that is read; None if there is none yet."""
        statements = self._on(session)
        if lock:
            self._lock_all(session)
        found = self._execute(session, statements.lock_live if lock else statements.live, {"name": consumer})
        return found.scalar_one_or_none()

    def switch(self, session: AnySync, name: Name, catch_up: Callable[[Mark], Position]) -> Position:
        """Make a version the live one, under the locks of both, and return where it is.

        ``catch_up`` applies what it lacks and returns that, too. Raises ProjectionBehindError where that is before the
        version which is live.
        """
        live = self.live(session, name.consumer, lock=True)
        wanted = [name, name._replace(version=name.version if live is None else live)]
        # In one order, whatever the versions are: of two who switch, none waits for the other one.
        marks = {each: self.lock(session, each, wait=True) for each in sorted(set(wanted))}
        mine, other = (marks[each] for each in wanted)
        if mine is None or other is None:
            raise ConfigurationError(f"{name} has no checkpoint: run it first")
        if mine.state != RUNNING:
            raise ConfigurationError(f"{name} is {mine.state}: nothing was switched")
        at = catch_up(mine)
        if at < other.position:
            raise ProjectionBehindError(f"{name} is at {at}, before the live one: let it catch up")
        row = self.tables.live
        self._execute(session, update(row).where(row.c.name == name.consumer).values(version=name.version))
        return at

    def drop(self, session: AnySync, name: Name) -> None:
        """End a version that is not live, for ever: its workers stop, so that its tables can be dropped."""
        if self.live(session, name.consumer, lock=True) == name.version:
            raise ConfigurationError(f"{name} is the live version: switch to another one first")
        if self.lock(session, name, wait=True) is None:
            raise ConfigurationError(f"there is no version {name.version} of {name.consumer}")
        # The row remains: without it, a worker of that version would begin anew, in tables that are full.
        self._change(session, name, state=DROPPED)
        row = self.tables.skipped.c
        mine = row.consumer == name.consumer, row.version == name.version
        self._execute(session, delete(self.tables.skipped).where(*mine))

    def now(self, session: AnySync) -> float:
        """Return the time of the database in seconds since the epoch."""
        return float(self._execute(session, self._on(session).now).scalar_one()) / 1000

    def check(self, session: AnySync, name: Name, to: AnyPosition) -> None:
        """Raise where the transaction that moved a checkpoint has ended or failed, by an error that was caught since.

        PostgreSQL would commit such a transaction without an error, and nothing of it; MariaDB what came after.
        """
        mark = self.find(session, name)
        if mark is None or mark.position != position_of(to):
            raise TransactionError(SESSION_ENDED)

    def _stopped(self, session: AnySync, name: Name) -> Mark:
        mark = self.lock(session, name, wait=True)
        if mark is None or mark.state != STOPPED:
            raise ConfigurationError(f"{name} {'is ' + mark.state if mark else 'is not there'}: nothing to do")
        return mark

    def _lock_all(self, session: AnySync) -> None:
        if (lock_all := self._on(session).lock_all) is not None:
            self._execute(session, lock_all)

    def _first(self, session: AnySync, query: Executable, name: Name) -> Mark | None:
        row = self._execute(session, query, _own(name)).first()
        return None if row is None else _mark(row)

    def _add(self, session: AnySync, name: Name, position: Position) -> None:
        self._execute(session, self._on(session).add, {**name._asdict(), **position._asdict()})

    def _change(self, session: AnySync, name: Name, **values: Any) -> None:
        self._execute(session, self._on(session).change.values(**values), _own(name))

    def _on(self, session: AnySync) -> Statements:
        return self._statements(_connection(session).dialect.name)

    def _execute(self, session: AnySync, statement: Executable, values: Values | None = None) -> CursorResult[Any]:
        connection = _connection(session)
        try:
            return connection.execute(statement, values)
        except DBAPIError as error:
            conflict = StoreError("the transaction conflicts with another one: begin it again")
            raise_described(error, connection, self.woken_by, PROJECTIONS, conflict)


@lru_cache
def rows_named(table: str) -> Rows:
    """Return the rows of the tables of that name, whose statements are made once."""
    return Rows(Tables(MetaData(), table))


def _connection(session: AnySync) -> Connection:
    return connection_of(session, "There is no transaction for a checkpoint: begin one.")


def _own(name: Name) -> Values:
    """Return the parameters that name a row."""
    return {"own_consumer": name.consumer, "own_version": name.version, "own_stream": name.stream}


def position_of(position: AnyPosition) -> Position:
    """Return what was given as a position; ConfigurationError for anything else."""
    parts: tuple[Any, ...] = position if isinstance(position, tuple) else (position, 0)
    if len(parts) != 2 or any(type(part) is not int or not 0 <= part <= _LARGEST for part in parts):
        raise ConfigurationError(f"a position is a number from 0 on, or two of them, not {position!r}")
    return Position(*parts)


def _mark(row: Any) -> Mark:
    return Mark(Name(*row[:3]), Position(*row[3:5]), *row[5:])
