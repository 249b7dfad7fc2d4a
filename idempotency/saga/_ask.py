"""Ask the journal of any store in an event loop."""

from __future__ import annotations

import asyncio
from typing import TypeVar, cast

from idempotency._sagas.journal import Journaling, Request, SyncJournaling
from idempotency.errors import ConfigurationError
from idempotency.stores.base import OneSided, Store, SyncStore, require, supports

R = TypeVar("R")


class Journal:
    """The journal of a store. One that has only the verbs of threads is asked in a thread.

    ``for_what`` is the subject of the ConfigurationError for a store that keeps no sagas.
    """

    def __init__(self, store: Store | SyncStore, for_what: str) -> None:
        self._store = store
        self._awaited = _is_awaited(store)
        if not self._awaited:
            require(store, SyncJournaling, for_what)

    async def ask(self, request: Request[R]) -> R:
        """Return the answer to a request."""
        if self._awaited:
            return await cast(Journaling, self._store).journal(request)
        return await asyncio.to_thread(cast(SyncJournaling, self._store).journal_sync, request)


def _is_awaited(store: object) -> bool:
    if not supports(store, Journaling):
        return False
    try:
        if supports(store, OneSided):
            store.check_side(asynchronous=True)
    except ConfigurationError:
        return False
    return True
