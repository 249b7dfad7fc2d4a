"""The contract of a journal of sagas, as tests: subclass it, give one fixture, and every rule of it is checked.

    class TestMyJournal(JournalContract):
        @pytest.fixture
        async def store(self):
            store = MyStore(...)
            yield store
            await store.aclose()

The tests are coroutines: use pytest-asyncio in its auto mode, or mark the subclass. Each test has sagas of its own
name, so a store that is shared and not empty will do. Leases are real and short: a run takes some seconds.
"""

from __future__ import annotations

import asyncio
from typing import Any

from idempotency._sagas.journal import Request
from idempotency.testing.journal._amending import AmendContract
from idempotency.testing.journal._journal import R
from idempotency.testing.journal._leaving import LeaveContract
from idempotency.testing.journal._opening import OpenContract
from idempotency.testing.journal._reading import ReadContract
from idempotency.testing.journal._signalling import SignalContract
from idempotency.testing.journal._writing import WriteContract

__all__ = ["JournalContract", "SyncJournalContract"]


class JournalContract(OpenContract, WriteContract, LeaveContract, SignalContract, AmendContract, ReadContract):
    """Check ``journal`` of a store.

    Give the fixture ``store``. Three more make it stricter, or faster: ``another``, a second instance on the same sagas
    (by default the same instance); ``make_newer``, which overwrites the format version of a saga (by default the tests
    that need it are skipped); ``advance``, which moves the clock of the store by some seconds (by default it waits).
    """


class SyncJournalContract(JournalContract):
    """Check ``journal_sync`` of a store, in threads. The fixtures are those of :class:`JournalContract`."""

    @staticmethod
    def asked_of(store: Any) -> Any:
        """Return what answers a request."""

        async def ask(request: Request[R], /) -> R:
            answer: R = await asyncio.to_thread(store.journal_sync, request)
            return answer

        return ask
