"""The store on SQL: its verbs, for asyncio and for threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from typing import Literal, Self, TypeVar

from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._durations import DAY, positive
from idempotency._rules import Claim, Record, State
from idempotency._sagas.journal import Request
from idempotency._sql.bounded import Abandoned, Watchdog
from idempotency._sql.commit_guard import install
from idempotency._sql.driver import lock_wait_limit
from idempotency._sql.engines import check_backend, check_side, read_url
from idempotency._sql.pooler import check_pooler, read_pooler
from idempotency._sql.sessions import check_same_database
from idempotency._sql.sqlite import check_in_file
from idempotency._sql.tables import create_tables
from idempotency._synchronization import LocalLock
from idempotency.errors import ConfigurationError
from idempotency.stores._clock_guard import ClockGuard
from idempotency.stores._operating import check_and_examine
from idempotency.stores._sealing import Sealing, findings_in, sealed_result, sealing_of
from idempotency.stores._versions import OLDEST, WITH_NAMES, check_write_version
from idempotency.stores.base import Changed, Entry, Finding
from idempotency.stores.encryption import Encryption
from idempotency.stores.sql._audit import Audit, AuditInSQL
from idempotency.stores.sql._database import Settings, Work
from idempotency.stores.sql._examine import examine, examine_saga_tables
from idempotency.stores.sql._find import ListingInSQL
from idempotency.stores.sql._forks import drop_in_children
from idempotency.stores.sql._in_sessions import InSessions
from idempotency.stores.sql._joined import JoinedVerbs
from idempotency.stores.sql._per_loop import PerLoop, Threads, open_threads
from idempotency.stores.sql._sagas import SagaVerbs
from idempotency.stores.sql._table import DEFAULT_TABLE, audit_table, located, records_table, schema_by
from idempotency.stores.sql._verbs import Verbs

R = TypeVar("R")
T = TypeVar("T")


class SQLStore(InSessions, ListingInSQL, AuditInSQL):
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
    each statement that writes, and set back.
    On PostgreSQL and SQLite, claims and completions of one event loop that come while others are under way are sent
    together, by asyncpg, psycopg or aiosqlite itself. Behind a pooler, and where a listener takes part in each use of
    the engine or its pool, each is sent alone, through SQLAlchemy.
    ``encryption`` is an :class:`~idempotency.stores.encryption.Encryption` of results, scopes and keys, default None.
    ``digest_names``: whether scopes and keys are stored as digests only, default False.

    ``pooler``: whether a pooler in transaction mode, such as PgBouncer, is between the engine and PostgreSQL. Then each
    verb is a transaction, and duplicates that wait poll. None, the default: each connection is asked once. False is for
    a pooler in session mode.
    ``write_version``: 2 to write the names of operations, 1 not to, the default; see :doc:`contracts <contracts>`.

    Before the first claim, the engine's driver is tried: one that changes values, or counts no rows, is refused with
    :class:`~idempotency.errors.ConfigurationError`.
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine,
        *,
        table: str = DEFAULT_TABLE,
        timeout: float = 5.0,
        encryption: Encryption | None = None,
        digest_names: bool = False,
        pooler: bool | None = None,
        write_version: int = OLDEST,
    ) -> None:
        if not isinstance(engine, AsyncEngine | Engine):
            raise ConfigurationError(f"engine must be an AsyncEngine or an Engine, not {type(engine).__name__}")
        check_backend(engine.url)
        self._set_up(engine, pooler, table, timeout, sealing_of(encryption, digest_names), write_version)

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        table: str = DEFAULT_TABLE,
        timeout: float = 5.0,
        encryption: Encryption | None = None,
        digest_names: bool = False,
        pooler: bool | None = None,
        write_version: int = OLDEST,
    ) -> Self:
        """Make a store that opens its engines itself, at the first use, and closes them.

        ``url`` is an SQLAlchemy URL with a driver, such as ``postgresql+asyncpg://``, ``postgresql+psycopg://`` (which
        serves both kinds of verbs), ``mysql+aiomysql://``, ``sqlite+aiosqlite:///file``. SQLite is opened in WAL mode.
        For a pooler such as PgBouncer, give ``pooler=True``, or add ``?pooler=true`` to the URL: then the driver
        prepares no statement that outlives its transaction.
        Raises :class:`~idempotency.errors.ConfigurationError`, naming what to install, when the driver is missing.
        """
        store = cls.__new__(cls)
        sealing = sealing_of(encryption, digest_names)
        store._set_up(*read_pooler(read_url(url), pooler), table, timeout, sealing, write_version)
        return store

    def _set_up(
        self,
        source: AsyncEngine | Engine | URL,
        pooler: bool | None,
        table: str,
        timeout: float,
        sealing: Sealing | None,
        write_version: int,
    ) -> None:
        timeout = positive("timeout", timeout, DAY)
        if not isinstance(table, str) or not table:
            raise ConfigurationError(f"table must be the name of a table, not {table!r}")
        # Now rather than with the first session: SQLAlchemy's listeners may not be added while other threads call them.
        install()
        self._source = source
        check_pooler(self._url, pooler)
        check_in_file(self._url)
        self._table = records_table(MetaData(), table)
        self._timeout = timeout
        self._writes_names = check_write_version(write_version) >= WITH_NAMES
        self._settings = Settings(self._table, timeout, pooler, self._writes_names)
        self._sealing = sealing
        self._per_loop: dict[asyncio.AbstractEventLoop, PerLoop] = {}
        self._awaited_in_threads = False
        self._threads: Threads | None = None
        self._opening = threading.Lock()
        self._joined: JoinedVerbs | None = None
        self._sagas = SagaVerbs(table, lock_wait_limit(timeout))
        self._audit = Audit(audit_table(MetaData(), table), timeout)
        self._clock_guard = ClockGuard()
        self.abandoned = Abandoned()
        self.watchdog = Watchdog(timeout)
        self._local_lock = LocalLock() if self._url.get_backend_name() == "sqlite" else None
        drop_in_children(self)

    def awaited_in_threads(self) -> Self:
        """Return a store on the same engine, a synchronous one, whose awaited verbs run in threads."""
        store = copy(self)
        store._per_loop, store._awaited_in_threads = {}, True
        drop_in_children(store)
        return store

    @property
    def _url(self) -> URL:
        return self._source if isinstance(self._source, URL) else self._source.url

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        loop = await self._this_loop()
        return await loop.together.claim(claim, self._claiming(claim))

    def _claiming(self, claim: Claim) -> Work[Record]:
        return lambda verbs, connection: verbs.claim(connection, claim, self._clock_guard, self._sealing)

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return await self._run(lambda verbs, connection: verbs.renew(connection, claim))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        sealed = sealed_result(self._sealing, claim.id, result)
        loop = await self._this_loop()
        return await loop.together.complete(
            claim, sealed, state, lambda verbs, connection: verbs.complete(connection, claim, sealed, state)
        )

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return await self._run(lambda verbs, connection: verbs.release(connection, claim))

    @property
    def timeout(self) -> float:
        """Return how long a verb may take, in seconds."""
        return self._timeout

    @property
    def writes_names(self) -> bool:
        """Return whether the names of operations are written, where the table has columns for them."""
        return self._writes_names

    @property
    def local_lock(self) -> LocalLock | None:
        """Return the lock that joined transactions take first, where the database has one writer at a time: SQLite.

        The database's own lock is the one that decides. But SQLite waits for it by trying from time to time, and sleeps
        up to 0.1 s in between, in which the lock may be free. This lock wakes the next waiter at once.
        """
        return self._local_lock

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError where this store has an engine for the other kind of verbs."""
        check_side(self._source, asynchronous and not self._awaited_in_threads)

    def check_shared(self, engine: object) -> None:
        """Raise ConfigurationError unless sessions on ``engine`` reach the database that holds the records."""
        check_same_database(self._url, engine)

    @property
    def _schema(self) -> str | None:
        options = {} if isinstance(self._source, URL) else self._source.get_execution_options()
        return schema_by(options, self._table)

    @asynccontextmanager
    async def watch(self, claim: Claim, /) -> AsyncIterator[Changed]:
        """See :meth:`~idempotency.stores.base.Store.watch`. On PostgreSQL by LISTEN, elsewhere by polling."""
        loop = await self._this_loop()
        async with loop.watch(claim.id) as changed:
            yield changed

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        return self._run_sync(self._claiming(claim))

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return self._run_sync(lambda verbs, connection: verbs.renew(connection, claim))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        sealed = sealed_result(self._sealing, claim.id, result)
        return self._run_sync(lambda verbs, connection: verbs.complete(connection, claim, sealed, state))

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return self._run_sync(lambda verbs, connection: verbs.release(connection, claim))

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Housekeeping.inspect`. A damaged record raises UnreadableError."""
        return await self._run(lambda verbs, connection: verbs.inspect(connection, record, self._sealing))

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        return self._run_sync(lambda verbs, connection: verbs.inspect(connection, record, self._sealing))

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`~idempotency.stores.base.Housekeeping.resolve`."""
        sealed = sealed_result(self._sealing, record, result)
        return await self._run(lambda verbs, connection: verbs.resolve(connection, record, outcome, sealed, ttl))

    def resolve_sync(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`resolve`."""
        sealed = sealed_result(self._sealing, record, result)
        return self._run_sync(lambda verbs, connection: verbs.resolve(connection, record, outcome, sealed, ttl))

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
        """Create the table, that of the audit, and their indexes where they are missing; in any number of processes."""
        await self._run(self._create, transaction=True)

    def create_schema_sync(self) -> None:
        """See :meth:`create_schema`."""
        self._run_sync(self._create, transaction=True)

    async def journal(self, request: Request[R], /) -> R:
        """Answer a request about sagas. On SQLite their tables are created at the first use."""
        return await self._run(self._answering(request))

    def journal_sync(self, request: Request[R], /) -> R:
        """See :meth:`journal`."""
        return self._run_sync(self._answering(request))

    def _answering(self, request: Request[R]) -> Work[R]:
        return lambda _, connection: self._sagas.answer(connection, request, self._sealing)

    async def create_saga_schema(self) -> None:
        """Create the tables of sagas and their indexes where they are missing; safe in any number of processes."""
        await self._run(lambda _, connection: self._sagas.create(connection), transaction=True)

    async def has_saga_schema(self) -> bool:
        """Return whether one of the tables of sagas is there."""
        return await self._run(lambda _, connection: self._sagas.exists(connection))

    @property
    def saga_schema(self) -> str:
        """Return what :meth:`create_saga_schema` creates."""
        tables = self._sagas.tables.located(self._schema)
        return f"tables {tables.sagas.fullname} and {tables.entries.fullname}"

    def create_saga_schema_sync(self) -> None:
        """See :meth:`create_saga_schema`."""
        self._run_sync(lambda _, connection: self._sagas.create(connection), transaction=True)

    async def examine(self) -> list[Finding]:
        """See :meth:`~idempotency.stores.base.Examining.examine`."""
        return await check_and_examine(self.check, "reachable, and the table has every column", self._examine)

    async def _examine(self) -> list[Finding]:
        of_server = await self._run(lambda _, connection: examine(connection, self._table))
        of_sagas = await self._run(lambda _, connection: examine_saga_tables(connection, self._sagas.tables))
        return [*of_server, *of_sagas, *await findings_in(self._sealing, self.find)]

    @property
    def schema(self) -> str:
        """Return what :meth:`create_schema` creates."""
        names = (located(each, self._schema).fullname for each in (self._table, self._audit.table))
        return f"tables {' and '.join(names)}"

    def _create(self, _: Verbs, connection: Connection) -> None:
        create_tables(connection, self._table, self._audit.table)

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
            found = self._per_loop[loop] = PerLoop(
                self._source,
                self._settings,
                self.abandoned,
                self._clock_guard,
                self._sealing,
                self._awaited_in_threads,
            )
            await found.open()
        return found

    def _open_threads(self) -> Threads:
        with self._opening:
            if self._threads is None:
                self._threads = open_threads(self._source, self._settings)
            return self._threads
