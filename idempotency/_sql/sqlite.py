"""What SQLite needs: a transaction that begins early enough, and connections that are closed in their own thread."""

from __future__ import annotations

import gc
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine, Pool, event

from idempotency._durations import milliseconds
from idempotency._sql.send import pooled, send, setting
from idempotency.errors import ConfigurationError

T = TypeVar("T")

_WATCHED: WeakSet[Pool] = WeakSet()

BUSY_TIMEOUT = "PRAGMA busy_timeout"

# Statements that store nothing. They begin no transaction: what was read in a snapshot could not be written to once
# another connection has committed, even if that was the renewal of the operation's own lease.
_STORES_NOTHING = re.compile(
    r"\s*(?:SELECT|VALUES|EXPLAIN|ATTACH|DETACH|BEGIN"
    r"|WITH(?!.*\b(?:INSERT|UPDATE|DELETE|REPLACE)\b)"
    r"|PRAGMA(?!\s+(?:\w+\.)?(?:user_version|application_id)\s*[=(]))\b",
    re.IGNORECASE | re.DOTALL,
)
# Statements for which the driver itself begins a transaction.
_STORES_ROWS = re.compile(r"\s*(?:INSERT|UPDATE|DELETE|REPLACE)\b", re.IGNORECASE)


def check_in_file(url: URL) -> None:
    """Raise ConfigurationError for an SQLite database in memory.

    All would share one connection, so that a verb's commit would commit a handler's open transaction; or each
    connection would have a database of its own.
    """
    in_memory = url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"
    if url.get_backend_name() == "sqlite" and in_memory:
        raise ConfigurationError("SQLite in memory cannot hold records: name a file, or use memory://")


def begin(connection: Connection, sql: str = "") -> None:
    """Begin a transaction, unless one is open, ``sql`` needs none, or the driver begins it for ``sql``."""
    driver: Any = pooled(connection).driver_connection
    level = driver.isolation_level
    if driver.in_transaction or _STORES_NOTHING.match(sql) or (level is not None and _STORES_ROWS.match(sql)):
        return
    # This is what the driver would send, in the mode that the user has chosen; by default it takes no lock.
    send(connection, f"BEGIN {level or ''}", fetch=False)


def begin_to_write(connection: Connection) -> None:
    """Begin anew with the lock for writing, where the driver does not begin by itself, or a snapshot may be open."""
    driver: Any = pooled(connection).driver_connection
    if driver.in_transaction:
        send(connection, "ROLLBACK", fetch=False)
    elif driver.isolation_level is not None:
        return
    send(connection, "BEGIN IMMEDIATE", fetch=False)


def waiting(connection: Connection, seconds: float, before: int) -> AbstractContextManager[None]:
    """Let statements wait for the lock for up to ``seconds``, and afterwards for ``before`` milliseconds again."""
    return setting(connection, BUSY_TIMEOUT, milliseconds(seconds), before)


def busy_timeout_of(connection: Connection) -> int:
    """Return for how many milliseconds statements wait for the lock."""
    row = send(connection, BUSY_TIMEOUT).row
    return row[0] if row else 0


@contextmanager
def lowered_lock_wait(connection: Connection, lock_wait: float) -> Iterator[None]:
    """Let statements wait for the lock for up to ``lock_wait`` seconds, and afterwards as long as the user has set.

    To set it, and to set it back, each take one switch to the thread of aiosqlite. It is not changed for an engine that
    waits less anyway.
    """
    limit = milliseconds(lock_wait)
    before = in_its_thread(connection, partial(_lower, limit=limit))
    try:
        yield
    finally:
        if before > limit and not connection.invalidated:
            in_its_thread(connection, partial(_lower, limit=before, raises=True))


def _lower(opened: sqlite3.Connection, limit: int, raises: bool = False) -> int:
    before: int = opened.execute(BUSY_TIMEOUT).fetchone()[0]
    if before > limit or raises:
        opened.execute(f"{BUSY_TIMEOUT} = {limit:d}").fetchone()
    return before


def in_its_thread(connection: Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Call ``work`` with the driver's connection, for aiosqlite by one switch to its thread. Raises its errors."""
    adapted: Any = pooled(connection).dbapi_connection
    if connection.dialect.driver != "aiosqlite":
        return work(adapted)
    done: T = adapted.run_async(lambda driver: driver._execute(work, driver._conn))
    return done


@contextmanager
def writing(opened: sqlite3.Connection, lock_wait: float, is_cut_off: Callable[[], bool]) -> Iterator[None]:
    """Make the block one transaction, which waits for the lock for up to ``lock_wait`` seconds.

    It must run in the connection's own thread. ``is_cut_off`` is asked before the commit, because an interrupt ends
    only a statement that is under way. Raises the driver's errors.
    """
    limit = milliseconds(lock_wait)
    before = _lower(opened, limit)
    try:
        opened.execute("BEGIN IMMEDIATE")
        yield
        if is_cut_off():
            raise sqlite3.OperationalError("interrupted")
        opened.execute("COMMIT")
    finally:
        if opened.in_transaction:
            opened.execute("ROLLBACK")
        if before > limit:
            _lower(opened, before, raises=True)


def close_what_is_invalidated(engine: Engine) -> None:
    """Roll back and close each connection that ``engine`` invalidates, at once and in the connection's own thread.

    SQLAlchemy would close it only after the abandoned statement. That may wait for the lock, get it, and hold it for as
    long as something refers to its cursor; and aiosqlite never ends a close that is interrupted.
    """
    if engine.pool not in _WATCHED:
        _WATCHED.add(engine.pool)
        event.listen(engine.pool, "invalidate", _close_invalidated)
        if engine.dialect.driver == "aiosqlite":
            event.listen(engine.pool, "checkin", drop_closed)


def cut_off(driver: Any) -> None:
    """Interrupt what the aiosqlite connection ``driver`` executes, and let its thread roll it back and close it."""
    opened, driver._connection = driver._connection, None
    if opened is None:
        return
    driver._running = False
    driver._execute = _execute_nothing
    opened.interrupt()
    # Not by its methods: they wait for an answer, which is not needed here.
    driver._tx.put_nowait((None, partial(_end, opened)))


def is_cut_off(driver: Any) -> bool:
    """Return whether the aiosqlite connection ``driver`` was cut off."""
    return bool(driver._connection is None)


async def _execute_nothing(function: Callable[..., object], *_args: object, **_options: object) -> None:
    # Only a close succeeds: SQLAlchemy closes its cursor after a failure, and would log that it cannot.
    if getattr(function, "__name__", "") != "close":
        raise sqlite3.ProgrammingError("the connection was closed: its statement was abandoned")


def _end(opened: sqlite3.Connection) -> object:
    from aiosqlite.core import _STOP_RUNNING_SENTINEL

    _roll_back_and_close(opened)
    return _STOP_RUNNING_SENTINEL


def _roll_back_and_close(opened: sqlite3.Connection) -> None:
    # The rollback comes first: a closed connection holds its lock until its last cursor is gone.
    with suppress(sqlite3.Error):
        try:
            opened.rollback()
        except sqlite3.OperationalError:
            # The interrupt lasts until no statement is under way, and one with rows not yet fetched is under way.
            for cursor in gc.get_referrers(opened):
                if isinstance(cursor, sqlite3.Cursor):
                    cursor.close()
            opened.rollback()
    with suppress(sqlite3.Error):
        opened.close()


def _close_invalidated(adapted: Any, _record: object, _error: object) -> None:
    driver = getattr(adapted, "driver_connection", adapted)
    if isinstance(driver, sqlite3.Connection):
        with suppress(sqlite3.Error):
            driver.interrupt()
        _roll_back_and_close(driver)
    else:
        cut_off(driver)


def drop_closed(adapted: Any, record: Any) -> None:
    """Have the pool drop a connection that was cut off: a listener for its return to the pool."""
    # It was cut off while it executed nothing, so SQLAlchemy has seen no error of it.
    if adapted is not None and is_cut_off(adapted.driver_connection):
        record.invalidate()
