"""The journal of sagas on MariaDB, MySQL and SQLite: each request that writes is a transaction.

Its first statement writes, and so locks the row of the saga, or on SQLite the database. What is read after that is as
it is now: SQLite waits for a writer only where nothing was read before, and InnoDB takes its snapshot at the first read
that locks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import Connection, Dialect

from idempotency._sql.guarded_connection import commits_by_itself
from idempotency._sql.send import send
from idempotency._sql.sqlite import begin_to_write
from idempotency.errors import UnreadableError
from idempotency.stores.sql._saga_statements import (
    CALLED,
    CHANGING,
    COLUMNS,
    ENTRY_COLUMNS,
    EXPIRED,
    FREE,
    GOES_ON,
    LOOK,
    NEW,
    STATE,
    TAKE,
    VALUES,
    Change,
    Changed,
    SagaStatements,
    family_of,
)
from idempotency.stores.sql._saga_table import SagaTables

_ROW = "(:id, :name#, :progress#, :ord#, :attempt#, :body#, {at}, {at})"
_PURGED_AT_ONCE = 100

_LOCK = "UPDATE {sagas} AS r SET wakes = r.wakes WHERE r.id = :id"
_INSERT = f"INSERT INTO {{sagas}} ({COLUMNS}) VALUES ({VALUES})"
_FOUND = f"SELECT {EXPIRED} AS expired, {FREE} AS free FROM {{sagas}} AS r WHERE r.id = :id"
_STATE = f"SELECT r.wakes, {STATE} FROM {{sagas}} AS r WHERE r.id = :id"
_INSERT_ENTRIES = f"INSERT INTO {{entries}} ({ENTRY_COLUMNS}) VALUES {{rows}}"
_DELETE_ENTRIES = "DELETE FROM {entries} WHERE saga_id = :id"
_CALL = f"UPDATE {{sagas}} AS r SET {CALLED} WHERE r.id = :id"
_PUT = f"""
SELECT r.version, {EXPIRED} AS expired, {GOES_ON} AS goes_on, e.name, e.progress, e.ord, e.attempt, e.body,
    {{at}} - e.changed_ms AS changed, {{at}} - e.began_ms AS began
FROM {{sagas}} AS r LEFT JOIN {{entries}} AS e ON e.saga_id = r.id AND e.name = :name0 WHERE r.id = :id"""

_PURGED = ", ".join(f":id{number}" for number in range(_PURGED_AT_ONCE))
_DELETE_PURGED = (
    f"DELETE FROM {{entries}} WHERE saga_id IN ({_PURGED})",
    f"DELETE FROM {{sagas}} WHERE id IN ({_PURGED})",
)


class _Clauses(NamedTuple):
    """How an INSERT changes a row that is there already, or leaves it as it is; and how the first statement purges."""

    update: str
    excluded: str
    nothing: str
    purge: str


_EXPIRED_IDS = "SELECT id FROM {sagas} WHERE expires_ms <= {now} ORDER BY expires_ms LIMIT :limit"
_CLAUSES = {
    "mysql": _Clauses(
        "ON DUPLICATE KEY UPDATE", "VALUES({})", "ON DUPLICATE KEY UPDATE id = id", f"{_EXPIRED_IDS} FOR UPDATE"
    ),
    "sqlite": _Clauses(
        "ON CONFLICT DO UPDATE SET",
        "excluded.{}",
        "ON CONFLICT DO NOTHING",
        f"DELETE FROM {{sagas}} WHERE id IN ({_EXPIRED_IDS}) RETURNING id",
    ),
}


class Elsewhere:
    """The requests that write, in the transaction of the connection."""

    def __init__(self, dialect: Dialect, tables: SagaTables, lock_wait: float) -> None:
        # It takes fractions of a second; innodb_lock_wait_timeout takes whole seconds only.
        mariadb = bool(getattr(dialect, "is_mariadb", False))
        prefix = f"SET STATEMENT max_statement_time={lock_wait:.3f} FOR " if mariadb else ""
        self.sql = SagaStatements(dialect, tables, row=_ROW, prefix=prefix)
        clauses = _CLAUSES[family_of(dialect)]
        self._record = f"{_INSERT} {clauses.nothing}"
        self._record_anew = f"{_INSERT} {_updating(clauses, NEW)}"
        self._write_entries = f"{_INSERT_ENTRIES} {_updating(clauses, CHANGING)}"
        self._purge = clauses.purge

    @contextmanager
    def writing(self, connection: Connection) -> Iterator[None]:
        """Make the block one transaction, also on a connection that commits each statement by itself."""
        if connection.dialect.name == "sqlite":
            begin_to_write(connection)
        if commits_by_itself(connection) is False:
            yield
            return
        send(connection, "BEGIN", fetch=False)
        try:
            yield
            send(connection, "COMMIT", fetch=False)
        except BaseException as error:
            if not connection.invalidated:
                # See _sagas.py: what cannot be read is written all the same.
                send(connection, "COMMIT" if isinstance(error, UnreadableError) else "ROLLBACK", fetch=False)
            raise

    def open(self, connection: Connection, values: Mapping[str, Any]) -> Sequence[Any]:
        """Return the row of the saga as it is now, with its entries if it was there and is owned; or nothing."""
        self.sql.execute(connection, self._record if values["records"] else _LOCK, values)
        found = self.sql.execute(connection, _FOUND, values).first()
        if found is None or (found.expired and not values["records"]):
            return ()
        if found.expired:
            self.sql.execute(connection, _DELETE_ENTRIES, values)
            self.sql.execute(connection, self._record_anew, values)
        elif found.free:
            self.sql.execute(connection, f"{TAKE} WHERE r.id = :id", values)
        rows = self.sql.execute(connection, LOOK, values).all()
        return rows if found.free else [row for row in rows if row.kind == "saga"]

    def change(self, connection: Connection, change: Change) -> Changed:
        """Change a saga, unless the condition of the update is false."""
        update = f"UPDATE {{sagas}} AS r SET {change.update.assignments} WHERE {change.update.condition}"
        changed = self.sql.execute(connection, update, change.values).rowcount > 0
        if changed and change.without:
            values = {**change.values, **self.sql.named(change.without, "without")}
            self.sql.execute(connection, f"{_DELETE_ENTRIES} AND name IN ({{without}})", values, 0, len(change.without))
        if changed and change.entries:
            values = {**change.values, **self.sql.written(change.entries)}
            self.sql.execute(connection, self._write_entries, values, len(change.entries))
        return Changed(changed, self.sql.execute(connection, _STATE, change.values).first())

    def put(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Write an entry unless it is there; return it, with whether its saga goes on, None without a saga."""
        self.sql.execute(connection, _LOCK, values)
        found = self.sql.execute(connection, _PUT, values, 1).first()
        if found is None or not found.goes_on or found.name is not None:
            return found
        self.sql.execute(connection, _INSERT_ENTRIES, values, 1)
        self.sql.execute(connection, _CALL, values)
        return self.sql.execute(connection, _PUT, values, 1).first()

    def purge(self, connection: Connection, batch: int) -> int:
        """Delete up to ``batch`` sagas that have expired, with their entries, and return how many."""
        gone = [bytes(record) for record in self.sql.execute(connection, self._purge, {"limit": batch}).scalars()]
        for start in range(0, len(gone), _PURGED_AT_ONCE):
            part = gone[start : start + _PURGED_AT_ONCE]
            # Always as many, so that it is always the same statement.
            values = {f"id{number}": part[min(number, len(part) - 1)] for number in range(_PURGED_AT_ONCE)}
            for delete in _DELETE_PURGED:
                self.sql.execute(connection, delete, values)
        return len(gone)


def _updating(clauses: _Clauses, columns: Sequence[str]) -> str:
    return f"{clauses.update} {', '.join(f'{name} = {clauses.excluded.format(name)}' for name in columns)}"
