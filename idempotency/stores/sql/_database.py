"""Use the table through one engine: connect, run one verb, repeat it where that helps, and describe what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, Table
from sqlalchemy.exc import SQLAlchemyError

from idempotency._sql.bounded import InFlight
from idempotency._sql.driver import FETCHING, fetch, in_transaction, lock_wait_limit
from idempotency._sql.failures import (
    OpenTransactionError,
    describe_database,
    describe_failure,
    is_repeatable,
    refuses_statement,
    replacing,
    unusable,
)
from idempotency._sql.pooler import asked_once
from idempotency._sql.send import is_observed
from idempotency._sql.sqlite import drop_closed
from idempotency._sql.tables import create_tables
from idempotency.errors import IdempotencyError, StoreError
from idempotency.stores.sql._table import SCHEMAS, located, schema_by
from idempotency.stores.sql._verbs import Verbs

T = TypeVar("T")
Work = Callable[[Verbs, Connection], T]

# The drivers of PostgreSQL that begin and end AUTOCOMMIT without a round trip.
_CHEAP_AUTOCOMMIT = frozenset({"asyncpg", "psycopg", "psycopg2"})
# The drivers by which calls can be sent together, where they are used by asyncio.
_TOGETHER = FETCHING | {"aiosqlite"}
_DEFAULT_POOL_SIZE = 5
_STATEMENT_TRIES = 3


class NotTogetherError(Exception):
    """Calls cannot be sent together any more: each is sent alone."""


class Settings(NamedTuple):
    """What a store was given besides its engine: the table, and the options of :class:`SQLStore`."""

    table: Table
    timeout: float
    pooler: bool | None
    writes_names: bool


class Database:
    """One engine and the table of records in its database.

    ``pooler``: whether a pooler is between the engine and PostgreSQL, as the last connection has shown; None before.
    :meth:`perform` is plain blocking code. For an async engine it runs inside SQLAlchemy's greenlet.
    """

    def __init__(self, engine: Engine, settings: Settings, owned: bool) -> None:
        self.engine = engine
        self.table = settings.table
        self._timeout = settings.timeout
        self._writes_names = settings.writes_names
        self._lock_wait = lock_wait_limit(settings.timeout)
        self._verbs_in = lru_cache(SCHEMAS)(self._make_verbs)
        self._sqlite = engine.dialect.name == "sqlite"
        # An engine that the library opened is set to this limit already.
        self._lowers_lock_wait = self._sqlite and not owned
        self._created: set[str | None] = set()
        # AUTOCOMMIT saves BEGIN and COMMIT where it costs no round trip of its own. Not with pg8000: SQLAlchemy's ping
        # of an idle connection begins a transaction, which AUTOCOMMIT would neither see nor end.
        self._autocommit = engine.dialect.name == "postgresql" and engine.dialect.driver in _CHEAP_AUTOCOMMIT
        self.pooler = settings.pooler if self._autocommit else False
        self._asks_for_pooler = self.pooler is None
        self._flies = engine.dialect.is_async and engine.dialect.driver in _TOGETHER

    @property
    def max_parallel(self) -> int:
        """How many verbs may run at once: fewer than the pool has connections, which the application needs too."""
        if self._sqlite:
            return 1
        size: Any = getattr(self.engine.pool, "size", None)
        connections: Any = size() if callable(size) else size  # of a SingletonThreadPool it is a number
        return max(1, (connections or _DEFAULT_POOL_SIZE) - 1)

    def perform(self, work: Work[T], statement: InFlight, transaction: bool = False) -> T:
        """Run ``work``, and repeat it where the database asks for that. Every failure is a StoreError.

        ``work`` must be one statement, unless ``transaction`` is set, which makes several of them one transaction.
        """
        replaced = False
        for remaining in reversed(range(_STATEMENT_TRIES)):
            try:
                return self._try_once(work, statement, transaction)
            except IdempotencyError:
                raise
            except Exception as error:  # a driver whose connection dies may raise anything
                # A new connection may reach another server. If that one cannot be used either, its error is raised.
                again = not replaced if unusable(error) else is_repeatable(error)
                replaced = replaced or unusable(error)
                if not remaining or statement.abandoned or not again:
                    failure = describe_failure(error, self.engine.url, self.name)
                    raise failure from getattr(error, "orig", None) or error
        raise AssertionError

    @property
    def together(self) -> Verbs | None:
        """The verbs whose statements for many calls can be sent, by :meth:`fetch` or, on SQLite, by :meth:`perform`.

        None before the driver was tried by a claim, behind a pooler, and where something of the application takes part
        in each use of the engine: it must see each statement in the context of its caller.
        """
        if not self._flies or self.pooler is not False or is_observed(self.engine, drop_closed):
            return None
        verbs = self._verbs_in(self._schema)
        return verbs if verbs.trusted else None

    def still_together(self) -> Verbs:
        """Return :attr:`together`, which has changed where it is None: the calls of the flight were let in before."""
        verbs = self.together
        if verbs is None:
            raise NotTogetherError
        return verbs

    def fetch(self, verb: str, values: dict[str, Any], statement: InFlight) -> Sequence[Sequence[Any]]:
        """Send a statement of :attr:`Statements.in_flights`, and return the rows. Raises the driver's own errors."""
        verbs = self.still_together()
        with self._opened(statement) as connection:
            if self._is_behind_pooler(connection):
                raise NotTogetherError
            compiled = verbs.in_flights[verb]
            driver: Any = connection.connection.driver_connection
            try:
                return fetch(connection.dialect.driver, driver, compiled.sql, compiled.parameters(values))
            except BaseException as error:
                if not refuses_statement(error):
                    connection.invalidate(error)
                raise

    @property
    def name(self) -> str:
        """The name of the table, with its schema if that is named."""
        return located(self.table, self._schema).fullname

    @property
    def _schema(self) -> str | None:
        return schema_by(self.engine.get_execution_options(), self.table)

    def no_answer(self) -> StoreError:
        """Return the error of a call whose time is over."""
        database = describe_database(self.engine.url)
        return StoreError(f"{database} gave no answer within {self._timeout:g} s: is it running, and not overloaded?")

    def _is_behind_pooler(self, connection: Connection) -> bool:
        if not self._asks_for_pooler:
            return bool(self.pooler)
        self.pooler = found = asked_once(connection)
        return found

    def _make_verbs(self, schema: str | None) -> Verbs:
        table = located(self.table, schema)
        return Verbs(self.engine.dialect, table, self._lock_wait, self._lowers_lock_wait, self._writes_names)

    @contextmanager
    def _opened(self, statement: InFlight) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            statement.driver, statement.connection = connection.dialect.driver, connection.connection
            if statement.abandoned:
                raise StoreError("the statement was abandoned before it was sent")
            if in_transaction(statement.driver, statement.connection.driver_connection):
                # The verb would be committed or rolled back with that transaction. To end the transaction here would
                # commit or roll back what was done in it before.
                connection.invalidate()
                raise OpenTransactionError
            yield connection

    def _try_once(self, work: Work[T], statement: InFlight, transaction: bool) -> T:
        with self._opened(statement) as connection:
            schema = connection.schema_for_object(self.table)
            verbs = self._verbs_in(schema)
            try:
                with replacing(connection):
                    if self._sqlite and schema not in self._created:
                        with connection.begin():
                            create_tables(connection, self.table)
                        self._created.add(schema)
                    behind_pooler = self._is_behind_pooler(connection)
                    # A pooler keeps to one connection within a transaction only, and a driver may need two messages for
                    # a statement.
                    if self._autocommit and not transaction and not behind_pooler:
                        return work(verbs, connection.execution_options(isolation_level="AUTOCOMMIT"))
                    with connection.begin():
                        return work(verbs, connection)
            except (SQLAlchemyError, IdempotencyError):
                raise
            except BaseException as error:
                # Interrupted at an unknown point, as by a signal: the server may still send an answer.
                connection.invalidate(error)
                raise
