"""The contract, on every store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from idempotency.testing import StoreContract, SyncStoreContract
from tests.kit.newer import make_newer
from tests.kit.targets import SYNC_KINDS, Target


class TestContract(StoreContract):
    """Each store keeps what ``stores.base`` promises."""

    @pytest.fixture
    async def another(self, store: Any, open_another: Callable[[], Awaitable[Any]]) -> Any:
        return await open_another()

    @pytest.fixture
    async def naming(self, target: Target) -> AsyncIterator[Any]:
        async with target.opened(write_version=2) as store:
            yield store

    @pytest.fixture
    def make_newer(self, target: Target) -> Callable[[bytes], Awaitable[None]]:
        return lambda record: make_newer(target, record)


@pytest.mark.stores(*SYNC_KINDS)
class TestSyncContract(SyncStoreContract):
    """So do the blocking verbs."""

    @pytest.fixture
    def store(self, sync_store: Any) -> Any:
        return sync_store
