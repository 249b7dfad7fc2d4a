"""One transaction around a test, which is rolled back at its end, whatever the code under test commits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, overload

from sqlalchemy import Engine, StaticPool
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.errors import ConfigurationError


@overload
def rolled_back(engine: AsyncEngine) -> AbstractAsyncContextManager[AsyncEngine]: ...
@overload
def rolled_back(engine: Engine) -> AbstractContextManager[Engine]: ...
def rolled_back(engine: Any) -> Any:
    """Give an engine whose connections are all in one transaction, which is rolled back at the end of the context.

    It is an async context for an ``AsyncEngine``, and an ordinary one for an ``Engine``. Give its engine to the code
    under test: to ``SQLStore``, and to the sessionmaker of ``session=``. What would begin a transaction sets a
    savepoint. A commit keeps what was done since, and a rollback undoes it.

    All use one connection, one after the other: for what runs at the same time in several connections, use the engine
    itself. A rollback also undoes what others have done since its savepoint. ``now()`` of PostgreSQL stands still
    within a transaction, so no lease and no record expires. What a database commits by itself, such as DDL on MariaDB,
    is not undone: create tables before.

    Raises :class:`~idempotency.errors.ConfigurationError` for SQLite, where each test can have a file of its own.
    """
    if not isinstance(engine, AsyncEngine | Engine):
        raise ConfigurationError(f"rolled_back takes an AsyncEngine or an Engine, not {type(engine).__name__}")
    if engine.dialect.name == "sqlite":
        raise ConfigurationError("rolled_back is not for SQLite: give each test a file of its own, as by tmp_path")
    return _async(engine) if isinstance(engine, AsyncEngine) else _sync(engine)


@asynccontextmanager
async def _async(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    async with engine.connect() as outer:
        transaction = await outer.begin()
        await outer.exec_driver_sql("SELECT 1")  # some drivers begin with the first statement
        raw = await outer.get_raw_connection()
        try:
            yield AsyncEngine(_on_one_connection(engine.sync_engine, raw.dbapi_connection))
        finally:
            await transaction.rollback()


@contextmanager
def _sync(engine: Engine) -> Iterator[Engine]:
    with engine.connect() as outer:
        transaction = outer.begin()
        outer.exec_driver_sql("SELECT 1")
        try:
            yield _on_one_connection(engine, outer.connection.dbapi_connection)
        finally:
            transaction.rollback()


def _on_one_connection(engine: Engine, opened: Any) -> Engine:
    dialect: Any = copy.copy(engine.dialect)
    savepoints = _Savepoints()
    dialect.do_begin, dialect.do_commit, dialect.do_rollback = savepoints.begin, savepoints.commit, savepoints.rollback
    # A level is set outside of a transaction, and this connection is never outside.
    dialect.set_isolation_level = dialect.reset_isolation_level = lambda *_: None
    # By its driver the library would know that a transaction is open, and refuse a connection that comes with one.
    dialect.driver = f"{dialect.driver} of a test"
    pool = StaticPool(lambda: opened, reset_on_return=None, dialect=dialect)
    return Engine(pool, dialect, engine.url, execution_options=engine.get_execution_options())


class _Savepoints:
    """The transactions of the code under test, each a savepoint, by the use of the connection that has begun it."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, str] = {}

    def begin(self, pooled: Any) -> None:
        name = self._open[id(pooled)] = f"idempotency_test_{next(self._numbers)}"
        _send(pooled, f"SAVEPOINT {name}")

    def commit(self, pooled: Any) -> None:
        # Not released: a savepoint that was set after it by another use of the connection would end with it.
        self._open.pop(id(pooled), None)

    def rollback(self, pooled: Any) -> None:
        name = self._open.pop(id(pooled), None)
        if name is not None:
            _send(pooled, f"ROLLBACK TO SAVEPOINT {name}")


def _send(pooled: Any, sql: str) -> None:
    cursor = pooled.cursor()
    try:
        cursor.execute(sql)
    finally:
        cursor.close()
