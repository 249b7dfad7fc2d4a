"""The database of a relay: one statement or one transaction at a time, each within a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from idempotency._outbox.emit import OUTBOX
from idempotency._outbox.table import Tables
from idempotency._sql.bounded import Abandoned, InFlight
from idempotency._sql.engines import check_backend, open_async, open_sync, read_url
from idempotency._sql.failures import (
    describe_database,
    describe_failure,
    is_repeatable,
    lacks_table,
    replacing,
    unusable,
    waited_for_lock,
)
from idempotency._sql.pooler import asked_once, read_pooler
from idempotency._sql.sqlite import check_in_file, close_what_is_invalidated
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError

T = TypeVar("T")
Work = Callable[[Connection], T]
"""What is done with a connection. It may be done twice, where the answer of the database was lost."""

_TRIES = 3
_THREADS = 4
_DISPOSE_TIMEOUT = 2.0


class RelayDatabase:
    """One engine and the tables of an outbox in its database.

    ``source``: an async engine, a sync engine, which is used in threads, or a URL, whose engine is closed at the end.
    ``timeout``: seconds after which a statement or transaction is abandoned.
    """

    def __init__(self, source: AsyncEngine | Engine | URL | str, tables: Tables, timeout: float) -> None:
        self._owned = not isinstance(source, AsyncEngine | Engine)
        opened = source if isinstance(source, AsyncEngine | Engine) else _open(source, timeout)
        self._threads: ThreadPoolExecutor | None = None
        self.engine = opened.sync_engine if isinstance(opened, AsyncEngine) else opened
        check_backend(self.engine.url)
        check_in_file(self.engine.url)
        self.tables = tables
        self.dialect = self.engine.dialect.name
        self._opened = opened
        self._timeout = timeout
        self._abandoned = Abandoned()
        if self.dialect == "sqlite":
            close_what_is_invalidated(self.engine)

    @property
    def asynchronous(self) -> bool:
        """Return whether the engine is an async one."""
        return isinstance(self._opened, AsyncEngine)

    def __str__(self) -> str:
        return describe_database(self.engine.url)

    async def prepare(self) -> None:
        """Create the tables on SQLite, and look for them elsewhere; ConfigurationError where there are none."""
        try:
            if self.dialect == "sqlite":
                await self.run(self.tables.create, transaction=True)
            else:
                await self.run(self._look_for_tables)
        except StoreError as error:
            if error.__cause__ is not None and lacks_table(error.__cause__):
                raise ConfigurationError(str(error)) from error
            raise

    def _look_for_tables(self, connection: Connection) -> None:
        for table in self.tables.all:
            connection.execute(table.select().limit(0))

    async def behind_pooler(self) -> bool:
        """Return whether a pooler is between the engine and PostgreSQL."""
        return self.dialect == "postgresql" and await self.run(asked_once, transaction=None)

    async def run(self, work: Work[T], *, transaction: bool | None = False) -> T:
        """Do ``work``, which is one statement, or with ``transaction`` one transaction of several.

        ``transaction`` None: the work begins its transaction itself. Every failure is a StoreError.
        """
        statement = InFlight()
        task = asyncio.get_running_loop().create_task(self._perform_elsewhere(work, statement, transaction))
        try:
            await asyncio.wait({task}, timeout=self._timeout)
        except asyncio.CancelledError:
            self._abandoned.add(task, statement.cut_off)
            raise
        if task.done():
            return task.result()
        self._abandoned.add(task, statement.cut_off)
        raise StoreError(f"{self} gave no answer within {self._timeout:g} s: is it running, and not overloaded?")

    async def aclose(self) -> None:
        """Wait for what was abandoned, and dispose of the engine if it was opened here."""
        await self._abandoned.wait()
        if self._owned:
            if isinstance(self._opened, Engine):
                self._opened.dispose()
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._opened.dispose(), _DISPOSE_TIMEOUT)
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    async def _perform_elsewhere(self, work: Work[T], statement: InFlight, transaction: bool | None) -> T:
        if self.asynchronous:
            return await greenlet_spawn(self._perform, work, statement, transaction)
        self._threads = self._threads or ThreadPoolExecutor(_THREADS, "idempotency-relay")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._perform, work, statement, transaction)

    def _perform(self, work: Work[T], statement: InFlight, transaction: bool | None) -> T:
        for remaining in reversed(range(_TRIES)):
            try:
                return self._try_once(work, statement, transaction)
            except IdempotencyError:
                raise
            except Exception as error:  # a driver whose connection dies may raise anything
                again = is_repeatable(error) or unusable(error) or waited_for_lock(error)
                if not remaining or statement.abandoned or not again:
                    failure = describe_failure(error, self.engine.url, self.tables.messages.fullname, OUTBOX)
                    raise failure from error
        raise AssertionError

    def _try_once(self, work: Work[T], statement: InFlight, transaction: bool | None) -> T:
        with self.engine.connect() as connection:
            statement.driver, statement.connection = connection.dialect.driver, connection.connection
            if statement.abandoned:
                raise StoreError("the statement was abandoned before it was sent")
            try:
                with replacing(connection):
                    if transaction is None:
                        return work(connection)
                    # A process that is paused between its statement and its COMMIT would hold the locks of its rows,
                    # also when its lease is over. A pooler, however, keeps to one connection within a transaction only,
                    # and a driver may need two messages for a statement.
                    pooler = self.dialect == "postgresql" and asked_once(connection)
                    if not transaction and not pooler:
                        with _autocommit(connection):
                            return work(connection)
                    with connection.begin():
                        return work(connection)
            except (SQLAlchemyError, IdempotencyError):
                raise
            except BaseException as error:
                # Interrupted at an unknown point: the server may still send an answer.
                connection.invalidate(error)
                raise


@contextmanager
def _autocommit(connection: Connection) -> Iterator[None]:
    """Let each statement of the block be a transaction of its own.

    With the option ``isolation_level`` it would end when the connection is given back to its pool. On one that was cut
    off that fails, and the pool would count it as in use for ever.
    """
    driver: Any = connection.connection.dbapi_connection
    connection.dialect.set_isolation_level(driver, "AUTOCOMMIT")
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.dialect.reset_isolation_level(driver)


def _open(source: URL | str, timeout: float) -> AsyncEngine | Engine:
    url, pooler = read_pooler(read_url(source), None)
    opened = open_async if url.get_dialect(_is_async=True).is_async else open_sync
    return opened(url, timeout, pooler)
