"""The verbs in a transaction of the caller: its uncommitted row is the lock, for which others wait a limited time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, Table, TextClause
from sqlalchemy.exc import DBAPIError

from idempotency._rules import Claim, Record, State
from idempotency._sql.driver import lock_wait_limit
from idempotency._sql.failures import (
    ConflictError,
    UnusableError,
    conflicts,
    describe_failure,
    refuses_data,
    replacing,
    unusable,
    waited_for_lock,
)
from idempotency._sql.guarded_connection import COMMITS_BY_ITSELF, GuardedConnection, commits_by_itself
from idempotency._sql.send import Sent, send, setting
from idempotency._sql.sqlite import begin_to_write, busy_timeout_of, lowered_lock_wait, waiting
from idempotency._sql.tables import create_tables
from idempotency.errors import ConfigurationError, IdempotencyError, StoreRefusedError
from idempotency.stores._clock_guard import ClockGuard
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._limits import check_size
from idempotency.stores.sql._operation_name import Names
from idempotency.stores.sql._statements import Statements
from idempotency.stores.sql._table import SCHEMAS, located
from idempotency.stores.sql._trust import has_begun, has_names, try_driver
from idempotency.stores.sql._values import packed
from idempotency.stores.sql._verbs import (
    CLAIM_TRIES,
    Found,
    claim_values,
    complete_values,
    notification_values,
    read_record,
)

# A result of more bytes is written behind a savepoint, where a refused statement would end the transaction.
_LARGE = 64 * 1024
_SAVEPOINT = "idempotency_result"


@dataclass(slots=True)
class _InSchema:
    """The table in one schema, its statements, and those that are compiled, by the driver.

    ``looked``: whether it is known if the table has columns for the name of an operation.
    """

    table: Table
    sql: Statements
    looked: bool
    compiled: dict[tuple[TextClause, str], tuple[str, Sequence[str] | None]] = field(default_factory=dict)


class JoinedVerbs:
    """The verbs over one table, for sessions on ``engine``, which must have connected once."""

    def __init__(
        self, engine: Engine, table: Table, timeout: float, guard: ClockGuard, *, writes_names: bool = False
    ) -> None:
        self._url = engine.url
        self._lock_wait = lock_wait_limit(timeout)
        self._dialect = engine.dialect
        self._table = table
        self._clock_guard = guard
        self._in_schema = lru_cache(SCHEMAS)(self._make)
        self._family = engine.dialect.name
        self._mariadb = bool(getattr(engine.dialect, "is_mariadb", False))
        self._trusted = False
        self._writes_names = writes_names

    def _make(self, schema: str | None) -> _InSchema:
        table = located(self._table, schema)
        return _InSchema(table, Statements(self._dialect, table, self._lock_wait), looked=not self._writes_names)

    def _of(self, connection: Connection) -> _InSchema:
        return self._in_schema(connection.schema_for_object(self._table))

    def claim_in(self, connection: Connection, claim: Claim, wait: float, sealing: Sealing | None) -> Record | None:
        """Claim, waiting up to ``wait`` seconds for a transaction that has locked the row; None if it still has then.

        Raises :class:`ConflictError` where this transaction, by its isolation level, cannot see the row as it is now.
        """
        with self.describing_failures(self._of(connection).table), replacing(connection):
            return self._claim_in(connection, claim, wait, sealing)

    def _claim_in(self, connection: Connection, claim: Claim, wait: float, sealing: Sealing | None) -> Record | None:
        if not self._trusted:
            try_driver(connection, self._of(connection).sql)
            self._trusted = True
        here = self._of(connection)
        if not here.looked:
            if has_names(connection, here.sql):
                here.sql = Statements(self._dialect, here.table, self._lock_wait, Names(shown=True, written=True))
            here.looked = True
        deadline, remaining = monotonic() + wait, wait
        asked = self._clock_guard.ask(claim)
        values = claim_values(claim, asked, sealing)
        try:
            for _ in range(CLAIM_TRIES):
                row = self._claim_once(connection, values, remaining)
                if row is not None:
                    # With AUTOCOMMIT the effect would be committed at once, and a rollback would not undo it.
                    by_itself = commits_by_itself(connection)
                    if by_itself or (by_itself is None and not has_begun(connection)):
                        raise ConfigurationError(COMMITS_BY_ITSELF)
                    return self._clock_guard.read(asked, claim, read_record(row, claim.id, sealing), float(row.now_ms))
                remaining = max(0.0, deadline - monotonic())
        except DBAPIError as error:
            if waited_for_lock(error):
                return None
            raise
        raise ConflictError(f"the claim lost against others {CLAIM_TRIES} times in a row")

    @contextmanager
    def describing_failures(self, table: Table | None = None) -> Iterator[None]:
        """Raise what fails within as a StoreError that describes it; ``table``: the one in use, if that is known."""
        try:
            yield
        except IdempotencyError:
            raise
        except Exception as error:  # a driver that cannot connect may raise anything
            if conflicts(error):
                raise ConflictError("the database asks for the transaction to be begun anew") from error
            failure = describe_failure(error, self._url, (self._table if table is None else table).fullname)
            if unusable(error):
                raise UnusableError(str(failure)) from error
            raise failure from error

    def complete(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        """Record the end; False for a superseded owner, TransactionError where the transaction has been ended.

        Raises :class:`~idempotency.errors.StoreRefusedError` for a result that the database does not take: the
        transaction can be completed without it.
        """
        check_size(connection, result)
        if isinstance(connection, GuardedConnection):
            connection.check_open("UPDATE")
            if not connection.begun and self._family == "sqlite":
                # An operation that has stored nothing waits for the lock here.
                with lowered_lock_wait(connection, self._lock_wait):
                    return self._complete_or_undo(connection, claim, result, state)
        return self._complete_or_undo(connection, claim, result, state)

    def _complete_or_undo(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        if result is None:
            return self._complete(connection, claim, result, state)
        # On PostgreSQL a failed statement ends the transaction, unless it is behind a savepoint. Elsewhere it undoes
        # only itself. A small result is not worth the round trip of a savepoint.
        postgresql = self._family == "postgresql"
        behind_savepoint = postgresql and len(result) > _LARGE
        if behind_savepoint:
            send(connection, f"SAVEPOINT {_SAVEPOINT}", fetch=False)
        try:
            return self._complete(connection, claim, result, state)
        except DBAPIError as error:
            undone = behind_savepoint or not postgresql
            if not undone or error.connection_invalidated or not refuses_data(error):
                raise
            if behind_savepoint:
                send(connection, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}", fetch=False)
            raise StoreRefusedError("the database refused the result") from error

    def _complete(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        values = complete_values(claim, result, state)
        if self._family == "postgresql":
            values |= notification_values(claim, self._table)
        returns = self._family in ("postgresql", "sqlite")
        sent = self._send(connection, self._of(connection).sql.complete_in, values, fetch=returns)
        return sent.row is not None if returns else sent.rowcount > 0

    def _claim_once(self, connection: Connection, values: dict[str, Any], wait: float) -> Found | None:
        sql = self._of(connection).sql
        if self._family == "postgresql":
            # A lock_timeout of 0 would mean to wait for ever.
            values = {**values, "wait": f"{max(1, round(wait * 1000))}ms"}
            row = self._send(connection, sql.claim_bounded, values).row
            return None if row is None or row[0] is None else Found(*row[:-1])
        if self._family == "sqlite":
            return self._claim_once_on_sqlite(connection, values, wait)
        seconds = math.ceil(wait)
        if self._mariadb:
            prefix = f"SET STATEMENT innodb_lock_wait_timeout={seconds:d} FOR "
            return _found(self._send(connection, sql.claim_bounded, values, prefix))
        with _lock_wait(connection, max(1, seconds)):
            self._send(connection, sql.claim_bounded, values, fetch=False)
            row = _found(self._send(connection, sql.look_locked, values))
        return None if row is None or (row.free and row.token != values["token"]) else row

    def _send(
        self,
        connection: Connection,
        statement: TextClause,
        values: dict[str, Any],
        prefix: str = "",
        *,
        fetch: bool = True,
    ) -> Sent:
        # Not by SQLAlchemy's own cache of statements: to find a long text in it takes as long as the statement itself.
        here = self._of(connection)
        cache_key = statement, connection.dialect.driver
        compiled = here.compiled.get(cache_key)
        if compiled is None:
            made = statement.compile(dialect=connection.dialect)
            names = getattr(made, "positiontup", None) if made.positional else None
            compiled = here.compiled[cache_key] = str(made), names
        sql, names = compiled
        if here.sql.packs:
            values = packed(values)
        parameters = values if names is None else tuple(map(values.__getitem__, names))
        return send(connection, prefix + sql, parameters, fetch=fetch)

    def look(self, connection: Connection, claim: Claim, sealing: Sealing | None) -> Record | None:
        """Return the committed record, if it is not free for ``claim``. On SQLite this waits for no lock."""
        asked = self._clock_guard.ask(claim)
        row = self._send(connection, self._of(connection).sql.look, claim_values(claim, asked, sealing)).row
        found = None if row is None else Found(*row)
        if found is None or found.free:
            return None
        return self._clock_guard.read(asked, claim, read_record(found, claim.id, sealing), float(found.now_ms))

    def _claim_once_on_sqlite(self, connection: Connection, values: dict[str, Any], wait: float) -> Found | None:
        sql = self._of(connection).sql
        row: Sequence[Any] | None = None
        try:
            row = self._send(connection, sql.look_waiting, values).row
        except DBAPIError as error:
            if "no such table" not in str(error.orig):
                raise
        missing, before, found = row is None, row[0] if row else busy_timeout_of(connection), _found_beside(row)
        if found is not None and not found.free:
            return found
        # The transaction writes first and reads afterwards: one that has read cannot wait for a writer, because the
        # writer's commit would make what was read out of date. The read above was in no transaction, or in one that
        # begin_to_write ends.
        with waiting(connection, wait, before):
            begin_to_write(connection)
            if missing:
                create_tables(connection, self._table)
            return _found(self._send(connection, sql.claim_bounded, values)) or _found(
                self._send(connection, sql.look, values)
            )


def _found_beside(row: Sequence[Any] | None) -> Found | None:
    return Found(*row[1:]) if row is not None and row[1] is not None else None


def _found(sent: Sent) -> Found | None:
    return None if sent.row is None else Found(*sent.row)


@contextmanager
def _lock_wait(connection: Connection, seconds: int) -> Iterator[None]:
    row = send(connection, "SELECT @@innodb_lock_wait_timeout").row
    with setting(connection, "SET innodb_lock_wait_timeout", seconds, row[0] if row else seconds):
        yield
