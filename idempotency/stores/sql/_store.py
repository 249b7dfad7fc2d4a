"""The store on SQL: its verbs, for asyncio and for threads, and those in a transaction of the caller."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, Self, TypeVar

from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from idempotency._durations import DAY, positive
from idempotency._rules import Claim, Record, State
from idempotency._sql.bounded import Abandoned, InFlight, Watchdog
from idempotency._sql.commit_guard import install
from idempotency._sql.engines import check_backend, check_side, read_url
from idempotency._sql.failures import replacing
from idempotency._sql.pooler import check_pooler, read_pooler
from idempotency._sql.send import pooled
from idempotency._sql.session_failures import connecting
from idempotency._sql.sessions import check_same_database
from idempotency._synchronization import LocalLock
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores._operating import check_and_examine, id_digits, inspect_all
from idempotency.stores.base import Changed, Entry, Finding
from idempotency.stores.sql._database import Settings, Work
from idempotency.stores.sql._examine import examine
from idempotency.stores.sql._find import find_ids
from idempotency.stores.sql._fork import FORKING
from idempotency.stores.sql._joined import JoinedVerbs
from idempotency.stores.sql._per_loop import PerLoop, Threads, open_threads
from idempotency.stores.sql._table import (
    DEFAULT_TABLE,
    check_same_schema,
    create_schema,
    located,
    records_table,
    schema_by,
)
from idempotency.stores.sql._verbs import Verbs

T = TypeVar("T")
_CLAIMED_IN = "idempotency: the schema of the claim"
"""A key of ``session.info``: the schema in which this session itself has claimed. Else the store's engine has."""

_CUT_OFF_WAIT = 0.25
"""Seconds within which a driver notices that its connection is cut off."""


class SQLStore:
    """A store for asyncio and for threads, with housekeeping, on a SQL database.

    ``engine`` is an ``AsyncEngine`` for the verbs that are awaited, or an ``Engine`` for those that end in ``_sync``;
    a verb of the other kind raises :class:`~idempotency.errors.ConfigurationError`. The store never disposes of it, and
    never uses up its pool: it uses at most one connection fewer than ``pool_size`` at a time, on SQLite one.
    ``table`` names the table, default ``idempotency_record``; its schema may be named too, ``"schema.table"``, and the
    option ``schema_translate_map`` of the engine or connection applies. On SQLite the table is created at the first
    use; elsewhere by :meth:`create_schema` or by migrations (:func:`records_table`).
    ``timeout`` is in seconds, default 5: a verb ends within it, with :class:`~idempotency.errors.StoreError`, even if
    the server is frozen. A blocking verb may end up to a quarter of it later. While it connects, its driver's own
    time-outs apply, which :meth:`from_url` sets. A statement that is abandoned does not go on: its connection is
    closed, and the server waits for a lock for at most 0.8 times ``timeout`` (MySQL: for its own
    ``innodb_lock_wait_timeout``). On an SQLite engine that was passed in, ``busy_timeout`` is lowered to that around
    each statement that writes, and set back, which takes two switches to aiosqlite's thread.

    ``pooler``: whether a pooler in transaction mode, such as PgBouncer, is between the engine and PostgreSQL. Then each
    verb is a transaction, and duplicates that wait poll. None, the default: the first connection shows it. False is for
    a pooler in session mode.

    Before the first claim, the engine's driver is tried: one that changes values, or counts no rows, is refused with
    :class:`~idempotency.errors.ConfigurationError`.
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine,
        *,
        table: str = DEFAULT_TABLE,
        timeout: float = 5.0,
        pooler: bool | None = None,
    ) -> None:
        if not isinstance(engine, AsyncEngine | Engine):
            raise ConfigurationError(f"engine must be an AsyncEngine or an Engine, not {type(engine).__name__}")
        check_backend(engine.url)
        self._set_up(engine, pooler, table, timeout)

    @classmethod
    def from_url(
        cls, url: str | URL, *, table: str = DEFAULT_TABLE, timeout: float = 5.0, pooler: bool | None = None
    ) -> Self:
        """Make a store that opens its engines itself, at the first use, and closes them.

        ``url`` is an SQLAlchemy URL with a driver, such as ``postgresql+asyncpg://``, ``postgresql+psycopg://`` (which
        serves both kinds of verbs), ``mysql+aiomysql://``, ``sqlite+aiosqlite:///file``. SQLite is opened in WAL mode.
        For a pooler such as PgBouncer, give ``pooler=True``, or add ``?pooler=true`` to the URL: then the driver
        prepares no statement that outlives its transaction.
        Raises :class:`~idempotency.errors.ConfigurationError`, naming what to install, when the driver is missing.
        """
        store = cls.__new__(cls)
        store._set_up(*read_pooler(read_url(url), pooler), table, timeout)
        return store

    def _set_up(self, source: AsyncEngine | Engine | URL, pooler: bool | None, table: str, timeout: float) -> None:
        timeout = positive("timeout", timeout, DAY)
        if not isinstance(table, str) or not table:
            raise ConfigurationError(f"table must be the name of a table, not {table!r}")
        # Now rather than with the first session: SQLAlchemy's listeners may not be added while other threads call them.
        install()
        self._source = source
        url = self._url
        check_pooler(url, pooler)
        if url.get_backend_name() == "sqlite" and (
            url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"
        ):
            # All would share one connection, so that a verb's commit would commit a handler's open transaction; or each
            # connection would have a database of its own.
            raise ConfigurationError("SQLite in memory cannot hold records: name a file, or use memory://")
        self._table = records_table(MetaData(), table)
        self._timeout = timeout
        self._settings = Settings(self._table, timeout, pooler)
        self._per_loop: dict[asyncio.AbstractEventLoop, PerLoop] = {}
        self._threads: Threads | None = None
        self._opening = threading.Lock()
        self._joined: JoinedVerbs | None = None
        self.abandoned = Abandoned()
        self.watchdog = Watchdog(timeout)
        self._local_lock = LocalLock() if url.get_backend_name() == "sqlite" else None
        FORKING.add(self)

    @property
    def _url(self) -> URL:
        return self._source if isinstance(self._source, URL) else self._source.url

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        return await self._run(lambda verbs, connection: verbs.claim(connection, claim))

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return await self._run(lambda verbs, connection: verbs.renew(connection, claim))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        return await self._run(lambda verbs, connection: verbs.complete(connection, claim, result, state))

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return await self._run(lambda verbs, connection: verbs.release(connection, claim))

    @property
    def timeout(self) -> float:
        """Return how long a verb may take, in seconds."""
        return self._timeout

    @property
    def local_lock(self) -> LocalLock | None:
        """Return the lock that joined transactions take first, where the database has one writer at a time: SQLite.

        The database's own lock is the one that decides. But SQLite waits for it by trying from time to time, and sleeps
        up to 0.1 s in between, in which the lock may be free. This lock wakes the next waiter at once.
        """
        return self._local_lock

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError where this store has an engine for the other kind of verbs."""
        check_side(self._source, asynchronous)

    def check_shared(self, engine: object) -> None:
        """Raise ConfigurationError unless sessions on ``engine`` reach the database that holds the records."""
        check_same_database(self._url, engine)

    def check_same_table(self, options: Mapping[str, Any]) -> None:
        """Raise ConfigurationError unless sessions with these execution options use the same table as the store."""
        check_same_schema(self._table, self._schema, schema_by(options, self._table))

    @property
    def _schema(self) -> str | None:
        options = {} if isinstance(self._source, URL) else self._source.get_execution_options()
        return schema_by(options, self._table)

    async def claim_in(self, session: AsyncSession, claim: Claim, *, wait: float) -> Record | None:
        """Claim in the transaction of ``session``, which must be on this store's database; commit nothing.

        Where another transaction holds the row uncommitted, this waits for it for up to ``wait`` seconds (MariaDB and
        MySQL: whole seconds, rounded up; SQLite: for any other writer of the database). None: that transaction still
        holds the row. After None or an error, the caller's transaction can only be rolled back. Raises
        :class:`~idempotency.errors.StoreError`, also where a transaction that begins anew can succeed. The connection
        is cut off if the server does not answer within ``wait`` and the store's ``timeout``.
        """
        statement, limit = InFlight(), math.ceil(wait) + self._timeout
        # The connection is cut off first, which the driver notices at once. Then the task is cancelled: a driver ends a
        # cancelled statement by asking the server to, and waits for the answer, unless there is no connection.
        cut = asyncio.get_running_loop().call_later(limit, statement.cut_off)
        try:
            async with asyncio.timeout(limit + _CUT_OFF_WAIT):
                return await session.run_sync(self._claim_in, claim, wait, statement)
        except TimeoutError as error:
            raise StoreError(f"the claim was not answered within {limit:g} s: is the database running?") from error
        finally:
            cut.cancel()

    def claim_in_sync(self, session: Session, claim: Claim, *, wait: float) -> Record | None:
        """See :meth:`claim_in`."""
        statement = InFlight()
        with self.watchdog.watch(math.ceil(wait) + self._timeout, statement.cut_off):
            return self._claim_in(session, claim, wait, statement)

    def _claim_in(self, session: Session, claim: Claim, wait: float, statement: InFlight) -> Record | None:
        joined = self._joined_verbs(session)
        with joined.describing_failures():
            connection = session.connection()
            session.info[_CLAIMED_IN] = connection.schema_for_object(self._table)
            statement.driver, statement.connection = connection.dialect.driver, pooled(connection)
            return joined.claim_in(connection, claim, wait)

    async def look_in(self, session: AsyncSession, claim: Claim) -> Record | None:
        """Return the committed record, if it is not free for ``claim`` and can be read without a wait."""
        return await session.run_sync(self.look_in_sync, claim)

    def look_in_sync(self, session: Session, claim: Claim) -> Record | None:
        """See :meth:`look_in`."""
        try:
            return self._joined_verbs(session).look(session.connection(), claim)
        except (StoreError, DBAPIError):
            # The claim comes next, and raises what is wrong.
            return None

    async def complete_in(
        self, session: AsyncSession, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """Record the end in the transaction of ``session``, which must be on this store's database; commit nothing."""
        return await session.run_sync(lambda sync_session: self.complete_in_sync(sync_session, claim, result, state))

    def complete_in_sync(
        self, session: Session, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """See :meth:`complete_in`."""
        connection = session.connection()
        here = connection.schema_for_object(self._table)
        check_same_schema(self._table, session.info.get(_CLAIMED_IN, self._schema), here)
        with replacing(connection):
            return self._joined_verbs(session).complete(connection, claim, result, state)

    def _joined_verbs(self, session: Session) -> JoinedVerbs:
        if self._joined is None:
            with connecting(session):
                engine = session.connection().engine
            self._joined = JoinedVerbs(engine, self._table, self._timeout)
        return self._joined

    @asynccontextmanager
    async def _watch(self, claim: Claim) -> AsyncIterator[Changed]:
        loop = await self._this_loop()
        async with loop.watch(claim.id) as changed:
            yield changed

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """See :meth:`~idempotency.stores.base.Store.watch`. On PostgreSQL by LISTEN, elsewhere by polling."""
        return self._watch(claim)

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        return self._run_sync(lambda verbs, connection: verbs.claim(connection, claim))

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return self._run_sync(lambda verbs, connection: verbs.renew(connection, claim))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        return self._run_sync(lambda verbs, connection: verbs.complete(connection, claim, result, state))

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return self._run_sync(lambda verbs, connection: verbs.release(connection, claim))

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Housekeeping.inspect`. A damaged record raises UnreadableError."""
        return await self._run(lambda verbs, connection: verbs.inspect(connection, record))

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        return self._run_sync(lambda verbs, connection: verbs.inspect(connection, record))

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Housekeeping.unresolved`."""
        return await self._run(lambda verbs, connection: verbs.unresolved(connection, limit))

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`~idempotency.stores.base.Housekeeping.resolve`."""
        return await self._run(lambda verbs, connection: verbs.resolve(connection, record, outcome, result, ttl))

    async def forget(self, record: bytes, /) -> bool:
        """Forget a record, so that its operation runs again; False when there is none, or it is being run."""
        return await self._run(lambda verbs, connection: verbs.forget(connection, record))

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        return self._run_sync(lambda verbs, connection: verbs.forget(connection, record))

    async def purge(self, batch: int = 1000) -> int:
        """See :meth:`~idempotency.stores.base.Housekeeping.purge`."""
        return await self._run(lambda verbs, connection: verbs.purge(connection, batch))

    async def check(self) -> None:
        """Check that the server answers and the table has every column; else raise StoreError with what to do."""
        await self._run(lambda verbs, connection: verbs.check(connection))

    async def create_schema(self) -> None:
        """Create the table and its index where they are missing; safe in any number of processes at once."""
        await self._run(self._create, transaction=True)

    def create_schema_sync(self) -> None:
        """See :meth:`create_schema`."""
        self._run_sync(self._create, transaction=True)

    async def find(self, start: str = "", *, key: str | None = None, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Searching.find`; with ``key`` alone, it reads the whole table."""
        return await inspect_all(self._ids(id_digits(start), key), self.inspect, key, limit)

    async def _ids(self, start: str, key: str | None) -> AsyncIterator[bytes]:
        for record in await self._run(lambda _, connection: find_ids(connection, self._table, start, key)):
            yield record

    async def examine(self) -> list[Finding]:
        """See :meth:`~idempotency.stores.base.Examining.examine`."""
        healthy = "reachable, and the table has every column"
        return await check_and_examine(
            self.check, healthy, lambda: self._run(lambda _, connection: examine(connection, self._table))
        )

    @property
    def schema(self) -> str:
        """Return what :meth:`create_schema` creates."""
        return f"table {located(self._table, self._schema).fullname}"

    def _create(self, _: Verbs, connection: Connection) -> None:
        create_schema(connection, self._table)

    async def aclose(self) -> None:
        """Dispose of the engine this store opened on the running loop, and stop listening."""
        loop = self._per_loop.pop(asyncio.get_running_loop(), None)
        if loop is not None:
            await loop.aclose()
        await self.abandoned.wait()

    def close(self) -> None:
        """Dispose of the synchronous engine this store opened."""
        threads, self._threads = self._threads, None
        if threads is not None and isinstance(self._source, URL):
            threads.database.engine.dispose()

    def forked(self) -> None:
        """Leave the connections of the blocking verbs to the parent process; called in each child that is forked.

        The child begins with all slots free: the parent's other threads, which do not exist here, cannot free theirs.
        """
        self._opening = threading.Lock()
        threads, self._threads = self._threads, None
        engine = threads.database.engine if threads is not None else self._source
        if isinstance(engine, Engine):
            engine.dispose(close=False)

    async def _run(self, work: Work[T], transaction: bool = False) -> T:
        loop = await self._this_loop()
        return await loop.run(work, transaction)

    def _run_sync(self, work: Work[T], transaction: bool = False) -> T:
        threads = self._threads or self._open_threads()
        return threads.run(work, self._timeout, self.watchdog, transaction)

    async def _this_loop(self) -> PerLoop:
        loop = asyncio.get_running_loop()
        found = self._per_loop.get(loop)
        if found is None:
            for other in list(self._per_loop):
                if other.is_closed():
                    self._per_loop.pop(other, None)
            found = self._per_loop[loop] = PerLoop(self._source, self._settings, self.abandoned)
            await found.open()
        return found

    def _open_threads(self) -> Threads:
        with self._opening:
            if self._threads is None:
                self._threads = open_threads(self._source, self._settings)
            return self._threads
