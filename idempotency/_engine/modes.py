"""The choice of how an operation holds its key: leased, joined or transactional."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from idempotency._engine.calls import Calls
from idempotency._engine.lease import NewLease, plain_leases
from idempotency._engine.lease_sync import NewSyncLease, plain_leases_sync
from idempotency._engine.leased import Leased
from idempotency._engine.leased_sync import SyncLeased
from idempotency._engine.runner import Runner
from idempotency._engine.runner_sync import SyncRunner
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Store, SyncStore, check_store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

_NEEDS_SQLALCHEMY = "session= needs SQLAlchemy: pip install 'asgi-idempotency[sql]'"


def runner_of(asynchronous: bool, store: object, calls: Calls, session: Any, lock_timeout: float) -> Callable[..., Any]:
    """Choose how functions and consumers hold their keys: leased, or joined where there is a ``session``."""
    if session is None:
        if asynchronous:
            return Leased(check_store(store, Store), calls).run
        return SyncLeased(check_store(store, SyncStore), calls).run
    try:
        from idempotency._engine.joined import Joined
        from idempotency._engine.joined_sync import SyncJoined
    except ImportError as error:
        raise ConfigurationError(_NEEDS_SQLALCHEMY) from error
    joined: type[Joined | SyncJoined] = Joined if asynchronous else SyncJoined
    return joined(store, calls, session, lock_timeout).run


def awaited_store(store: object, session: object) -> Store:
    """Return the store whose verbs requests await: with a synchronous ``session``, they run in threads."""
    if session is not None:
        try:
            from idempotency._sql.sessions import is_synchronous
            from idempotency.stores.sql import SQLStore
        except ImportError as error:
            raise ConfigurationError(_NEEDS_SQLALCHEMY) from error
        if is_synchronous(session) and isinstance(store, SQLStore):
            try:
                store.check_side(asynchronous=False)
            except ConfigurationError as error:
                raise ConfigurationError(
                    "session= is synchronous, and the store is not. Give session= an async_sessionmaker; or keep it,"
                    f" and change the store. {error}"
                ) from error
            return store.awaited_in_threads()
    return check_store(store, Store)


def leases_of(runner: Runner, session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None) -> NewLease:
    """Choose how requests hold their keys: leased, or transactional where there is a ``session``."""
    if session is None:
        return plain_leases(runner)
    try:
        from idempotency._engine.transactional import transactional_leases
    except ImportError as error:
        raise ConfigurationError(_NEEDS_SQLALCHEMY) from error
    return transactional_leases(runner, session)


def leases_of_sync(runner: SyncRunner, session: sessionmaker[Session] | None) -> NewSyncLease:
    """See :func:`leases_of`."""
    if session is None:
        return plain_leases_sync(runner)
    try:
        from idempotency._engine.transactional_sync import transactional_leases_sync
    except ImportError as error:
        raise ConfigurationError(_NEEDS_SQLALCHEMY) from error
    return transactional_leases_sync(runner, session)
