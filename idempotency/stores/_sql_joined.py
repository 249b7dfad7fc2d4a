"""The verbs inside a transaction of the caller: the uncommitted row is the lock, and the wait for it is bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, Row, Table, TextClause
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from idempotency._core import Claim, Record
from idempotency.errors import IdempotencyError, StoreError
from idempotency.stores._sql_engines import Database, error_code
from idempotency.stores._sql_schema import create_schema
from idempotency.stores._sql_verbs import TRIES, Verbs, claim_values, read_record

_BUSY_SNAPSHOT = 517
# Serialization failure, deadlock, a record changed since the snapshot: the transaction has to begin anew.
_CONFLICTS = frozenset({"40001", "40P01", 1213, 1020, _BUSY_SNAPSHOT})
# Lock not available, lock wait time-out, SQLITE_BUSY and SQLITE_LOCKED.
_LOCKED = frozenset({"55P03", 1205, 5, 6})


def conflicts(error: Exception) -> bool:
    """Say whether a transaction that begins anew can succeed where this one failed."""
    return isinstance(error, DBAPIError) and error_code(error) in _CONFLICTS


class ConflictError(StoreError):
    """The database asks for the transaction to be rolled back and begun anew."""


class Joined(Verbs):
    """The verbs over one table, for sessions on ``engine``, which must have connected once."""

    def __init__(self, engine: Engine, table: Table) -> None:
        super().__init__(engine.dialect, table)
        self._table = table
        self._compiled: dict[tuple[TextClause, str], tuple[str, Sequence[str] | None]] = {}
        self._database = Database(engine, table)
        self._family = engine.dialect.name
        self._mariadb = bool(getattr(engine.dialect, "is_mariadb", False))

    def claim_in(self, connection: Connection, claim: Claim, wait: float) -> Record | None:
        """Claim, waiting up to ``wait`` seconds for each other transaction that holds the row; None: it still does.

        Raises :class:`ConflictError` where the isolation level does not let this transaction see what is there now.
        """
        deadline = monotonic() + wait
        values = claim_values(claim)
        try:
            for _ in range(TRIES):
                row = self._once(connection, values, max(0.0, deadline - monotonic()))
                if row is not None:
                    return read_record(row)
        except DBAPIError as error:
            if error_code(error) in _LOCKED:
                return None
            raise
        raise ConflictError(f"the claim lost against others {TRIES} times in a row")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Say in words what fails within, as a StoreError."""
        try:
            yield
        except IdempotencyError:
            raise
        except Exception as error:  # a driver that cannot connect raises what it likes
            if conflicts(error):
                raise ConflictError("the database asks for the transaction to be begun anew") from error
            raise self._database.failure(error) from error

    def _once(self, connection: Connection, values: dict[str, Any], wait: float) -> Row[Any] | None:
        if self._family == "postgresql":
            # A lock_timeout of 0 would mean to wait for ever.
            values = {**values, "wait": f"{max(1, round(wait * 1000))}ms"}
            found = self._execute(connection, self._sql.claim_bounded, values).one()
            return None if found.version is None else found
        if self._family == "sqlite":
            return self._once_sqlite(connection, values, wait)
        seconds = math.ceil(wait)
        if self._mariadb:
            bound = f"SET STATEMENT innodb_lock_wait_timeout={seconds:d} FOR "
            return self._send(connection, self._sql.claim, values, bound).first()
        with _setting(
            connection, "SET innodb_lock_wait_timeout = ", max(1, seconds), "SELECT @@innodb_lock_wait_timeout"
        ):
            self._execute(connection, self._sql.claim, values)
            row = self._execute(connection, self._sql.look_locked, values).first()
        return None if row is None or (row.free and row.token != values["token"]) else row

    def _execute(self, connection: Connection, statement: TextClause, values: dict[str, Any]) -> CursorResult[Any]:
        return self._send(connection, statement, values)

    def _send(
        self, connection: Connection, statement: TextClause, values: dict[str, Any], prefix: str = ""
    ) -> CursorResult[Any]:
        # Past SQLAlchemy's own cache of statements: finding a long text in it takes as long as the statement itself.
        drawer = statement, connection.dialect.driver
        compiled = self._compiled.get(drawer)
        if compiled is None:
            made = statement.compile(dialect=connection.dialect)
            names = getattr(made, "positiontup", None) if made.positional else None
            compiled = self._compiled[drawer] = str(made), names
        sql, names = compiled
        if self._sql.bytes_as_hex:
            values = {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}
        return connection.exec_driver_sql(
            prefix + sql, values if names is None else tuple(map(values.__getitem__, names))
        )

    def _once_sqlite(self, connection: Connection, values: dict[str, Any], wait: float) -> Row[Any] | None:
        # It writes first and reads afterwards: a transaction that has read cannot wait for a writer, whose commit
        # would make what it read out of date.
        with _setting(connection, "PRAGMA busy_timeout = ", round(wait * 1000), "PRAGMA busy_timeout"):
            try:
                result = self._execute(connection, self._sql.claim, values)
            except DBAPIError as error:
                if "no such table" not in str(error.orig):
                    raise
                create_schema(connection, self._table)
                result = self._execute(connection, self._sql.claim, values)
            return result.first() or self._execute(connection, self._sql.look, values).first()


@contextmanager
def connecting(session: Session) -> Iterator[None]:
    """Say in words why there is no first connection, as a StoreError."""
    try:
        yield
    except Exception as error:
        raise StoreError(
            f"the session has no connection: {type(getattr(error, 'orig', None) or error).__name__}"
        ) from error


@contextmanager
def _setting(connection: Connection, change: str, value: int, query: str) -> Iterator[None]:
    before = connection.exec_driver_sql(query).scalar_one()
    connection.exec_driver_sql(f"{change}{value:d}")
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.exec_driver_sql(f"{change}{before:d}")
