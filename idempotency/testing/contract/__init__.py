"""The contract of a store, as tests: subclass it, give one fixture, and every rule of ``stores.base`` is checked.

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            store = MyStore(...)
            yield store
            await store.aclose()

The tests are coroutines: use pytest-asyncio in its auto mode, or mark the subclass. Records are made in the scopes
``contract`` and ``other contract`` under keys that do not repeat, so a store that is shared and not empty will do.
Leases are real and short: a run takes some seconds.
"""

from __future__ import annotations

from idempotency.testing.contract._claiming import ClaimContract
from idempotency.testing.contract._expiry import ExpiryContract
from idempotency.testing.contract._housekeeping import HousekeepingContract
from idempotency.testing.contract._names import NameContract
from idempotency.testing.contract._races import RaceContract
from idempotency.testing.contract._sync import SyncStoreContract
from idempotency.testing.contract._watch import WatchContract
from idempotency.testing.contract._writing import WriteContract

__all__ = ["StoreContract", "SyncStoreContract"]


class StoreContract(
    ClaimContract,
    WriteContract,
    ExpiryContract,
    RaceContract,
    WatchContract,
    HousekeepingContract,
    NameContract,
):
    """Check a store for asyncio, its housekeeping included.

    Give the fixture ``store``. Three more make it stricter: ``another``, a second instance on the same records (by
    default the same instance); ``make_newer``, which overwrites the format version of a record (by default the tests
    that need it are skipped); and ``naming``, a store that records names (by default ``store``, if it does).
    """
