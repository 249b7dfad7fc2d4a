"""The choice of how calls are held: under a lease, or joined with the transaction of a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from idempotency._engine.calls import Calls
from idempotency._engine.leased import Leased
from idempotency._engine.leased_sync import SyncLeased
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Store, SyncStore, check_store


def runner_of(asynchronous: bool, store: object, calls: Calls, session: Any, lock_timeout: float) -> Callable[..., Any]:
    """Choose how the calls are held: under a lease, or joined with the transaction of a session."""
    if session is None:
        if asynchronous:
            return Leased(check_store(store, Store), calls).run
        return SyncLeased(check_store(store, SyncStore), calls).run
    try:
        from idempotency._engine.joined import Joined
        from idempotency._engine.joined_sync import SyncJoined
    except ImportError as error:
        raise ConfigurationError("session= needs SQLAlchemy: pip install 'asgi-idempotency[sql]'") from error
    joined: type[Joined | SyncJoined] = Joined if asynchronous else SyncJoined
    return joined(store, calls, session, lock_timeout).run
